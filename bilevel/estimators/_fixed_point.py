"""The implicit hypergradient of a lower problem that is stated as a fixed point."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from bilevel import _tree
from bilevel._oracle import Oracle
from bilevel._problem import BilevelProblem
from bilevel._solution import Status
from bilevel._types import Tree
from bilevel.estimators._base import Estimate, failed
from bilevel.fixed_points import FixedPoint
from bilevel.linear import LinearSolver


def at_fixed_point(
    condition: FixedPoint,
    linear: LinearSolver,
    tol: float,
    solved: float,
    problem: BilevelProblem,
    x: Tensor,
    y: Tensor,
    data: Any,
    memory: Mapping[str, Any] | None,
) -> Estimate:
    r"""$\partial_x F + (\partial_x T)^\top v$ with $(I - \partial_y T)^\top v = \partial_y F$, where $y = T(x, y)$.

    Args:
        condition: T, and how to iterate it.
        linear: Solves for v; the matrix is not symmetric.
        tol: Residual of the fixed point to reach, relative to the one at the start.
        solved: Relative residual up to which the linear system counts as solved.
        problem: See `Estimator.estimate`, as for the rest.
        x: Shape (m,).
        y: Shape (n,).
        data: The data.
        memory: Of an estimate nearby.

    Returns:
        The estimate.
    """
    oracle, warm = Oracle(problem, data), memory or {}
    step = over_vectors(condition, problem)
    first = _tree.length(oracle.mapped(step, x, y) - y)
    scale = max(first, float(warm.get("scale", 0.0)))
    reached = condition.solve(lambda v: oracle.mapped(step, x, v), y, tol * scale)
    if reached.status is Status.NONFINITE:
        return failed(oracle, x, y, Status.NONFINITE)
    y = reached.y
    upper, upper_x, upper_y = oracle.upper_grad(x, y)
    lower = float(oracle.lower(x, y))
    derivative = oracle.linearized_map(step, x, y)
    v = linear.solve(lambda w: w - derivative.vjp_y(w), upper_y, warm.get("v"))
    size = _tree.length(upper_y)
    residual = _tree.length(v - derivative.vjp_y(v) - upper_y) / (size or 1.0)
    grad = upper_x + derivative.vjp_x(v)
    status = Status.CONVERGED
    if not (math.isfinite(float(upper)) and math.isfinite(lower) and _tree.is_finite(grad)):
        status = Status.NONFINITE
    elif reached.status is not Status.CONVERGED:
        status = Status.LOWER_UNSOLVED
    elif not residual <= solved:
        status = Status.LINEAR_UNSOLVED
    return Estimate(
        grad=grad,
        y=y,
        value=float(upper),
        status=status,
        info={
            "upper": float(upper),
            "lower": lower,
            "lower_residual": reached.residual,
            "linear_residual": residual,
        },
        noise=torch.finfo(x.dtype).eps * abs(float(upper)) + _tree.length(v) * reached.residual,
        memory={"v": v, "scale": scale},
        evaluations=oracle.evaluations,
    )


def over_vectors(
    condition: FixedPoint, problem: BilevelProblem
) -> Callable[[Tensor, Tensor, Any], Tensor]:
    """T of a problem over vectors, as a function of the vectors x and y, and the data."""
    as_x, as_y = problem.unravel or (_as_it_is, _as_it_is)

    def step(x: Tensor, y: Tensor, data: Any) -> Tensor:
        tree = as_y(y)
        image = condition.map(as_x(x), tree, data)
        _tree.check_like(image, tree, "FixedPoint(map=...)(x, y, data)")
        return _tree.ravel(image)[0]

    return step


def _as_it_is(vector: Tensor) -> Tree:
    return vector
