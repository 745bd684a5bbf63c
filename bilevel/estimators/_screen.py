"""Where a function of few variables looks low, by its values alone at many points."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from bilevel import _tree

_MOST = 6  # variables up to which so many points tell anything
_POINTS = (128, 256)  # of one variable, and of more
_REACH = 8.0  # how far they lie from the center at most, in units of y or of 1
_NEIGHBORS = 4  # a variable, whom a low point lies below: enough to have some on every side
_KEPT = 4  # starts at most


def low_points(value: Callable[[Tensor], float], y: Tensor) -> list[Tensor]:
    """The lowest of the points around y that lie lower than their neighbors: starts of local solves.

    The points are a Sobol sequence whose distances from y are squared, so that they are dense near y and reach far.

    Args:
        value: The function; points where it is not finite do not count.
        y: The center, shape (n,).

    Returns:
        At most four points, the lowest first; none above six variables.
    """
    n = y.numel()
    if n > _MOST:
        return []
    count = _POINTS[n > 1]
    sobol = torch.quasirandom.SobolEngine(n, scramble=True, seed=0)  # the same at every call
    unit = 2.0 * sobol.draw(count, dtype=torch.float64) - 1.0
    offsets = _REACH * max(1.0, _tree.rms(y)) * unit * unit.abs()
    points = [y + offset.to(y) for offset in offsets]
    heights = torch.tensor([value(point) for point in points], dtype=torch.float64)
    heights = heights.nan_to_num(math.inf, math.inf, math.inf)
    neighbors = torch.cdist(unit, unit).topk(1 + _NEIGHBORS * n, largest=False).indices
    is_low = (heights[:, None] <= heights[neighbors]).all(1) & heights.isfinite()
    lowest = heights.where(is_low, torch.full_like(heights, math.inf)).argsort()
    return [points[int(i)] for i in lowest[:_KEPT] if is_low[i]]
