r"""The two functions of y that the value-function methods minimize, with their curvature.

z minimizes $f + \tfrac{\mu}{2}|\cdot|^2$ (Eq. 14); y minimizes
$\pm F + P_\sigma(f - v) + \tfrac{\theta}{2}|\cdot|^2$ (Eq. 15).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from bilevel import _tree
from bilevel._oracle import Oracle
from bilevel.barriers import Barrier
from bilevel.optim._base import Point, SmoothFunction

_CANCELLATION = 64.0  # f may be the sum of terms this much larger than itself


def rounding(value: float, dtype: torch.dtype) -> float:
    """The rounding error of a difference of values of an objective near `value`."""
    return _CANCELLATION * torch.finfo(dtype).eps * abs(value)


class AtZ(NamedTuple):
    """What the lower objective knows at a point."""

    lower: float  # f(x, z)
    lower_x: Tensor  # its gradient in x, (m,)
    lower_y: Tensor  # its gradient in y, (n,)
    losses: Tensor | None  # its losses by sample, (n,), where the problem is per_sample


class RegularizedLower(SmoothFunction):
    """`f(x, .) + mu/2 |.|^2` at fixed x."""

    def __init__(
        self, oracle: Oracle, x: Tensor, mu: float, lower_hessian: Tensor | None = None
    ) -> None:
        self._oracle, self._x, self._mu = oracle, x, mu
        self.lower_hessian = lower_hessian

    def evaluate(self, y: Tensor) -> Point:
        value, lower_x, grad = self._oracle.lower_grad(self._x, y)
        lower = float(value)
        return Point(
            y,
            lower + 0.5 * self._mu * float(y @ y),
            grad + self._mu * y,
            noise=torch.finfo(y.dtype).eps * abs(lower),
            extra=AtZ(lower, lower_x, grad, self._oracle.losses),
        )

    @property
    def has_hessian(self) -> bool:
        return self.lower_hessian is not None

    def hessian(self, point: Point, *, refresh: bool) -> Tensor:
        if refresh or self.lower_hessian is None:
            self.lower_hessian = self._oracle.linearized(self._x, point.y).hessian()
        return _plus_diagonal(self.lower_hessian, self._mu)

    def hvp(self, point: Point) -> Callable[[Tensor], Tensor]:
        linear = self._oracle.linearized(self._x, point.y)
        return lambda v: linear.hvp(v) + self._mu * v


class Parameters(Protocol):
    """The numbers of Eq. 15 that a value-function method fixes."""

    @property
    def mu(self) -> float: ...
    @property
    def epsilon(self) -> float: ...
    @property
    def sigma(self) -> float: ...
    @property
    def theta(self) -> float | None: ...
    @property
    def barrier(self) -> Barrier: ...
    @property
    def pessimistic(self) -> bool: ...


class AtY(NamedTuple):
    """What the gap function knows at a strictly feasible point."""

    upper: float  # F(x, y)
    lower: float  # f(x, y)
    gap: float  # f(x, y) - f(x, z)
    gap_noise: float  # its rounding error
    zeta: float  # f(x, y) - v(x), negative inside
    multiplier: float  # lambda = P'(zeta)
    curvature: float  # P''(zeta)
    upper_x: Tensor  # gradient of F in x, (m,)
    lower_x: Tensor  # gradient of f in x, (m,)
    gap_y: Tensor  # gradient of zeta in y, (n,)
    upper_y_norm: float


class GapFunction(SmoothFunction):
    r"""`sign F + P(zeta) + theta/2 |y|^2` at fixed x, infinite where zeta >= 0.

    zeta is $f(x,y) - v(x)$; with `theta=None` it is $f(x,y) + \tfrac{\mu}{2}|y|^2 - v(x)$, whose
    stationary points are those of $\theta = \lambda \mu$.
    """

    def __init__(
        self,
        oracle: Oracle,
        x: Tensor,
        parameters: Parameters,
        z: Point,
        hessians: Mapping[str, Tensor] | None = None,
    ) -> None:
        self._oracle, self._x, self._p, self._z = oracle, x, parameters, z
        self.hessians = dict(hessians or {})
        self.sign = -1.0 if parameters.pessimistic else 1.0
        self._in_gap = parameters.mu if parameters.theta is None else 0.0
        self._theta = parameters.theta or 0.0
        #: v(x) - f(x, z), less what the regularization of the gap takes from it at z
        self.slack = parameters.epsilon + 0.5 * (parameters.mu - self._in_gap) * float(z.y @ z.y)

    def _gap(self, y: Tensor, at: AtZ) -> tuple[float, float]:
        """f(x, y) - f(x, z) and its rounding error.

        The two values share their digits. The trapezoidal rule along the way from z to y, from gradients that
        are known anyway, does not: where both agree within the rounding error of the values, it is the
        better one (exact where f is quadratic), and a constant added to f leaves no trace in it.
        """
        z: AtZ = self._z.extra
        eps = torch.finfo(y.dtype).eps
        error = rounding(abs(at.lower) + abs(z.lower), y.dtype)
        if at.losses is not None and z.losses is not None:
            by_values = float((at.losses.double() - z.losses.double()).mean())
        else:
            by_values = at.lower - z.lower
        by_gradients = 0.5 * float((at.lower_y + z.lower_y) @ (y - self._z.y))
        if abs(by_values - by_gradients) <= error:
            return by_gradients, 4.0 * eps * abs(by_gradients)
        return by_values, error

    def _zeta(self, y: Tensor, gap: float) -> float:
        square = 0.5 * float((y - self._z.y) @ (y + self._z.y))  # (|y|^2 - |z|^2) / 2
        return gap + self._in_gap * square - self.slack

    def regularized_gap(self, point: Point) -> float:
        """How far y is above z in the function that z minimizes."""
        at: AtY = point.extra
        return at.gap + 0.5 * self._p.mu * float((point.y - self._z.y) @ (point.y + self._z.y))

    def well_inside(self, point: Point) -> bool:
        """Whether a point of `RegularizedLower` uses at most half of the slack."""
        return self._zeta(point.y, self._gap(point.y, point.extra)[0]) <= -0.5 * self.slack

    def evaluate(self, y: Tensor) -> Point:
        value, lower_x, lower_y = self._oracle.lower_grad(self._x, y)
        lower = float(value)
        gap, gap_noise = self._gap(y, AtZ(lower, lower_x, lower_y, self._oracle.losses))
        zeta = self._zeta(y, gap)
        if not zeta < 0.0:
            return Point(y, math.nan if math.isnan(zeta) else math.inf, lower_y)
        z, sigma = torch.tensor(zeta, dtype=torch.float64), self._p.sigma
        multiplier = float(self._p.barrier.derivative(z, sigma))
        value, upper_x, upper_y = self._oracle.upper_grad(self._x, y)
        upper = float(value)
        gap_y = lower_y + self._in_gap * y
        # F may be a small square of a difference: then the rounding of y itself tells
        eps, slope = torch.finfo(y.dtype).eps, _tree.length(upper_y)
        total = (
            self.sign * upper
            + float(self._p.barrier.value(z, sigma))
            + 0.5 * self._theta * float(y @ y)
        )
        return Point(
            y,
            total,
            self.sign * upper_y + multiplier * gap_y + self._theta * y,
            noise=eps * (abs(upper) + slope * _tree.length(y)) + multiplier * gap_noise,
            extra=AtY(
                upper,
                lower,
                gap,
                gap_noise,
                zeta,
                multiplier,
                float(self._p.barrier.second_derivative(z, sigma)),
                upper_x,
                lower_x,
                gap_y,
                slope,
            ),
        )

    @property
    def has_hessian(self) -> bool:
        return bool(self.hessians)

    def hessian(self, point: Point, *, refresh: bool) -> Tensor:
        if refresh or not self.hessians:
            self.hessians = {
                "upper": self._oracle.linearized(self._x, point.y, upper=1.0, lower=0.0).hessian(),
                "lower": self._oracle.linearized(self._x, point.y).hessian(),
            }
        at: AtY = point.extra
        smooth = self.sign * self.hessians["upper"] + at.multiplier * self.hessians["lower"]
        rank_one = at.curvature * torch.outer(at.gap_y, at.gap_y)
        return _plus_diagonal(smooth + rank_one, self._theta + at.multiplier * self._in_gap)

    def hvp(self, point: Point) -> Callable[[Tensor], Tensor]:
        at: AtY = point.extra
        linear = self._oracle.linearized(self._x, point.y, upper=self.sign, lower=at.multiplier)
        ridge = self._theta + at.multiplier * self._in_gap
        return lambda v: linear.hvp(v) + at.curvature * (at.gap_y @ v) * at.gap_y + ridge * v


def _plus_diagonal(matrix: Tensor, value: float) -> Tensor:
    return matrix + value * torch.eye(matrix.shape[0], dtype=matrix.dtype, device=matrix.device)
