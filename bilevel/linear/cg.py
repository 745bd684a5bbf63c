"""Conjugate gradients."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from bilevel._tree import norm
from bilevel._types import Tree
from bilevel.linear._base import LinearSolver, System, system


@dataclass(frozen=True)
class CG(LinearSolver):
    r"""Conjugate gradients, for a symmetric positive definite matrix.

    Stops when $\|b - A v\| \le \max(\text{rtol}\, \|b\|, \text{atol})$, when rounding allows no
    smaller residual, or when it meets a direction of non-positive curvature $p^\top A p \le 0$,
    which shows that the matrix is not positive definite. It returns the last iterate, the best one
    in the norm of the matrix.

    Attributes:
        rtol: Relative tolerance of the residual; at least 0.
        atol: Absolute tolerance of the residual; at least 0.
        max_steps: Products at most; ten times the number of unknowns if left out.

    Raises:
        ValueError: A parameter is out of range.

    Example:
        >>> A = torch.tensor([[4.0, 1.0], [1.0, 3.0]], dtype=torch.float64)
        >>> b = torch.tensor([1.0, 2.0], dtype=torch.float64)
        >>> CG().solve(lambda v: A @ v, b)  # (1/11, 7/11)
        tensor([0.0909, 0.6364], dtype=torch.float64)

    References:
        Hestenes and Stiefel, Methods of Conjugate Gradients for Solving Linear Systems, Journal of
        Research of the National Bureau of Standards, 1952.
    """

    rtol: float = 1e-12
    atol: float = 0.0
    max_steps: int | None = None

    def __post_init__(self) -> None:
        for name in ("rtol", "atol"):
            if not 0.0 <= getattr(self, name) < math.inf:
                raise ValueError(
                    f"`CG({name}=...)` must be a finite number of at least 0. "
                    f"Got {name}={getattr(self, name)}. Pass e.g. 1e-8."
                )
        if self.max_steps is not None and self.max_steps < 1:
            raise ValueError(
                "`CG(max_steps=...)` must be at least 1, or None. "
                f"Got max_steps={self.max_steps}. Pass None for ten times the number of unknowns."
            )

    def solve(self, matvec: Callable[[Tree], Tree], b: Tree, v0: Tree | None = None) -> Tree:
        """See `LinearSolver.solve`."""
        equation = system(matvec, b, v0)
        return equation.restore(self._solve(equation))

    def _solve(self, equation: System) -> torch.Tensor:
        A, b, n = equation.matvec, equation.b, equation.b.numel()
        size = float(norm(b))
        if size == 0.0 or not math.isfinite(size):
            return b * size  # zero, or NaN and infinities
        eps = torch.finfo(b.dtype).eps
        target = max(self.rtol * size, self.atol, eps * size)
        left = 10 * n if self.max_steps is None else self.max_steps
        if equation.v0 is None:
            v, r = torch.zeros_like(b), b
        else:
            v = equation.v0
            r, left = b - A(v), left - 1
        p, rr = r, float(torch.dot(r, r))
        best, least = v, math.inf
        while math.sqrt(rr) > target and left > 0:
            Ap, left = A(p), left - 1
            curvature = float(torch.dot(p, Ap))
            if not curvature > 0.0:
                break
            step = rr / curvature
            v = v + step * p
            r = r - step * Ap
            rr, rr_before = float(torch.dot(r, r)), rr
            p = r + (rr / rr_before) * p
            if math.sqrt(rr) > target or target > math.sqrt(eps) * size or left == 0:
                continue
            # The recursion claims convergence below what its rounding errors may amount to.
            r, left = b - A(v), left - 1
            p, rr = r, float(torch.dot(r, r))
            if math.sqrt(rr) > 0.5 * least:  # no better than at the claim before
                return v if math.sqrt(rr) < least else best
            best, least = v, math.sqrt(rr)
        return v
