"""The unrolled hypergradient: differentiate through the steps that solve the lower problem."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bilevel import _tree
from bilevel._oracle import Oracle
from bilevel._problem import BilevelProblem
from bilevel._solution import Status
from bilevel.estimators._base import Estimate, Estimator


@dataclass(frozen=True)
class Unrolled(Estimator):
    r"""The gradient of $F(x, y_T(x))$, where $y_{t+1} = y_t - \alpha \nabla_y f(x, y_t)$ from the given y.

    It is the exact gradient of what T steps of gradient descent reach. Where the lower problem has many
    solutions, that is the solution the start leads to, whatever F would choose among them.

    Attributes:
        max_steps: T, the number of steps, >= 1.
        lr: alpha, their length, > 0; below 2 over the largest eigenvalue of the lower Hessian.

    Raises:
        ValueError: A parameter is out of its range.

    Example:
        >>> import torch, bilevel as bl
        >>> problem = bl.BilevelProblem(
        ...     upper=lambda x, y, data: 0.5 * ((y - 1.0) ** 2).sum(),
        ...     lower=lambda x, y, data: 0.5 * ((y - 3.0 * x) ** 2).sum(),
        ... )
        >>> estimate = bl.hypergradient(
        ...     problem, torch.ones(1), torch.zeros(1), method=bl.Unrolled(100, lr=0.5)
        ... )
        >>> round(estimate.grad.item(), 4)
        6.0

    References:
        Franceschi et al., Forward and reverse gradient-based hyperparameter optimization (ICML 2017), algorithm 1.
    """

    max_steps: int = 100
    lr: float = 0.1

    def __post_init__(self) -> None:
        if self.max_steps < 1:
            raise ValueError(
                f"`Unrolled(max_steps=...)` must be at least 1. Got max_steps={self.max_steps}. Raise it."
            )
        if not (self.lr > 0.0 and math.isfinite(self.lr)):
            raise ValueError(
                f"`Unrolled(lr=...)` must be a finite number > 0. Got lr={self.lr}. Use e.g. 0.1."
            )

    def estimate(
        self,
        problem: BilevelProblem,
        x: Tensor,
        y: Tensor,
        data: Any = None,
        memory: Mapping[str, Any] | None = None,
    ) -> Estimate:
        """See `Estimator.estimate`."""
        oracle = Oracle(problem, data)
        trajectory = [y]
        for _ in range(self.max_steps):
            _, grad_y = oracle.lower_grad_y(x, trajectory[-1])
            trajectory.append(trajectory[-1] - self.lr * grad_y)
        upper, grad, cotangent = oracle.upper_grad(x, trajectory[-1])
        for before in reversed(
            trajectory[:-1]
        ):  # the adjoint of one step, from the last to the first
            gradient = oracle.linearized(x, before)
            grad = grad - self.lr * gradient.mixed_vjp(cotangent)
            cotangent = cotangent - self.lr * gradient.hvp(cotangent)
        residual = _tree.length(oracle.lower_grad_y(x, trajectory[-1])[1])
        finite = math.isfinite(float(upper)) and bool(torch.isfinite(grad).all())
        return Estimate(
            grad=grad,
            y=trajectory[-1],
            value=float(upper),
            status=Status.CONVERGED if finite else Status.NONFINITE,
            info={"upper": float(upper), "lower_residual": residual},
            noise=torch.finfo(x.dtype).eps * abs(float(upper)),
            evaluations=oracle.evaluations,
        )
