"""F at the lower solution of another x, and how far the solves of the lower problem agree on it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bilevel import _tree
from bilevel._solution import Status
from bilevel.estimators._directions import Optimum
from bilevel.estimators._gap import rounding
from bilevel.estimators._stationarity import UpperPoint

_ELSEWHERE = 5.0  # steps: how far from the solution found the second solve starts
_AGREES = 1e-6  # of the rise of f from the solution to that start


class OptimalValue:
    """F along the lower solutions around a point, each solved from two starts."""

    def __init__(self, at: UpperPoint) -> None:
        self._at, self._is_smooth = at, at.local.is_smooth  # until a solve ends at a kink
        generator = torch.Generator().manual_seed(0)  # the same starts at every call
        self._shift = _ELSEWHERE * at.units.step * at.units.y * _tree.normal_like(at.y, generator)

    def __call__(self, x: Tensor) -> Optimum | None:
        """See `Solve`."""
        oracle, sign = self._at.oracle, self._at.sign
        solver = self._at.solver(x, is_smooth=self._is_smooth)
        found = [solver.solve(y) for y in (self._at.y, *self._at.rivals)]
        self._is_smooth = all(local.is_smooth for local in found)
        found = [local for local in found if local.status is Status.CONVERGED]
        if not found:
            return None
        lowest = min(found, key=lambda local: local.value)
        start = lowest.y + self._shift
        again = solver.solve(start)
        height = abs(float(oracle.lower(x, start)) - lowest.value)
        if not math.isfinite(height):
            return None
        same = _AGREES * height + rounding(lowest.value, x.dtype)
        if again.status is not Status.CONVERGED or abs(again.value - lowest.value) > same:
            return None
        values = [
            sign * float(oracle.upper(x, local.y))
            for local in found
            if local.value <= lowest.value + same
        ]
        upper = [float(oracle.upper(x, local.y)) for local in (lowest, again)]
        noise = abs(upper[1] - upper[0])
        if not all(map(math.isfinite, [noise, *values])):
            return None
        if not self._at.is_feasible(x, lowest.y):
            return Optimum(math.inf, noise)
        return Optimum(sign * min(values), noise)
