"""The two objectives of a problem on one batch, every evaluation counted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from functools import partial
from typing import Any

from torch import Tensor

from bilevel import _autodiff, _tree
from bilevel._autodiff import DescentSteps, LinearizedGradient, LinearizedMap
from bilevel._problem import BilevelProblem, split_data
from bilevel._returned import samples, scalar
from bilevel._solution import Evaluations
from bilevel._types import Tree

_KINDS = [field.name for field in fields(Evaluations)]


class Oracle:
    """Values, gradients and curvature of F and f on fixed data.

    Attributes:
        problem: The problem whose objectives are evaluated.
        losses: The losses by sample of the last evaluation of f, shape (n,), where the problem is
            `per_sample`; else None.
    """

    def __init__(self, problem: BilevelProblem, data: Any = None) -> None:
        self.problem = problem
        self.losses: Tensor | None = None
        self._data = split_data(data)
        self._counts = dict.fromkeys(_KINDS, 0)

    @property
    def evaluations(self) -> Evaluations:
        """What was evaluated since this oracle was made."""
        return Evaluations(**self._counts)

    def _upper(self, x: Tree, y: Tree) -> Tensor:
        self._counts["upper"] += 1
        return scalar(self.problem.upper(x, y, self._data.upper), "upper")

    def _lower(self, x: Tree, y: Tree) -> Tensor:
        self._counts["lower"] += 1
        value = self.problem.lower(x, y, self._data.lower)
        if not self.problem.per_sample:
            return scalar(value, "lower")
        losses = samples(value)
        self.losses = losses.detach()
        return losses.mean()

    def upper(self, x: Tree, y: Tree) -> Tensor:
        """F(x, y), 0-d."""
        return _autodiff.value(self._upper, x, y)

    def lower(self, x: Tree, y: Tree) -> Tensor:
        """f(x, y), 0-d."""
        return _autodiff.value(self._lower, x, y)

    def upper_grad(self, x: Tree, y: Tree) -> tuple[Tensor, Tree, Tree]:
        """F(x, y) and its gradients in x and in y, from one backward pass."""
        self._counts["upper_grad"] += 1
        value, (grad_x, grad_y) = _autodiff.value_and_grad(self._upper, x, y)
        return value, grad_x, grad_y

    def lower_grad(self, x: Tree, y: Tree) -> tuple[Tensor, Tree, Tree]:
        """f(x, y) and its gradients in x and in y, from one backward pass."""
        self._counts["lower_grad"] += 1
        value, (grad_x, grad_y) = _autodiff.value_and_grad(self._lower, x, y)
        return value, grad_x, grad_y

    def upper_grad_y(self, x: Tree, y: Tree) -> tuple[Tensor, Tree]:
        """F(x, y) and its gradient in y alone."""
        self._counts["upper_grad"] += 1
        value, (grad_y,) = _autodiff.value_and_grad(partial(self._upper, x), y)
        return value, grad_y

    def lower_grad_y(self, x: Tree, y: Tree) -> tuple[Tensor, Tree]:
        """f(x, y) and its gradient in y alone."""
        self._counts["lower_grad"] += 1
        value, (grad_y,) = _autodiff.value_and_grad(partial(self._lower, x), y)
        return value, grad_y

    def linearized(
        self,
        x: Tensor,
        y: Tensor,
        *,
        upper: float = 0.0,
        lower: float = 1.0,
        plus: Callable[[Tensor, Tensor], Tensor] | None = None,
    ) -> CountedGradient:
        """The gradient in y of `upper * F + lower * f + plus` at vectors x and y, with its products."""
        return CountedGradient(self._linear(x, y, upper, lower, plus), self._counts)

    def descended(self, x: Tensor, y: Tree, lr: float) -> tuple[Tree, Tree]:
        """Where a step of gradient descent on f leads from y, and the gradient that led there, without a graph."""
        _, grad = self.lower_grad_y(x, y)
        return _tree.stepped(y, grad, lr), grad

    def descent_steps(self, x: Tensor, y: Tree, lr: float) -> CountedSteps:
        """Steps of gradient descent on f from y, and the way back through them."""
        return CountedSteps(DescentSteps(self._lower, x, y, lr), self._upper, self._counts)

    def _linear(
        self,
        x: Tensor,
        y: Tensor,
        upper: float,
        lower: float,
        plus: Callable[[Tensor, Tensor], Tensor] | None,
    ) -> LinearizedGradient:
        def weighted(u: Tensor, v: Tensor) -> Tensor:
            parts = ((upper, self._upper), (lower, self._lower))
            # A weight of one would be a node more in the graph, and so in each product.
            terms = [fun(u, v) if w == 1.0 else w * fun(u, v) for w, fun in parts if w != 0.0]
            if plus is not None:
                terms.append(plus(u, v))
            return sum(terms[1:], terms[0])

        self._counts["upper_grad"] += int(upper != 0.0)
        self._counts["lower_grad"] += int(lower != 0.0)
        return LinearizedGradient(weighted, x, y)

    def lower_tangents(
        self, x: Tensor, y: Tensor, along_x: Tensor, along_y: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The gradient of f in y, (n,), and its derivatives along k directions, (k, n), in forward mode."""
        self._counts["lower_grad"] += 1
        self._counts["hvp"] += along_x.shape[0]
        found = _autodiff.gradient_and_tangents(self._lower, x, y, along_x, along_y)
        self.losses = None  # those of the last call belong to the transformation that has ended
        return found

    def mapped(self, fun: Callable[..., Tensor], x: Tensor, y: Tensor) -> Tensor:
        """`fun(x, y, data)` of the lower level, counted as the gradient of f that it stands for."""
        self._counts["lower_grad"] += 1
        return _autodiff.value(fun, x, y, self._data.lower)

    def linearized_map(self, fun: Callable[..., Tensor], x: Tensor, y: Tensor) -> CountedMap:
        """The derivatives of `fun(x, y, data)` in x and y."""
        self._counts["lower_grad"] += 1

        def on_data(u: Tensor, v: Tensor) -> Tensor:
            return fun(u, v, self._data.lower)

        return CountedMap(LinearizedMap(on_data, x, y), self._counts)


class CountedSteps:
    """A `DescentSteps` whose gradients are counted, and two products for each on the way back."""

    def __init__(
        self, descent: DescentSteps, upper: Callable[[Tree, Tree], Tensor], counts: dict[str, int]
    ) -> None:
        self._descent, self._upper, self._counts, self._steps = descent, upper, counts, 0

    def step(self) -> list[Tensor]:
        self._counts["lower_grad"] += 1
        self._steps += 1
        return self._descent.step()

    def reached(self) -> Tree:
        return self._descent.reached()

    def vjp(self, cotangent: Tree) -> tuple[Tensor, Tree]:
        self._counts["hvp"] += 2 * self._steps
        return self._descent.vjp(cotangent)

    def upper_grad(self) -> tuple[Tensor, Tensor]:
        """F at the last iterate, and its gradient in x through all steps."""
        self._counts["upper_grad"] += 1
        self._counts["hvp"] += 2 * self._steps
        return self._descent.value_and_total_grad(self._upper)


class CountedMap:
    """A `LinearizedMap` whose products are counted."""

    def __init__(self, linear: LinearizedMap, counts: dict[str, int]) -> None:
        self._linear, self._counts = linear, counts

    def vjp_x(self, cotangent: Tensor) -> Tensor:
        self._counts["hvp"] += 1
        return self._linear.vjp(0, cotangent)

    def vjp_y(self, cotangent: Tensor) -> Tensor:
        self._counts["hvp"] += 1
        return self._linear.vjp(1, cotangent)


class CountedGradient:
    """A `LinearizedGradient` whose products are counted: n for a Hessian of n columns."""

    def __init__(self, linear: LinearizedGradient, counts: dict[str, int]) -> None:
        self._linear, self._counts = linear, counts
        self.value, self.grad = linear.value, linear.grad

    def hvp(self, vector: Tensor) -> Tensor:
        self._counts["hvp"] += 1
        return self._linear.hvp(vector)

    def mixed_vjp(self, vector: Tensor) -> Tensor:
        self._counts["hvp"] += 1
        return self._linear.mixed_vjp(vector)

    def products(self, vector: Tensor) -> tuple[Tensor, Tensor]:
        self._counts["hvp"] += 2
        return self._linear.products(vector)

    def hessian(self) -> Tensor:
        self._counts["hvp"] += self.grad.numel()
        return self._linear.hessian()
