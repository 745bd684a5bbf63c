r"""The value-function hypergradient: a barrier on the value gap, first derivatives only."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from bilevel import _tree
from bilevel._errors import check_kind, check_number
from bilevel._oracle import Oracle
from bilevel._problem import BilevelProblem
from bilevel._solution import Status
from bilevel.barriers import Barrier, log_rational
from bilevel.estimators._base import Estimate, Estimator, failed
from bilevel.estimators._bound import error_bound
from bilevel.estimators._gap import AtY, GapFunction, RegularizedLower
from bilevel.optim._base import Minimizer, Minimum, Point
from bilevel.optim.newton import Newton

_MEMORY = 0.5  # the gradient of F that sets the tolerances fades by this factor an estimate
_COLD = 1e-3  # of the gradient of f at the start: what z may leave where nothing else is known
_BETTER = 1e-10  # relative decrease of f at which y counts as a better lower minimizer than z


@dataclass(frozen=True)
class ValueFunction(Estimator):
    r"""The gradient of ASBLO's approximation $\varphi_{\mu,\theta,\sigma,\varepsilon}$ at fixed parameters.

    $$v(x) = \min_z \{ f(x, z) + \tfrac{\mu}{2} |z|^2 \} + \varepsilon, \qquad
    \varphi(x) = \min_y \{ F(x, y) + P_\sigma(f(x, y) - v(x)) + \tfrac{\theta}{2} |y|^2 \},$$

    $$\nabla \varphi = \partial_x F(x, y) + \lambda [\partial_x f(x, y) - \partial_x f(x, z)],
    \qquad \lambda = P_\sigma'(f(x, y) - v(x)).$$

    No second derivative of f or F enters the gradient; the default minimizer uses them to find z and
    y. Its distance to the implicit gradient is $O(1/\lambda)$ where the lower problem is strongly convex.

    Attributes:
        mu: Weight of $|z|^2/2$ in the value function, > 0.
        epsilon: Slack added to the value function, >= 0; it must be > 0 where `theta` is None.
        sigma: Weight of the barrier, > 0.
        theta: Weight of $|y|^2/2$, >= 0, or None for $\theta = \lambda \mu$: the regularized
            $f + \tfrac{\mu}{2}|y|^2$ stands in the gap, and the leading bias of $\mu$ cancels.
        barrier: The barrier P.
        pessimistic: Let y maximize F over the lower solutions instead of minimizing it.
        tol: Accuracy of z and y, relative to the gradient of F in y.
        minimizer: Finds z and y.
        error_bound: Whether `info["error_bound"]` says how far the gradient is from that of $F(x, y^*(x))$: a bound
            to first order on the bias and on what inexact z and y add to it. It takes second derivatives of f, by one
            Newton step and one linear solve at z, and is infinite where the lower Hessian is singular or torch has
            no second derivatives of f.

    Raises:
        ValueError: A parameter is out of its range.

    Example:
        >>> import torch, bilevel as bl
        >>> problem = bl.BilevelProblem(
        ...     upper=lambda x, y, data: 0.5 * ((y - 1.0) ** 2).sum(),
        ...     lower=lambda x, y, data: 0.5 * ((y - 3.0 * x) ** 2).sum(),
        ... )
        >>> one, zero = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
        >>> estimate = bl.hypergradient(problem, one, zero, method=bl.ValueFunction(epsilon=1e-8))
        >>> bool(abs(estimate.grad - 6.0) < 1e-3)
        True

    References:
        He and He, EchoIR (arXiv 2412.07225), Eqs. 10, 14, 15 and 16; Liu et al., BVFIM (ICML 2021).

    Note:
        The paper has no `epsilon`; without it there is no strictly feasible y wherever y = 0 solves
        the lower problem. Eq. 16 is used in its corrected form: the derivative of the value function
        is $\partial_x f(x, z)$, taken at z.
    """

    mu: float = 1e-8
    epsilon: float = 1e-6
    sigma: float = 1e-2
    theta: float | None = None
    barrier: Barrier = field(default_factory=log_rational)
    pessimistic: bool = False  # pyright: ignore[reportIncompatibleMethodOverride]  # as frozen
    tol: float = 1e-10
    minimizer: Minimizer = field(default_factory=Newton)
    error_bound: bool = False

    def __post_init__(self) -> None:
        for name in ("mu", "sigma", "tol"):
            check_number("ValueFunction", name, getattr(self, name), "Use a small positive one.")
        mend = "Use a small positive one."
        check_number("ValueFunction", "epsilon", self.epsilon, mend, zero=True)
        if self.theta is None and self.epsilon == 0.0:
            raise ValueError(
                "`ValueFunction(epsilon=...)` must be > 0 where theta is None. Got epsilon=0.0. "
                "Raise it, or give theta."
            )
        if self.theta is not None:
            mend = "Leave it out for lambda * mu."
            check_number("ValueFunction", "theta", self.theta, mend, zero=True)
        for name, kind, mend in (
            ("barrier", Barrier, "Pass e.g. `barriers.log_rational()`."),
            ("minimizer", Minimizer, "Pass e.g. `optim.Newton()`."),
            ("pessimistic", bool, "Pass True or False."),
            ("error_bound", bool, "Pass True or False."),
        ):
            check_kind(f"ValueFunction({name}=...)", getattr(self, name), kind, mend)

    def estimate(
        self,
        problem: BilevelProblem,
        x: Tensor,
        y: Tensor,
        data: Any = None,
        memory: Mapping[str, Any] | None = None,
    ) -> Estimate:
        """See `Estimator.estimate`."""
        oracle = Oracle(problem, data)
        warm = dict(memory or {})
        lower = RegularizedLower(oracle, x, self.mu, warm.get("lower_hessian"))
        # The error of z enters the hypergradient times lambda, that of y times a constant: hence the two
        # tolerances. Before lambda is known, z is solved as far as its own start allows.
        pull = float(warm.get("upper_gradient", 0.0))
        start_z = lower.evaluate(warm.get("z", y))
        push = pull / float(warm["multiplier"]) if pull else _COLD * _tree.length(start_z.grad)
        z = self.minimizer.minimize(lower, start_z, self.tol * push)
        gap = GapFunction(oracle, x, self, z.point, warm.get("hessians"))
        while True:
            if z.status in (Status.NONFINITE, Status.LOWER_UNBOUNDED):
                return failed(oracle, x, y, z.status)
            start = self._feasible(lower, gap, y, z.point)
            if not math.isfinite(start.value):
                # a strictly feasible point has its numbers: F is infinite there, not the barrier
                feasible = start.extra is not None
                broken = feasible or math.isnan(start.value)
                return failed(oracle, x, y, Status.NONFINITE if broken else Status.INFEASIBLE)
            pull = max(_MEMORY * pull, start.extra.upper_y_norm)
            minimum = self.minimizer.minimize(gap, start, self.tol * pull)
            if minimum.status in (Status.NONFINITE, Status.LOWER_UNBOUNDED):
                return failed(oracle, x, y, minimum.status)
            y = minimum.point.y
            if gap.regularized_gap(minimum.point) >= -_BETTER * self.epsilon:
                return self._estimate(oracle, x, lower, gap, z, minimum, pull)
            # y lies in a deeper lower basin than z: z starts again from there.
            z = self.minimizer.minimize(lower, lower.evaluate(y), self.tol * push)
            gap = GapFunction(oracle, x, self, z.point, gap.hessians)

    def _feasible(self, lower: RegularizedLower, gap: GapFunction, y: Tensor, z: Point) -> Point:
        """A strictly feasible start: y itself, or phase I from y, or z; an infinite value where there is none.

        Phase I descends f from y rather than restarting at z, which would lose the basin that F chose.
        """
        start = gap.evaluate(y)
        if start.value < math.inf or math.isnan(start.value):
            return start
        phase_one = self.minimizer.minimize(lower, lower.evaluate(y), stop=gap.well_inside)
        start = gap.evaluate(phase_one.point.y)
        return start if math.isfinite(start.value) else gap.evaluate(z.y)

    def _estimate(
        self,
        oracle: Oracle,
        x: Tensor,
        lower: RegularizedLower,
        gap: GapFunction,
        z: Minimum,
        y: Minimum,
        pull: float,
    ) -> Estimate:
        """Eq. 16, from the gradients that the two minimizers left at their last points."""
        at_y: AtY = y.point.extra
        sign = gap.sign
        grad = at_y.upper_x + sign * at_y.multiplier * (at_y.lower_x - z.point.extra.lower_x)
        status = Status.CONVERGED
        if not (math.isfinite(y.point.value) and _tree.is_finite(grad)):
            status = Status.NONFINITE
        elif not (z.status is y.status is Status.CONVERGED):
            status = Status.LOWER_UNSOLVED
        info = {
            "upper": at_y.upper,
            "lower": at_y.lower,
            "value_gap": at_y.gap,
            "gap_noise": at_y.gap_noise,
            "slack": -at_y.zeta,
            "multiplier": at_y.multiplier,
            "lower_residual": z.residual,
            "residual": y.residual,
        }
        if self.error_bound and status is not Status.NONFINITE:
            try:
                bound = error_bound(oracle, x, z.point.y, grad, hessian=lower.lower_hessian)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError:  # f was differentiated many times before, but never twice
                bound = math.inf
            info["error_bound"] = bound
        return Estimate(
            grad=grad,
            y=y.point.y,
            value=sign * y.point.value,
            status=status,
            info=info,
            noise=y.point.noise,
            memory={
                "z": z.point.y,
                "multiplier": at_y.multiplier,
                "upper_gradient": max(_MEMORY * pull, at_y.upper_y_norm),
                "lower_hessian": lower.lower_hessian,
                "hessians": gap.hessians,
            },
            evaluations=oracle.evaluations,
        )
