"""The local minima of the lower objective around a point."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from bilevel import _tree
from bilevel._oracle import Oracle
from bilevel._solution import Status
from bilevel.estimators._gap import rounding
from bilevel.estimators._lower import LowerObjective
from bilevel.estimators._screen import low_points
from bilevel.optim import Minimizer

_AROUND = 8  # solves of the lower problem, the first from the point itself
#: Of the heights of the starts above the nearest minimum: minima nearer to each other count as one.
_RESOLUTION = 1e-8


@dataclass(frozen=True)
class Basins:
    """What was found from the point itself and from around it.

    Attributes:
        nearest: The minimum found from the point, `inf` where none was.
        nearest_y: Where it lies, shape (n,).
        lowest: The lowest minimum found; `-inf` where f is unbounded below.
        lowest_y: Where it lies, shape (n,).
        status: CONVERGED, NONFINITE (from the point itself) or LOWER_UNBOUNDED.
    """

    nearest: float
    nearest_y: Tensor
    lowest: float
    lowest_y: Tensor
    status: Status


def explore(oracle: Oracle, x: Tensor, y: Tensor, minimizer: Minimizer, seed: int) -> Basins:
    """Minimize f(x, .) from `y`, from seven points around it at radii 1/4 to 16 in units of y, and from where f is low.

    A minimum counts as lower only where rounding cannot explain it; among equals the nearest stays.
    """
    generator = torch.Generator().manual_seed(seed)  # the same starts at every call
    size = max(1.0, _tree.rms(y))
    hessian: Tensor | None = None
    nearest, nearest_y, lowest, lowest_y, height = math.inf, y, math.inf, y, 0.0
    noises = torch.randn(_AROUND, y.numel(), generator=generator, dtype=torch.float64).to(y)
    starts = [y, *(y + 2.0 ** (i - 3) * size * noises[i] for i in range(1, _AROUND))]
    starts += low_points(oracle, x, y)
    for number, point in enumerate(starts):
        lower = LowerObjective(oracle, x, hessian)
        start = lower.evaluate(point)
        if not math.isfinite(start.value):
            if number == 0:
                return Basins(nearest, y, lowest, y, Status.NONFINITE)
            continue
        found = minimizer.minimize(lower, start, 1e-10 * _tree.length(start.grad))
        if found.status is Status.LOWER_UNBOUNDED:
            return Basins(nearest, nearest_y, -math.inf, found.point.y, found.status)
        if number == 0:
            if found.status is Status.NONFINITE:
                return Basins(nearest, y, lowest, y, found.status)
            nearest, nearest_y = found.point.value, found.point.y
        hessian = lower.lower_hessian
        height = max(height, abs(start.value - nearest))
        if found.point.value < lowest - _RESOLUTION * height - rounding(nearest, y.dtype):
            lowest, lowest_y = found.point.value, found.point.y
    return Basins(nearest, nearest_y, lowest, lowest_y, Status.CONVERGED)
