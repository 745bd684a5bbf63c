"""How far a hypergradient is from the true one, estimated a posteriori."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from bilevel import _tree
from bilevel._oracle import CountedGradient, Oracle
from bilevel.linear import CG

linalg: Any = torch.linalg  # its stubs are untyped
_SAFETY = 2.0  # covers the terms of second order and the tolerance of the solves
_RTOL = 1e-2  # of the solves; coarse, as what they solve for is itself the error
_TIGHT = 1e-10  # of the solve for the whole of v, of whose error nothing else would know
_UNSOLVED = 0.1  # relative residual at which a solve to _RTOL is not believed
_NEGLIGIBLE = 1e3  # units of rounding of y below which y is not moved
_ROUNDING = 64.0  # units of rounding that the terms of a hypergradient are worth


def error_bound(
    oracle: Oracle,
    x: Tensor,
    y: Tensor,
    grad: Tensor,
    gradient: CountedGradient | None = None,
    hessian: Tensor | None = None,
    v: Tensor | None = None,
) -> float:
    r"""A first-order bound on the distance of `grad` from the hypergradient at the lower solution near y.

    One Newton step removes the lower residual, $y_2 = y - H^{-1} \nabla_y f(x, y)$, and one more solve the linear
    residual, $v_2 = v - H^{-1}(H_2 v - \partial_y F(x, y_2))$. The implicit hypergradient with these has an error of
    second order, so that twice its distance to `grad` bounds the error to first order: sharp and reliable near a
    solution, no guarantee far from it.

    Args:
        oracle: Counts what this costs.
        x: Shape (m,).
        y: Where the lower solve stopped, shape (n,).
        grad: The hypergradient in question, shape (m,).
        gradient: That of f at y, if it is at hand.
        hessian: That of f somewhere near y, if it is at hand, as a preconditioner of the products with the Hessian;
            without it conjugate gradients solve.
        v: An approximate solution of the linear system, if there is one.

    Returns:
        The bound; infinite where the lower Hessian is singular, or indefinite and not at hand.
    """
    at_y = oracle.linearized(x, y) if gradient is None else gradient
    delta = _solve(at_y, hessian, at_y.grad)
    moved, size = _tree.length(delta), _tree.length(y)
    if not math.isfinite(moved):
        return math.inf
    eps = torch.finfo(x.dtype).eps
    is_at_rest = v is not None and moved <= _NEGLIGIBLE * eps * size
    at = at_y if is_at_rest else oracle.linearized(x, y - delta)
    _, upper_x, upper_y = oracle.upper_grad(x, y if is_at_rest else y - delta)
    if v is None:
        v = _solve(at, hessian, upper_y, max(_TIGHT, _ROUNDING * eps))
    else:
        v = v + _solve(at, hessian, upper_y - at.hvp(v))
    better = upper_x - at.mixed_vjp(v)
    terms = _tree.length(upper_x) + _tree.length(better - upper_x)
    neglected = moved / size if is_at_rest and size > 0.0 else 0.0
    bound = _SAFETY * _tree.length(grad - better) + _ROUNDING * max(eps, neglected) * terms
    return bound if math.isfinite(bound) else math.inf


def _solve(
    gradient: CountedGradient, hessian: Tensor | None, b: Tensor, rtol: float = _RTOL
) -> Tensor:
    """H^-1 b to `rtol`, H that of `gradient`; infinite where that cannot be had.

    `hessian` may have been measured elsewhere: it only preconditions, and products with H measure what is left.
    """
    size = _tree.length(b)
    solution, left = torch.zeros_like(b), b
    if size == 0.0:
        return solution
    if hessian is not None:
        factors, pivots, info = linalg.lu_factor_ex(hessian)
        if int(info) != 0:
            return torch.full_like(b, math.inf)
        before = math.inf
        while rtol * size < _tree.length(left) <= 0.5 * before:
            before = _tree.length(left)
            solution = solution + linalg.lu_solve(factors, pivots, left[:, None])[:, 0]
            left = b - gradient.hvp(solution)
    if _tree.length(left) > rtol * size:
        solution = CG(rtol=rtol).solve(gradient.hvp, b, solution)
        left = b - gradient.hvp(solution)
    solved = _tree.length(left) <= _UNSOLVED * rtol / _RTOL * size
    return solution if solved else torch.full_like(b, math.inf)
