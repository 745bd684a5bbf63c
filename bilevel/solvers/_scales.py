"""The units of a problem: how much F and f vary where the solution is looked for.

The schedules of ASBLO speak in these units, so that adding a constant to F or f, or multiplying one by
a positive number, changes no iterate.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from bilevel import _tree
from bilevel._box import Box
from bilevel._oracle import Oracle
from bilevel._problem import BilevelProblem
from bilevel._solution import Evaluations, Status
from bilevel._types import Projection
from bilevel.estimators._basins import explore
from bilevel.estimators._gap import RegularizedLower
from bilevel.estimators._lower import LowerObjective
from bilevel.optim._base import Minimizer, Point
from bilevel.optim.quasi_newton import QuasiNewton

_JOINT_STEPS = 100
_FAR = 1e3  # growth of |(x, y)| at which the joint problem counts as unbounded
_TINY_MU = 1e-10  # of the lower curvature: makes z unique, moves it by no digit that matters


class Scales(NamedTuple):
    """The units, and the point of smallest F that was met while they were measured."""

    lower: float  # of f, mu |y|^2, epsilon and kappa
    upper: float  # of F and sigma
    square: float  # of |y|^2
    x: Tensor
    y: Tensor
    z: Tensor
    status: Status
    evaluations: Evaluations


def measure(
    problem: BilevelProblem, x: Tensor, y: Tensor, minimizer: Minimizer, *, jointly: bool
) -> Scales:
    """Solve the two ends of ASBLO's path: f alone at x, and F alone in x and y together.

    With an infinite slack the barrier vanishes and ASBLO minimizes F over both variables; with none, y
    minimizes f. The range of F and of f between these two ends is their scale. The joint minimizer of F
    is where the path starts: from there F, not the user's y0, chooses the basin of the lower problem.
    A pessimistic problem has no such end, and starts where the user says, as one does that is not to start `jointly`.
    z starts in the deepest basin of f that is found from there.
    """
    oracle = Oracle(problem)
    first = LowerObjective(oracle, x).evaluate(y)
    if not (math.isfinite(first.value) and bool(torch.isfinite(first.grad).all())):
        return _failed(x, y, Status.NONFINITE, oracle)
    z = _minimize_lower(oracle, x, y, minimizer)
    if isinstance(z, Status):
        return _failed(x, y, z, oracle)
    values = [oracle.upper_grad(x, v) for v in (y, z)]
    if not all(bool(torch.isfinite(part).all()) for at in values for part in at):
        return _failed(x, z, Status.NONFINITE, oracle)
    joint = _minimize_jointly(oracle, problem.domain, x, z) if jointly else None
    start_x, start_y = joint or (x, y)
    basins = explore(oracle, start_x, start_y, minimizer, seed=1)
    if basins.status is not Status.CONVERGED:
        return _failed(x, y, basins.status, oracle)
    ends = (y, z, start_y, basins.nearest_y, basins.lowest_y)
    square = max(float(v @ v) for v in ends) or float(y.numel())
    reach = math.sqrt(square)
    heights = [float(oracle.lower(start_x, v)) for v in ends]
    costs = [float(oracle.upper(start_x, v)) for v in ends] + [float(at[0]) for at in values]
    if not all(any(map(math.isfinite, seen)) for seen in (heights, costs)):
        return _failed(x, y, Status.NONFINITE, oracle)
    lower, upper = _spread(heights), _spread(costs)
    slope = max(_tree.length(part) for _, *parts in values for part in parts)
    return Scales(
        lower or _tree.length(first.grad) * reach or 1.0,
        upper or slope * reach or 1.0,
        square,
        start_x,
        start_y,
        basins.lowest_y,
        Status.RUNNING,
        oracle.evaluations,
    )


def _spread(values: list[float]) -> float:
    """The range of the finite values, or 0 where it is only rounding."""
    finite = [v for v in values if math.isfinite(v)]
    spread = max(finite) - min(finite)
    return spread if spread > 1e-10 * max(map(abs, finite)) else 0.0


def _failed(x: Tensor, y: Tensor, status: Status, oracle: Oracle) -> Scales:
    return Scales(1.0, 1.0, 1.0, x, y, y, status, oracle.evaluations)


def _minimize_lower(oracle: Oracle, x: Tensor, y: Tensor, minimizer: Minimizer) -> Tensor | Status:
    """The minimizer of f(x, .) found from y, or why there is none."""
    start = LowerObjective(oracle, x).evaluate(y)
    size = _tree.length(start.grad)
    lower = RegularizedLower(oracle, x, _TINY_MU * size / (1.0 + _tree.length(y)))
    found = minimizer.minimize(lower, lower.evaluate(y), 1e-10 * size)
    failed = found.status in (Status.LOWER_UNBOUNDED, Status.NONFINITE)
    return found.status if failed else found.point.y


def _minimize_jointly(
    oracle: Oracle, domain: Projection | None, x: Tensor, y: Tensor
) -> tuple[Tensor, Tensor] | None:
    """The minimizer of F over x in B and all y, or None where F runs away."""

    def parts(vector: Tensor) -> tuple[Tensor, Tensor]:
        return vector[: x.numel()].to(x), vector[x.numel() :].to(y)

    def evaluate(vector: Tensor) -> Point:
        value, grad_x, grad_y = oracle.upper_grad(*parts(vector))
        noise = torch.finfo(vector.dtype).eps * abs(float(value))
        return Point(vector, float(value), torch.cat([grad_x, grad_y]), noise)

    optimizer = QuasiNewton()
    point = evaluate(torch.cat([x, y]))
    both = _joint_domain(domain, x, y)
    limit = _FAR * (1.0 + _tree.length(point.y))
    size = _tree.length(point.grad)
    memory = optimizer.init(point.y)
    for _ in range(_JOINT_STEPS):
        new, memory = optimizer.step(evaluate, point, memory, both)
        if new is None:
            break
        point = new
        if not _tree.length(point.y) < limit:
            return None
        if _tree.length(point.grad) <= 1e-6 * size:
            break
    u, v = parts(point.y)
    return u.clone(), v.clone()


def _joint_domain(domain: Projection | None, x: Tensor, y: Tensor) -> Projection | None:
    if domain is None:
        return None
    if isinstance(domain, Box):
        low, high = domain.bounds(x)
        far = torch.full_like(y, math.inf)
        return Box(torch.cat([low, -far]), torch.cat([high, far]))
    return lambda vector: torch.cat([domain(vector[: x.numel()]), vector[x.numel() :]])
