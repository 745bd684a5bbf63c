"""The lower objective as a function of y, and its Hessian as a matrix that linear solvers multiply with."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bilevel._oracle import CountedGradient, Oracle
from bilevel.linear._base import Product
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


class LowerHessian:
    """Products with the Hessian in y, of which the last that a linear solver measured its solution by is kept."""

    def __init__(self, gradient: CountedGradient) -> None:
        self._gradient = gradient
        self._last: tuple[Tensor, tuple[Tensor, Tensor]] | None = None

    def product(self, *, has_columns: bool) -> Product:
        """For a linear solver."""
        columns = self._gradient.hessian if has_columns else None
        return Product(self._gradient.hvp, columns, lambda v: self.products(v)[1])

    def products(self, v: Tensor) -> tuple[Tensor, Tensor]:
        """The derivative in x of `grad_y f . v`, and the Hessian times v, from one backward pass at most."""
        if self._last is None or self._last[0] is not v:
            self._last = v, self._gradient.products(v)
        return self._last[1]
