"""The minimum residual method."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bilevel._tree import norm
from bilevel._types import Tree
from bilevel.linear._base import LinearSolver, check_limits, refined, system

_RESTARTS = 5  # iterative refinement beyond this gains nothing
_SINGULAR = 1e3  # units of rounding below which a pivot counts as zero


@dataclass(frozen=True)
class MINRES(LinearSolver):
    r"""The minimum residual method, for a symmetric matrix that may be indefinite.

    After k products it has the smallest residual $\|b - A v\|$ that k products allow: where `CG` meets a direction
    of negative curvature and stops, it goes on. It stops when $\|b - A v\| \le \text{rtol}\, \|b\|$, when rounding
    allows no smaller residual, or after `max_steps`. Where the matrix is singular and b lies outside of its range,
    the answer is a least-squares solution, and the residual says so.

    Attributes:
        rtol: Relative tolerance of the residual; at least 0.
        max_steps: Products at most; ten times the number of unknowns if left out.

    Raises:
        ValueError: A parameter is out of range.

    Example:
        >>> A = torch.tensor([[1.0, 2.0], [2.0, 1.0]], dtype=torch.float64)  # eigenvalues 3 and -1
        >>> b = torch.tensor([1.0, 5.0], dtype=torch.float64)
        >>> MINRES().solve(lambda v: A @ v, b)
        tensor([ 3.0000, -1.0000], dtype=torch.float64)

    References:
        Paige and Saunders, Solution of sparse indefinite systems of linear equations, SIAM Journal on Numerical
        Analysis 12 (1975), section 6.
    """

    rtol: float = 1e-14
    max_steps: int | None = None

    def __post_init__(self) -> None:
        check_limits("MINRES", self.rtol, self.max_steps)

    def solve(self, matvec: Callable[[Tree], Tree], b: Tree, v0: Tree | None = None) -> Tree:
        """See `LinearSolver.solve`."""
        equation = system(matvec, b, v0)

        def correct(r: Tensor, target: float, left: int) -> tuple[Tensor, int]:
            return _lanczos(equation.matvec, r, target, min(left, 8 * r.numel()))

        # The recursion loses digits in proportion to the condition number: solving for what is left regains them.
        return equation.restore(refined(equation, self.rtol, self.max_steps, correct, _RESTARTS))


def _lanczos(
    A: Callable[[Tensor], Tensor], b: Tensor, target: float, max_steps: int
) -> tuple[Tensor, int]:
    """An approximate solution from zero, and the products that it took: the recurrences of the paper.

    The Lanczos process makes A tridiagonal; Givens rotations (c, s) reduce that to an upper triangle of three
    diagonals, of which each column gives the next direction d.
    """
    tiny = _SINGULAR * torch.finfo(b.dtype).eps
    beta = phi = float(norm(b))
    q, q_before = b / beta, torch.zeros_like(b)
    d, d_before, v = torch.zeros_like(b), torch.zeros_like(b), torch.zeros_like(b)
    c, s, c_before, s_before, beta = -1.0, 0.0, -1.0, 0.0, 0.0
    largest = 0.0  # of the triangle's diagonal, near the norm of A
    for k in range(max_steps):
        w = A(q) - beta * q_before
        alpha = float(torch.dot(q, w))
        w = w - alpha * q
        beta_next = float(norm(w))
        # column k of the triangle: the two rotations before, then the one that annuls beta_next
        epsilon = s_before * beta
        entry = -c_before * beta
        delta = c * entry + s * alpha
        gamma_bar = s * entry - c * alpha
        gamma = math.hypot(gamma_bar, beta_next)
        if not gamma > tiny * largest:  # singular to rounding: no residual can be removed any more
            return v, k + 1
        largest = max(largest, gamma)
        c_before, s_before = c, s
        c, s = gamma_bar / gamma, beta_next / gamma
        d_before, d = d, (q - delta * d - epsilon * d_before) / gamma
        v = v + (c * phi) * d
        phi = s * phi
        if abs(phi) <= target or beta_next <= tiny * largest:
            return v, k + 1
        q_before, q, beta = q, w / beta_next, beta_next
    return v, max_steps
