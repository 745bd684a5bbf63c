"""Constraints as vectors, their derivatives, and the multipliers that explain a gradient."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from bilevel import _autodiff, _tree
from bilevel._problem import BilevelProblem, constraint_value
from bilevel.estimators._numpy import to_numpy

linalg: Any = torch.linalg  # its stubs are untyped


class Linearized(NamedTuple):
    """A constraint at a point."""

    value: Tensor  # (k,)
    in_x: Tensor  # (k, m)
    in_y: Tensor  # (k, n)


def constraint_values(
    problem: BilevelProblem, name: str, x: Tensor, y: Tensor, data: Any
) -> Tensor:
    """The constraint of that name as a vector; of no entries where there is none.

    Raises:
        ObjectiveError: It returns no floating tensor.
    """
    if getattr(problem, name) is None:
        return y.new_zeros(0)
    return constraint_value(problem, name, x, y, data).to(y.dtype)


def linearize(problem: BilevelProblem, name: str, x: Tensor, y: Tensor, data: Any) -> Linearized:
    """The constraint of that name and its derivatives in x and in y."""

    def fixed(u: Tensor, v: Tensor) -> Tensor:
        return constraint_values(problem, name, u, v, data)

    value, (in_x, in_y) = _autodiff.jacobian(fixed, x, y)
    return Linearized(value, in_x, in_y)


class Fit(NamedTuple):
    """Multipliers of inequalities and of equalities, and whether they are the best ones: else they are zero."""

    inequality: Tensor  # (k,)
    equality: Tensor  # (l,)
    is_solved: bool


def fit_multipliers(grad: Tensor, rows: Tensor, equality_rows: Tensor) -> Fit:
    r"""$\lambda \ge 0$ and $\nu$ that minimize $|g + A^\top \lambda + E^\top \nu|$.

    Args:
        grad: g, shape (n,).
        rows: A, shape (k, n).
        equality_rows: E, shape (l, n).
    """
    import scipy.optimize  # pyright: ignore[reportMissingTypeStubs]

    optimize: Any = scipy.optimize
    both = torch.cat([rows, equality_rows, -equality_rows])
    weights = 1.0 / positive(linalg.vector_norm(both, dim=1))
    k, count = rows.shape[0], equality_rows.shape[0]
    none = Fit(rows.new_zeros(k), rows.new_zeros(count), is_solved=both.shape[0] == 0)
    if none.is_solved or not (_tree.is_finite(both) and _tree.is_finite(grad)):
        return none
    columns = to_numpy((both * weights[:, None]).T)
    size = _tree.length(grad) or 1.0
    try:
        found = optimize.nnls(columns, to_numpy(-grad / size), maxiter=30 * both.shape[0])[0]
    except RuntimeError:  # SciPy's word for too many iterations
        return none
    found = torch.as_tensor(found).to(grad) * weights * size
    return Fit(found[:k], found[k : k + count] - found[k + count :], is_solved=True)


def positive(sizes: Tensor) -> Tensor:
    """Sizes to divide by: 1 where they are zero."""
    return torch.where(sizes == 0.0, torch.ones_like(sizes), sizes)
