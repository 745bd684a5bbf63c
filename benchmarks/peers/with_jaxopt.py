"""JAXopt 0.8.5: its L-BFGS, which it differentiates implicitly by its conjugate gradients, or those alone."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
from jax import Array
from jaxopt import LBFGS
from jaxopt.linear_solve import solve_cg
from speed.work import Hypergradient, Work

from peers.in_jax import Data, Variable, objectives
from peers.with_jax import Found, called

Solve = Callable[[Data, Array, Variable, Array], Variable]


def lbfgs(work: Work, rtol: float, products: int) -> Callable[[int], Hypergradient]:
    """Until the norm of grad f is at most 10^-d, for each d that is asked for."""
    _, lower, _ = objectives(work)

    def solve(data: Data, x: Array, y: Variable, digits: Array) -> Variable:
        solver = LBFGS(
            lambda y, data, x: lower(data, x, y),
            tol=10.0**-digits,
            implicit_diff_solve=partial(solve_cg, tol=rtol, maxiter=products),
        )
        return solver.run(y, data, x).params

    return _hypergradients(work, solve)


def cg(work: Work, rtol: float, products: int) -> Callable[[int], Hypergradient]:
    """Where f is a quadratic in y: of grad f = 0, which it differentiates by solving once more."""
    _, lower, _ = objectives(work)

    def solve(data: Data, x: Array, y: Variable, _: Array) -> Variable:
        slope, hvp = jax.linearize(lambda y: jax.grad(lower, 2)(data, x, y), y)
        step = solve_cg(hvp, slope, tol=rtol, maxiter=products)
        return jax.tree.map(lambda leaf, d: leaf - d, y, step)

    return _hypergradients(work, solve)


def _hypergradients(work: Work, solve: Solve) -> Callable[[int], Hypergradient]:
    upper, _, data = objectives(work)

    def program(data: Data, x: Array, y: Variable, number: Array) -> Found:
        def solved(x: Array) -> Found:
            at = solve(data, x, y, number)
            return upper(data, x, at), at

        return jax.grad(solved, has_aux=True)(x)

    return called(work, program, data)
