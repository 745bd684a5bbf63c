r"""Constraints as barriers in the objectives, so that a solver of unconstrained problems takes them.

$\tilde f = f + \sum_j R(h_j)$ and $\tilde F = F + \sum_j R(h_j) + \sum_i R(H_i)$, where R is the barrier P_sigma
continued by a parabola, so that a start outside is pushed in; an equality has a parabola alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bilevel import _tree
from bilevel._oracle import Oracle
from bilevel._problem import CONSTRAINTS, BilevelProblem, constraint_value, lower_value
from bilevel.barriers import log_rational, relaxed
from bilevel.estimators._constraints import linearize, positive

_SIGMA = (0.1, 0.2)  # weight of the barrier in the first stage, and its ratio from stage to stage
_DELTA = (0.1, 0.2 / 3.0)  # where the parabola begins: its push, sigma / delta, grows threefold


class Units(NamedTuple):
    """What F, f and each constraint are measured in: their change over the reach of x and y.

    A constraint has no finite unit where its value at the start is not finite.

    Attributes:
        upper: Unit of F.
        lower: Unit of f.
        constraints: Units of the constraints by name, each of shape (k,).
    """

    upper: float
    lower: float
    constraints: Mapping[str, Tensor]


def measure(oracle: Oracle, x: Tensor, y: Tensor) -> Units:
    """The units at a point of the problem over vectors."""
    reach = math.sqrt(1.0 + float(x @ x) + float(y @ y))
    sizes: dict[str, Tensor] = {}
    for name in CONSTRAINTS:
        if getattr(oracle.problem, name) is not None:
            at = linearize(oracle.problem, name, x, y, None)
            slopes: Any = (torch.cat([at.in_x, at.in_y], 1) ** 2).sum(1).sqrt()
            steep = torch.where(slopes.isfinite(), reach * slopes, torch.zeros_like(slopes))
            sizes[name] = positive(torch.maximum(at.value.abs(), steep))
    # where a gradient happens to vanish, one beside the point tells
    phases = torch.arange(x.numel() + y.numel(), dtype=torch.float64).cos()
    shifts = torch.split(math.sqrt(reach) * phases, [x.numel(), y.numel()])
    beside = [v + shift.to(v) for v, shift in zip((x, y), shifts, strict=True)]
    upper, lower = (
        reach * (_slope(gradient, x, y) or _slope(gradient, *beside) or 1.0)
        for gradient in (oracle.upper_grad, oracle.lower_grad)
    )
    return Units(upper, lower, sizes)


def _slope(gradient: Callable[[Tensor, Tensor], tuple[Tensor, ...]], x: Tensor, y: Tensor) -> float:
    """The norm of the gradient, 0 where it is not finite."""
    slope = math.hypot(*map(_tree.length, gradient(x, y)[1:]))
    return slope if math.isfinite(slope) else 0.0


def walled(problem: BilevelProblem, units: Units, stage: int) -> BilevelProblem:
    """The problem without constraints: the barriers of a stage stand for them."""
    if not units.constraints:
        return problem
    sigma, delta = (first * ratio**stage for first, ratio in (_SIGMA, _DELTA))
    barrier = relaxed(log_rational(), delta)

    def cost(name: str, x: Tensor, y: Tensor, data: Any) -> Tensor | float:
        if getattr(problem, name) is None:
            return 0.0
        value = constraint_value(problem, name, x, y, data) / units.constraints[name]
        if name.endswith("equality"):
            return (value**2).sum() / (2.0 * sigma)
        return barrier.value(value, sigma).sum()

    def upper(x: Tensor, y: Tensor, data: Any) -> Tensor:
        costs = [cost(name, x, y, data) for name in CONSTRAINTS]
        return problem.upper(x, y, data) + units.upper * sum(costs)

    def lower(x: Tensor, y: Tensor, data: Any) -> Tensor:
        costs = [cost(name, x, y, data) for name in ("lower_constraint", "lower_equality")]
        return lower_value(problem, x, y, data) + units.lower * sum(costs)

    return replace(
        problem, upper=upper, lower=lower, per_sample=False, **dict.fromkeys(CONSTRAINTS)
    )
