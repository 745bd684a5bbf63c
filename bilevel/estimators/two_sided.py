r"""The value-function hypergradient from both sides: its bias is quadratic in one over the multiplier."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bilevel import _tree
from bilevel._errors import check_kind, check_number
from bilevel._oracle import Oracle
from bilevel._problem import BilevelProblem
from bilevel._solution import Status
from bilevel.estimators._base import Estimate, Estimator, failed
from bilevel.optim import Minimizer, Newton, Point, SmoothFunction


@dataclass(frozen=True)
class TwoSided(Estimator):
    r"""The central difference of the lower value function in the direction of F; first derivatives only.

    With $v_\pm(x) = \min_y \{ f(x, y) \pm \tfrac1\lambda F(x, y) \}$, attained at $y_\pm$,

    $$\varphi_\lambda = \tfrac\lambda2 (v_+ - v_-) = F(x, y^*(x)) + O(\lambda^{-2}), \qquad
    \nabla \varphi_\lambda = \tfrac12 [\partial_x F(x, y_+) + \partial_x F(x, y_-)]
    + \tfrac\lambda2 [\partial_x f(x, y_+) - \partial_x f(x, y_-)].$$

    The one-sided formula, that of `ValueFunction` and of penalty methods, has a bias of $O(1/\lambda)$. The price
    is that $f - F/\lambda$ must have a minimum too: the lower problem must be strongly convex around its solution,
    and $\lambda$ larger than the ratio of the curvatures of F and f. The rounding error of $\varphi_\lambda$ is
    $\lambda$ times that of f.

    Attributes:
        multiplier: lambda, > 0.
        tol: Accuracy of both solutions: the gradient left over, relative to that of $F/\lambda$, >= 0.
        minimizer: Finds both; the default takes second derivatives, others need none.

    Raises:
        ValueError: A parameter is out of its range.

    Example:
        >>> import torch, bilevel as bl
        >>> problem = bl.BilevelProblem(
        ...     upper=lambda x, y, data: 0.5 * ((y - 1.0) ** 2).sum(),
        ...     lower=lambda x, y, data: 0.5 * ((y - 3.0 * x) ** 2).sum(),
        ... )
        >>> one, zero = torch.ones(1).double(), torch.zeros(1).double()
        >>> for multiplier in (10.0, 100.0):
        ...     method = bl.TwoSided(multiplier)
        ...     error = bl.hypergradient(problem, one, zero, method).grad - 6.0
        ...     print(f"{error.item():.5f}")
        0.06061
        0.00060

    References:
        Chen, Li, Chayti and Zhang, Faster gradient methods for highly-smooth stochastic bilevel optimization
        (arXiv 2509.02937), the method F2SA-p with p = 2; Kwon et al., A fully first-order method for stochastic
        bilevel optimization (ICML 2023), for the one-sided formula.
    """

    multiplier: float = 1e4
    tol: float = 1e-10
    minimizer: Minimizer = field(default_factory=Newton)

    def __post_init__(self) -> None:
        check_kind("TwoSided(minimizer=...)", self.minimizer, Minimizer, "Pass e.g. `Newton()`.")
        check_number("TwoSided", "multiplier", self.multiplier, "Use e.g. 1e4.")
        check_number("TwoSided", "tol", self.tol, "Use e.g. 1e-10.", zero=True)

    def estimate(
        self,
        problem: BilevelProblem,
        x: Tensor,
        y: Tensor,
        data: Any = None,
        memory: Mapping[str, Any] | None = None,
    ) -> Estimate:
        """See `Estimator.estimate`."""
        oracle, warm = Oracle(problem, data), memory or {}
        ends: list[_At] = []
        starts: list[Tensor] = []
        residual, is_solved, hessian = 0.0, True, warm.get("hessian")
        for sign, name in ((1.0, "ahead"), (-1.0, "behind")):
            # Without a memory, the second solve starts where the first ended.
            start = warm.get(name, starts[-1] if starts else y)
            tilted = _Tilted(oracle, x, sign / self.multiplier, hessian)
            point = tilted.evaluate(start)
            if not math.isfinite(point.value):
                return failed(oracle, x, y, Status.NONFINITE)
            tol = self.tol * point.extra.upper_y_norm / self.multiplier
            minimum = self.minimizer.minimize(tilted, point, tol)
            if minimum.status in (Status.NONFINITE, Status.LOWER_UNBOUNDED):
                return failed(oracle, x, y, minimum.status)
            is_solved = is_solved and minimum.status is Status.CONVERGED
            residual, hessian = max(residual, minimum.residual), tilted.known_hessian
            ends.append(minimum.point.extra)
            starts.append(minimum.point.y)
        ahead, behind = ends
        half = 0.5 * self.multiplier
        value = 0.5 * (ahead.upper + behind.upper) + half * (ahead.lower - behind.lower)
        grad = 0.5 * (ahead.upper_x + behind.upper_x) + half * (ahead.lower_x - behind.lower_x)
        status = Status.CONVERGED if is_solved else Status.LOWER_UNSOLVED
        if not (math.isfinite(value) and _tree.is_finite(grad)):
            status = Status.NONFINITE
        eps = torch.finfo(x.dtype).eps
        return Estimate(
            grad=grad,
            y=0.5 * (starts[0] + starts[1]),
            value=value,
            status=status,
            info={
                "upper": 0.5 * (ahead.upper + behind.upper),
                "lower": 0.5 * (ahead.lower + behind.lower),
                "lower_residual": residual,
                "multiplier": self.multiplier,
            },
            noise=eps * (abs(value) + half * (abs(ahead.lower) + abs(behind.lower))),
            memory={"ahead": starts[0], "behind": starts[1], "hessian": hessian},
            evaluations=oracle.evaluations,
        )


class _At(NamedTuple):
    """What both objectives know at a point."""

    upper: float
    lower: float
    upper_x: Tensor  # (m,)
    lower_x: Tensor  # (m,)
    upper_y_norm: float


class _Tilted(SmoothFunction):
    """`f(x, .) + weight F(x, .)` at fixed x."""

    def __init__(
        self, oracle: Oracle, x: Tensor, weight: float, known_hessian: Tensor | None
    ) -> None:
        self._oracle, self._x, self._weight = oracle, x, weight
        self.known_hessian = known_hessian

    def evaluate(self, y: Tensor) -> Point:
        lower, lower_x, lower_y = self._oracle.lower_grad(self._x, y)
        upper, upper_x, upper_y = self._oracle.upper_grad(self._x, y)
        value = float(lower) + self._weight * float(upper)
        return Point(
            y,
            value,
            lower_y + self._weight * upper_y,
            noise=torch.finfo(y.dtype).eps * (abs(float(lower)) + abs(self._weight * float(upper))),
            extra=_At(float(upper), float(lower), upper_x, lower_x, _tree.length(upper_y)),
        )

    @property
    def has_hessian(self) -> bool:
        return self.known_hessian is not None

    def hessian(self, point: Point, *, refresh: bool) -> Tensor:
        if refresh or self.known_hessian is None:
            self.known_hessian = self._linearized(point).hessian()
        return self.known_hessian

    def hvp(self, point: Point) -> Callable[[Tensor], Tensor]:
        return self._linearized(point).hvp

    def _linearized(self, point: Point) -> Any:
        return self._oracle.linearized(self._x, point.y, upper=self._weight, lower=1.0)
