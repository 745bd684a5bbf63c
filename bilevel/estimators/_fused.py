"""Hypergradients as one program without a decision: the same operations whatever the numbers are."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bilevel._autodiff import func
from bilevel._problem import BilevelProblem, lower_value, upper_value
from bilevel._solution import Evaluations, Status
from bilevel.estimators._base import FALLEN, Estimate, linear_tolerance
from bilevel.estimators._fixed_steps import FixedSteps, length
from bilevel.linear import CG, Dense

linalg: Any = torch.linalg  # its stubs are untyped
#: The hypergradient, y, what the next one can start from, and measured numbers.
Found = tuple[Tensor, Tensor, Tensor, Tensor]
#: Where among the numbers stands the length of the gradient of f that the solve began with.
FIRST = 3
#: From x, y, what the last one left or None, and the data of F and of f.
Program = Callable[[Tensor, Tensor, Tensor | None, Any, Any], Found]
_Objective = Callable[[Tensor, Tensor], Tensor]


class Fused(ABC):
    """An estimator whose computation is fixed, and what its numbers say."""

    @abstractmethod
    def program(self, problem: BilevelProblem) -> Program:
        """The computation, for a problem over vectors."""

    @abstractmethod
    def estimate(
        self, found: Found, numbers: list[float], is_warm: bool, memory: Mapping[str, Any] | None
    ) -> Estimate:
        """What was found, with its status; `numbers` are the last part of `found`."""


@dataclass(frozen=True)
class FusedImplicit(Fused):
    """See `Implicit`.

    Attributes:
        steps: Solve the lower problem.
        tol: See `Implicit`.
        linear: Solves the linear system.
    """

    steps: FixedSteps
    tol: float
    linear: CG | Dense

    def program(self, problem: BilevelProblem) -> Program:
        """See `Fused.program`."""

        def found(
            x: Tensor, y: Tensor, v0: Tensor | None, upper_data: Any, lower_data: Any
        ) -> Found:
            upper, lower = _on(problem, upper_data, lower_data)

            def slope(u: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
                return func.grad_and_value(lower, argnums=1)(u, w)

            y, first, knows = self.steps.minimized(lambda w: lower(x, w), y, self.tol)
            g, pull, f = func.vjp(slope, x, y, has_aux=True)
            (upper_x, b), F = func.grad_and_value(upper, argnums=(0, 1))(x, y)
            v = _solved(pull, b, v0, self.linear)
            mixed, product = pull(v)
            grad = upper_x - mixed
            lengths = [length(part) for part in (product - b, b, v, grad)]
            parts = [F, f, length(g), first, *lengths, knows]
            return grad, y, v, torch.stack([part.to(y.dtype) for part in parts])

        return found

    def estimate(
        self, found: Found, numbers: list[float], is_warm: bool, memory: Mapping[str, Any] | None
    ) -> Estimate:
        """See `Fused.estimate`."""
        grad, y, v, _ = found
        upper, lower, lower_residual, first, linear_residual, upper_y, adjoint, _, knows = numbers
        scale = max(first, float((memory or {}).get("scale", 0.0)))
        residual = linear_residual / (upper_y or 1.0)
        status = Status.CONVERGED
        if not math.isfinite(sum(numbers)):
            status = Status.NONFINITE
        elif knows < 0.0 or (knows == 0.0 and not lower_residual <= self.tol * scale):
            status = Status.LOWER_UNSOLVED
        elif not residual <= linear_tolerance(y.dtype, self.tol):
            status = Status.LINEAR_UNSOLVED
        n, linear = y.numel(), self.linear
        products = n if isinstance(linear, Dense) else _products(linear, n) + is_warm
        values, gradients, hvps = self.steps.cost(n)
        return Estimate(
            grad=grad,
            y=y,
            value=upper,
            status=status,
            info={
                "upper": upper,
                "lower": lower,
                "lower_residual": lower_residual,
                "linear_residual": residual,
            },
            noise=torch.finfo(y.dtype).eps * abs(upper) + adjoint * lower_residual,
            memory={"v": v, "scale": scale},
            evaluations=Evaluations(1, values + 1, 1, gradients + 1, hvps + products + 2),
        )


@dataclass(frozen=True)
class FusedUnrolled(Fused):
    """See `Unrolled`.

    Attributes:
        max_steps: Steps taken.
        constant: The first of them, which are not differentiated.
        lr: Their length.
    """

    max_steps: int
    constant: int
    lr: float

    def program(self, problem: BilevelProblem) -> Program:
        """See `Fused.program`."""

        def found(
            x: Tensor, y: Tensor, v0: Tensor | None, upper_data: Any, lower_data: Any
        ) -> Found:
            upper, lower = _on(problem, upper_data, lower_data)
            gradient = func.grad(lower, argnums=1)
            pulls: list[Callable[[Tensor], tuple[Tensor, Tensor]]] = []
            first = torch.zeros_like(y)
            for t in range(self.max_steps):
                if t < self.constant:
                    g = gradient(x, y)
                else:
                    g, pull = func.vjp(gradient, x, y)
                    pulls.append(pull)
                first = length(g) if t == 0 else first
                y = y - self.lr * g
            (grad, cotangent), F = func.grad_and_value(upper, argnums=(0, 1))(x, y)
            upper_y = length(cotangent)
            for pull in reversed(pulls):  # the adjoint of one step
                mixed, product = pull(self.lr * cotangent)
                grad, cotangent = grad - mixed, cotangent - product
            last, f = func.grad_and_value(lower, argnums=1)(x, y)
            parts = [F, f, length(last), first, length(cotangent), upper_y, length(grad)]
            return grad, y, cotangent, torch.stack([part.to(y.dtype) for part in parts])

        return found

    def estimate(
        self, found: Found, numbers: list[float], is_warm: bool, memory: Mapping[str, Any] | None
    ) -> Estimate:
        """See `Fused.estimate`."""
        grad, y, _, _ = found
        upper, lower, residual, first, cotangent, upper_y, _ = numbers
        eps = torch.finfo(y.dtype).eps
        scale = max(first, float((memory or {}).get("scale", 0.0)))
        has_fallen = residual <= FALLEN * scale and residual <= max(first, math.sqrt(eps) * scale)
        is_finite = math.isfinite(sum(numbers))
        status = Status.CONVERGED if has_fallen else Status.LOWER_UNSOLVED
        info = {"upper": upper, "lower": lower, "lower_residual": residual}
        if self.constant:
            info["truncated"] = cotangent / (upper_y or 1.0)
        taken = self.max_steps + 1
        products = 2 * (self.max_steps - self.constant)
        return Estimate(
            grad=grad,
            y=y,
            value=upper,
            status=status if is_finite else Status.NONFINITE,
            info=info,
            noise=eps * abs(upper),
            memory={"scale": scale},
            evaluations=Evaluations(1, taken, 1, taken, products),
        )


def _on(problem: BilevelProblem, upper_data: Any, lower_data: Any) -> tuple[_Objective, _Objective]:
    """F and f on their data."""
    return (
        lambda x, y: upper_value(problem, x, y, upper_data),
        lambda x, y: lower_value(problem, x, y, lower_data),
    )


def _solved(
    pull: Callable[[Tensor], tuple[Tensor, Tensor]],
    b: Tensor,
    v0: Tensor | None,
    linear: CG | Dense,
) -> Tensor:
    """The v of which the lower Hessian makes b."""

    def product(vector: Tensor) -> Tensor:
        return pull(vector)[1]

    if isinstance(linear, CG):
        return _conjugate_gradients(product, b, v0, linear)
    identity = torch.eye(b.numel(), dtype=b.dtype, device=b.device)
    hessian = func.vmap(product)(identity)  # symmetric: its rows are its columns
    return linalg.solve_ex(hessian, b)[0]


def _conjugate_gradients(
    A: Callable[[Tensor], Tensor], b: Tensor, v0: Tensor | None, linear: CG
) -> Tensor:
    """All steps are made; those after convergence, or after a curvature that is not positive, have length zero."""
    size = length(b)
    unit = torch.where(size > 0.0, size, 1.0)  # in which squares neither under- nor overflow
    v = torch.zeros_like(b) if v0 is None else v0 / unit
    r = b / unit if v0 is None else b / unit - A(v)
    rr = torch.sum(r * r)
    relative = max(linear.rtol, torch.finfo(b.dtype).eps)
    target = torch.clamp(linear.atol / unit, min=relative) ** 2
    p = r
    for _ in range(_products(linear, b.numel())):
        Ap = A(p)
        curvature = torch.sum(p * Ap)
        goes = (rr > target) & (curvature > 0.0)
        step = torch.where(goes, rr / curvature, 0.0)
        v = v + step * p
        r = r - step * Ap
        before, rr = rr, torch.sum(r * r)
        p = torch.where(goes, r + (rr / before) * p, p)
    return unit * v


def _products(linear: CG, n: int) -> int:
    """In exact arithmetic n are enough, so that of a few unknowns no more than twice as many are made."""
    return min(linear.max_steps or n, 2 * n)
