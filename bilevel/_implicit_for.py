"""The parts of an implicit hypergradient that suit a problem."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from bilevel._problem import BilevelProblem, lower_value, split_data
from bilevel.estimators import Implicit
from bilevel.estimators._base import FALLEN
from bilevel.estimators._newton_steps import MOST, steps_needed
from bilevel.linear import CG, Dense
from bilevel.optim import Newton

_SHARE = 0.1  # of the error that is allowed, for the lower problem and for the linear system
_AT_ONCE = 10  # single products that take as long as all columns of a small Hessian in one batch


def implicit_for(
    problem: BilevelProblem,
    x: Tensor,
    y: Tensor,
    data: Any,
    spectrum: Tensor | None,
    rtol: float | None,
    *,
    compile: bool,  # noqa: A002  # the word of the estimators
) -> tuple[Implicit, list[str]]:
    """The estimator, and why it is made so.

    Args:
        problem: A problem over vectors with a locally unique lower solution and no constraints.
        x: Where it is to be solved, shape (m,).
        y: Where the lower solve starts, shape (n,).
        data: That of both levels.
        spectrum: All eigenvalues of the lower Hessian, shape (n,), or None where there are too many.
        rtol: Relative error that is good enough, or None for as well as the numbers allow.
        compile: Whether one compiled graph is wanted.
    """
    if spectrum is None:
        why = f"not compiled: each step would form the Hessian of {y.numel()} variables"
        return _by_products(rtol), [why] if compile else []
    dense = Implicit(Dense()) if rtol is None else Implicit(Dense(), tol=_tolerance(rtol))
    if rtol is None and not compile:
        return dense, []
    try:
        steps = steps_needed(_lower(problem, x, data), y, dense.tol)
    except RuntimeError as error:  # an operator that torch.func cannot transform
        verb = "compiled" if compile else "weighed against single products"
        return dense, [f"not {verb}: {str(error).splitlines()[0]}"]
    if compile and steps is None:
        return dense, [f"not compiled: from y it takes more than {MOST} Newton steps"]
    if steps is None:
        return dense, []
    if compile:
        count = min(steps + 1, MOST)  # one to spare: x will move
        why = f"one graph holds all of {count} Newton step(s), and is compiled at the first call"
        return replace(dense, minimizer=Newton(max_steps=count), compile=True), [why]
    products = 2 * _products(spectrum, dense.tol)
    if products > _AT_ONCE * (steps + 1):
        return dense, []
    why = f"its linear systems take about {products} products, fewer than {steps + 1} Hessians cost"
    return replace(_by_products(rtol), minimizer=Newton(dense_limit=0)), [why]


def _by_products(rtol: float | None) -> Implicit:
    if rtol is None:
        return Implicit(CG())
    return Implicit(CG(rtol=_tolerance(rtol)), tol=_tolerance(rtol))


def _tolerance(rtol: float) -> float:
    """What the lower problem and the linear system are solved to: never worse than what counts as solved."""
    return min(_SHARE * rtol, FALLEN)


def _lower(problem: BilevelProblem, x: Tensor, data: Any) -> Callable[[Tensor], Tensor]:
    of_lower = split_data(data).lower
    return lambda y: lower_value(problem, x, y, of_lower)


def _products(spectrum: Tensor, rtol: float) -> int:
    """How many conjugate gradients need for a matrix of this spectrum and a right-hand side in all parts of it."""
    count = 0

    def product(v: Any) -> Tensor:
        nonlocal count
        count += 1
        return spectrum * v

    CG(rtol=rtol).solve(product, torch.ones_like(spectrum))
    return count
