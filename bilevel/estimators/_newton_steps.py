"""A fixed number of Newton steps, as operations on tensors that can be traced."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bilevel._autodiff import func
from bilevel.estimators._fixed_steps import FixedSteps, Reached, length
from bilevel.optim import Newton
from bilevel.optim.newton import has_digits

linalg: Any = torch.linalg  # its stubs are untyped
MOST = 30  # steps: each is a part of the graph of its own, and none ends early
_SUFFICIENT_DECREASE = 1e-4  # Armijo's constant
_HALVINGS = 12  # of a step, all of which are measured at once


@dataclass(frozen=True)
class NewtonSteps(FixedSteps):
    """The steps of `bilevel.optim.Newton`, each with a Hessian of its own.

    Note:
        An indefinite Hessian is shifted, where `Newton` takes its absolute eigenvalues, which cost more.
        A saddle at which the steps begin is not left.

    Attributes:
        max_steps: Steps taken, > 0.

    References:
        Nocedal and Wright, Numerical Optimization (2006), algorithm 3.2 and section 3.4.
    """

    max_steps: int

    def minimized(self, fun: Callable[[Tensor], Tensor], y: Tensor, tol: float) -> Reached:
        """See `FixedSteps.minimized`."""
        g, f = func.grad_and_value(fun)(y)
        first = length(g)
        knows = torch.zeros_like(first)
        for _ in range(self.max_steps):
            y, knows = _step(fun, y, tol * first, f)
        return y, first, knows

    def cost(self, n: int) -> tuple[int, int, int]:
        """See `FixedSteps.cost`."""
        values = self.max_steps * (_HALVINGS + 1)
        return values, self.max_steps + 1, self.max_steps * n


def steps_needed(fun: Callable[[Tensor], Tensor], y: Tensor, tol: float) -> int | None:
    """The Newton steps from y after which the gradient has fallen to `tol` times itself, or the value can fall no more.

    Returns:
        Their number, at least 1, or None where more are needed than one program may have.
    """
    g, f = func.grad_and_value(fun)(y)
    first = length(g)
    for count in range(1, MOST + 1):
        y, knows = _step(fun, y, tol * first, f)
        left = length(func.grad(fun)(y))
        if float(left) <= tol * float(first) or float(knows) > 0.0:
            return count
    return None


def _step(
    fun: Callable[[Tensor], Tensor], y: Tensor, tol: Tensor, start: Tensor
) -> tuple[Tensor, Tensor]:
    """One step from y, of length zero where the gradient is no longer than `tol`, and what is known there.

    `start` is the value at the first y: what has been lost since then was rounded too.
    """
    g, pull, f = func.vjp(func.grad_and_value(fun), y, has_aux=True)
    identity = torch.eye(y.numel(), dtype=y.dtype, device=y.device)
    hessian = func.vmap(pull)(identity)[0]
    factor, is_indefinite = _factor(hessian, identity)
    d = -torch.cholesky_solve(g[:, None], factor)[:, 0]
    d = d * (length(y).clamp(min=math.sqrt(y.numel())) / length(d)).clamp(max=1.0)
    halves = 0.5 ** torch.arange(_HALVINGS, dtype=y.dtype, device=y.device)
    values = func.vmap(fun)(y + halves[:, None] * d)
    noise = 16.0 * torch.finfo(y.dtype).eps * torch.maximum(f.abs(), start - f)
    slope = torch.sum(d * g)
    falls = values <= f + _SUFFICIENT_DECREASE * halves * slope + noise
    t = torch.where(falls, halves, 0.0).amax()
    knows = torch.where(is_indefinite, -1.0, torch.where(-0.5 * slope <= noise, 1.0, 0.0))
    return torch.where((length(g) > tol) & (t > 0.0), y + t * d, y), knows


def _factor(hessian: Tensor, identity: Tensor) -> tuple[Tensor, Tensor]:
    """Cholesky's factor of the Hessian, shape (n, n), and whether that has negative eigenvalues.

    Where it is not positive definite it is shifted: a little first, which is enough where it is singular, then by
    twice what Gershgorin's circles leave possible below zero, so that the most negative curvature about changes its
    sign.
    """
    eps = torch.finfo(hessian.dtype).eps
    size = hessian.abs().amax()
    little = torch.where(size > 0.0, math.sqrt(eps) * size, eps)  # without curvature: the gradient
    diagonal = hessian.diagonal()
    least = torch.amin(diagonal - (hessian.abs().sum(1) - diagonal.abs()))
    factor, failed = linalg.cholesky_ex(hessian)
    nudged, is_indefinite = linalg.cholesky_ex(hessian + little * identity)
    shifted, _ = linalg.cholesky_ex(hessian + (little - 2.0 * least) * identity)
    positive = torch.where(is_indefinite == 0, nudged, shifted)
    is_sound = (failed == 0) & has_digits(hessian, factor)
    return torch.where(is_sound, factor, positive), is_indefinite != 0


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
