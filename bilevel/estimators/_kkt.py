r"""The constrained lower problem at a fixed x, solved to its KKT conditions.

At a solution y with multipliers $\lambda \ge 0$ of h and $\nu$ of $h_=$, $L = f + \lambda^\top h + \nu^\top h_=$,

$$\nabla_y L = 0, \qquad h \le 0, \qquad \lambda^\top h = 0, \qquad h_= = 0.$$

Where the gradients of the active constraints are independent, L is strictly convex along them, and no active
constraint has a zero multiplier (strict complementarity), y and the multipliers are smooth functions of x.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from bilevel import _tree
from bilevel._oracle import CountedGradient, Oracle
from bilevel._solution import Status
from bilevel.estimators._constraints import (
    Linearized,
    constraint_values,
    fit_multipliers,
    linearize,
)
from bilevel.estimators._kkt_point import KKTModel, KKTPoint, reach
from bilevel.estimators._kkt_scipy import METHODS, ScipyLower
from bilevel.estimators._kkt_system import KKTSystem

_SOLVED = 1e-6  # relative KKT residual from which the polishing counts as done
_POLISHING = 40  # Newton steps at most
_NEAR = 1e-4  # relative distance up to which SciPy's answer may be from a constraint that holds it


class ConstrainedLower:
    """`min f(x, .)` under h <= 0 and h_= = 0 at fixed x.

    Attributes:
        size: The unit of y: what counts as a distance of one.
    """

    def __init__(self, oracle: Oracle, x: Tensor, data: Any, size: float) -> None:
        self._oracle, self._x, self._data, self.size = oracle, x, data, size
        self._scipy = ScipyLower(oracle, x, data, size)

    def system(self, point: KKTPoint) -> KKTSystem:
        """The matrix of the KKT equations at a point of this problem."""
        return KKTSystem(point, self._model(point))

    def _model(self, point: KKTPoint) -> KKTModel:
        """The problem linearized at the point, again only where that is not known from its residual."""
        if point.model is not None:
            return point.model
        grad = self._oracle.lower_grad_y(self._x, point.y)[1]
        return KKTModel(grad, *self._constraints(point.y), self._lagrangian(point))

    def _constraints(self, y: Tensor) -> tuple[Linearized, Linearized]:
        problem = self._oracle.problem
        return (
            linearize(problem, "lower_constraint", self._x, y, self._data),
            linearize(problem, "lower_equality", self._x, y, self._data),
        )

    def _lagrangian(self, point: KKTPoint) -> CountedGradient:
        """The gradient of L in y at the point, with its products."""
        problem = self._oracle.problem

        def terms(u: Tensor, v: Tensor) -> Tensor:
            held = (
                ("lower_constraint", point.multipliers),
                ("lower_equality", point.equality_multipliers),
            )
            parts = [m @ constraint_values(problem, name, u, v, self._data) for name, m in held]
            return sum(parts, v.new_zeros(()))

        return self._oracle.linearized(self._x, point.y, plus=terms)

    def solve(self, y: Tensor) -> KKTPoint:
        """The solution found from y: by polishing alone where y is nearly one, else by SciPy and polishing."""
        start = self._polish(y)
        is_near = _tree.length(start.y - y) <= 1e-2 * self.size * math.sqrt(y.numel())
        if start.status is Status.CONVERGED and is_near and self._is_minimum(start):
            return start
        best = start
        for method in METHODS:
            rough, status = self._scipy.minimize(y if best is start else best.y, method)
            if status in (Status.NONFINITE, Status.LOWER_UNBOUNDED):
                return KKTPoint.without_answer(rough, status)
            found = self._polish(rough)
            if found.status is Status.NONFINITE:
                return found
            if best is start or found.residual < best.residual:
                best = found
            if best.status is Status.CONVERGED:
                return best
        if best.infeasibility > _SOLVED:
            return replace(best, status=Status.INFEASIBLE)
        return best

    def _is_minimum(self, point: KKTPoint) -> bool:
        curvature = self.system(point).curvature
        return curvature is None or curvature >= -1e-8

    def _polish(self, y: Tensor) -> KKTPoint:
        """Newton's method on the KKT equations; the active set follows the signs of lambda + c h."""
        point = self._measured(y, *self._multipliers(y))
        best, worse = point, 0
        for _ in range(_POLISHING):
            if not math.isfinite(point.residual):
                break
            step = self.system(point).newton()
            length = _tree.length(step.y)
            if not math.isfinite(length) or length > 1e3 * self.size * math.sqrt(y.numel()):
                break
            point = self._measured(point.y + step.y, step.multipliers, step.equality_multipliers)
            worse = 0 if point.residual < 0.5 * best.residual else worse + 1
            if point.residual < best.residual:
                best = point
            if worse >= 4:
                break
        return best

    def _multipliers(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """The multipliers of the nearly active constraints that explain the gradient of f best."""
        grad = self._oracle.lower_grad_y(self._x, y)[1]
        inequality, equality = self._constraints(y)
        near = inequality.value >= -_NEAR * reach(inequality, self.size)
        fit = fit_multipliers(grad, inequality.in_y[near], equality.in_y)
        multipliers = torch.zeros_like(inequality.value)
        multipliers[near] = fit.inequality
        return multipliers, fit.equality

    def _measured(self, y: Tensor, multipliers: Tensor, nu: Tensor) -> KKTPoint:
        """The point with its residual, and the active set that its signs tell."""
        value, grad = self._oracle.lower_grad_y(self._x, y)
        inequality, equality = self._constraints(y)
        raw = KKTPoint(
            y,
            float(value),
            multipliers,
            nu,
            multipliers > 0.0,
            math.inf,
            0.0,
            Status.LOWER_UNSOLVED,
        )
        seen = (grad, multipliers, nu, inequality.value, equality.value)
        if not (math.isfinite(raw.value) and all(map(_tree.is_finite, seen))):
            return replace(raw, status=Status.NONFINITE)
        model = KKTModel(grad, inequality, equality, self._lagrangian(raw))
        stationarity = _tree.length(model.lagrangian.grad) / model.slope(self.size)
        depth, force = model.depth_and_force(multipliers, self.size)
        complementarity = _largest(torch.minimum(-depth, force).abs())
        infeasibility = max(
            _largest(depth.clamp(min=0.0)),
            _largest(equality.value.abs() / reach(equality, self.size)),
        )
        residual = max(stationarity, complementarity, infeasibility)
        solved = residual <= max(1e-9, 1e3 * torch.finfo(y.dtype).eps)
        return replace(
            raw,
            active=force + depth > 0.0,
            residual=residual,
            infeasibility=infeasibility,
            status=Status.CONVERGED if solved else Status.LOWER_UNSOLVED,
            model=model,
        )

    def weakly_active(self, point: KKTPoint, tol: float) -> Tensor:
        """Which of h are within `tol` of being active with a zero multiplier, in units of each, (k,)."""
        if point.multipliers.numel() == 0:
            return point.active
        depth, force = self._model(point).depth_and_force(point.multipliers, self.size)
        return (depth.abs() <= tol) & (force.abs() <= tol)


def _largest(values: Tensor) -> float:
    return float(values.max()) if values.numel() else 0.0
