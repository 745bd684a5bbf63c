"""A run to its end: the loop with a limit, the certificate of the answer, and several starts."""

from __future__ import annotations

import itertools
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

from bilevel._certify import certify
from bilevel._errors import BilevelWarning, check_count
from bilevel._iterate import check_batches, check_start, iterate
from bilevel._oracle import Oracle
from bilevel._problem import BilevelProblem
from bilevel._solution import Certificate, Solution, State, Status
from bilevel._starts import best_of, starting_points
from bilevel._types import Tree
from bilevel.solvers import Solver

_WITHOUT_ANSWER = (
    Status.NONFINITE,
    Status.LOWER_UNBOUNDED,
    Status.UPPER_UNBOUNDED,
    Status.INFEASIBLE,
)


def solve(
    problem: BilevelProblem,
    solver: Solver,
    x0: Tree,
    y0: Tree,
    batches: Iterable[Any] | None = None,
    *,
    max_steps: int,
    callback: Callable[[State], object] | None = None,
    throw: bool = True,
    starts: int | Iterable[tuple[Tree, Tree]] | None = None,
) -> Solution:
    """Run `solver` until it converges, the steps or batches run out, or the callback stops it.

    Args:
        problem: The problem.
        solver: The solver.
        x0: Where the upper variable starts; not modified.
        y0: Where the lower variable starts; not modified.
        batches: The data of each step; see `iterate`.
        max_steps: Upper steps at most, >= 1.
        callback: Called with each state, the last one too; a true answer stops the run, and no further start is
            tried.
        throw: Raise the error of a failed run instead of returning its solution. Reaching
            `max_steps` is no failure.
        starts: Run from several starts and keep the best certified answer: the number of starts, x0 and y0 and
            seeded perturbations of them, or further pairs (x0, y0) to be tried after the given one. For the
            full batch only. A start that fails does not end the others. ASBLO, whose path begins where F is smallest
            over x and y together, stays near the further starts: see `ASBLO.first_stage`.

    Returns:
        The solution, with a certificate where no batches were given. Of several starts, that of smallest F among
        the answers that did not fail and whose certificates trust them, else among those that did not fail;
        its evaluations and seconds are those of all starts.

    Warns:
        BilevelWarning: The solver says CONVERGED and the certificate found something wrong, or it found a deeper
            basin of the lower problem than that of y.

    Raises:
        TypeError: A parameter is of the wrong kind.
        ValueError: `max_steps` or `starts` is below 1, `starts` is empty, or there are `starts` and batches.
        BilevelError: The run failed and `throw` is true; the message says how, and at which step.

    Example:
        >>> import torch, bilevel as bl
        >>> problem = bl.BilevelProblem(
        ...     upper=lambda x, y, data: ((y - 1.0) ** 2).sum() + 0.1 * (x**2).sum(),
        ...     lower=lambda x, y, data: ((y - 2.0 * x) ** 2).sum(),
        ... )
        >>> solution = bl.solve(
        ...     problem, bl.ASBLO(), torch.zeros(1).double(), torch.zeros(1).double(), max_steps=500
        ... )
        >>> solution.status.name, round(solution.x.item(), 4)  # 2 / 4.1
        ('CONVERGED', 0.4878)
    """
    check_count("solve", "max_steps", max_steps, "Raise it, e.g. to 500.")
    if callback is not None and not callable(callback):
        raise TypeError(
            f"`solve(callback=...)` must be callable. Got {type(callback).__name__}. "
            "Pass a function of the state."
        )
    check_batches("solve", batches)
    if starts is not None:
        check_start(x0, y0, None)

        def run(number: int, x0: Tree, y0: Tree, callback: Callable[[State], object]) -> Solution:
            method = solver.nearby() if number else solver
            return solve(
                problem, method, x0, y0, max_steps=max_steps, callback=callback, throw=False
            )

        pairs = starting_points(x0, y0, starts, batches)
        return best_of(pairs, run, type(solver).__name__, callback, throw)
    data: list[Any] = [None]
    watched = None if batches is None else _watch(batches, data)
    started = time.perf_counter()
    states = iterate(problem, solver, x0, y0, watched)
    state = first = next(states)
    for state in itertools.chain([first], states):
        asked = callback is not None and callback(state)
        if state.status is not Status.RUNNING:
            break
        if asked:
            state = replace(state, status=Status.STOPPED)
            break
        if state.step >= max_steps:
            state = replace(state, status=Status.MAX_STEPS)
            break
    if state.status is Status.RUNNING:
        state = replace(state, status=Status.MAX_STEPS)
    if throw and state.status.is_failure:
        raise state.status.error(
            f"{type(solver).__name__} stopped at step {state.step}: {state.message}"
        )
    oracle = Oracle(problem, data[0])
    upper, lower = float(oracle.upper(state.x, state.y)), float(oracle.lower(state.x, state.y))
    seconds = time.perf_counter() - started
    certificate = None
    if batches is None and state.status not in _WITHOUT_ANSWER:
        certificate = certify(problem, state.x, state.y, pessimistic=solver.pessimistic)
        if state.status is Status.CONVERGED or certificate.deeper_basin > 0.0:
            state = _disagreement(state, certificate)
    return Solution(
        x=state.x,
        y=state.y,
        status=state.status,
        upper=upper,
        lower=lower,
        steps=state.step,
        evaluations=state.evaluations + oracle.evaluations,
        seconds=seconds,
        certificate=certificate,
        state=state,
        message=state.message,
        recoveries=state.recoveries,
    )


def _disagreement(state: State, certificate: Certificate) -> State:
    """The state, its message with what keeps the certificate from trust; warns where something is wrong."""
    if certificate.is_trusted:
        return state
    message = f"the certificate: {certificate.verdict}"
    if certificate.problems:
        message = f"the certificate disagrees: {'; '.join(certificate.problems)}"
        warnings.warn(message, BilevelWarning, stacklevel=3)
    return replace(state, message="; ".join(filter(None, (state.message, message))))


def _watch(batches: Iterable[Any], last: list[Any]) -> Iterator[Any]:
    """The batches, the one in use kept in `last[0]`."""
    for data in batches:
        last[0] = data
        yield data
