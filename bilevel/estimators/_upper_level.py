r"""Whether (x, y) is stationary for the upper level, along the lower solutions.

Where y*(x) is smooth, the hypergradient of F and of each upper constraint is known by implicit differentiation,
and the multipliers of the nearly active ones are fitted by non-negative least squares. Where it is not - S(x)
holds many points, or a constraint is weakly active - that formula does not hold, and the linearized problem in
x, y and the multipliers is solved on each branch of the complementarity conditions instead: there y may move
along the lower solutions as well, as the optimistic value function lets it.

Either way a direction only counts where a step along it, with the lower problem solved again, lowers F. Where
neither is an answer - at a kink of f, above all - F is followed along directions of x without derivatives.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch

from bilevel import _tree
from bilevel.estimators._branching_upper import examine_branches
from bilevel.estimators._directions import Directions
from bilevel.estimators._gap import rounding
from bilevel.estimators._optimum import OptimalValue
from bilevel.estimators._search import SMALL
from bilevel.estimators._smooth_upper import examine_smooth
from bilevel.estimators._stationarity import DENSE, Stationarity, UpperPoint

linalg: Any = torch.linalg  # its stubs are untyped
_NOT_CURVED = "f is not curved around y as its Hessian says, as at a kink"
_WEAK = 1e-3  # in units: multipliers and distances up to which a constraint is weakly active


def examine(at: UpperPoint) -> Stationarity:
    """Find out whether F falls along the lower solutions."""
    if not at.local.is_smooth:
        return _by_directions(at, Stationarity(untested="f has a kink at y"))
    found = _by_derivatives(at)
    return _by_directions(at, found) if found.untested else found


def _by_derivatives(at: UpperPoint) -> Stationarity:
    n = at.y.numel()
    solver = at.solver(at.x)
    if n > DENSE:
        if solver.constrained:
            return Stationarity(untested=f"there are more than {DENSE} lower variables")
        if _has_kink(at):
            return Stationarity(untested=_NOT_CURVED)
        return examine_smooth(at, None, None)
    system = solver.kkt.system(at.local.point)
    relative = system.curvature
    size = float(linalg.matrix_norm(system.hessian)) if relative is not None else 0.0
    curvature = None if relative is None or not math.isfinite(size) else relative * size
    if not _tree.is_finite(system.matrix):
        return Stationarity(untested="the lower Hessian is not finite here")
    weak = solver.kkt.weakly_active(at.local.point, _WEAK)
    if system.is_regular and not bool(weak.any()):
        if _has_kink(at):
            return Stationarity(curvature=curvature, untested=_NOT_CURVED, is_unique=True)
        return examine_smooth(at, system, curvature)
    return examine_branches(at, solver, system, curvature, weak)


def _has_kink(at: UpperPoint) -> bool:
    """Whether f around y is not curved as its Hessian there says."""
    generator = torch.Generator().manual_seed(0)  # the same direction at every call
    step = at.units.step * at.units.y * _tree.normal_like(at.y, generator)
    hvp = at.oracle.linearized(at.x, at.y).hvp
    curved = float(step @ hvp(step))
    values = [float(at.oracle.lower(at.x, at.y + t * step)) for t in (1.0, -1.0, 0.0)]
    error = abs(values[0] + values[1] - 2.0 * values[2] - curved)
    return error > max(0.5 * abs(curved), rounding(max(map(abs, values)), step.dtype))


def _by_directions(at: UpperPoint, found: Stationarity) -> Stationarity:
    """The test without derivatives where that by derivatives could not be made."""
    if at.y.numel() > SMALL:
        return found
    x, domain = at.x, at.oracle.problem.domain
    along = abs(float(at.oracle.upper(x + at.units.x, at.y)) - at.value)
    walked = Directions(
        OptimalValue(at),
        (lambda u: u) if domain is None else domain,
        x,
        at.units.step * math.sqrt(x.numel()) * at.units.x,
        max(at.units.upper, along if math.isfinite(along) else 0.0),
        at.noise(),
    ).walk(at.value)
    found = replace(found, hypergradient=None)
    if walked.step > 0.0:
        problem = (
            f"the upper level is not stationary: F falls by {walked.fall:.3g} over a step of {walked.step:.3g} "
            f"in x, with the lower problem solved again there ({found.untested})"
        )
        return replace(found, problem=problem, untested="")
    if walked.untested:
        return replace(found, untested=f"{walked.untested} ({found.untested})")
    tested = (
        f"F falls along none of {walked.directions} directions of x, with the lower problem solved again along "
        f"each ({found.untested})"
    )
    return replace(found, tested=(tested,), untested="")
