"""Conjugate gradients for the steps of Newton's method."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from bilevel import _tree

_FAITHFUL = 0.5  # of a residual: a gradient that differs from it by no more goes on from it, as steep as that


class ConjugateSteps:
    """Solves `H d = -grad` step after step of Newton's method, and goes on where it can.

    Where the function is quadratic, the gradient after a full step is the residual that its solve has left. The next
    solve then begins along a direction conjugate to the last one, so that all of them together are one run of
    conjugate gradients, however often it stopped to look.
    """

    def __init__(self, max_steps: int) -> None:
        self._max_steps = max_steps  # products at most for one direction
        self._last: tuple[Tensor, Tensor, Tensor] | None = None  # residual, direction, its product

    def direction(self, hvp: Callable[[Tensor], Tensor], grad: Tensor, target: float) -> Tensor:
        """A direction of descent, which solves to a residual of `target` or ends before at negative curvature."""
        d, r = torch.zeros_like(grad), -grad
        p = self._first(r)
        slope = float(r @ p)
        self._last = None
        for _ in range(self._max_steps):
            hp = hvp(p)
            curvature = float(p @ hp)
            if not curvature > 0.0:  # also where it is NaN
                break
            step = slope / curvature
            d = torch.add(d, p, alpha=step)
            before, r = r, torch.sub(r, hp, alpha=step)
            rr = float(r @ r)
            if math.sqrt(rr) <= target:
                self._last = r, p, hp
                break
            # Of a start that goes on the residuals need not be orthogonal, and then the difference counts.
            p = torch.add(r, p, alpha=(rr - float(r @ before)) / slope)
            slope = rr
        return d if float(d @ grad) < 0.0 else -grad

    def _first(self, r: Tensor) -> Tensor:
        """The residual, or where it is the one that the last solve has left, the direction that was to follow."""
        if self._last is None:
            return r
        left, p, hp = self._last
        if not _tree.length(r - left) <= _FAITHFUL * _tree.length(left):
            return r
        conjugate = torch.sub(r, p, alpha=float(r @ hp) / float(p @ hp))
        return conjugate if float(r @ conjugate) > _FAITHFUL * float(r @ r) else r
