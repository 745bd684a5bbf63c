"""The linear system of the KKT conditions at a point: its regularity, its solutions, and a Newton step."""

from __future__ import annotations

import math
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bilevel import _tree
from bilevel.estimators._constraints import positive
from bilevel.estimators._kkt_point import KKTModel, KKTPoint

linalg: Any = torch.linalg  # its stubs are untyped
SINGULAR = 1e-10  # smallest over largest eigenvalue of what still counts as invertible


class NewtonStep(NamedTuple):
    """A step in y, and the multipliers after it."""

    y: Tensor
    multipliers: Tensor
    equality_multipliers: Tensor


class KKTSystem:
    """The matrix of the KKT equations over the active constraints.

    Attributes:
        curvature: Smallest eigenvalue of the Hessian of L along the active constraints, relative to its norm; None
            where they leave no direction.
        is_regular: Whether the matrix can be inverted and the curvature is positive.
        model: The problem linearized at the point.
        rows: Gradients in y of the active constraints, the equalities last, shape (a, n).
        rows_x: The same in x, shape (a, m).
        hessian: Of L in y, shape (n, n).
    """

    def __init__(self, point: KKTPoint, model: KKTModel) -> None:
        self._point, self.model = point, model
        inequality, equality = model.inequality, model.equality
        self.rows = torch.cat([inequality.in_y[point.active], equality.in_y])
        self.rows_x = torch.cat([inequality.in_x[point.active], equality.in_x])
        self.hessian = model.hessian
        # rows in units of the Hessian, so that the condition number means something
        size = float(linalg.matrix_norm(self.hessian)) or 1.0
        self._weights = size / positive(linalg.vector_norm(self.rows, dim=1))
        scaled = self.rows * self._weights[:, None]
        corner = self.rows.new_zeros((self.rows.shape[0],) * 2)
        self.matrix = torch.cat(
            [torch.cat([self.hessian, scaled.T], 1), torch.cat([scaled, corner], 1)]
        )
        self._size = size

    @cached_property
    def curvature(self) -> float | None:
        if not _tree.is_finite(self.matrix):
            return -math.inf
        free = _null_space(self.rows)
        if free.shape[1] == 0:
            return None
        reduced = free.T @ self.hessian @ free
        return float(linalg.eigvalsh(reduced)[0]) / self._size

    @property
    def is_regular(self) -> bool:
        if not _tree.is_finite(self.matrix):
            return False
        eps = max(SINGULAR, 10.0 * torch.finfo(self.matrix.dtype).eps)
        sizes = linalg.svdvals(self.matrix)
        curvature = self.curvature
        return float(sizes[-1]) > eps * float(sizes[0]) and (curvature is None or curvature > eps)

    def solve(self, of_y: Tensor) -> tuple[Tensor, Tensor, float]:
        """(p, q) with the matrix times (p, q) equal to (of_y, 0), and the relative residual."""
        right = torch.cat([of_y, of_y.new_zeros(self.rows.shape[0])])
        solution = _least_squares(self.matrix, right)
        residual = _tree.length(self.matrix @ solution - right) / (_tree.length(right) or 1.0)
        n = of_y.numel()
        return solution[:n], solution[n:] * self._weights, residual

    def pull_back(self, p: Tensor, q: Tensor) -> Tensor:
        """The derivative in x of the KKT equations, transposed, times (p, q), shape (m,)."""
        mixed = self.model.lagrangian.mixed_vjp(p)
        return mixed + (self.rows_x.T @ q).to(mixed)

    def newton(self) -> NewtonStep:
        """One step on the KKT equations, the inactive multipliers set to zero."""
        point, model = self._point, self.model
        inequality, equality = model.inequality, model.equality
        held = torch.cat([inequality.value[point.active], equality.value])
        old = torch.cat([point.multipliers[point.active], point.equality_multipliers])
        # grad L without the multipliers that are set to zero
        dropped = (point.multipliers * ~point.active) @ inequality.in_y
        grad = model.lagrangian.grad - dropped
        right = -torch.cat([grad, held * self._weights])
        solution = _least_squares(self.matrix, right)
        n = point.y.numel()
        new = old + solution[n:] * self._weights
        count = int(point.active.sum())
        multipliers = torch.zeros_like(point.multipliers)
        multipliers[point.active] = new[:count]
        return NewtonStep(solution[:n], multipliers, new[count:])


def _null_space(rows: Tensor) -> Tensor:
    """An orthonormal basis of what is orthogonal to the rows, shape (n, n - rank)."""
    n = rows.shape[1]
    if rows.shape[0] == 0:
        return torch.eye(n, dtype=rows.dtype, device=rows.device)
    unit = rows / positive(linalg.vector_norm(rows, dim=1, keepdim=True))
    _, sizes, basis = linalg.svd(unit, full_matrices=True)
    rank = int((sizes > 1e-8).sum())
    return basis[rank:].T


def _least_squares(matrix: Tensor, right: Tensor) -> Tensor:
    """The solution of smallest norm; where the matrix is regular, the solution."""
    factors, pivots, info = linalg.lu_factor_ex(matrix)
    sizes = factors.diagonal().abs()
    if int(info) == 0 and float(sizes.min()) > SINGULAR * float(sizes.max()):
        solution = linalg.lu_solve(factors, pivots, right[:, None])[:, 0]
        correction = right - matrix @ solution  # one step of refinement
        return solution + linalg.lu_solve(factors, pivots, correction[:, None])[:, 0]
    if not _tree.is_finite(matrix):
        return torch.full_like(right, math.nan)
    return linalg.pinv(matrix, rtol=SINGULAR) @ right
