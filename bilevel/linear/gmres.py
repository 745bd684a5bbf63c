"""The generalized minimum residual method."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bilevel._errors import check_count
from bilevel._tree import norm
from bilevel._types import Tree
from bilevel.linear._base import LinearSolver, check_limits, refined, system

linalg: Any = torch.linalg  # its stubs are untyped


@dataclass(frozen=True)
class GMRES(LinearSolver):
    r"""The generalized minimum residual method, for any square matrix.

    After k products since the last restart it has the smallest residual $\|b - A v\|$ that k products allow; it
    keeps k vectors for that. It stops when $\|b - A v\| \le \text{rtol}\, \|b\|$, when a whole cycle did not halve
    the residual, or after `max_steps`. For a symmetric matrix `MINRES` does the same with three vectors.

    Attributes:
        rtol: Relative tolerance of the residual; at least 0.
        max_steps: Products at most; ten times the number of unknowns if left out.
        restart: Vectors to keep, at least 1: the number of products after which it starts again.

    Raises:
        ValueError: A parameter is out of range.

    Example:
        >>> A = torch.tensor([[0.0, 2.0], [-1.0, 1.0]], dtype=torch.float64)
        >>> b = torch.tensor([2.0, 3.0], dtype=torch.float64)
        >>> GMRES().solve(lambda v: A @ v, b)
        tensor([-2.,  1.], dtype=torch.float64)

    References:
        Saad and Schultz, GMRES: a generalized minimal residual algorithm for solving nonsymmetric linear systems,
        SIAM Journal on Scientific and Statistical Computing 7 (1986), algorithm 4.
    """

    rtol: float = 1e-14
    max_steps: int | None = None
    restart: int = 100

    def __post_init__(self) -> None:
        check_limits("GMRES", self.rtol, self.max_steps)
        check_count("GMRES", "restart", self.restart, "Pass e.g. 100.")

    def solve(self, matvec: Callable[[Tree], Tree], b: Tree, v0: Tree | None = None) -> Tree:
        """See `LinearSolver.solve`."""
        equation = system(matvec, b, v0)

        def correct(r: Tensor, target: float, left: int) -> tuple[Tensor, int]:
            return _cycle(equation.matvec, r, target, min(self.restart, r.numel(), left))

        return equation.restore(refined(equation, self.rtol, self.max_steps, correct))


def _cycle(
    A: Callable[[Tensor], Tensor], b: Tensor, target: float, max_steps: int
) -> tuple[Tensor, int]:
    """The best approximation from zero, and the products that it took: Arnoldi's process and Givens rotations."""
    eps = torch.finfo(b.dtype).eps
    size = float(norm(b))
    basis = [b / size]
    triangle: list[list[float]] = []  # its columns
    rotations: list[tuple[float, float]] = []
    rhs, spent = [size], 0
    for k in range(max_steps):
        w, spent = A(basis[k]), spent + 1
        Q, scale = torch.stack(basis), float(norm(w))
        h = Q @ w
        w = w - Q.T @ h
        again = Q @ w  # orthogonal to rounding only after the second time
        w, h = w - Q.T @ again, h + again
        length = float(norm(w))
        if not math.isfinite(length):
            break
        entries: Any = h  # `tolist` is untyped
        column: list[float] = entries.tolist()  # one wait for the device, not one an entry
        for j, (c, s) in enumerate(rotations):
            column[j], column[j + 1] = (
                c * column[j] + s * column[j + 1],
                c * column[j + 1] - s * column[j],
            )
        diagonal = math.hypot(column[k], length)
        if not diagonal > eps * scale:  # a direction that A annihilates
            break
        c, s = column[k] / diagonal, length / diagonal
        column[k] = diagonal
        rotations.append((c, s))
        triangle.append(column)
        rhs[k:] = [c * rhs[k], -s * rhs[k]]
        if abs(rhs[-1]) <= target or not length > eps * scale:
            break
        basis.append(w / length)
    k = len(triangle)
    if k == 0:
        return torch.zeros_like(b), spent
    R = b.new_tensor([[*column, *([0.0] * (k - 1 - j))] for j, column in enumerate(triangle)]).T
    weights = linalg.solve_triangular(R, b.new_tensor(rhs[:k])[:, None], upper=True)[:, 0]
    return torch.stack(basis[:k]).T @ weights, spent
