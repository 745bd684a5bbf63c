"""The upper level where y*(x) branches: by the problem linearized in x, y and the multipliers on each branch."""

from __future__ import annotations

import itertools

from torch import Tensor

from bilevel._solution import Status
from bilevel.estimators._gap import rounding
from bilevel.estimators._kkt_system import KKTSystem
from bilevel.estimators._linear_program import LinearProgram
from bilevel.estimators._search import LowerSolver
from bilevel.estimators._stationarity import Stationarity, UpperPoint

_LINEAR_PROGRAM = 400  # largest number of x and y together for the linearized problem
_BRANCHES = 5  # weakly active constraints whose combinations are all tried


def examine_branches(
    at: UpperPoint, solver: LowerSolver, system: KKTSystem, curvature: float | None, weak: Tensor
) -> Stationarity:
    count = int(weak.sum())
    if count:
        why = f"{count} lower constraint(s) are weakly active, so y*(x) has a kink"
    else:
        why = "the lower Hessian is singular or indefinite here"
    if at.sign < 0.0 or at.x.numel() + at.y.numel() > _LINEAR_PROGRAM:
        reason = "for a pessimistic problem" if at.sign < 0.0 else "at this size"
        untested = f"no test by derivatives {reason}: {why}"
        return Stationarity(curvature=curvature, untested=untested)
    assumptions: list[str] = []
    if count > _BRANCHES:
        assumptions.append(
            f"the upper level is stationary on the branches that were not tried: {why}"
        )
    program = LinearProgram(at.oracle.problem.domain, system, at.local.point, at.x, at.units)
    program.upper(at.upper_x, at.upper_y, at.held, at.equal)
    chosen = [i for i in range(weak.numel()) if bool(weak[i])][:_BRANCHES]
    for active in itertools.product((True, False), repeat=len(chosen)):
        branch = dict(zip(chosen, active, strict=True))
        found = program.descend(branch, weak)
        if found is None:
            assumptions.append(
                "the upper level is stationary on a branch of the complementarity conditions that was not "
                f"tested, since SciPy did not solve its linear program ({why})"
            )
            continue
        dx, dy, slope = found
        expected = at.units.step * slope
        if not expected > at.noise():
            continue
        gain = _falls(at, dx, dy)
        if gain >= 0.5 * expected:
            problem = (
                f"(x, y) is not stationary along the lower solutions: F falls by {gain:.3g} over a step of "
                f"{at.units.step:.2g} of the sizes of x and y that keeps y a lower solution ({why})"
            )
            return Stationarity(curvature=curvature, problem=problem)
        assumptions.append(
            f"F cannot be lowered along the lower solutions: the linearized problem says {slope:.2g} per unit, "
            f"but no lower solution there confirms it ({why})"
        )
    if assumptions:
        told = tuple(dict.fromkeys(assumptions))
        return Stationarity(curvature=curvature, assumptions=told, untested=why)
    tested = f"F cannot be lowered to first order along the lower solutions ({why})"
    return Stationarity(curvature=curvature, tested=(tested,))


def _falls(at: UpperPoint, dx: Tensor, dy: Tensor) -> float:
    """How much F falls over a step whose end is feasible, with y solved again from there."""
    domain = at.oracle.problem.domain
    x = at.x + at.units.step * dx
    x = x if domain is None else domain(x)
    solver = at.solver(x)
    start = at.y + at.units.step * dy
    near = solver.solve(start)
    fallback = solver.solve(at.y)
    if near.status is not Status.CONVERGED or fallback.status is not Status.CONVERGED:
        return 0.0
    gap = near.value - fallback.value
    allowed = 1e-9 * abs(float(at.oracle.lower(x, start)) - near.value)
    if gap > allowed + rounding(near.value, x.dtype) or at.is_overtaken(solver, near):
        return 0.0
    if not at.is_feasible(x, near.y):
        return 0.0
    return at.value - float(at.oracle.upper(x, near.y))
