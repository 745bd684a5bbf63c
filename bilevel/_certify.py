"""How good an answer is, by means that no solver uses on its way."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from bilevel import _tree
from bilevel._oracle import Oracle
from bilevel._problem import CONSTRAINTS, BilevelProblem, constrains_lower, ravel
from bilevel._returned import excess
from bilevel._solution import Certificate, Status
from bilevel._types import Tree
from bilevel.estimators._constraints import constraint_values, fit_multipliers, linearize, positive
from bilevel.estimators._gap import rounding
from bilevel.estimators._linear_program import Units
from bilevel.estimators._search import SMALL, Local, LowerSolver, Search, search
from bilevel.estimators._stationarity import Stationarity, UpperPoint
from bilevel.estimators._upper_level import examine

linalg: Any = torch.linalg  # its stubs are untyped
_GAP = 1e-5  # of the change of f within one unit of y
_FAR_GAP = 1e-9  # of the change of f within a distance of 1, where a unit of y is less
_DISTANCE = 5e-3  # from a locally unique lower solution, in units of y
_SMALL_SIZE = 1e-2  # size of y at least for that
_EXPLAINED = 0.25  # of the value gap, by the Hessian there; where it is less, f is flat
_FLAT_DISTANCE = 5e-2  # from a solution where f is flat, in units of y; 1e-2 at least
_VIOLATION = 1e-6  # of the change of a constraint within one unit of x and y
_OTHER = 1e-4  # of the change of F within one unit of y: what another lower solution must gain
_FAR_OTHER = 1e-8  # of the change of F within a distance of 1, likewise
_AGAIN = 3  # solves after which another lower solution counts as one
#: Ends of a local solve that say nothing about y.
_UNDECIDED = (Status.STALLED, Status.MAX_STEPS, Status.LOWER_UNSOLVED)
_STEP = 1e-3  # of the sizes of x and y: how far a stationary point may be from where it should be
_SMALLEST = 1e-3  # unit of a variable that is zero


def certify(
    problem: BilevelProblem, x: Tree, y: Tree, data: Any = None, *, pessimistic: bool = False
) -> Certificate:
    r"""How good (x, y) is as an answer: value gap, stationarity, violations, and what was assumed.

    The lower problem is solved again from y, from points around it at radii from 1/4 to 16 in units of y, and from
    where F is small: by Newton's method, or with lower constraints by SciPy, polished on the KKT equations; at kinks
    of f by a quasi-Newton method made for them, whose result no point around it may undercut. So a y
    that is no lower solution, one in the wrong basin, and one that is not the best for F among those found all show.

    The upper level is tested at the solution found from y. Where y*(x) is smooth, by the implicit hypergradient,
    with the multipliers of the nearly active upper constraints and bounds fitted by non-negative least squares;
    where S(x) holds many points or a lower constraint is weakly active, by the problem linearized in x, y and the
    multipliers. A direction counts as descent only where F falls along it with the lower problem solved again, over
    a step of 0.1 % of the sizes of x and y (2 % in float32). Where neither test can be made, as at a kink of f, F is
    followed without derivatives: along the axes of x, or random directions above ten upper variables, and the
    steepest one of them all, each lower problem solved from two starts that must agree.

    Tolerances are relative: the value gap to the change of f within one unit of y (1e-5; or 1e-9 of that within a
    distance of 1), the violation of a constraint to its change within one unit of x and y, F to its change within
    one unit of y. The unit of a variable is its root mean square, 1e-3 at least.

    Args:
        problem: The problem.
        x: Upper variable.
        y: Lower variable.
        data: A `Batch`, or what both objectives get as their third argument.
        pessimistic: Whether y should maximize F over the lower solutions instead of minimizing it.

    Returns:
        The certificate. Its `verdict` is "trusted", "wrong" (`problems` says what), or "not tested" (`untested` says
        which test of the two that an answer must pass, the lower solution and the upper stationarity, could not be
        made, and why). Above 300 lower variables fewer starts are made, above 3000 none but y; above 256 Hessians
        are not formed, above 300 kinks are left untested. `assumptions` says what else was not tested.

    Raises:
        StructureError: `x` or `y` is no tree of floating tensors.

    Example:
        >>> import torch, bilevel as bl
        >>> problem = bl.BilevelProblem(
        ...     upper=lambda x, y, data: ((y - 1.0) ** 2).sum(),
        ...     lower=lambda x, y, data: ((y - x) ** 2).sum(),
        ... )
        >>> good = bl.certify(problem, torch.ones(1), torch.ones(1))
        >>> good.is_trusted, good.value_gap, good.hypergradient
        (True, 0.0, 0.0)
        >>> bad = bl.certify(problem, torch.ones(1), torch.full((1,), 3.0))
        >>> bad.is_trusted, bad.value_gap  # a wrong y is caught
        (False, 4.0)
        >>> kinked = bl.BilevelProblem(problem.upper, lambda x, y, data: (y - x).abs().sum())
        >>> [
        ...     bl.certify(kinked, x, x.clone()).is_trusted
        ...     for x in (torch.ones(1), torch.full((1,), 0.7))
        ... ]
        [True, False]
    """
    _tree.check_variable(x, "x")
    _tree.check_variable(y, "y")
    flat, (u, v), _, _ = ravel(problem, _tree.detach(x), _tree.detach(y))
    oracle = Oracle(flat, data)
    eps = torch.finfo(v.dtype).eps
    size_x, size_y = _unit(u), _unit(v)
    sign = -1.0 if pessimistic else 1.0
    upper = oracle.upper(u, v)
    value, lower_gradient, is_fitted = _lower_gradient(oracle, u, v, data, size_y)
    found = search(oracle, u, v, data, size_y, sign)
    size_y = max(size_y, _tree.rms(found.nearest.y) if _tree.is_finite(found.nearest.y) else 0.0)
    units = Units(size_x, size_y, found.upper_size, max(_STEP, eps**0.25))
    violations = _violations(flat, u, v, data, units)
    problems = [sentence for _, sentence in violations.values() if sentence]
    outside = 0.0 if flat.domain is None else _tree.length(u - flat.domain(u))
    if outside > max(_VIOLATION, 100.0 * eps) * math.sqrt(u.numel()) * size_x:
        problems.append(f"x is {outside:.3g} outside of its domain")
    gap = _positive(value - min(found.nearest.value, found.lowest.value))
    deeper = _positive(found.nearest.value - found.lowest.value)
    if not (math.isfinite(value) and math.isfinite(float(upper))):
        problems.append(f"an objective is not finite here: F = {float(upper):.3g}, f = {value:.3g}")
    of_lower, untested = _lower_problems(found, value, gap, deeper)
    problems += of_lower
    stationarity = Stationarity()
    if found.nearest.status is Status.CONVERGED:
        problems += _better_solution(oracle, u, found, data, size_y, sign)
        stationarity = examine(
            UpperPoint(oracle, u, found.nearest, found.minima, data, units, sign)
        )
        if stationarity.is_unique:
            problems += _far_from_solution(oracle, u, v, found.nearest, gap, size_y)
        if stationarity.problem:
            problems.append(stationarity.problem)
        if stationarity.untested:
            untested.append(f"whether the upper level is stationary: {stationarity.untested}")
    many = "" if v.numel() <= SMALL else " (fewer than for a small y)"
    assumptions = [
        f"the lower minimum is the lowest of {found.starts} local solves{many}",
        "no other x is better: the test of the upper level is local",
    ]
    if not is_fitted:
        assumptions.append(
            "no constraint holds a part of the lower gradient (SciPy did not fit the multipliers)"
        )
    return Certificate(
        value_gap=gap,
        deeper_basin=deeper,
        lower_gradient=lower_gradient,
        hypergradient=stationarity.hypergradient,
        upper_violation=violations["upper_constraint"][0],
        lower_violation=violations["lower_constraint"][0],
        domain_violation=outside,
        lower_curvature=stationarity.curvature,
        assumptions=(*assumptions, *stationarity.assumptions),
        evaluations=oracle.evaluations,
        upper_equality_violation=violations["upper_equality"][0],
        lower_equality_violation=violations["lower_equality"][0],
        problems=tuple(problems),
        tested=stationarity.tested,
        untested=tuple(untested),
    )


def _unit(own: Tensor) -> float:
    """The unit of a variable; 1 where it is not finite."""
    unit = max(_tree.rms(own), _SMALLEST)
    return unit if math.isfinite(unit) else 1.0


def _lower_gradient(
    oracle: Oracle, x: Tensor, y: Tensor, data: Any, size: float
) -> tuple[float, float, bool]:
    """f, the norm of its gradient less what the nearly active constraints hold, and whether that is known."""
    value, grad = oracle.lower_grad_y(x, y)
    problem, is_fitted = oracle.problem, True
    if constrains_lower(problem):
        held = linearize(problem, "lower_constraint", x, y, data)
        equal = linearize(problem, "lower_equality", x, y, data)
        near = held.value >= -_STEP * size * linalg.vector_norm(held.in_y, dim=1)
        fit = fit_multipliers(grad, held.in_y[near], equal.in_y)
        grad = grad + held.in_y[near].T @ fit.inequality + equal.in_y.T @ fit.equality
        is_fitted = fit.is_solved
    return float(value), _tree.length(grad), is_fitted


def _violations(
    problem: BilevelProblem, x: Tensor, y: Tensor, data: Any, units: Units
) -> dict[str, tuple[float, str]]:
    """By constraint: its largest violation, and a sentence where that is more than its tolerance."""
    tolerance = max(_VIOLATION, 100.0 * torch.finfo(y.dtype).eps)
    found: dict[str, tuple[float, str]] = {}
    for name in CONSTRAINTS:
        with torch.no_grad():
            amount = excess(constraint_values(problem, name, x, y, data), name)
        if amount.numel() == 0 or float(amount.max()) == 0.0:
            found[name] = (0.0, "")
            continue
        held = linearize(problem, name, x, y, data)
        reach = linalg.vector_norm(held.in_x, dim=1) * units.x
        reach = reach + linalg.vector_norm(held.in_y, dim=1) * units.y
        allowed = tolerance * positive(reach)
        worst = int((amount / allowed).nan_to_num(math.inf).argmax())
        sentence = ""
        if not float(amount[worst]) <= float(allowed[worst]):
            sentence = (
                f"`{name}` is violated by {float(amount[worst]):.3g} "
                f"(tolerance {float(allowed[worst]):.2g})"
            )
        found[name] = (float(amount.max()), sentence)
    return found


def _lower_problems(
    found: Search, value: float, gap: float, deeper: float
) -> tuple[list[str], list[str]]:
    """What is wrong with y as a solution of the lower problem, and what could not be tested."""
    if found.lowest.status is Status.LOWER_UNBOUNDED:
        return ["f falls without bound in y, so that the lower problem has no solution"], []
    tolerance = max(_GAP * found.lower_size, _FAR_GAP * found.lower_far)
    tolerance += rounding(value, found.nearest.y.dtype)
    if deeper > tolerance:
        return [
            f"y solves the lower problem locally at best: from another start f falls lower by {deeper:.3g}. "
            "Start at another y0, or convexify f"
        ], []
    if gap > tolerance:
        return [
            f"y does not solve the lower problem: the value gap is {gap:.3g} (tolerance {tolerance:.2g})"
        ], []
    if found.nearest.status is Status.CONVERGED:
        return [], []
    why = f"no lower solution was found from y: {found.nearest.status.value}"
    if found.nearest.status in _UNDECIDED and math.isfinite(gap):
        levels = "whether y solves the lower problem, and whether the upper level is stationary"
        return [], [f"{levels}: {why}"]
    return [why], []


def _far_from_solution(
    oracle: Oracle, x: Tensor, y: Tensor, nearest: Local, gap: float, size: float
) -> list[str]:
    """Whether y is far from a locally unique solution; farther where f is flat there."""
    away = y - nearest.y
    apart, allowed = _tree.rms(away), _DISTANCE * max(size, _SMALL_SIZE)
    if apart <= allowed:
        return []
    if 0.5 * float(away @ oracle.linearized(x, nearest.y).hvp(away)) < _EXPLAINED * gap:
        allowed = max(_FLAT_DISTANCE * size, _SMALL_SIZE)
    if apart <= allowed:
        return []
    return [
        f"y is {apart:.3g} (root mean square) from the lower solution next to it (tolerance {allowed:.2g})"
    ]


def _better_solution(
    oracle: Oracle, x: Tensor, found: Search, data: Any, size: float, sign: float
) -> list[str]:
    """Whether another lower solution among those found is better for F."""
    here = sign * float(oracle.upper(x, found.nearest.y))
    allowed = max(_OTHER * found.upper_size, _FAR_OTHER * found.upper_far) + rounding(here, x.dtype)
    solver = LowerSolver(oracle, x, data, size, is_smooth=found.nearest.is_smooth)

    def gain_at(other: Local) -> float:
        gain = 0.0
        for _ in range(_AGAIN):  # a first solve may end beside the solution where f is flat
            gain = here - sign * float(oracle.upper(x, other.y))
            if other.value > found.nearest.value + found.same or not allowed < gain < math.inf:
                return 0.0
            other = solver.solve(other.y)
        return gain

    gain = max([gain_at(other) for other in found.minima[1:]], default=0.0)
    if gain == 0.0:
        return []
    way = "lower" if sign > 0.0 else "higher"
    return [
        f"y is not the lower solution that the upper level wants: F is {way} by {gain:.3g} at another one"
    ]


def _positive(value: float) -> float:
    """`value` or 0; a NaN stays one."""
    return 0.0 if value < 0.0 else value
