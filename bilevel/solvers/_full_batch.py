"""ASBLO on the full batch: the path, and where that is not the whole answer, the KKT form.

The path is the sequence of `_sequential`, with barriers in the place of constraints: from the minimum of F it
follows the lower solutions into the basin that F prefers. With constraints, where y turns out to lie in the wrong
basin of f, or where f is too flat for the path to end, the KKT form of the problem is solved from the end of the
path, from the user's start and from points around both, and the best answer that holds is kept.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from bilevel import _tree
from bilevel._oracle import Oracle
from bilevel._problem import BilevelProblem, projected_by, ravel
from bilevel._solution import State, Status
from bilevel._types import Tree
from bilevel.estimators._basins import Basins, explore
from bilevel.estimators._screen import low_points
from bilevel.solvers import _sequential, _walls
from bilevel.solvers._kkt_form import KKTForm, Point
from bilevel.solvers._sequential import Sequence

_STAGES = 4  # of the path, where constraints make the KKT form follow anyway
_PATH_GRADIENTS = 3000  # after which the path is left for the same reason
_MANY_GRADIENTS = 30_000  # after which it is left without constraints: a kink of F or f holds it up
_VALUES = 30_000  # evaluations of f after which no other start is tried
_FAR = (1.0, 1e-2, 1e-4, 1e-6, 1e-9)  # relaxations t, where y may leave the start for a better F
_NEAR = (1e-3, 1e-6, 1e-9)  # and where it stays with the piece of the lower solutions that it is on
_NEAREST = (1e-6, 1e-9)
#: The random starts: distance in units of x and y, whether y is solved for, relaxations.
_STARTS = (
    (0.3, True, _NEAR),
    (1.0, True, _NEAR),
    (1.0, False, _NEAREST),
    (1.0, True, _NEAR),
    (1.0, False, _NEAR),
    (3.0, True, _NEAR),
    (3.0, False, _NEAREST),
    (3.0, False, _NEAR),
)
_LAST = len(_STARTS) + 2  # the number of the last start, after the end of the path, x0 and these
_AROUND = (0.3, 1.0, 1.0, 3.0)  # distances of the starts of the search for a better lower solution
_ROUNDS = 6  # cuts at most from one start
_CUTS = 6  # kept at most, the newest
_ENDED_WITH_AN_ANSWER = (Status.CONVERGED, Status.LOWER_UNSOLVED, Status.STALLED)
_UNBOUNDED = 1e8  # growth of |x|, or of F over |x|^2, at which a minimum is not believed to exist
_POLISH = 1e-2  # of the size of y: how far the solution of the last stage may be from the lower one
_APART = 1e-3  # of the size of y: how far another basin is
_TIE = 1e-9  # in units of f: by how much the minimum there may be lower
_VIOLATION, _GAP = 1e-7, 1e-7  # of an answer that holds, in units of the constraints and of f


class Answer(NamedTuple):
    """A point with what decides whether it is one.

    Attributes:
        x: Shape (m,).
        y: Shape (n,).
        upper: F there.
        lower: f there.
        gap: Value gap beyond the rounding error of f, in units of f.
        violation: Of the constraints, in their units.
        is_overtaken: Whether another basin of f is the lower one, by more than SLSQP leaves a cut violated.
    """

    x: Tensor
    y: Tensor
    upper: float
    lower: float
    gap: float
    violation: float
    is_overtaken: bool

    @property
    def holds(self) -> bool:
        """Whether y is a lower solution and the constraints hold."""
        return self.violation <= _VIOLATION and self.gap <= _GAP and not self.is_overtaken

    def is_better_than(self, other: Answer | None) -> bool:
        """Whether this one holds and has the smaller F, or is nearer to holding."""
        if other is None or self.holds != other.holds:
            return other is None or self.holds
        if self.holds:
            return self.upper < other.upper
        return max(self.violation, self.gap) < max(other.violation, other.gap)


def init(sequence: Sequence, problem: BilevelProblem, x0: Tree, y0: Tree) -> State:
    """Measure the units, and stand at the start of the path."""
    flat, (x, y), unravel_x, unravel_y = ravel(problem, x0, y0)
    x = projected_by(flat.domain, x)  # units measured outside would be those of another problem
    oracle = Oracle(flat)
    units = _walls.measure(oracle, x, y)
    state = _sequential.init(sequence, _walls.walled(flat, units, 0), x, y)
    memory = {
        "path": dict(state.memory),
        "units": [units.upper, units.lower, dict(units.constraints)],
        "start": [x, y],
    }
    state = replace(state, memory=memory, evaluations=state.evaluations + oracle.evaluations)
    for name, unit in units.constraints.items():
        if not _tree.is_finite(unit):
            message = f"`{name}` is not finite at x0 and y0"
            return replace(state, x=x0, y=y0, status=Status.NONFINITE, message=message)
    if units.constraints and state.status in (Status.LOWER_UNBOUNDED, Status.NONFINITE):
        # the barriers are finite outside the constraints, where f may be unbounded or undefined
        state = _with_starts(sequence, flat, replace(state, x=x, y=y), units)
    return replace(state, x=unravel_x(state.x), y=unravel_y(state.y))


def step(sequence: Sequence, problem: BilevelProblem, state: State) -> State:
    """One step along the path, or one start of the KKT form."""
    flat, (x, y), unravel_x, unravel_y = ravel(problem, state.x, state.y)
    units = _walls.Units(*state.memory["units"])
    state = replace(state, x=x, y=y, step=state.step + 1)
    if "next" in state.memory:
        state = _from_a_start(flat, state, KKTForm(flat, units))
    else:
        state = _along_the_path(sequence, flat, state, units)
    return replace(state, x=unravel_x(state.x), y=unravel_y(state.y))


def _along_the_path(
    sequence: Sequence, flat: BilevelProblem, state: State, units: _walls.Units
) -> State:
    path: Mapping[str, Any] = state.memory["path"]
    moved = _sequential.step(
        sequence,
        _walls.walled(flat, units, path["stage"]),
        replace(state, memory=path, step=state.step - 1),
    )
    ended = moved.status is not Status.RUNNING
    gradients = moved.evaluations.gradients
    late = moved.memory["stage"] >= _STAGES or gradients > _PATH_GRADIENTS
    state = replace(moved, memory={**state.memory, "path": dict(moved.memory)})
    if units.constraints:
        return _with_starts(sequence, flat, state, units) if late or ended else state
    if not ended and gradients > _MANY_GRADIENTS:
        return _with_starts(sequence, flat, state, units)
    if moved.status in _ENDED_WITH_AN_ANSWER:
        oracle = Oracle(flat)
        basins = explore(oracle, moved.x, moved.y, sequence.minimizer, seed=2)
        is_answer = not (basins.lowest < basins.nearest or moved.status.is_failure)
        if is_answer:
            state = _on_the_lower_solution(oracle, state, basins)
        state = replace(state, evaluations=state.evaluations + oracle.evaluations)
        return state if is_answer else _with_starts(sequence, flat, state, units)
    return state


def _on_the_lower_solution(oracle: Oracle, state: State, basins: Basins) -> State:
    """The state with y moved over what the slack of the last stage left it short of the lower solution."""
    y = basins.nearest_y
    if _tree.length(y - state.y) > _POLISH * _sequential.extent(y):
        return state
    upper, lower = float(oracle.upper(state.x, y)), basins.nearest
    if not math.isfinite(upper):
        return state
    metrics = {**state.metrics, "upper": upper, "lower": lower, "value_gap": 0.0}
    return replace(state, y=y, metrics=metrics)


def _with_starts(
    sequence: Sequence, flat: BilevelProblem, state: State, units: _walls.Units
) -> State:
    """The state from which the KKT form is solved, if it can be and was not yet; else the verdict on the path."""
    form = KKTForm(flat, units)
    can_follow = not sequence.pessimistic and form.is_small(state.x, state.y)
    if can_follow and "answer" not in state.memory:
        good = _tree.is_finite(state.x) and _tree.is_finite(state.y)
        more = {
            "next": 0,
            "end": [state.x, state.y] if good else state.memory["start"],
            "cuts": [],
            "values": 0,
            "verdict": [state.status.name, state.message],
        }
        return replace(state, status=Status.RUNNING, message="", memory={**state.memory, **more})
    violation = form.violation(state.x, state.y)
    if state.status in _ENDED_WITH_AN_ANSWER and violation > math.sqrt(_VIOLATION):
        message = f"a violation of {violation:.2g} in units of the constraint; {state.message}"
        return replace(state, status=Status.INFEASIBLE, message=message)
    return state


def _from_a_start(flat: BilevelProblem, state: State, form: KKTForm) -> State:
    memory = dict(state.memory)
    number: int = memory["next"]
    cuts: list[Tensor] = list(memory["cuts"])
    best = Answer(*memory["answer"]) if "answer" in memory else None
    oracle = Oracle(flat)
    point, relaxations = _start(flat, form, memory, number)
    for _ in range(_ROUNDS):
        point = form.solve(point, cuts, relaxations)
        answer, lower = _judged(oracle, form, point, cuts)
        if answer.is_better_than(best):
            best = answer
        if lower is None or (best is not None and best.holds and answer.upper >= best.upper):
            break  # a cut can only raise F
        cuts = [*cuts[1 - _CUTS :], lower]
        relaxations = _FAR[1:]
    best = cast(Answer, best)  # of the first round, if of none before
    values = memory["values"] + form.evaluations.lower
    memory |= {"next": number + 1, "cuts": cuts, "answer": list(best), "values": values}
    state = replace(
        state,
        x=best.x,
        y=best.y,
        metrics={
            "upper": best.upper,
            "lower": best.lower,
            "value_gap": best.gap,
            "violation": best.violation,
        },
        memory=memory,
        evaluations=state.evaluations + form.evaluations + oracle.evaluations,
    )
    if number < _LAST and values <= _VALUES:
        return state
    if best.holds and _tree.length(best.x) > _UNBOUNDED * (1.0 + _tree.length(memory["start"][0])):
        status = Status.UPPER_UNBOUNDED
        message = f"{status.value} (F = {best.upper:.2g} at |x| = {_tree.length(best.x):.2g})"
        return replace(state, status=status, message=message)
    if best.holds:
        message = f"the best of {number + 1} starts on the KKT conditions of the lower level"
        return replace(state, status=Status.CONVERGED, message=message)
    del memory["next"]  # no answer: the path goes on, or what it said stands
    x, y = memory["end"]
    name, message = memory["verdict"]
    return replace(state, x=x, y=y, status=Status[name], message=message, memory=memory)


def _start(
    flat: BilevelProblem, form: KKTForm, memory: Mapping[str, Any], number: int
) -> tuple[Point, tuple[float, ...]]:
    """The start of a number, and the relaxations to solve with from there."""
    if number < 2:
        x, y = memory["end" if number == 0 else "start"]
        return form.start(x, y), _NEAR if number == 0 else _FAR
    if number == _LAST:  # the best so far, free to leave its piece of the lower solutions
        return form.start(*memory["answer"][:2]), _FAR[1:]
    distance, is_solved, relaxations = _STARTS[number - 2]
    generator = torch.Generator().manual_seed(number)
    x, y = memory["start" if number % 2 else "end"]
    size = distance * (1.0 + float(torch.cat([x, y]).abs().max()))
    x, y = (v + size * _tree.normal_like(v, generator) for v in (x, y))
    x = projected_by(flat.domain, x)
    if is_solved:
        drop, where = form.drop(x, y, [y])
        y = where if math.isfinite(drop) else y
    return form.start(x, y), relaxations


def _judged(
    oracle: Oracle, form: KKTForm, point: Point, cuts: list[Tensor]
) -> tuple[Answer, Tensor | None]:
    """The answer, and a better lower solution where there is one."""
    x, y = point.x, point.y
    generator = torch.Generator().manual_seed(0)
    size = 1.0 + float(y.abs().max())
    around = [y + distance * size * _tree.normal_like(y, generator) for distance in _AROUND]
    around += low_points(oracle, x, y)
    lower = float(oracle.lower(x, y))
    drop, where = form.drop(x, y, [y, *cuts[-3:], *around])
    # what rounding can explain is no gap; without any feasible lower point, no y is a solution
    known = math.isfinite(lower) and drop > -math.inf
    gap = max(0.0, drop - form.noise(lower, y.dtype)) if known else math.inf
    is_other = _tree.length(where - y) > _APART * size * math.sqrt(y.numel())
    overtaken = is_other and gap > _TIE
    upper, violation = float(oracle.upper(x, y)), form.violation(x, y)
    square = 1.0 + float(x @ x) + float(y @ y)
    if violation > 0.0 and abs(upper) > _UNBOUNDED * form.upper_unit * square:
        # at a pole that stands on the constraint, of which rounding shows the other side
        violation = math.inf
    answer = Answer(x, y, upper, lower, gap, violation, overtaken)
    return answer, where if (overtaken or gap > _GAP) and gap < math.inf else None
