"""The hypergradient of one lower step: cheap, and biased."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bilevel import _tree
from bilevel._errors import check_number
from bilevel._oracle import Oracle
from bilevel._problem import BilevelProblem
from bilevel._solution import Status
from bilevel.estimators._base import FALLEN, Estimate, Estimator, failed


@dataclass(frozen=True)
class OneStep(Estimator):
    r"""The gradient of $F(x, y')$ with $y' = y - \alpha \nabla_y f(x, y)$, the given y held constant.

    $$\partial_x F(x, y') - \alpha\, \partial^2_{xy} f(x, y)\, \partial_y F(x, y').$$

    Warning:
        It is biased by design, also where the lower problem is solved: $\alpha I$ stands for the inverse of the
        lower Hessian, so only the part of $\partial_y F$ along eigenvalues near $1/\alpha$ is passed on in full.
        Relative errors near one are usual. A solver that starts each estimate at the y of the one before moves both
        levels at once, at the cost of one step each; it ends where this gradient vanishes, which is not the optimum.

    The status is CONVERGED only where the gradient of f has fallen to a hundredth of the first one seen, and else
    MAX_STEPS, which is no failure: one step was asked for.

    Attributes:
        lr: alpha, the length of the step, > 0.
        radius: None for the exact product $\partial^2_{xy} f\, v$ with $v = \partial_y F(x, y')$, or the length
            > 0 by which y is moved along $\pm v / |v|$ to take it as the central difference of $\partial_x f$: DARTS
            takes 0.01, and f then needs no second derivatives.

    Raises:
        ValueError: A parameter is out of its range.
        TypeError: A parameter is of the wrong kind.

    Example:
        >>> import torch, bilevel as bl
        >>> problem = bl.BilevelProblem(
        ...     upper=lambda x, y, data: 0.5 * ((y - 1.0) ** 2).sum(),
        ...     lower=lambda x, y, data: 0.5 * ((y - 3.0 * x) ** 2).sum(),
        ... )
        >>> one, zero = torch.ones(1), torch.zeros(1)
        >>> bl.hypergradient(problem, one, zero, method=bl.OneStep(lr=0.5)).grad  # (1.5 - 1) 1.5
        tensor([0.7500])

    References:
        Luketina et al., Scalable gradient-based tuning of continuous regularization hyperparameters (ICML 2016),
        Eq. 5 (T1-T2); Liu et al., DARTS: differentiable architecture search (ICLR 2019), Eqs. 7 and 8.
    """

    lr: float = 0.1
    radius: float | None = None

    def __post_init__(self) -> None:
        check_number("OneStep", "lr", self.lr, "Use e.g. 0.1.")
        if self.radius is not None:
            mend = "Use e.g. 0.01, or leave it out for the exact product."
            check_number("OneStep", "radius", self.radius, mend)

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
        if self.radius is None:
            gradient = oracle.linearized(x, y)
            slope = gradient.grad
            y_new = y - self.lr * slope
            upper, upper_x, upper_y = oracle.upper_grad(x, y_new)
            mixed = gradient.mixed_vjp(upper_y)
        else:
            _, slope = oracle.lower_grad_y(x, y)
            y_new = y - self.lr * slope
            upper, upper_x, upper_y = oracle.upper_grad(x, y_new)
            mixed = _difference(oracle, x, y, upper_y, self.radius)
        grad = upper_x - self.lr * mixed
        lower, left = oracle.lower_grad_y(x, y_new)
        first, residual = _tree.length(slope), _tree.length(left)
        finite = all(map(math.isfinite, (float(upper), float(lower), residual)))
        if not (finite and _tree.is_finite(grad)):
            return failed(oracle, x, y, Status.NONFINITE)
        scale = max(first, float((memory or {}).get("scale", 0.0)))
        has_fallen = residual <= FALLEN * scale
        return Estimate(
            grad=grad,
            y=y_new,
            value=float(upper),
            status=Status.CONVERGED if has_fallen else Status.MAX_STEPS,
            info={"upper": float(upper), "lower": float(lower), "lower_residual": residual},
            noise=torch.finfo(x.dtype).eps * abs(float(upper)),
            memory={"scale": scale},
            evaluations=oracle.evaluations,
        )


def _difference(oracle: Oracle, x: Tensor, y: Tensor, v: Tensor, radius: float) -> Tensor:
    """Eq. 8 of DARTS: the mixed derivative of f times v, by a central difference along v."""
    length = _tree.length(v)
    if length == 0.0:
        return torch.zeros_like(x)
    epsilon = radius / length
    _, ahead, _ = oracle.lower_grad(x, y + epsilon * v)
    _, behind, _ = oracle.lower_grad(x, y - epsilon * v)
    return (ahead - behind) / (2.0 * epsilon)
