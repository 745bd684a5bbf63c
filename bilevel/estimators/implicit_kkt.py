"""The implicit hypergradient of a lower problem with constraints: one linear system with its KKT matrix."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from bilevel import _tree
from bilevel._errors import check_number
from bilevel._oracle import Oracle
from bilevel._problem import CONSTRAINTS, BilevelProblem
from bilevel._solution import Status
from bilevel.estimators._base import Estimate, Estimator, failed, linear_tolerance
from bilevel.estimators._kkt import ConstrainedLower


@dataclass(frozen=True)
class ImplicitKKT(Estimator):
    r"""The hypergradient by the implicit function theorem, where y is held by constraints.

    At a lower solution with multipliers $\lambda$ of the active constraints $h_A$ (the equalities among them) and
    $L = f + \lambda^\top h_A$, the equations $\nabla_y L = 0$, $h_A = 0$ give

    $$\frac{d}{dx} F(x, y^*(x)) = \partial_x F - \partial^2_{xy} L \, p - \partial_x h_A^\top q, \qquad
    \begin{pmatrix} \partial^2_{yy} L & \partial_y h_A^\top \\ \partial_y h_A & 0 \end{pmatrix}
    \begin{pmatrix} p \\ q \end{pmatrix} = \begin{pmatrix} \partial_y F \\ 0 \end{pmatrix},$$

    if the active gradients are independent, L is strictly convex along them, and each active inequality has a
    positive multiplier. The lower problem is solved by SciPy (SLSQP, then trust-constr) from y and polished by
    Newton's method on these equations. The matrix is dense: for up to some hundred lower variables.

    What does not hold is said: the status is WEAKLY_ACTIVE where a multiplier is zero, and the gradient then
    that of one side; LINEAR_UNSOLVED where the matrix is singular or L not convex along the constraints;
    LOWER_UNSOLVED where the KKT residual is too large; INFEASIBLE where no y was found. `info` has the numbers.

    Attributes:
        atol: Distance of a constraint and of its multiplier from zero, both relative, at which it counts as
            weakly active, >= 0.

    Raises:
        ValueError: `atol` is negative.

    Example:
        >>> import torch, bilevel as bl
        >>> problem = bl.BilevelProblem(  # y projects x onto y1 + y2 = 1
        ...     upper=lambda x, y, data: y[0] ** 2,
        ...     lower=lambda x, y, data: ((y - x) ** 2).sum(),
        ...     lower_equality=lambda x, y, data: y.sum() - 1.0,
        ... )
        >>> x = torch.tensor([1.0, 0.4]).double()
        >>> bl.hypergradient(problem, x, x, method=bl.ImplicitKKT()).grad  # y = (0.8, 0.2)
        tensor([ 0.8000, -0.8000], dtype=torch.float64)

    References:
        Fiacco, Sensitivity analysis for nonlinear programming using penalty methods (1976), theorem 2.1; Amos and
        Kolter, OptNet (ICML 2017), Eqs. 6 to 8, for the quadratic case.

    Note:
        Evaluations count F and f; constraints are called about as often as f, and are not counted.
    """

    constraints: ClassVar[tuple[str, ...]] = CONSTRAINTS
    atol: float = 1e-6

    def __post_init__(self) -> None:
        check_number("ImplicitKKT", "atol", self.atol, "Use e.g. 1e-6.", zero=True)

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
        size = max(_tree.rms(y), 1e-2 * _tree.rms(x), 1e-3)
        lower = ConstrainedLower(oracle, x, data, size if math.isfinite(size) else 1.0)
        solved = lower.solve(y)
        if solved.status in (Status.NONFINITE, Status.LOWER_UNBOUNDED, Status.INFEASIBLE):
            nearest = solved.y if solved.status is Status.INFEASIBLE else y
            return failed(oracle, x, nearest, solved.status)
        y = solved.y
        upper, upper_x, upper_y = oracle.upper_grad(x, y)
        system = lower.system(solved)
        if not (_tree.is_finite(system.matrix) and _tree.is_finite(upper_y)):
            return failed(oracle, x, y, Status.NONFINITE)
        p, q, residual = system.solve(upper_y)
        grad = upper_x - system.pull_back(p, q)
        weak = int(lower.weakly_active(solved, self.atol).sum())
        status = Status.CONVERGED
        if not (math.isfinite(float(upper)) and _tree.is_finite(grad)):
            status = Status.NONFINITE
        elif solved.status is not Status.CONVERGED:
            status = Status.LOWER_UNSOLVED
        elif residual > linear_tolerance(x.dtype) or not system.is_regular:
            status = Status.LINEAR_UNSOLVED
        elif weak:
            status = Status.WEAKLY_ACTIVE
        eps = torch.finfo(x.dtype).eps
        return Estimate(
            grad=grad,
            y=y,
            value=float(upper),
            status=status,
            info={
                "upper": float(upper),
                "lower": solved.value,
                "lower_residual": solved.residual,
                "linear_residual": residual,
                "infeasibility": solved.infeasibility,
                "active": float(solved.active.sum()),
                "weakly_active": float(weak),
            },
            # F moves with y, which the KKT equations fix to their residual
            noise=eps * abs(float(upper)) + _tree.length(upper_y) * size * solved.residual,
            evaluations=oracle.evaluations,
        )
