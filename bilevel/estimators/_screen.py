"""Where the lower objective of few variables looks low, by its values alone at many points."""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor

from bilevel import _tree
from bilevel._oracle import Oracle
from bilevel._problem import constrains_lower

_MOST = 6  # variables up to which so many points tell anything
_POINTS = (128, 256)  # of one variable, and of more
_REACH = 8.0  # how far they lie from the center at most, in units of y or of 1
_NEIGHBORS = 4  # a variable, whom a low point lies below: enough to have some on every side
_KEPT = 4  # starts at most


def low_points(oracle: Oracle, x: Tensor, y: Tensor) -> list[Tensor]:
    """The lowest of the points around y where f(x, .) is lower than at their neighbors: starts of local solves.

    The points are a Sobol sequence whose distances from y are squared, so that they are dense near y and reach far.
    Those where f is not finite do not count.

    Args:
        oracle: The problem over vectors.
        x: Shape (m,).
        y: The center, shape (n,).

    Returns:
        At most four points, the lowest first; none above six variables, and none with lower constraints, which f
        does not know of.
    """
    if y.numel() > _MOST or constrains_lower(oracle.problem):
        return []
    cube, neighbors = _cube(y.numel())
    offsets = _REACH * max(1.0, _tree.rms(y)) * cube * cube.abs()
    points = [y + offset.to(y) for offset in offsets]
    values = [float(oracle.lower(x, point)) for point in points]
    heights = torch.tensor(values, dtype=torch.float64).nan_to_num(math.inf, math.inf, math.inf)
    is_low = (heights[:, None] <= heights[neighbors]).all(1) & heights.isfinite()
    lowest = heights.where(is_low, torch.full_like(heights, math.inf)).argsort()
    return [points[int(i)] for i in lowest[:_KEPT] if is_low[i]]


@cache
def _cube(n: int) -> tuple[Tensor, Tensor]:
    """A Sobol sequence in [-1, 1]^n, and the nearest points of each with itself."""
    sobol = torch.quasirandom.SobolEngine(n, scramble=True, seed=0)  # the same at every call
    points = 2.0 * sobol.draw(_POINTS[n > 1], dtype=torch.float64) - 1.0
    return points, torch.cdist(points, points).topk(1 + _NEIGHBORS * n, largest=False).indices
