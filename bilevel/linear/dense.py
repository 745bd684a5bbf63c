"""The matrix itself, and its factors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from bilevel._types import Tree
from bilevel.linear._base import LinearSolver, Product, system

linalg: Any = torch.linalg  # its stubs are untyped


@dataclass(frozen=True)
class Dense(LinearSolver):
    r"""Forms the matrix column by column and solves by LU: n products, n^2 numbers, n^3 operations.

    Exact to rounding, for any square matrix. Where the matrix is singular to rounding, the answer is
    the least-squares solution of smallest norm.

    Example:
        >>> A = torch.tensor([[4.0, 1.0], [1.0, 3.0]], dtype=torch.float64)
        >>> b = torch.tensor([1.0, 2.0], dtype=torch.float64)
        >>> Dense().solve(lambda v: A @ v, b)  # (1/11, 7/11)
        tensor([0.0909, 0.6364], dtype=torch.float64)
    """

    def solve(self, matvec: Callable[[Tree], Tree], b: Tree, v0: Tree | None = None) -> Tree:
        """See `LinearSolver.solve`; `v0` is not needed."""
        equation = system(matvec, b, None)
        n = equation.b.numel()
        if isinstance(matvec, Product) and matvec.columns is not None:
            matrix = matvec.columns()
        else:
            identity = torch.eye(n, dtype=equation.b.dtype, device=equation.b.device)
            matrix = torch.stack([equation.matvec(column) for column in identity], dim=1)
        factors, swaps, _ = linalg.lu_factor_ex(matrix)
        pivots = factors.diagonal().abs()
        singular = pivots.min() <= n * torch.finfo(matrix.dtype).eps * pivots.max()
        if bool(singular) and bool(torch.isfinite(matrix).all()):
            return equation.restore(linalg.pinv(matrix) @ equation.b)
        solution = linalg.lu_solve(factors, swaps, equation.b.unsqueeze(1))
        return equation.restore(solution.squeeze(1))
