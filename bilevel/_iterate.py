"""The one loop: every solver runs in it, and nothing else loops over upper steps."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from bilevel import _tree
from bilevel._errors import StructureError, check_kind
from bilevel._oracle import Oracle
from bilevel._problem import Batch, BilevelProblem, violated
from bilevel._solution import State, Status
from bilevel._types import Tree
from bilevel.estimators import check_problem
from bilevel.solvers import Solver

_ONE_BATCH = (Batch, Tensor, str, Mapping)  # iterable, but over their own parts


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
    check_batches("iterate", batches)
    origin = f"{type(solver).__name__} on {'the full batch' if batches is None else 'batches'}"
    check_start(x0, y0, state)
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
            words = _blame(problem, x0, y0, first) or "not finite: a gradient"
            state = replace(state, message=f"{state.message}; {words}")
        return _states(problem, solver, state, stream, is_resumed=False)
    if state.origin != origin:
        raise StructureError(
            "`iterate(state=...)` must go on in the way the state was made. "
            f"Got a state of {state.origin or 'no run'} for {origin}. "
            "Pass the same solver, with or without batches as before, or start anew from x0 and y0."
        )
    return _states(problem, solver, state, stream, is_resumed=True)


def check_start(x0: Tree | None, y0: Tree | None, state: State | None) -> None:
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


def check_batches(name: str, batches: Any) -> None:
    """Raises where `batches` is no stream of them: one batch would be iterated over its own parts."""
    kind = type(batches).__name__
    if isinstance(batches, _ONE_BATCH) or not (batches is None or isinstance(batches, Iterable)):
        raise TypeError(
            f"`{name}(batches=...)` must be an iterable of the data of each step. "
            f"Got one {kind}. Pass a list or a generator, e.g. `[batch] * 100`."
        )


def _blame(problem: BilevelProblem, x: Tree, y: Tree, data: Any) -> str:
    """Which of the variables and objectives is not finite at the start; empty where all are."""
    oracle = Oracle(problem, data)
    parts = {"x0": x, "y0": y, "F(x0, y0)": oracle.upper(x, y), "f(x0, y0)": oracle.lower(x, y)}
    spoiled = [name for name, part in parts.items() if not _tree.is_finite(part)]
    return f"not finite: {', '.join(spoiled)}" if spoiled else ""


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
        # Many solvers look at the numbers of the start in their first step only.
        if new.status is Status.NONFINITE and state.step == 0:
            words = _blame(problem, state.x, state.y, data)
            new = replace(new, message="; ".join(filter(None, (new.message, words))))
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
