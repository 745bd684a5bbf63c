"""What a minimizer of a smooth function of a vector is given, and what it returns."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from bilevel._solution import Status


@dataclass(frozen=True)
class Point:
    """A function at a point.

    Attributes:
        y: Where, shape (n,).
        value: The value there, infinite outside the function's domain.
        grad: The gradient there, shape (n,).
        noise: The rounding error of `value`: differences below it mean nothing.
        extra: What the function keeps for itself.
    """

    y: Tensor
    value: float
    grad: Tensor
    noise: float = 0.0
    extra: Any = None


class SmoothFunction(ABC):
    """A function with a gradient and a Hessian, to be minimized over vectors."""

    @abstractmethod
    def evaluate(self, y: Tensor) -> Point:
        """The value and the gradient at `y`."""

    def evaluate_ahead(self, y: Tensor) -> Point:
        """The same, where products with the Hessian at `y` are likely to follow: what they need may be kept."""
        return self.evaluate(y)

    @property
    @abstractmethod
    def has_hessian(self) -> bool:
        """Whether second derivatives were measured before, here or at a point nearby."""

    @abstractmethod
    def hessian(self, point: Point, *, refresh: bool) -> Tensor:
        """The Hessian, shape (n, n): measured at `point` on `refresh`, else where it last was."""

    @abstractmethod
    def hvp(self, point: Point) -> Callable[[Tensor], Tensor]:
        """The product of the Hessian at `point` with a vector."""


@dataclass(frozen=True)
class Minimum:
    """Where a minimizer stopped.

    Attributes:
        point: The last point.
        residual: Norm of the gradient there.
        status: CONVERGED (to the tolerance, or to rounding), MAX_STEPS, STALLED, NONFINITE or
            LOWER_UNBOUNDED.
        steps: Steps taken.
    """

    point: Point
    residual: float
    status: Status
    steps: int


class Minimizer(ABC):
    """Minimizes a smooth function of a vector."""

    @abstractmethod
    def minimize(
        self,
        fun: SmoothFunction,
        start: Point,
        tol: float = 0.0,
        *,
        stop: Callable[[Point], bool] | None = None,
    ) -> Minimum:
        """Minimize `fun` from `start`.

        Args:
            fun: The function.
            start: Where to start: `fun.evaluate(y)`.
            tol: Stop when the norm of the gradient is at most this.
            stop: Stop as soon as this holds at the current point.
        """
