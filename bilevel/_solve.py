"""The one loop: every solver runs in it, and nothing else loops over upper steps."""

from __future__ import annotations

import itertools
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from bilevel import _tree
from bilevel._certify import certify
from bilevel._errors import BilevelWarning, StructureError, check_count, check_kind
from bilevel._oracle import Oracle
from bilevel._problem import Batch, BilevelProblem, violated
from bilevel._solution import Certificate, Solution, State, Status
from bilevel._starts import best_of, starting_points
from bilevel._types import Tree
from bilevel.estimators import check_problem
from bilevel.solvers import Solver

_ONE_BATCH = (Batch, Tensor, str, Mapping)  # iterable, but over their own parts
_WITHOUT_ANSWER = (
    Status.NONFINITE,
    Status.LOWER_UNBOUNDED,
    Status.UPPER_UNBOUNDED,
    Status.INFEASIBLE,
)


def iterate(
    problem: BilevelProblem,
    solver: Solver,
    x0: Tree | None = None,
    y0: Tree | None = None,
    batches: Iterable[Any] | None = None,
    *,
    state: State | None = None,
) -> Iterator[State]:
    """The states of a run, one a step; stop by leaving the loop.

    Args:
        problem: The problem.
        solver: The solver.
        x0: Where the upper variable starts; not modified.
        y0: Where the lower variable starts; not modified.
        batches: The data of each step, a `Batch` or what both objectives get as their third
            argument. Without it the objectives are the same in every step, get None, and the
            solver works in its full-batch mode.
        state: Go on from here instead of from `x0` and `y0`: the steps that follow equal those of a run
            that never stopped, if the batches go on too.

    Yields:
        The state after each step. The last one has another status than RUNNING, unless the batches ran out.

    Raises:
        StructureError: `x0` or `y0` is no tree of floating tensors, or both or neither of the
            start and `state` are given, or the state is of another solver or problem.
        TypeError: `problem`, `solver`, `batches` or `state` is of another kind.
        ObjectiveError: An objective returns no scalar, or x or y is used by no objective.
        ValueError: There are no batches in `batches`.

    Example:
        >>> import torch, bilevel as bl
        >>> problem = bl.BilevelProblem(
        ...     upper=lambda x, y, data: ((y - 1.0) ** 2).sum() + 0.1 * (x**2).sum(),
        ...     lower=lambda x, y, data: ((y - 2.0 * x) ** 2).sum(),
        ... )
        >>> for state in bl.iterate(
        ...     problem, bl.ASBLO(), torch.zeros(1).double(), torch.zeros(1).double()
        ... ):
        ...     if state.step == 3:
        ...         break
        >>> state.step
        3
    """
    check_kind(
        "iterate(problem, ...)", problem, BilevelProblem, "Pass `BilevelProblem(upper, lower)`."
    )
    check_kind(
        "iterate(solver=...)",
        solver,
        Solver,
        "Pass e.g. `ASBLO()`, or `HypergradientDescent(...)` with an estimator.",
    )
    _check_batches("iterate", batches)
    origin = f"{type(solver).__name__} on {'the full batch' if batches is None else 'batches'}"
    _check_start(x0, y0, state)
    stream = itertools.repeat(None) if batches is None else iter(batches)
    if state is None:
        try:
            first = next(stream)
        except StopIteration:
            raise ValueError(
                "`iterate(batches=...)` must hold at least one batch. Got none. "
                "Pass the data of each step, or leave it out for the full-batch mode."
            ) from None
        checked = check_problem(problem, x0, y0, first)
        x0, y0 = _tree.detach(x0), _tree.detach(y0)
        stream = itertools.chain([first], stream)
        state = solver.init(problem, x0, y0, first, full_batch=batches is None)
        state = replace(state, origin=origin, evaluations=state.evaluations + checked)
        if state.status is Status.NONFINITE:
            state = replace(state, message=f"{state.message}; {_blame(problem, x0, y0, first)}")
        return _states(problem, solver, state, stream, is_resumed=False)
    if state.origin != origin:
        raise StructureError(
            "`iterate(state=...)` must go on in the way the state was made. "
            f"Got a state of {state.origin or 'no run'} for {origin}. "
            "Pass the same solver, with or without batches as before, or start anew from x0 and y0."
        )
    return _states(problem, solver, state, stream, is_resumed=True)


def _check_start(x0: Tree | None, y0: Tree | None, state: State | None) -> None:
    """Raises unless there is one thing to start from."""
    given = [name for name, part in (("x0", x0), ("y0", y0)) if part is not None]
    rule = "`iterate` must be given either x0 and y0, or state."
    if state is None and len(given) < 2:
        got = f"{given[0]} alone" if given else "neither"
        raise StructureError(f"{rule} Got {got}. Pass tensors, or trees of them, for x0 and y0.")
    if state is not None:
        mend = (
            "Pass a state that `iterate` yielded, `Solution.state`, or what `load_state` returns."
        )
        check_kind("iterate(state=...)", state, State, mend)
        if given:
            raise StructureError(f"{rule} Got both. Leave out one of them.")


def _check_batches(name: str, batches: Any) -> None:
    """Raises where `batches` is no stream of them: one batch would be iterated over its own parts."""
    kind = type(batches).__name__
    if isinstance(batches, _ONE_BATCH) or not (batches is None or isinstance(batches, Iterable)):
        raise TypeError(
            f"`{name}(batches=...)` must be an iterable of the data of each step. "
            f"Got one {kind}. Pass a list or a generator, e.g. `[batch] * 100`."
        )


def _blame(problem: BilevelProblem, x: Tree, y: Tree, data: Any) -> str:
    """Which of the variables and objectives is not finite at the start."""
    oracle = Oracle(problem, data)
    parts = {"x0": x, "y0": y, "F(x0, y0)": oracle.upper(x, y), "f(x0, y0)": oracle.lower(x, y)}
    spoiled = [name for name, part in parts.items() if not _tree.is_finite(part)]
    return f"not finite: {', '.join(spoiled) or 'a gradient'}"


def _states(
    problem: BilevelProblem,
    solver: Solver,
    state: State,
    stream: Iterator[Any],
    *,
    is_resumed: bool,
) -> Iterator[State]:
    if state.status in (Status.MAX_STEPS, Status.STOPPED):  # the state of a solution goes on
        state = replace(state, status=Status.RUNNING)
    if state.status is not Status.RUNNING:
        yield state
        return
    for data in stream:
        try:
            new = solver.step(problem, state, data)
        except Exception as error:
            if is_resumed:
                _refuse_foreign(problem, state, data, error)
            raise
        if new.status is Status.INFEASIBLE:
            words = violated(problem, new.x, new.y, data)
            found = f"infeasible: {words}" if words else "infeasible"
            new = replace(new, message="; ".join(filter(None, (found, new.message))))
        state, is_resumed = replace(new, origin=state.origin), False
        yield state
        if state.status is not Status.RUNNING:
            return


def _refuse_foreign(problem: BilevelProblem, state: State, data: Any, error: Exception) -> None:
    """Raises where the first step from a given state failed since the objectives do not fit its variables."""
    oracle = Oracle(problem, data)
    try:
        oracle.upper(state.x, state.y)
        oracle.lower(state.x, state.y)
    except (TypeError, LookupError, RuntimeError, AttributeError) as reason:
        raise StructureError(
            "`iterate(state=...)` must hold variables of the given problem. "
            f"Got x {_tree.shapes(state.x)}, y {_tree.shapes(state.y)}, with which its objectives fail "
            f"({type(reason).__name__}: {reason}). Pass the problem of that run, or start anew from x0 and y0."
        ) from error
    error.add_note(
        "While going on from a state, which must come from a run of this problem and solver."
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
    _check_batches("solve", batches)
    if starts is not None:
        _check_start(x0, y0, None)

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
    state: State | None = None
    for state in iterate(problem, solver, x0, y0, watched):
        asked = callback is not None and callback(state)
        if state.status is not Status.RUNNING:
            break
        if asked:
            state = replace(state, status=Status.STOPPED)
            break
        if state.step >= max_steps:
            state = replace(state, status=Status.MAX_STEPS)
            break
    if state is None:
        raise RuntimeError("the solver yielded no state")
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
