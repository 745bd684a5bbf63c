"""The lower objective as a function of y, for the methods that need no gradient in x on the way."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bilevel._oracle import CountedGradient, Oracle
from bilevel.optim._base import Point, SmoothFunction


class LowerObjective(SmoothFunction):
    """`f(x, .)` at fixed x."""

    def __init__(self, oracle: Oracle, x: Tensor, lower_hessian: Tensor | None = None) -> None:
        self._oracle, self._x = oracle, x
        self.lower_hessian = lower_hessian
        self._last: tuple[Tensor, CountedGradient] | None = None

    def evaluate(self, y: Tensor) -> Point:
        value, grad = self._oracle.lower_grad_y(self._x, y)
        return self._point(y, value, grad)

    def evaluate_ahead(self, y: Tensor) -> Point:
        linear = self._linearized(y)
        return self._point(y, linear.value, linear.grad)

    def linearized(self, point: Point) -> CountedGradient:
        """The gradient in y at `point` with its products; where it was evaluated ahead, that evaluation serves."""
        if self._last is not None and self._last[0] is point.y:
            return self._last[1]
        return self._linearized(point.y)

    def _linearized(self, y: Tensor) -> CountedGradient:
        self._last = None  # one graph at a time
        linear = self._oracle.linearized(self._x, y)
        self._last = y, linear
        return linear

    @property
    def has_hessian(self) -> bool:
        return self.lower_hessian is not None

    def hessian(self, point: Point, *, refresh: bool) -> Tensor:
        if refresh or self.lower_hessian is None:
            self.lower_hessian = self.linearized(point).hessian()
        return self.lower_hessian

    def hvp(self, point: Point) -> Callable[[Tensor], Tensor]:
        return self.linearized(point).hvp

    def _point(self, y: Tensor, value: Tensor, grad: Tensor) -> Point:
        lower = float(value)
        return Point(y, lower, grad, noise=torch.finfo(y.dtype).eps * abs(lower))
