"""F at the lower solution of another x, and how far the solves of the lower problem agree on it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from bilevel import _tree
from bilevel._oracle import Oracle
from bilevel._solution import Status
from bilevel.estimators._directions import Optimum
from bilevel.estimators._gap import rounding
from bilevel.estimators._linear_program import Units
from bilevel.estimators._search import Local, LowerSolver

_ELSEWHERE = 5.0  # steps: how far from the solution found the second solve starts
_AGREES = 1e-6  # of the rise of f from the solution to that start


class OptimalValue:
    """F along the lower solutions around a point, each solved from two starts.

    Args:
        oracle: The problem over vectors.
        local: The lower solution at the point.
        rivals: The other lower minima there, one of which may become the lowest.
        data: The data of the problem.
        units: Of x and y.
        sign: 1 where y minimizes F over the lower solutions, -1 where it maximizes it.
        is_feasible: Whether the upper constraints allow (x, y).
    """

    def __init__(
        self,
        oracle: Oracle,
        local: Local,
        rivals: Sequence[Tensor],
        data: Any,
        units: Units,
        sign: float,
        is_feasible: Callable[[Tensor, Tensor], bool],
    ) -> None:
        self._oracle, self._local, self._rivals, self._data = oracle, local, rivals, data
        self._units, self._sign, self._is_feasible = units, sign, is_feasible
        self._is_smooth = local.is_smooth  # until a solve ends at a kink
        generator = torch.Generator().manual_seed(0)  # the same starts at every call
        self._shift = _ELSEWHERE * units.step * units.y * _tree.normal_like(local.y, generator)

    def __call__(self, x: Tensor) -> Optimum | None:
        """See `Solve`."""
        solver = LowerSolver(self._oracle, x, self._data, self._units.y, is_smooth=self._is_smooth)
        found = [solver.solve(y) for y in (self._local.y, *self._rivals)]
        self._is_smooth = all(local.is_smooth for local in found)
        found = [local for local in found if local.status is Status.CONVERGED]
        if not found:
            return None
        lowest = min(found, key=lambda local: local.value)
        start = lowest.y + self._shift
        again = solver.solve(start)
        height = abs(float(self._oracle.lower(x, start)) - lowest.value)
        if not math.isfinite(height):
            return None
        same = _AGREES * height + rounding(lowest.value, x.dtype)
        if again.status is not Status.CONVERGED or abs(again.value - lowest.value) > same:
            return None
        values = [
            self._sign * float(self._oracle.upper(x, local.y))
            for local in found
            if local.value <= lowest.value + same
        ]
        upper = [float(self._oracle.upper(x, local.y)) for local in (lowest, again)]
        noise = abs(upper[1] - upper[0])
        if not all(map(math.isfinite, [noise, *values])):
            return None
        if not self._is_feasible(x, lowest.y):
            return Optimum(math.inf, noise)
        return Optimum(self._sign * min(values), noise)
