"""The Neumann series."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bilevel._errors import check_count, check_number
from bilevel._tree import norm
from bilevel._types import Tree
from bilevel.linear._base import LinearSolver, System, system, trivial

POWER_STEPS = 10  # enough for the norm to a few percent; the series allows a factor of two


@dataclass(frozen=True)
class Neumann(LinearSolver):
    r"""The truncated series $A^{-1} b = \eta \sum_k (I - \eta A)^k b$, one product a term.

    It converges for a symmetric positive definite matrix and $\eta < 2 / \|A\|$, at a rate of
    $1 - \eta \lambda_{\min}$: slow where the matrix is ill-conditioned, and cheap where a few terms
    do. It stops when the residual no longer falls, so a bad step cannot make it diverge.

    Attributes:
        max_steps: Terms at most.
        step_size: The step $\eta$, above 0; one over an estimate of the norm of the matrix, which
            costs ten products, if left out.
        rtol: Relative tolerance of the residual $\|b - A v\| \le \text{rtol}\, \|b\|$; at least 0.

    Raises:
        ValueError: A parameter is out of range.

    Example:
        >>> A = torch.tensor([[4.0, 1.0], [1.0, 3.0]], dtype=torch.float64)
        >>> b = torch.tensor([1.0, 2.0], dtype=torch.float64)
        >>> Neumann(max_steps=50).solve(lambda v: A @ v, b)  # (1/11, 7/11)
        tensor([0.0909, 0.6364], dtype=torch.float64)

    References:
        Lorraine, Vicol and Duvenaud, Optimizing Millions of Hyperparameters by Implicit
        Differentiation, AISTATS 2020.
    """

    max_steps: int = 100
    step_size: float | None = None
    rtol: float = 1e-12

    def __post_init__(self) -> None:
        check_count("Neumann", "max_steps", self.max_steps, "Pass the number of terms, e.g. 100.")
        if self.step_size is not None:
            mend = "Pass None to have it measured."
            check_number("Neumann", "step_size", self.step_size, mend)
        check_number("Neumann", "rtol", self.rtol, "Pass e.g. 1e-8.", zero=True)

    def solve(self, matvec: Callable[[Tree], Tree], b: Tree, v0: Tree | None = None) -> Tree:
        """See `LinearSolver.solve`."""
        equation = system(matvec, b, v0)
        return equation.restore(self._solve(equation))

    def _solve(self, equation: System) -> Tensor:
        A, b = equation.matvec, equation.b
        known = trivial(equation)
        if known is not None:
            return known
        step = 1.0 / _spectral_norm(A, b) if self.step_size is None else self.step_size
        v = torch.zeros_like(b) if equation.v0 is None else equation.v0
        r = b if equation.v0 is None else b - A(v)
        least = float(norm(r))
        for _ in range(self.max_steps):
            if least <= self.rtol * equation.size:
                break
            candidate = v + step * r
            r = b - A(candidate)
            residual = float(norm(r))
            if not residual < least:
                break
            v, least = candidate, residual
        return v


def _spectral_norm(A: Callable[[Tensor], Tensor], b: Tensor) -> float:
    """The spectral norm, by power iteration from a fixed start near the direction of b."""
    u = torch.cos(torch.arange(b.numel(), dtype=b.dtype, device=b.device))
    u = u / norm(u) + b / norm(b)
    estimate = 0.0
    for _ in range(POWER_STEPS):
        u = A(u / norm(u))
        estimate = float(norm(u))
        if not 0.0 < estimate < math.inf:
            return 1.0
    return estimate
