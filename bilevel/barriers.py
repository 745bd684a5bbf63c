"""Barriers: what keeps a point inside a constraint.

A barrier is a function of the constraint's value zeta, finite where `zeta < 0`, infinite where
`zeta >= 0`. Solvers use it through its derivatives: with `lambda = P'(zeta)` as a plain number the
gradient of `F + P(f - v)` is that of `F + lambda f`, so nothing is differentiated through P.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from bilevel._errors import check_kind, check_number

__all__ = ["Barrier", "log_rational", "relaxed"]


class Barrier(ABC):
    """A convex, increasing, non-negative function P(zeta; sigma) for `zeta < 0`.

    Each method takes `zeta`, a tensor of any shape and floating dtype, and the weight `sigma`, a
    float or a 0-d tensor, and returns a tensor like `zeta`. A NaN in `zeta` stays a NaN.

    Example:
        >>> barrier = log_rational()
        >>> isinstance(barrier, Barrier)
        True
    """

    @abstractmethod
    def value(self, zeta: Tensor, sigma: float | Tensor = 1.0) -> Tensor:
        """P(zeta), infinite outside the barrier's domain."""

    @abstractmethod
    def derivative(self, zeta: Tensor, sigma: float | Tensor = 1.0) -> Tensor:
        """P'(zeta), the multiplier lambda; infinite outside the barrier's domain."""

    @abstractmethod
    def second_derivative(self, zeta: Tensor, sigma: float | Tensor = 1.0) -> Tensor:
        """P''(zeta), infinite outside the barrier's domain."""

    @abstractmethod
    def difference(self, zeta1: Tensor, zeta0: Tensor, sigma: float | Tensor = 1.0) -> Tensor:
        """P(zeta1) - P(zeta0) with the digits that a subtraction of two values would lose.

        `zeta0` must lie inside the domain; the result is infinite where `zeta1` does not.
        """


@dataclass(frozen=True)
class LogRational(Barrier):
    """See `log_rational`, which checks kappa; a tensor is what a traced program has for it."""

    kappa: float | Tensor = 1.0

    def _parts(self, zeta: Tensor) -> tuple[Tensor, Tensor]:
        """`n = min(-zeta, kappa)` and `t = min(kappa / -zeta, 1)`.

        The near branch has t = 1 and the far one n = kappa: products of the two cover both
        branches, and neither argument leaves the range in which its formula is finite.
        """
        slack = torch.where(zeta >= 0.0, self.kappa, -zeta)
        return slack.clamp(max=self.kappa), (self.kappa / slack).clamp(max=1.0)

    def value(self, zeta: Tensor, sigma: float | Tensor = 1.0) -> Tensor:
        n, t = self._parts(zeta)
        inside = sigma * (t * (2.0 - 0.5 * t) - torch.log(n / self.kappa))
        return inside.masked_fill(zeta >= 0.0, math.inf)

    def derivative(self, zeta: Tensor, sigma: float | Tensor = 1.0) -> Tensor:
        n, t = self._parts(zeta)
        return (sigma * (t * t) * (2.0 - t) / n).masked_fill(zeta >= 0.0, math.inf)

    def second_derivative(self, zeta: Tensor, sigma: float | Tensor = 1.0) -> Tensor:
        n, t = self._parts(zeta)
        return (sigma * (t * t * t) * (4.0 - 3.0 * t) / n / n).masked_fill(zeta >= 0.0, math.inf)

    def difference(self, zeta1: Tensor, zeta0: Tensor, sigma: float | Tensor = 1.0) -> Tensor:
        (n1, t1), (n0, t0) = self._parts(zeta1), self._parts(zeta0)
        near = -torch.log1p((n1 - n0) / n0)
        far1, far0 = zeta1.clamp(max=-self.kappa), zeta0.clamp(max=-self.kappa)
        far = t1 * t0 * ((far1 - far0) / self.kappa) * (2.0 - 0.5 * (t1 + t0))
        return (sigma * (near + far)).masked_fill(zeta1 >= 0.0, math.inf)


def log_rational(kappa: float = 1.0) -> Barrier:
    r"""The logarithm near the bound, a rational function of `1 / zeta` far from it.

    With $t = \kappa / (-\zeta)$,

    $$P(\zeta; \sigma) = \begin{cases} \sigma (\tfrac32 + \log t) & -\kappa \le \zeta < 0, \\
    \sigma (2 t - \tfrac12 t^2) & \zeta < -\kappa. \end{cases}$$

    P is twice continuously differentiable, convex and increasing, and vanishes at minus infinity,
    so it is positive everywhere: the logarithm alone is negative far from its bound.

    Args:
        kappa: The distance from the bound at which the branches meet, in the unit of `zeta`;
            above 0.

    Returns:
        The barrier.

    Raises:
        ValueError: `kappa` is a number that is not finite and above 0.

    Example:
        >>> barrier = log_rational(kappa=1.0)
        >>> barrier.value(torch.tensor([-2.0, -1.0, 0.0]))  # 2 t - t^2 / 2 at t = 1/2, 3/2, outside
        tensor([0.8750, 1.5000,    inf])
        >>> barrier.derivative(torch.tensor(-0.01), sigma=0.1)  # sigma / -zeta near the bound
        tensor(10.)

    References:
        He and He, EchoIR: Advancing Image Restoration with Echo Upsampling and Bi-Level
        Optimization, arXiv:2412.07225, 2024. The paper leaves the coefficients open: these follow
        from P being C2 at `-kappa` and zero at minus infinity.
    """
    mend = "Pass the distance from the bound at which the logarithm takes over, e.g. 1.0."
    check_number("log_rational", "kappa", kappa, mend)
    return LogRational(kappa)


@dataclass(frozen=True)
class Relaxed(Barrier):
    """See `relaxed`."""

    barrier: Barrier
    delta: float | Tensor

    def __post_init__(self) -> None:
        check_kind("relaxed(barrier=...)", self.barrier, Barrier, "Pass e.g. `log_rational()`.")
        if not isinstance(self.delta, Tensor):
            mend = "Pass a part of the known slack, e.g. 0.1 of it."
            check_number("relaxed", "delta", self.delta, mend)

    def _edge(self, zeta: Tensor) -> Tensor:
        return -torch.as_tensor(self.delta, dtype=zeta.dtype, device=zeta.device)

    def value(self, zeta: Tensor, sigma: float | Tensor = 1.0) -> Tensor:
        edge = self._edge(zeta)
        slope = self.barrier.derivative(edge, sigma)
        curvature = self.barrier.second_derivative(edge, sigma)
        beyond = (zeta - edge).clamp(min=0.0)  # zero on the barrier's own side
        inside = self.barrier.value(torch.minimum(zeta, edge), sigma)
        return inside + beyond * (slope + 0.5 * curvature * beyond)

    def derivative(self, zeta: Tensor, sigma: float | Tensor = 1.0) -> Tensor:
        edge = self._edge(zeta)
        beyond = (zeta - edge).clamp(min=0.0)
        inside = self.barrier.derivative(torch.minimum(zeta, edge), sigma)
        return inside + self.barrier.second_derivative(edge, sigma) * beyond

    def second_derivative(self, zeta: Tensor, sigma: float | Tensor = 1.0) -> Tensor:
        return self.barrier.second_derivative(torch.minimum(zeta, self._edge(zeta)), sigma)

    def difference(self, zeta1: Tensor, zeta0: Tensor, sigma: float | Tensor = 1.0) -> Tensor:
        edge = self._edge(zeta0)
        slope = self.barrier.derivative(edge, sigma)
        curvature = self.barrier.second_derivative(edge, sigma)
        beyond1, beyond0 = (zeta1 - edge).clamp(min=0.0), (zeta0 - edge).clamp(min=0.0)
        inside = self.barrier.difference(
            torch.minimum(zeta1, edge), torch.minimum(zeta0, edge), sigma
        )
        return inside + (beyond1 - beyond0) * (slope + 0.5 * curvature * (beyond1 + beyond0))


def relaxed(barrier: Barrier, delta: float | Tensor) -> Barrier:
    r"""The barrier up to `-delta`, its second-order Taylor polynomial beyond: finite everywhere.

    $$\tilde P(\zeta) = P(-\delta) + P'(-\delta)(\zeta + \delta)
    + \tfrac12 P''(-\delta)(\zeta + \delta)^2 \quad\text{for } \zeta > -\delta.$$

    A first-order method with a fixed step cannot reject a point; with this continuation a point
    outside is pushed back instead of giving an infinity. It is C2, convex and increasing.

    Args:
        barrier: What to continue.
        delta: Where the continuation begins: above 0, a float or a 0-d tensor (whose value is not
            checked, since that would make an accelerator wait).

    Returns:
        The continued barrier.

    Raises:
        ValueError: `delta` is a number that is not finite and above 0.

    Example:
        >>> barrier = relaxed(log_rational(), delta=0.5)
        >>> barrier.derivative(torch.tensor([-1.0, -0.5, 0.0, 1.0]))
        tensor([1., 2., 4., 8.])
    """
    return Relaxed(barrier, delta)
