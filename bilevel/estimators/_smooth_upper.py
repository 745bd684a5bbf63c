"""The upper level where y*(x) is smooth: by the implicit hypergradient, confirmed by a step along it."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from bilevel import _tree
from bilevel._box import Box
from bilevel._solution import Status
from bilevel.estimators._base import linear_tolerance
from bilevel.estimators._constraints import (
    Linearized,
    fit_multipliers,
    positive,
)
from bilevel.estimators._kkt_system import KKTSystem
from bilevel.estimators._stationarity import DENSE, Stationarity, UpperPoint
from bilevel.linear import CG

linalg: Any = torch.linalg  # its stubs are untyped
_SHORTER = 0.1  # of a step, again and again: whether F falls at all as its slope says


def examine_smooth(
    at: UpperPoint, system: KKTSystem | None, curvature: float | None
) -> Stationarity:
    assumptions: list[str] = []
    if system is None:
        assumptions.append(
            f"the lower Hessian is positive definite (not tested above {DENSE} variables)"
        )
    pulled = _reduced(at, system, at.upper_x, at.upper_y)
    held, equal = (_reduced_rows(at, system, c) for c in (at.held, at.equal))
    if pulled is None or held is None or equal is None:
        return Stationarity(untested="the linear system of the lower Hessian was not solved")
    domain, x = at.oracle.problem.domain, at.x
    reach = at.units.step * math.sqrt(x.numel()) * at.units.x
    slopes = linalg.vector_norm(held, dim=1)
    near = at.held.value >= -reach * positive(slopes)
    low = high = torch.zeros_like(x, dtype=torch.bool)
    if isinstance(domain, Box):
        bounds = domain.bounds(x)
        low, high = x - bounds[0] <= reach, bounds[1] - x <= reach
    walls: list[Tensor] = []
    if bool((low | high).any()):
        identity = torch.eye(x.numel(), dtype=x.dtype, device=x.device)
        walls = [-identity[low], identity[high]]
    residual, weights, nu = pulled, held.new_zeros(held.shape[0]), equal.new_zeros(0)
    if bool(near.any()) or walls or equal.shape[0]:
        rows = torch.cat([held[near], *walls])
        fit = fit_multipliers(pulled, rows, equal)
        if not fit.is_solved:
            return Stationarity(untested="SciPy did not fit the multipliers of its constraints")
        nu = fit.equality
        residual = pulled + rows.T @ fit.inequality + equal.T @ nu
        weights[near] = fit.inequality[: int(near.sum())]
    if domain is not None and not isinstance(domain, Box) and (held.shape[0] or nu.numel()):
        assumptions.append("the domain and the upper constraints do not hold x together")
    tested = ["the upper level is stationary along the implicit derivative of y"]
    if system is not None:
        tested.insert(0, "the lower solution is locally unique: its Hessian is positive definite")
    if system is not None and system.rows.shape[0]:
        tested.insert(1, "strict complementarity: each active lower constraint has a multiplier")
    size = _tree.length(residual)
    problem = ""
    if size > 0.0:
        moved = x - reach * residual / size
        moved = moved if domain is None else domain(moved)
        expected = float(residual @ (x - moved))
        gain = _lagrangian_falls(at, moved, weights, nu)
        if math.isnan(gain):
            why = "the lower problem has no smooth solution next to x"
            return Stationarity(curvature=curvature, untested=why, is_unique=True)
        if expected > at.noise() and gain >= 0.5 * expected:
            problem = (
                f"x is not stationary: the hypergradient has norm {size:.3g}, and F falls by {gain:.3g} over a "
                f"step of {_tree.length(x - moved):.3g}, as the slope {expected:.3g} says (at a minimum it would "
                f"turn within that step, {at.units.step:.2g} of the size of x)"
            )
        elif not _turns(at, moved, expected, weights, nu):
            why = "F does not fall as its hypergradient says, however small the step"
            return Stationarity(curvature=curvature, untested=why, is_unique=True)
    projected = residual
    if domain is not None and not isinstance(domain, Box):
        projected = x - domain(x - residual)
    elif isinstance(domain, Box):
        projected = x - domain(x - (pulled + held.T @ weights + equal.T @ nu))
    return Stationarity(
        _tree.length(projected),
        curvature,
        problem,
        () if problem else tuple(tested),
        tuple(assumptions),
        is_unique=True,
    )


def _reduced(at: UpperPoint, system: KKTSystem | None, of_x: Tensor, of_y: Tensor) -> Tensor | None:
    """The derivative in x of a function of (x, y*(x)) whose partial derivatives are given."""
    if system is None:
        linear = at.oracle.linearized(at.x, at.y)
        v = CG().solve(linear.hvp, of_y)
        size = _tree.length(of_y) or 1.0
        if not _tree.length(linear.hvp(v) - of_y) <= linear_tolerance(v.dtype) * size:
            return None
        return of_x.to(at.x) - linear.mixed_vjp(v)
    p, q, residual = system.solve(of_y)
    if not residual <= linear_tolerance(p.dtype):
        return None
    return of_x.to(at.x) - system.pull_back(p, q)


def _reduced_rows(at: UpperPoint, system: KKTSystem | None, held: Linearized) -> Tensor | None:
    pairs = zip(held.in_x, held.in_y, strict=True)
    rows = [_reduced(at, system, of_x, of_y) for of_x, of_y in pairs]
    solved = [row for row in rows if row is not None]
    if len(solved) < len(rows):
        return None
    return torch.stack(solved) if solved else held.in_x.to(at.x)


def _lagrangian_falls(at: UpperPoint, x: Tensor, weights: Tensor, nu: Tensor) -> float:
    """How much `F + weights H + nu H_=` falls from the point to x, with y solved again; NaN at a kink."""
    solver = at.solver(x)
    solved = solver.solve(at.y)
    if solved.status is not Status.CONVERGED or not solved.is_smooth:
        return math.nan
    if at.is_overtaken(solver, solved):
        return 0.0
    gain = 0.0
    for name, held, factors in (
        ("upper_constraint", at.held, weights),
        ("upper_equality", at.equal, nu),
    ):
        if factors.numel() and bool(factors.any()):
            there = at.constraint(name, x, solved.y)
            gain += float(factors @ (held.value - there).to(factors))
    return gain + at.value - float(at.oracle.upper(x, solved.y))


def _turns(at: UpperPoint, x: Tensor, expected: float, weights: Tensor, nu: Tensor) -> bool:
    """Whether F first falls as the hypergradient says on the way to x, and turns later, as at a minimum."""
    part = _SHORTER
    while part * expected > at.noise():
        there = at.x + part * (x - at.x)
        if _lagrangian_falls(at, there, weights, nu) >= 0.5 * part * expected:
            return True
        part *= _SHORTER
    return expected <= at.noise() or part == _SHORTER
