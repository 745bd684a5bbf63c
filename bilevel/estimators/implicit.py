"""The implicit hypergradient: one linear system with the lower Hessian."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from bilevel import _tree
from bilevel._errors import check_kind, check_number
from bilevel._oracle import Oracle
from bilevel._problem import BilevelProblem
from bilevel._solution import Status
from bilevel._types import Tree
from bilevel.estimators import _compiled
from bilevel.estimators._base import Estimate, Estimator, failed, linear_tolerance
from bilevel.estimators._bound import error_bound
from bilevel.estimators._descent import descent
from bilevel.estimators._fixed_point import at_fixed_point
from bilevel.estimators._fused import FusedImplicit
from bilevel.estimators._lower import LowerHessian, LowerObjective
from bilevel.estimators._newton_steps import newton_steps
from bilevel.fixed_points import FixedPoint
from bilevel.linear import CG, GMRES, Dense, LinearSolver
from bilevel.optim import Minimizer, Newton

_AT_ONCE = 256  # variables up to which the columns of the Hessian may take memory together, as for Newton's method
_FEW = 8  # unknowns, for which a warm start saves fewer products than the one it costs
_EXACT = 1e-6  # relative residual from which on that is so


@dataclass(frozen=True)
class Implicit(Estimator):
    r"""The hypergradient by the implicit function theorem.

    Where the lower Hessian is invertible, $\nabla_y f(x, y^*(x)) = 0$ gives

    $$\frac{d}{dx} F(x, y^*(x)) = \partial_x F - \partial^2_{xy} f \, v,
    \qquad \partial^2_{yy} f \, v = \partial_y F.$$

    The lower problem is solved first, and the status says if it was not, or if the linear system was not:
    the error of the hypergradient follows both residuals, which `info` reports.

    Attributes:
        linear: Solves for v: `CG()` by Hessian-vector products, `MINRES()` where the Hessian is indefinite,
            `Dense()` by the whole Hessian, `Nystrom()` with a low-rank preconditioner, `Neumann()` by a truncated
            series. None for `CG()`, and for `GMRES()` with a `condition`, whose matrix is not symmetric.
        minimizer: Solves the lower problem where there is no `condition`; None for `Newton()`.
        tol: Norm of the lower gradient, or of $T(x, y) - y$, to reach, relative to the one at the start, >= 0. The
            linear system counts as solved at the same residual, relative to its right-hand side, at no less than 1e-6
            (1.2e-5 in float32) and no more than 1e-2.
        condition: A `FixedPoint` $y = T(x, y)$ that holds at the lower solution, in place of
            $\nabla_y f(x, y) = 0$, for an f that is not smooth. The hypergradient then is
            $\partial_x F + (\partial_x T)^\top v$ with $(I - \partial_y T)^\top v = \partial_y F$, and
            evaluations of T count as gradients of f.
        error_bound: Whether `info["error_bound"]` says how far the hypergradient is from the true one, given both
            residuals: a bound to first order, by one Newton step and one linear solve more, which `evaluations`
            count. Not with a `condition`.
        compile: Whether `torch.compile` makes one graph of the lower steps, the linear system and the hypergradient:
            the same numbers many times faster where the problem is small, but the first call compiles it, for the
            longer the more steps there are. It takes a fixed number of steps, which end early in their effect and
            not in time: `minimizer` must be `Newton(max_steps=...)`, whose every step forms the Hessian and which
            then leaves no saddle that it starts at, or a `Torch` of SGD, Adam or AdamW, and `linear`
            `CG(max_steps=...)` or `Dense()`. What is compiled is kept with the problem, so make that once, and give
            what changes as data.

    Raises:
        ValueError: `tol` is negative, a `minimizer` is given beside a `condition`, or `compile` beside a part that
            has no fixed number of steps.
        TypeError: A part is of the wrong kind.

    Example:
        >>> import torch, bilevel as bl
        >>> problem = bl.BilevelProblem(
        ...     upper=lambda x, y, data: 0.5 * ((y - 1.0) ** 2).sum(),
        ...     lower=lambda x, y, data: 0.5 * ((y - 3.0 * x) ** 2).sum(),
        ... )
        >>> bl.hypergradient(
        ...     problem, torch.ones(1), torch.zeros(1), method=bl.Implicit(bl.linear.Dense())
        ... ).grad
        tensor([6.])

    References:
        Pedregosa, Hyperparameter optimization with approximate gradient (ICML 2016), Eq. 2.
    """

    linear: LinearSolver | None = None
    minimizer: Minimizer | None = None
    tol: float = 1e-13
    condition: FixedPoint | None = None
    error_bound: bool = False
    compile: bool = False

    def __post_init__(self) -> None:
        if self.linear is not None:
            check_kind(
                "Implicit(linear=...)", self.linear, LinearSolver, "Pass e.g. `linear.CG()`."
            )
        if self.condition is not None:
            mend = "Pass e.g. `FixedPoint(fixed_points.prox_gradient(...))`."
            check_kind("Implicit(condition=...)", self.condition, FixedPoint, mend)
            if self.minimizer is not None:
                raise ValueError(
                    "`Implicit(minimizer=...)` must be left out where a condition is given, which has an iteration "
                    f"of its own. Got minimizer={self.minimizer}. Set `FixedPoint(max_steps=...)` instead."
                )
        if self.minimizer is not None:
            mend = "Pass e.g. `Newton()`."
            check_kind("Implicit(minimizer=...)", self.minimizer, Minimizer, mend)
        check_number("Implicit", "tol", self.tol, "Use e.g. 1e-10.", zero=True)
        check_kind("Implicit(error_bound=...)", self.error_bound, bool, "Pass True or False.")
        check_kind("Implicit(compile=...)", self.compile, bool, "Pass True or False.")
        if self.compile:
            _ = self.fused  # refuses now what has no fixed number of steps

    @cached_property
    def fused(self) -> FusedImplicit:
        """The same as one fixed program.

        Raises:
            ValueError: A part stops where its numbers tell it to.
        """
        for name in ("condition", "error_bound"):
            if getattr(self, name):
                raise ValueError(
                    f"`Implicit({name}=...)` must be left out of a fixed program, as `compile=True` and "
                    f"`solve_many` need it. Got {name}={getattr(self, name)}. Leave out one of them."
                )
        linear = self.linear or CG()
        if not isinstance(linear, Dense) and not (isinstance(linear, CG) and linear.max_steps):
            raise ValueError(
                "`Implicit(linear=...)` must take a fixed number of products to be one program for all problems, as "
                f"`compile=True` and `solve_many` need it. Got {linear}. Pass e.g. `linear.CG(max_steps=10)` or "
                "`linear.Dense()`."
            )
        where, minimizer = "Implicit(minimizer=...)", self.minimizer or Newton()
        if isinstance(minimizer, Newton):
            return FusedImplicit(newton_steps(where, minimizer), self.tol, linear)
        return FusedImplicit(descent(where, minimizer), self.tol, linear)

    def precompiled(self, problem: BilevelProblem, x: Tree, y: Tree, data: Any) -> Estimate | None:
        """See `Estimator.precompiled`."""
        return _compiled.precompiled(self.fused, problem, x, y, data) if self.compile else None

    def estimate(
        self,
        problem: BilevelProblem,
        x: Tensor,
        y: Tensor,
        data: Any = None,
        memory: Mapping[str, Any] | None = None,
    ) -> Estimate:
        """See `Estimator.estimate`."""
        if self.compile:
            return _compiled.estimate(self.fused, problem, x, y, data, memory)
        solved_to = linear_tolerance(x.dtype, self.tol)
        if self.condition is not None:
            linear = self.linear or GMRES()
            return at_fixed_point(
                self.condition, linear, self.tol, solved_to, problem, x, y, data, memory
            )
        linear = self.linear or CG()
        warm = memory or {}
        oracle = Oracle(problem, data)
        lower = LowerObjective(oracle, x, warm.get("lower_hessian"))
        minimizer = self.minimizer or Newton()
        evaluate = lower.evaluate_ahead if isinstance(minimizer, Newton) else lower.evaluate
        start = evaluate(y)
        scale = max(_tree.length(start.grad), float(warm.get("scale", 0.0)))
        solved = minimizer.minimize(lower, start, self.tol * scale)
        if solved.status in (Status.NONFINITE, Status.LOWER_UNBOUNDED):
            return failed(oracle, x, y, solved.status)
        y = solved.point.y
        upper, upper_x, upper_y = oracle.upper_grad(x, y)
        value = float(upper)
        gradient = lower.linearized(solved.point)
        hessian = LowerHessian(gradient)
        product = hessian.product(has_columns=y.numel() <= _AT_ONCE)
        v = linear.solve(product, upper_y, None if _solves_at_once(linear, y) else warm.get("v"))
        if (
            v.shape != upper_y.shape
        ):  # a solver of one's own: the engine would sum up what it can expand
            _tree.check_like(v, upper_y, "linear.solve(...)")
        size = _tree.length(upper_y)
        mixed, image = hessian.products(v)
        residual = _tree.length(image - upper_y) / (size or 1.0)
        grad = upper_x - mixed
        status = Status.CONVERGED
        measured = math.isfinite(value) and math.isfinite(residual)  # and so the products
        if not (measured and _tree.is_finite(grad)):
            status = Status.NONFINITE
        elif solved.status is not Status.CONVERGED:
            status = Status.LOWER_UNSOLVED
        elif not residual <= solved_to:
            status = Status.LINEAR_UNSOLVED
        info = {
            "upper": value,
            "lower": solved.point.value,
            "lower_residual": solved.residual,
            "linear_residual": residual,
        }
        if self.error_bound and status is not Status.NONFINITE:
            known = lower.lower_hessian
            info["error_bound"] = error_bound(oracle, x, y, grad, gradient, known, v)
        return Estimate(
            grad=grad,
            y=y,
            value=value,
            status=status,
            info=info,
            # F(x, y) - F(x, y*) = v . grad_y f to first order: the lower residual is rounding too
            noise=torch.finfo(x.dtype).eps * abs(value) + _tree.length(v) * solved.residual,
            memory={"v": v, "scale": scale, "lower_hessian": lower.lower_hessian},
            evaluations=oracle.evaluations,
        )


def _solves_at_once(linear: LinearSolver, y: Tensor) -> bool:
    """Whether conjugate gradients take about as many products as there are unknowns, and those are few."""
    n = y.numel()
    return (
        n <= _FEW and isinstance(linear, CG) and (linear.max_steps is None or linear.max_steps > n)
    )
