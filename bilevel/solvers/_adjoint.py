"""The linear system of the implicit gradient, H v + grad_y F = 0, in a loop that never solves it to the end."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bilevel import _tree
from bilevel._oracle import Oracle
from bilevel._problem import BilevelProblem, ravel
from bilevel._solution import State
from bilevel._types import Tree
from bilevel.solvers._walk import Residuals, Walk

_FORGET = 0.9998  # with each term of a series: 1 % in fifty


class Adjoint:
    """F, f and the products of f's second derivatives at the x and y of a walk.

    Attributes:
        upper, lower: F and f, 0-d.
        upper_y: Gradient of F in y, a vector of shape (n,).
        lower_y: Gradient of f in y, a tree like y.
    """

    def __init__(self, walk: Walk, problem: BilevelProblem, data: Any) -> None:
        flat, (x, y), self._unravel_x, unravel_y = ravel(problem, walk.x, walk.y)
        self._walk, self._oracle = walk, Oracle(flat, data)
        self._linear = self._oracle.linearized(x, y)
        self.upper, self._upper_x, self.upper_y = self._oracle.upper_grad(x, y)
        self.lower, self.lower_y = self._linear.value, unravel_y(self._linear.grad)

    def residual(self, v: Tensor) -> Tensor:
        """H v + grad_y F. Differences of the products show the norm of H; on batches, whose H differ, each does."""
        product = self._linear.hvp(v)
        self._walk.learn_hessian(v, product)
        return product + self.upper_y

    def hvp(self, v: Tensor) -> Tensor:
        """H v, which shows the norm of H: a series that does not converge turns into the steepest direction."""
        product = self._linear.hvp(v)
        self._walk.bound_hessian(v, product, forget=_FORGET)
        return product

    @property
    def step_size(self) -> float:
        """One over the norm of H."""
        return 1.0 / self._walk.hessian_norm

    def hypergradient(self, v: Tensor) -> Tree:
        """The gradient of F in x along the lower solution, a tree like x: d_x F + d^2_xy f v."""
        return self._unravel_x(self._upper_x + self._linear.mixed_vjp(v))

    def end(self, hypergradient: Tree, residual: Tensor, rtol: float) -> State:
        """The state after this step, whose linear system has this residual, 0-d."""
        walk = self._walk
        walk.spent = walk.spent + self._oracle.evaluations
        lower_residual = _tree.norm(self._linear.grad)
        rest = (walk.memory["unit"] * lower_residual, residual)
        bias = torch.zeros_like(residual)
        residuals = Residuals(hypergradient, rest, bias, self._upper_x, self.upper_y)
        metrics = {
            "upper": self.upper,
            "lower": self.lower,
            "lower_residual": lower_residual,
            "linear_residual": residual,
        }
        return walk.end(residuals, rtol, metrics)
