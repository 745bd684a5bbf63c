"""A fixed number of Newton steps, as operations on tensors that can be traced."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bilevel._autodiff import func
from bilevel.estimators._fixed_steps import FixedSteps, length
from bilevel.optim import Newton

linalg: Any = torch.linalg  # its stubs are untyped
MOST = 30  # steps: each is a part of the graph of its own, and none ends early
_SUFFICIENT_DECREASE = 1e-4  # Armijo's constant
_HALVINGS = 12  # of a step, all of which are measured at once


@dataclass(frozen=True)
class NewtonSteps(FixedSteps):
    """The steps of `bilevel.optim.Newton` each with a Hessian of its own."""

    max_steps: int

    def minimized(
        self, fun: Callable[[Tensor], Tensor], y: Tensor, tol: float
    ) -> tuple[Tensor, Tensor]:
        """See `FixedSteps.minimized`."""
        first = length(func.grad(fun)(y))
        for _ in range(self.max_steps):
            y = _step(fun, y, tol * first)
        return y, first

    def cost(self, n: int) -> tuple[int, int, int]:
        """See `FixedSteps.cost`."""
        values = self.max_steps * (_HALVINGS + 1)
        return values, self.max_steps + 1, self.max_steps * n


def _step(fun: Callable[[Tensor], Tensor], y: Tensor, tol: Tensor) -> Tensor:
    """One step from y, of length zero where the gradient is no longer than `tol`."""
    g, pull, f = func.vjp(func.grad_and_value(fun), y, has_aux=True)
    identity = torch.eye(y.numel(), dtype=y.dtype, device=y.device)
    hessian = func.vmap(pull)(identity)[0]
    d = -torch.cholesky_solve(g[:, None], _factor(hessian, identity))[:, 0]
    d = d * (length(y).clamp(min=math.sqrt(y.numel())) / length(d)).clamp(max=1.0)
    halves = 0.5 ** torch.arange(_HALVINGS, dtype=y.dtype, device=y.device)
    values = func.vmap(fun)(y + halves[:, None] * d)
    noise = 16.0 * torch.finfo(y.dtype).eps * f.abs()
    falls = values <= f + _SUFFICIENT_DECREASE * halves * torch.sum(d * g) + noise
    t = torch.where(falls, halves, 0.0).amax()
    return torch.where((length(g) > tol) & (t > 0.0), y + t * d, y)


def _factor(hessian: Tensor, identity: Tensor) -> Tensor:
    """Cholesky's factor of the Hessian, or of one that is shifted where it is not positive definite.

    By twice what Gershgorin's circles leave possible below zero, so that the most negative curvature about changes
    its sign.
    """
    factor, failed = linalg.cholesky_ex(hessian)
    diagonal = hessian.diagonal()
    least = torch.amin(diagonal - (hessian.abs().sum(1) - diagonal.abs()))
    shift = math.sqrt(torch.finfo(hessian.dtype).eps) * diagonal.abs().amax() - 2.0 * least
    shifted = linalg.cholesky_ex(hessian + shift * identity)[0]
    return torch.where(failed == 0, factor, shifted)


def newton_steps(where: str, minimizer: Newton) -> NewtonSteps:
    """The steps of `minimizer` written out.

    Raises:
        ValueError: There are too many of them.
    """
    if minimizer.max_steps > MOST:
        raise ValueError(
            f"`{where}` must take few Newton steps to be one program for all problems, at most {MOST}: each is a part "
            f"of the program. Got max_steps={minimizer.max_steps}. Pass e.g. `bilevel.optim.Newton(max_steps=8)`."
        )
    return NewtonSteps(minimizer.max_steps)
