"""First derivatives of F and f over vectors, as operations that can be traced."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from bilevel._autodiff import func
from bilevel._problem import BilevelProblem, upper_value
from bilevel._returned import samples, scalar
from bilevel._types import Tree


class Traced:
    """The passes of `Oracle`, uncounted.

    Attributes:
        losses: See `Oracle`.
    """

    def __init__(self, problem: BilevelProblem, upper_data: Any, lower_data: Any) -> None:
        self.losses: Tensor | None = None
        self._problem, self._upper_data, self._lower_data = problem, upper_data, lower_data

    def _upper(self, x: Tensor, y: Tensor) -> Tensor:
        return upper_value(self._problem, x, y, self._upper_data)

    def _lower(self, x: Tensor, y: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The value, and the losses by sample where there are such."""
        value = self._problem.lower(x, y, self._lower_data)
        if not self._problem.per_sample:
            return scalar(value, "lower"), ()
        losses = samples(value)
        return losses.mean(), (losses,)

    def upper_grad(self, x: Tree, y: Tree) -> tuple[Tensor, Tree, Tree]:
        """See `Oracle.upper_grad`."""
        (grad_x, grad_y), value = func.grad_and_value(self._upper, argnums=(0, 1))(x, y)
        return value, grad_x, grad_y

    def upper_grad_y(self, x: Tree, y: Tree) -> tuple[Tensor, Tree]:
        """See `Oracle.upper_grad_y`."""
        grad_y, value = func.grad_and_value(self._upper, argnums=1)(x, y)
        return value, grad_y

    def lower_grad(self, x: Tree, y: Tree) -> tuple[Tensor, Tree, Tree]:
        """See `Oracle.lower_grad`."""
        value, (grad_x, grad_y) = self._lower_grad((0, 1), x, y)
        return value, grad_x, grad_y

    def lower_grad_y(self, x: Tree, y: Tree) -> tuple[Tensor, Tree]:
        """See `Oracle.lower_grad_y`."""
        return self._lower_grad(1, x, y)

    def _lower_grad(self, wrt: int | tuple[int, int], x: Tree, y: Tree) -> tuple[Tensor, Any]:
        grads, (value, losses) = func.grad_and_value(self._lower, argnums=wrt, has_aux=True)(x, y)
        self.losses = losses[0] if losses else None
        return value, grads
