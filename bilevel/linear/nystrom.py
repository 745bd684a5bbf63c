"""The Nystrom approximation of a matrix, as an inverse and as a preconditioner."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bilevel._errors import check_count, check_number
from bilevel._tree import norm
from bilevel._types import Tree
from bilevel.linear._base import LinearSolver, System, check_limits, system, trivial
from bilevel.linear.cg import conjugate_gradients

linalg: Any = torch.linalg  # its stubs are untyped
_SEED = 0  # the same directions at every call, so that equal calls give equal answers


@dataclass(frozen=True)
class Nystrom(LinearSolver):
    r"""Conjugate gradients on a randomized low-rank approximation, for a positive semidefinite matrix.

    From `rank` products $Y = A \Omega$ with random orthonormal columns $\Omega$ comes the Nystrom approximation
    $\hat A = Y (\Omega^\top Y)^{-1} Y^\top = U \Lambda U^\top$. It serves in one of two ways:

    - with `rho=None` as the preconditioner of conjugate gradients, which then converge to the solution, fast
      where all but `rank` eigenvalues lie close together;
    - with `rho > 0` alone: the answer is $(\hat A + \rho I)^{-1} b$, no further product needed. That is biased,
      by the eigenvalues left out and by $\rho$, and never larger than $\|b\| / \rho$. `Implicit` says so: where the
      bias leaves a residual, its status is LINEAR_UNSOLVED by design, though the hypergradient may be of use.

    Attributes:
        rank: Products for the approximation, at least 1; no more than the number of unknowns are used.
        rho: Regularization, above 0, or None to iterate to the solution.
        rtol: Relative tolerance of the residual, as in `CG`; at least 0.
        max_steps: Further products at most; ten times the number of unknowns if left out.

    Raises:
        ValueError: A parameter is out of range.
        TypeError: A parameter is of the wrong kind.

    Example:
        >>> A = torch.diag(torch.tensor([1e6, 1e4, 1.0, 1.0], dtype=torch.float64))
        >>> b = torch.tensor([1e6, 1e4, 1.0, 2.0], dtype=torch.float64)
        >>> Nystrom(rank=2).solve(lambda v: A @ v, b)
        tensor([1.0000, 1.0000, 1.0000, 2.0000], dtype=torch.float64)

    References:
        Hataya and Yamada, Nystrom method for accurate and scalable implicit differentiation (AISTATS 2023), Eq. 6,
        for `rho`; Frangella, Tropp and Udell, Randomized Nystrom preconditioning, SIAM Journal on Matrix Analysis
        and Applications 44 (2023), algorithm 2.1 and Eq. 5.3.

    Note:
        The former paper samples columns of A, which is $\Omega$ made of unit vectors; random directions approximate
        no worse and do not depend on the coordinates.
    """

    rank: int = 20
    rho: float | None = None
    rtol: float = 1e-14
    max_steps: int | None = None

    def __post_init__(self) -> None:
        check_limits("Nystrom", self.rtol, self.max_steps)
        check_count("Nystrom", "rank", self.rank, "Pass e.g. 20.")
        if self.rho is not None:
            check_number("Nystrom", "rho", self.rho, "Pass None to iterate to the solution.")

    def solve(self, matvec: Callable[[Tree], Tree], b: Tree, v0: Tree | None = None) -> Tree:
        """See `LinearSolver.solve`; with `rho`, `v0` is not needed."""
        equation = system(matvec, b, v0)
        return equation.restore(self._solve(equation))

    def _solve(self, equation: System) -> Tensor:
        b, n = equation.b, equation.b.numel()
        known = trivial(equation)
        if known is not None:
            return known
        U, eigenvalues = self._approximation(equation)
        if self.rho is not None:
            inside = U.T @ b
            return U @ (inside / (eigenvalues + self.rho)) + (b - U @ inside) / self.rho
        # Eq. 5.3 without regularization: the smallest eigenvalue found stands for those that were not.
        largest, smallest = float(eigenvalues.max()), float(eigenvalues.min())
        floor = max(smallest, torch.finfo(b.dtype).eps * largest) or 1.0
        scale = floor / eigenvalues.clamp(min=floor)

        def precondition(r: Tensor) -> Tensor:
            inside = U.T @ r
            return r + U @ ((scale - 1.0) * inside)

        steps = 10 * n if self.max_steps is None else self.max_steps
        return conjugate_gradients(equation, self.rtol, 0.0, steps, precondition)

    def _approximation(self, equation: System) -> tuple[Tensor, Tensor]:
        """Orthonormal U, shape (n, rank), and the eigenvalues, shape (rank,), none below 0: algorithm 2.1."""
        b, n = equation.b, equation.b.numel()
        generator = torch.Generator().manual_seed(_SEED)
        random = torch.randn(n, min(self.rank, n), generator=generator, dtype=torch.float64).to(b)
        omega: Tensor = linalg.qr(random)[0]
        image = torch.stack([equation.matvec(column) for column in omega.T], dim=1)
        shift = torch.finfo(b.dtype).eps * float(norm(image))  # makes the Gram matrix invertible
        Y = image + shift * omega
        gram = omega.T @ Y
        values, vectors = linalg.eigh(0.5 * (gram + gram.T))
        # Where A is not semidefinite, what is negative is left out: conjugate gradients then say the rest.
        roots = torch.where(values > shift, values, math.inf).rsqrt()
        U, singular, _ = linalg.svd(Y @ (vectors * roots), full_matrices=False)
        return U, (singular**2 - shift).clamp(min=0.0)
