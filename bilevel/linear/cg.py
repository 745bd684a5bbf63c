"""Conjugate gradients."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bilevel._tree import length
from bilevel._types import Tree
from bilevel.linear._base import LinearSolver, System, check_limits, system, trivial


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

    rtol: float = 1e-14
    atol: float = 0.0
    max_steps: int | None = None

    def __post_init__(self) -> None:
        check_limits("CG", self.rtol, self.max_steps, self.atol)

    def solve(self, matvec: Callable[[Tree], Tree], b: Tree, v0: Tree | None = None) -> Tree:
        """See `LinearSolver.solve`."""
        equation = system(matvec, b, v0)
        n = equation.b.numel()
        steps = 10 * n if self.max_steps is None else self.max_steps
        return equation.restore(conjugate_gradients(equation, self.rtol, self.atol, steps))


def conjugate_gradients(
    equation: System,
    rtol: float,
    atol: float,
    max_steps: int,
    precondition: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """The loop of `CG`, with a symmetric positive definite approximation of the inverse or without.

    Args:
        equation: The system.
        rtol: See `CG`.
        atol: See `CG`.
        max_steps: Products at most.
        precondition: Applies the approximate inverse.

    Returns:
        The last iterate, shape (n,).
    """
    A, b, left = equation.matvec, equation.b, max_steps
    known = trivial(equation)
    if known is not None:
        return known
    size = equation.size
    eps = torch.finfo(b.dtype).eps
    target = max(rtol * size, atol / equation.unit, eps * size)

    def measured(r: Tensor) -> tuple[Tensor, float, float]:
        """The preconditioned residual z, r . z and |r|."""
        if precondition is None:
            rr = float(torch.dot(r, r))
            return r, rr, math.sqrt(rr)
        z = precondition(r)
        return z, float(torch.dot(r, z)), length(r)

    if equation.v0 is None:
        v, r = torch.zeros_like(b), b
    else:
        v = equation.v0
        r, left = b - A(v), left - 1
    z, rz, residual = measured(r)
    p = z
    best, least = v, math.inf
    while residual > target and left > 0:
        Ap, left = A(p), left - 1
        curvature = float(torch.dot(p, Ap))
        if not curvature > 0.0:
            break
        step = rz / curvature
        if not step < torch.finfo(b.dtype).max:
            break
        v = torch.add(v, p, alpha=step)
        r = torch.sub(r, Ap, alpha=step)
        rz_before = rz
        z, rz, residual = measured(r)
        if residual > target:
            p = torch.add(z, p, alpha=rz / rz_before)
            continue
        if target > math.sqrt(eps) * size or left == 0:
            break
        # The recursion claims convergence below what its rounding errors may amount to.
        r, left = b - equation.measure(v), left - 1
        z, rz, residual = measured(r)
        p = z
        if residual > 0.5 * least:  # no better than at the claim before
            return v if residual < least else best
        best, least = v, residual
    return v
