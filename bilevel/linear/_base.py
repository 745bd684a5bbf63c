"""What solves `A v = b` where A is known by its products alone."""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bilevel import _tree
from bilevel._errors import StructureError, check_count, check_number
from bilevel._types import Tree

_SAFE = 1e-10  # between it and its inverse the products of two lengths fit into float32


class LinearSolver(ABC):
    """Solves `matvec(v) = b`.

    Example:
        >>> from bilevel.linear import CG, Dense
        >>> isinstance(CG(), LinearSolver) and isinstance(Dense(), LinearSolver)
        True
    """

    @abstractmethod
    def solve(self, matvec: Callable[[Tree], Tree], b: Tree, v0: Tree | None = None) -> Tree:
        """The v with `matvec(v) = b`, as near as the solver gets.

        A solver that stops early returns its best iterate: whoever needs to know how good it is
        measures the residual `b - matvec(v)`.

        Args:
            matvec: The product of the matrix with a tree like `b`; linear.
            b: The right-hand side: a tensor or a tree of tensors.
            v0: Where an iterative solver starts, like `b`; zero if left out.

        Returns:
            A new tree like `b`, without a graph.

        Raises:
            StructureError: `v0` or a product is not like `b`.
        """


@dataclass(frozen=True)
class Product:
    """A product with vectors, and what is known of it beside that.

    Attributes:
        matvec: The product with a vector of shape (n,).
        columns: Makes the matrix, shape (n, n), for `Dense`; None where that is too large to be had at once.
        measure: The product with what may be the solution, which the caller keeps; None for `matvec`.
    """

    matvec: Callable[[Tree], Tree]
    columns: Callable[[], Tensor] | None = None
    measure: Callable[[Tree], Tree] | None = None

    def __call__(self, v: Tree) -> Tree:
        return self.matvec(v)


@dataclass(frozen=True)
class System:
    """The same equation over one vector, in float32 or wider.

    Attributes:
        matvec: The product with a vector of shape (n,).
        measure: The same, with what may be the solution.
        b: The right-hand side in its unit, shape (n,).
        size: The length of `b`.
        v0: The start in the same unit, shape (n,), or None.
        unit: A power of two; other than one where the squares of the right-hand side may not fit into float32.
        restore: Puts a solution back into its unit, and into a tree like the given right-hand side.
    """

    matvec: Callable[[Tensor], Tensor]
    measure: Callable[[Tensor], Tensor]
    b: Tensor
    size: float
    v0: Tensor | None
    unit: float
    restore: Callable[[Tensor], Tree]


def system(matvec: Callable[[Tree], Tree], b: Tree, v0: Tree | None) -> System:
    """The equation over vectors; half-precision products are summed up in float32."""
    vector, unravel = _tree.ravel(b)
    vector = vector.detach()
    dtype, n, size = vector.dtype, vector.numel(), _tree.length(vector)

    def checked(matvec: Callable[[Tree], Tree]) -> Callable[[Tensor], Tensor]:
        def product(v: Tensor) -> Tensor:
            image = _tree.ravel(matvec(unravel(v)))[0].detach()
            if image.numel() != n:
                raise StructureError(
                    f"`matvec(v)` must be like `b`, which has {n} entries. Got {image.numel()}. "
                    "Return the product with a square matrix."
                )
            return image if image.dtype == dtype else image.to(dtype)

        return product

    start = None
    if v0 is not None:
        _tree.check_like(v0, b, "v0")
        start = _tree.ravel(v0)[0].detach().clone()
    known = matvec if isinstance(matvec, Product) else Product(matvec)
    products = checked(known.matvec), checked(known.measure or known.matvec)
    unit = _unit(size, dtype)
    if unit == 1.0:
        return System(*products, vector, size, start, unit, unravel)
    start = None if start is None else start / unit
    return System(*products, vector / unit, size / unit, start, unit, lambda v: unravel(unit * v))


def _unit(size: float, dtype: torch.dtype) -> float:
    if size == 0.0 or not math.isfinite(size) or _SAFE < size < 1.0 / _SAFE:
        return 1.0
    largest = math.frexp(torch.finfo(dtype).max)[1] - 2
    return math.ldexp(1.0, min(math.frexp(size)[1], largest))


def trivial(equation: System) -> Tensor | None:
    """The answer where b is zero or not finite; None where there is something to solve."""
    size = equation.size
    return equation.b * size if size == 0.0 or not math.isfinite(size) else None


def refined(
    equation: System,
    rtol: float,
    max_steps: int | None,
    correct: Callable[[Tensor, float, int], tuple[Tensor, int]],
    cycles: int | None = None,
) -> Tensor:
    """Solve for what is left of the residual, again and again, while that halves it.

    Args:
        equation: The system.
        rtol: Relative tolerance of the residual.
        max_steps: Products at most; ten times the number of unknowns where it is None.
        correct: From a residual, its target and the products left: an approximate solution from zero, and the
            products that it took.
        cycles: Corrections at most.

    Returns:
        The last iterate that improved, shape (n,).
    """
    A, b = equation.matvec, equation.b
    known = trivial(equation)
    if known is not None:
        return known
    target = max(rtol, torch.finfo(b.dtype).eps) * equation.size
    left = 10 * b.numel() if max_steps is None else max_steps
    v, r = torch.zeros_like(b), b
    if equation.v0 is not None:
        v, left = equation.v0, left - 1
        r = b - A(v)
    residual = float(_tree.norm(r))
    for _ in itertools.count() if cycles is None else range(cycles):
        if not residual > target or left <= 0:
            break
        correction, spent = correct(r, target, left)
        left -= spent + 1
        if left < 0:  # no product left to measure with
            return v + correction
        remaining = r - A(correction)
        before, residual = residual, float(_tree.norm(remaining))
        if not residual < before:
            break
        v, r = v + correction, remaining
        if residual > 0.5 * before:
            break
    return v


def check_limits(name: str, rtol: float, max_steps: int | None, atol: float = 0.0) -> None:
    """Raises unless the tolerances and the limit of an iterative solver are in range."""
    check_number(name, "rtol", rtol, "Pass e.g. 1e-8.", zero=True)
    check_number(name, "atol", atol, "Pass e.g. 1e-8.", zero=True)
    if max_steps is not None:
        mend = "Pass None to let the number of unknowns decide."
        check_count(name, "max_steps", max_steps, mend)
