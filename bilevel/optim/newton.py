"""Newton's method, with a Hessian that is kept as long as it serves."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bilevel import _tree
from bilevel._errors import check_count
from bilevel._solution import Status
from bilevel.optim._base import Minimizer, Minimum, Point, SmoothFunction
from bilevel.optim._conjugate import ConjugateSteps

linalg: Any = torch.linalg  # its stubs are untyped
_SUFFICIENT_DECREASE = 1e-4  # Armijo's constant
_HALVINGS = 40  # 2^-40 of a Newton step is no step
_FORCING = 0.1  # how exactly a step far from the minimum is solved for, relative to the gradient
_REUSE = 0.2  # keep an old Hessian while each step reduces the gradient at least fivefold
_UNBOUNDED = 1e10  # growth of |y| at which a minimum is not believed to exist


@dataclass(frozen=True)
class Newton(Minimizer):
    r"""Newton's method with a line search, for small and medium dense problems and large smooth ones.

    Up to `dense_limit` variables the step solves $H d = -\nabla f$ by Cholesky, or with
    the absolute eigenvalues of H where H is indefinite, and H is measured again only when the
    gradient no longer shrinks fivefold a step. Above it, conjugate gradients solve for the step with
    Hessian-vector products, the more exactly the more the last step has gained, and stop at negative curvature. A
    step is no longer than $\sqrt n \max(1, \mathrm{rms}(y))$, so that a nearly singular Hessian cannot throw y out
    of its basin.

    Attributes:
        max_steps: Steps at most, > 0.
        dense_limit: Largest n whose Hessian is formed, >= 0.
        cg_steps: Products at most in one step above `dense_limit`, > 0.

    Raises:
        ValueError: A parameter is out of its range.

    References:
        Nocedal and Wright, Numerical Optimization (2006), algorithms 3.2 and 7.1; Eisenstat and Walker,
        Choosing the forcing terms in an inexact Newton method (SIAM J. Sci. Comput. 17, 1996), Eq. 2.6 with
        gamma = 0.9 and alpha = 2.
    """

    max_steps: int = 100
    dense_limit: int = 256
    cg_steps: int = 200

    def __post_init__(self) -> None:
        for name, least in (("max_steps", 1), ("dense_limit", 0), ("cg_steps", 1)):
            check_count("Newton", name, getattr(self, name), "Raise it, e.g. to 100.", least=least)

    def minimize(
        self,
        fun: SmoothFunction,
        start: Point,
        tol: float = 0.0,
        *,
        stop: Callable[[Point], bool] | None = None,
    ) -> Minimum:
        """See `Minimizer.minimize`."""
        point, y = start, start.y
        if not math.isfinite(point.value):
            return Minimum(point, math.inf, Status.NONFINITE, 0)
        eps = torch.finfo(y.dtype).eps
        dense = y.numel() <= self.dense_limit
        bound = _UNBOUNDED * (1.0 + _tree.length(y))
        stale = False  # whether the Hessian measured last no longer serves
        is_convex = (
            fun.has_hessian
        )  # whether the last Hessian was positive definite; one from before was
        residual = _tree.length(point.grad)
        forcing, conjugate = _FORCING, ConjugateSteps(self.cg_steps)
        for step in range(self.max_steps):
            if not math.isfinite(residual):
                return Minimum(point, residual, Status.NONFINITE, step)
            if stop is not None and stop(point):
                return Minimum(point, residual, Status.CONVERGED, step)
            if residual <= tol:
                lower = _beside_saddle(fun, point, is_convex) if dense else None
                if lower is None:
                    return Minimum(point, residual, Status.CONVERGED, step)
                point, residual, is_convex = lower, _tree.length(lower.grad), True
                continue
            fresh = dense and (stale or not fun.has_hessian)
            if dense:
                hessian = fun.hessian(point, refresh=fresh)
                if not _tree.is_finite(hessian):
                    return Minimum(point, residual, Status.NONFINITE, step)
                direction, is_convex = _dense_direction(hessian, point.grad)
            else:
                target = max(forcing * residual, 0.5 * tol)
                direction = conjugate.direction(fun.hvp(point), point.grad, target)
            direction = _capped(direction, point.y)
            # What the value can still lose, against the rounding error of what it lost so far.
            noise = 16.0 * max(point.noise, eps * (start.value - point.value))
            if -0.5 * float(direction @ point.grad) <= noise:
                new = _sharper(fun, point, direction, noise)
                if new is None:
                    return Minimum(point, residual, Status.CONVERGED, step)
            else:
                new = _line_search(fun, point, direction, noise)
            if new is None:
                if dense and not fresh:
                    stale = True
                    continue
                return Minimum(point, residual, Status.STALLED, step)
            before, residual = residual, _tree.length(new.grad)
            forcing = min(_FORCING, 0.9 * (residual / before) ** 2)
            stale = dense and residual > _REUSE * before
            point = new
            if not _tree.length(point.y) < bound:
                return Minimum(point, residual, Status.LOWER_UNBOUNDED, step + 1)
        done = residual <= tol or (stop is not None and stop(point))
        return Minimum(
            point, residual, Status.CONVERGED if done else Status.MAX_STEPS, self.max_steps
        )


def _capped(direction: Tensor, y: Tensor) -> Tensor:
    limit = math.sqrt(y.numel()) * max(1.0, _tree.rms(y))
    length = _tree.length(direction)
    return direction if length <= limit else direction * (limit / length)


def has_digits(hessian: Tensor, factor: Tensor) -> Tensor:
    """Whether each pivot of Cholesky's `factor` is more than the rounding of what it is left of, 0-d.

    Of a singular Hessian rounding may leave positive pivots, on some processors, and directions without a meaning.
    """
    rounding = hessian.shape[0] * torch.finfo(hessian.dtype).eps
    return (factor.diagonal().square() > rounding * hessian.diagonal()).all()


def _dense_direction(hessian: Tensor, grad: Tensor) -> tuple[Tensor, bool]:
    """The Newton direction, and whether the Hessian is positive definite."""
    factor, info = linalg.cholesky_ex(hessian)
    if int(info) == 0 and bool(has_digits(hessian, factor)):
        return -torch.cholesky_solve(grad[:, None], factor)[:, 0], True
    values, vectors = linalg.eigh(hessian)
    size = values.abs()
    eps = torch.finfo(grad.dtype).eps
    floor = float(size.max()) * math.sqrt(eps)
    if floor == 0.0:  # no curvature at all: as far along the gradient as a step may be
        return -grad / eps, False
    return -(vectors @ ((vectors.T @ grad) / size.clamp(min=floor))), False


def _beside_saddle(fun: SmoothFunction, point: Point, is_convex: bool) -> Point | None:
    """A lower point along the most negative curvature of a stationary point, or None at a minimum."""
    if is_convex:
        return None
    hessian = fun.hessian(point, refresh=True)
    if not _tree.is_finite(hessian):
        return None
    values, vectors = linalg.eigh(hessian)
    if float(values[0]) >= -math.sqrt(torch.finfo(values.dtype).eps) * float(values.abs().max()):
        return None
    t = math.sqrt(point.y.numel())
    for _ in range(_HALVINGS):
        new = fun.evaluate(point.y + t * vectors[:, 0])
        if new.value < point.value - 16.0 * point.noise:
            return new
        t *= 0.5
    return None


def _sharper(fun: SmoothFunction, point: Point, direction: Tensor, noise: float) -> Point | None:
    """The full step, where the value has no digits left to lose but the gradient halves; else None."""
    new = fun.evaluate_ahead(point.y + direction)
    if new.value <= point.value + noise and _tree.length(new.grad) <= 0.5 * _tree.length(
        point.grad
    ):
        return new
    return None


def _line_search(
    fun: SmoothFunction, point: Point, direction: Tensor, noise: float
) -> Point | None:
    """The first of the steps 1, 1/2, 1/4, ... that decreases the function, or None.

    Where the decrease drowns in the rounding error of the values, a step that halves the gradient counts.
    """
    slope = float(direction @ point.grad)
    if not slope < 0.0:
        return None
    size = _tree.length(point.grad)
    t, evaluate = 1.0, fun.evaluate_ahead  # most steps are taken as they are
    for _ in range(_HALVINGS):
        new = evaluate(point.y + t * direction)
        if new.value <= point.value + _SUFFICIENT_DECREASE * t * slope:
            return new
        if new.value <= point.value + noise and _tree.length(new.grad) <= 0.5 * size:
            return new
        if -slope * t <= noise:
            return None
        t, evaluate = 0.5 * t, fun.evaluate
    return None
