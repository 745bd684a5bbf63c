"""Stationarity of the upper level without derivatives: F with the lower problem solved again, along directions of x.

That needs no smoothness, so it is the test where y*(x) or f has a kink.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bilevel import _tree

_AXES = 10  # upper variables up to which each axis is a direction
_RANDOM = 4  # random directions below that, each with its opposite as those along the axes
_CONTINUES = 4.0 / 3.0  # of the fall over half a step: at a minimum within the step F turns
_SIGNIFICANT = 4.0  # times the noise of the solves: what counts as a change of F
_RESOLVED = 1e-6  # of the change of F within a unit: the noise up to which no change means flat
_LONGER = 10.0  # a second step where the first one drowns in noise


@dataclass(frozen=True)
class Optimum:
    """F at the lower solution of an x.

    Attributes:
        upper: The value; of several lower solutions that of the y that the upper level may choose, or must fear.
        noise: How much F changes where the lower problem is solved from another start.
    """

    upper: float
    noise: float


#: The optimum at x; None where the solves do not agree, and infinite where an upper constraint forbids x.
Solve = Callable[[Tensor], Optimum | None]


@dataclass(frozen=True)
class Walked:
    """What was found.

    Attributes:
        fall: How much F falls along the direction found, 0 where none was.
        step: Length of that step.
        directions: Number of directions that were tried.
        untested: Why no verdict was reached, or empty.
    """

    fall: float
    step: float
    directions: int
    untested: str


class Directions:
    """The test around a point x.

    Args:
        solve: F at the lower solution.
        project: Onto the domain.
        x: The point, shape (m,).
        reach: Length of a step.
        scale: How much F changes within a unit of x and y.
        floor: Changes of F below this mean nothing.
    """

    def __init__(
        self,
        solve: Solve,
        project: Callable[[Tensor], Tensor],
        x: Tensor,
        reach: float,
        scale: float,
        floor: float,
    ) -> None:
        self._solve, self._project = solve, project
        self._x, self._reach, self._scale, self._floor = x, reach, scale, floor

    def walk(self, upper: float) -> Walked:
        """Look for a direction along which F falls below `upper`, its value at x.

        That is no longer the value at the lower solution where x is beside a tie of two, by the error of x.
        """
        here = self._solve(self._x)
        if here is None:
            return Walked(0.0, 0.0, 0, "two solves of the lower problem do not agree")
        here = Optimum(min(here.upper, upper), here.noise)
        tried = blocked = 0
        steepest = torch.zeros_like(self._x)
        for direction in _directions(self._x):
            falls: list[float] = []
            for signed in (direction, -direction):
                fall, step, why = self._along(here, signed)
                if why:
                    return Walked(0.0, 0.0, tried, why)
                if step > 0.0:
                    return Walked(fall, step, tried, "")
                tried += 1
                blocked += fall == -math.inf
                falls.append(fall)
            if all(map(math.isfinite, falls)):
                steepest = steepest + (falls[0] - falls[1]) * direction
        length = _tree.length(steepest)
        if length > 0.0 and self._x.numel() > 1:
            fall, step, why = self._along(here, steepest / length)
            tried += 1
            if why or step > 0.0:
                return Walked(fall, step, tried, why)
            blocked += fall == -math.inf
        if blocked and self._x.numel() > 1:  # F might fall between them
            why = f"an upper constraint forbids {blocked} of {tried} directions"
            return Walked(0.0, 0.0, tried, why)
        return Walked(0.0, 0.0, tried, "")

    def _along(self, here: Optimum, direction: Tensor) -> tuple[float, float, str]:
        """How much F falls over a step, the step's length where that is descent (else 0), and why it is not known."""
        for reach in (self._reach, _LONGER * self._reach):
            there = self._project(self._x + reach * direction)
            step = _tree.length(there - self._x)
            if step < 0.5 * reach:
                return 0.0, 0.0, ""  # the domain ends here
            found = self._solve(there)
            if found is None:
                continue
            fall, noise = here.upper - found.upper, self._noise(here, found)
            if abs(fall) <= noise:
                if noise <= max(_RESOLVED * self._scale, self._floor):
                    return fall, 0.0, ""
                continue
            if fall < 0.0:
                return fall, 0.0, ""
            half = self._solve(self._x + 0.5 * (there - self._x))
            if half is None:
                continue
            before = here.upper - half.upper
            if fall - _CONTINUES * before >= -self._noise(here, half):
                return fall, step, ""
            return fall, 0.0, ""
        return 0.0, 0.0, "the solves of the lower problem next to x do not agree well enough"

    def _noise(self, one: Optimum, other: Optimum) -> float:
        return max(_SIGNIFICANT * (one.noise + other.noise), self._floor)


def _directions(x: Tensor) -> list[Tensor]:
    """Along the axes where those are few, and random ones; of length 1, the same at every call."""
    m = x.numel()
    axes = list(torch.eye(m, dtype=x.dtype, device=x.device)) if m <= _AXES else []
    count = _AXES if m > _AXES else min(m, _RANDOM) if m > 1 else 0
    generator = torch.Generator().manual_seed(0)
    random = torch.randn(count, m, generator=generator, dtype=torch.float64).to(x)
    return [*axes, *(row / _tree.length(row) for row in random)]
