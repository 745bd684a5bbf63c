"""The lower objective as a function of y, for the methods that need no gradient in x on the way."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bilevel._oracle import Oracle
from bilevel.optim._base import Point, SmoothFunction


class LowerObjective(SmoothFunction):
    """`f(x, .)` at fixed x."""

    def __init__(self, oracle: Oracle, x: Tensor, lower_hessian: Tensor | None = None) -> None:
        self._oracle, self._x = oracle, x
        self.lower_hessian = lower_hessian

    def evaluate(self, y: Tensor) -> Point:
        value, grad = self._oracle.lower_grad_y(self._x, y)
        lower = float(value)
        return Point(y, lower, grad, noise=torch.finfo(y.dtype).eps * abs(lower))

    @property
    def has_hessian(self) -> bool:
        return self.lower_hessian is not None

    def hessian(self, point: Point, *, refresh: bool) -> Tensor:
        if refresh or self.lower_hessian is None:
            self.lower_hessian = self._oracle.linearized(self._x, point.y).hessian()
        return self.lower_hessian

    def hvp(self, point: Point) -> Callable[[Tensor], Tensor]:
        return self._oracle.linearized(self._x, point.y).hvp
