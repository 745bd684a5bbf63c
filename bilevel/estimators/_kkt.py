r"""The constrained lower problem at a fixed x, and the linear system of its KKT conditions.

At a solution y with multipliers $\lambda \ge 0$ of h and $\nu$ of $h_=$, $L = f + \lambda^\top h + \nu^\top h_=$,

$$\nabla_y L = 0, \qquad h \le 0, \qquad \lambda^\top h = 0, \qquad h_= = 0.$$

Where the gradients of the active constraints are independent, L is strictly convex along them, and no active
constraint has a zero multiplier (strict complementarity), y and the multipliers are smooth functions of x.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, NamedTuple

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
    positive,
)
from bilevel.estimators._numpy import clipped, to_numpy

linalg: Any = torch.linalg  # its stubs are untyped
SINGULAR = 1e-10  # smallest over largest eigenvalue of what still counts as invertible
_SOLVED = 1e-6  # relative KKT residual from which the polishing counts as done
_POLISHING = 40  # Newton steps at most
_FAR = 1e8  # growth of |y| at which a minimum is not believed to exist
_NEAR = 1e-4  # relative distance up to which SciPy's answer may be from a constraint that holds it


@dataclass(frozen=True)
class KKTPoint:
    """A point of the lower problem and how well it satisfies the KKT conditions.

    Attributes:
        y: The point, shape (n,).
        value: f there.
        multipliers: Of h, shape (k,), >= 0.
        equality_multipliers: Of the equalities, shape (l,).
        active: Which of h hold y: those with a positive multiplier, shape (k,).
        residual: Largest violation of the KKT conditions, each relative to its own size.
        infeasibility: The part of `residual` that is due to the constraints.
        status: CONVERGED, LOWER_UNSOLVED, LOWER_UNBOUNDED, INFEASIBLE or NONFINITE.
    """

    y: Tensor
    value: float
    multipliers: Tensor
    equality_multipliers: Tensor
    active: Tensor
    residual: float
    infeasibility: float
    status: Status


class ConstrainedLower:
    """`min f(x, .)` under h <= 0 and h_= = 0 at fixed x.

    Attributes:
        size: The unit of y: what counts as a distance of one.
    """

    def __init__(self, oracle: Oracle, x: Tensor, data: Any, size: float) -> None:
        self._oracle, self._x, self._data, self.size = oracle, x, data, size

    def constraints(self, y: Tensor) -> tuple[Linearized, Linearized]:
        """The constraint h and the equalities at y, linearized."""
        return self._linearize("lower_constraint", y), self._linearize("lower_equality", y)

    def _linearize(self, name: str, y: Tensor) -> Linearized:
        return linearize(self._oracle.problem, name, self._x, y, self._data)

    def _reach(self, constraint: Linearized) -> Tensor:
        """How much each entry changes over one unit of y, (k,)."""
        return positive(linalg.vector_norm(constraint.in_y, dim=1) * self.size)

    def lagrangian(self, point: KKTPoint) -> CountedGradient:
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
        for method in ("SLSQP", "trust-constr"):
            found = self._by_scipy(method, y if best is start else best.y)
            if found.status in (Status.NONFINITE, Status.LOWER_UNBOUNDED):
                return found
            if best is start or found.residual < best.residual:
                best = found
            if best.status is Status.CONVERGED:
                return best
        if best.infeasibility > _SOLVED:
            return replace(best, status=Status.INFEASIBLE)
        return best

    def _by_scipy(self, method: str, y: Tensor) -> KKTPoint:
        import scipy.optimize  # pyright: ignore[reportMissingTypeStubs]

        optimize: Any = scipy.optimize
        value, grad = self._oracle.lower_grad_y(self._x, y)
        near = y + self.size * torch.cos(torch.arange(y.numel())).to(
            y
        )  # the start may be stationary
        scale = max(_tree.length(grad), _tree.length(self._oracle.lower_grad_y(self._x, near)[1]))
        if not (math.isfinite(float(value)) and math.isfinite(scale)):
            return _without_answer(y, Status.NONFINITE)
        scale = scale or 1.0
        offset, far, last = float(value), _FAR * (self.size + _tree.length(y)), y

        def objective(vector: Any) -> tuple[float, Any]:
            nonlocal last
            point = torch.as_tensor(vector).to(y)
            value, grad = self._oracle.lower_grad_y(self._x, point)
            if not (math.isfinite(float(value)) and _tree.is_finite(grad)):
                return 1e300, clipped(grad)
            last = point
            if _tree.length(point) > far:
                raise _FarAwayError
            return (float(value) - offset) / scale, to_numpy(grad / scale)

        conditions = self._scipy_constraints(optimize, method, y)
        options = {"maxiter": 300} | ({"ftol": 1e-14} if method == "SLSQP" else {"gtol": 1e-10})
        try:
            with warnings.catch_warnings():  # of steps that SciPy then rejects
                warnings.simplefilter("ignore", RuntimeWarning)
                warnings.simplefilter("ignore", UserWarning)
                result = optimize.minimize(
                    objective,
                    to_numpy(y),
                    jac=True,
                    method=method,
                    constraints=conditions,
                    options=options,
                )
        except _FarAwayError:
            return _without_answer(last, Status.LOWER_UNBOUNDED)
        return self._polish(torch.as_tensor(result.x).to(y))

    def _scipy_constraints(self, optimize: Any, method: str, y: Tensor) -> list[Any]:
        """The constraints as the method wants them, each entry in units of its change over one unit of y."""
        found: list[Any] = []
        for kind, name in (("ineq", "lower_constraint"), ("eq", "lower_equality")):
            if getattr(self._oracle.problem, name) is None:
                continue
            reach = self._reach(self._linearize(name, y))
            entry = _Entry(partial(self._at, name, reach, y))
            if method == "SLSQP":
                found.append({"type": kind, "fun": entry.minus_value, "jac": entry.minus_slope})
            else:
                low = -math.inf if kind == "ineq" else 0.0
                found.append(optimize.NonlinearConstraint(entry.value, low, 0.0, jac=entry.slope))
        return found

    def _at(self, name: str, reach: Tensor, like: Tensor, vector: Any) -> tuple[Any, Any]:
        here = self._linearize(name, torch.as_tensor(vector).to(like))
        value, in_y = here.value / reach, here.in_y / reach[:, None]
        bad = torch.full_like(value, math.inf)  # a constraint that is NaN is violated
        return clipped(torch.where(value.isnan(), bad, value)), clipped(in_y)

    def _polish(self, y: Tensor) -> KKTPoint:
        """Newton's method on the KKT equations; the active set follows the signs of lambda + c h."""
        point = self._measured(y, *self._multipliers(y))
        best, worse = point, 0
        for _ in range(_POLISHING):
            if not math.isfinite(point.residual):
                break
            system = KKTSystem(self, point)
            inequality, equality = self.constraints(point.y)
            step = system.newton(inequality, equality)
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
        inequality, equality = self.constraints(y)
        near = inequality.value >= -_NEAR * self._reach(inequality)
        fit = fit_multipliers(grad, inequality.in_y[near], equality.in_y)
        multipliers = torch.zeros_like(inequality.value)
        multipliers[near] = fit.inequality
        return multipliers, fit.equality

    def _measured(self, y: Tensor, multipliers: Tensor, nu: Tensor) -> KKTPoint:
        """The point with its residual, and the active set that its signs tell."""
        value, grad = self._oracle.lower_grad_y(self._x, y)
        inequality, equality = self.constraints(y)
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
        linear = self.lagrangian(raw)
        scale = self._slope(grad, linear.hessian())
        stationarity = _tree.length(linear.grad) / scale
        depth, force = self._depth_and_force(inequality, multipliers, scale)
        complementarity = _largest(torch.minimum(-depth, force).abs())
        infeasibility = max(
            _largest(depth.clamp(min=0.0)), _largest(equality.value.abs() / self._reach(equality))
        )
        residual = max(stationarity, complementarity, infeasibility)
        solved = residual <= max(1e-9, 1e3 * torch.finfo(y.dtype).eps)
        active = force + depth > 0.0
        return replace(
            raw,
            active=active,
            residual=residual,
            infeasibility=infeasibility,
            status=Status.CONVERGED if solved else Status.LOWER_UNSOLVED,
        )

    def _slope(self, grad: Tensor, hessian: Tensor) -> float:
        """The unit of a gradient in y: its size, or what the curvature makes of one unit of y."""
        return max(_tree.length(grad), float(linalg.matrix_norm(hessian)) * self.size) or 1.0

    def _depth_and_force(
        self, inequality: Linearized, multipliers: Tensor, scale: float
    ) -> tuple[Tensor, Tensor]:
        """The values of h and the multipliers, (k,), both in units, so that they compare."""
        reach = self._reach(inequality)
        return inequality.value / reach, multipliers * reach / (scale * self.size)

    def weakly_active(self, point: KKTPoint, tol: float) -> Tensor:
        """Which of h are within `tol` of being active with a zero multiplier, in units of each, (k,)."""
        inequality, _ = self.constraints(point.y)
        if inequality.value.numel() == 0:
            return point.active
        grad = self._oracle.lower_grad_y(self._x, point.y)[1]
        scale = self._slope(grad, self.lagrangian(point).hessian())
        depth, force = self._depth_and_force(inequality, point.multipliers, scale)
        return (depth.abs() <= tol) & (force.abs() <= tol)

    def _is_minimum(self, point: KKTPoint) -> bool:
        curvature = KKTSystem(self, point).curvature
        return curvature is None or curvature >= -1e-8


class _Entry:
    """A constraint as SciPy calls it."""

    def __init__(self, at: Callable[[Any], tuple[Any, Any]]) -> None:
        self._at = at

    def value(self, vector: Any) -> Any:
        return self._at(vector)[0]

    def slope(self, vector: Any) -> Any:
        return self._at(vector)[1]

    def minus_value(self, vector: Any) -> Any:
        return -self._at(vector)[0]

    def minus_slope(self, vector: Any) -> Any:
        return -self._at(vector)[1]


class NewtonStep(NamedTuple):
    """A step in y, and the multipliers after it."""

    y: Tensor
    multipliers: Tensor
    equality_multipliers: Tensor


class KKTSystem:
    """The matrix of the KKT equations over the active constraints.

    Attributes:
        curvature: Smallest eigenvalue of the Hessian of L along the active constraints, relative to its norm; None
            where they leave no direction.
        is_regular: Whether the matrix can be inverted and the curvature is positive.
        rows: Gradients in y of the active constraints, the equalities last, shape (a, n).
        rows_x: The same in x, shape (a, m).
        hessian: Of L in y, shape (n, n).
    """

    def __init__(self, lower: ConstrainedLower, point: KKTPoint) -> None:
        self._point, self.linear = point, lower.lagrangian(point)
        inequality, equality = lower.constraints(point.y)
        self.rows = torch.cat([inequality.in_y[point.active], equality.in_y])
        self.rows_x = torch.cat([inequality.in_x[point.active], equality.in_x])
        self.hessian = self.linear.hessian()
        # rows in units of the Hessian, so that the condition number means something
        size = float(linalg.matrix_norm(self.hessian)) or 1.0
        self._weights = size / positive(linalg.vector_norm(self.rows, dim=1))
        scaled = self.rows * self._weights[:, None]
        corner = self.rows.new_zeros((self.rows.shape[0],) * 2)
        self.matrix = torch.cat(
            [torch.cat([self.hessian, scaled.T], 1), torch.cat([scaled, corner], 1)]
        )
        self._size = size

    @cached_property
    def curvature(self) -> float | None:
        if not _tree.is_finite(self.matrix):
            return -math.inf
        free = _null_space(self.rows)
        if free.shape[1] == 0:
            return None
        reduced = free.T @ self.hessian @ free
        return float(linalg.eigvalsh(reduced)[0]) / self._size

    @property
    def is_regular(self) -> bool:
        if not _tree.is_finite(self.matrix):
            return False
        eps = max(SINGULAR, 10.0 * torch.finfo(self.matrix.dtype).eps)
        sizes = linalg.svdvals(self.matrix)
        curvature = self.curvature
        return float(sizes[-1]) > eps * float(sizes[0]) and (curvature is None or curvature > eps)

    def solve(self, of_y: Tensor) -> tuple[Tensor, Tensor, float]:
        """(p, q) with the matrix times (p, q) equal to (of_y, 0), and the relative residual."""
        right = torch.cat([of_y, of_y.new_zeros(self.rows.shape[0])])
        solution = _least_squares(self.matrix, right)
        residual = _tree.length(self.matrix @ solution - right) / (_tree.length(right) or 1.0)
        n = of_y.numel()
        return solution[:n], solution[n:] * self._weights, residual

    def pull_back(self, p: Tensor, q: Tensor) -> Tensor:
        """The derivative in x of the KKT equations, transposed, times (p, q), shape (m,)."""
        mixed = self.linear.mixed_vjp(p)
        return mixed + (self.rows_x.T @ q).to(mixed)

    def newton(self, inequality: Linearized, equality: Linearized) -> NewtonStep:
        """One step on the KKT equations, the inactive multipliers set to zero."""
        point = self._point
        held = torch.cat([inequality.value[point.active], equality.value])
        old = torch.cat([point.multipliers[point.active], point.equality_multipliers])
        # grad L without the multipliers that are set to zero
        dropped = (point.multipliers * ~point.active) @ inequality.in_y
        grad = self.linear.grad - dropped
        right = -torch.cat([grad, held * self._weights])
        solution = _least_squares(self.matrix, right)
        n = point.y.numel()
        new = old + solution[n:] * self._weights
        count = int(point.active.sum())
        multipliers = torch.zeros_like(point.multipliers)
        multipliers[point.active] = new[:count]
        return NewtonStep(solution[:n], multipliers, new[count:])


def _null_space(rows: Tensor) -> Tensor:
    """An orthonormal basis of what is orthogonal to the rows, shape (n, n - rank)."""
    n = rows.shape[1]
    if rows.shape[0] == 0:
        return torch.eye(n, dtype=rows.dtype, device=rows.device)
    unit = rows / positive(linalg.vector_norm(rows, dim=1, keepdim=True))
    _, sizes, basis = linalg.svd(unit, full_matrices=True)
    rank = int((sizes > 1e-8).sum())
    return basis[rank:].T


def _least_squares(matrix: Tensor, right: Tensor) -> Tensor:
    """The solution of smallest norm; where the matrix is regular, the solution."""
    factors, pivots, info = linalg.lu_factor_ex(matrix)
    sizes = factors.diagonal().abs()
    if int(info) == 0 and float(sizes.min()) > SINGULAR * float(sizes.max()):
        solution = linalg.lu_solve(factors, pivots, right[:, None])[:, 0]
        correction = right - matrix @ solution  # one step of refinement
        return solution + linalg.lu_solve(factors, pivots, correction[:, None])[:, 0]
    if not _tree.is_finite(matrix):
        return torch.full_like(right, math.nan)
    return linalg.pinv(matrix, rtol=SINGULAR) @ right


def _largest(values: Tensor) -> float:
    return float(values.max()) if values.numel() else 0.0


def _without_answer(y: Tensor, status: Status) -> KKTPoint:
    none, no = y.new_zeros(0), y.new_zeros(0, dtype=torch.bool)
    value = -math.inf if status is Status.LOWER_UNBOUNDED else math.nan
    return KKTPoint(y, value, none, none, no, math.inf, math.inf, status)


class _FarAwayError(Exception):
    """Ends SciPy's run where f falls without bound."""
