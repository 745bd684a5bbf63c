r"""Lower problems stated as a fixed point $y = T(x, y)$: what a nonsmooth f has in place of a zero gradient."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bilevel import _tree
from bilevel._autodiff import gradient_of
from bilevel._errors import check_count, check_number
from bilevel._solution import Status
from bilevel._types import Objective, Tree

linalg: Any = torch.linalg  # its stubs are untyped
_ROUNDING = 64.0  # units of rounding of y at which a residual counts as zero

__all__ = ["prox_gradient", "prox_l1"]

#: `(x, y, data) -> tree like y`.
Map = Callable[[Tree, Tree, Any], Tree]


class Reached(NamedTuple):
    """Where the iteration stopped."""

    y: Tensor  # shape (n,)
    residual: float  # |T(y) - y|
    status: Status  # CONVERGED, MAX_STEPS or NONFINITE


@dataclass(frozen=True)
class FixedPoint:
    r"""The condition $y = T(x, y)$ for `Implicit(condition=...)`, and how it is solved.

    The iteration is $y \leftarrow T(x, y)$ with Anderson acceleration. An accelerated step that does not shrink
    $|T(y) - y|$ is replaced by a plain one: a safeguard, no proof that it converges wherever the plain one does.

    Attributes:
        map: T, called as `map(x, y, data)` with the lower level's data; returns a tree like y. Torch must be able to
            differentiate it in x and y: made with `prox_gradient`, or any contraction of one's own.
        max_steps: Evaluations of T at most, >= 1.
        window: Steps that the acceleration combines, >= 0; 0 for the plain iteration.

    Raises:
        TypeError: `map` is not callable.
        ValueError: A number is out of its range.

    Example:
        >>> import torch, bilevel as bl
        >>> problem = bl.BilevelProblem(
        ...     upper=lambda x, y, data: (y**2).sum(),
        ...     lower=lambda x, y, data: 0.5 * ((y - 3.0) ** 2).sum() + x * y.abs().sum(),
        ... )
        >>> soft_threshold = bl.fixed_points.prox_gradient(
        ...     lambda x, y, data: 0.5 * ((y - 3.0) ** 2).sum(),
        ...     lambda x, v, step: bl.fixed_points.prox_l1(v, step * x),
        ...     lr=0.5,
        ... )
        >>> method = bl.Implicit(condition=bl.FixedPoint(soft_threshold))
        >>> x, y = torch.tensor(1.0).double(), torch.zeros(2).double()
        >>> grad = bl.hypergradient(problem, x, y, method).grad  # y = 3 - x, so -2 * 2 * (3 - x)
        >>> round(grad.item(), 4)
        -8.0

    References:
        Walker and Ni, Anderson acceleration for fixed-point iterations, SIAM Journal on Numerical Analysis 49 (2011),
        Eq. 2.2; Bertrand et al., Implicit differentiation of Lasso-type models (ICML 2020), for the derivative.
    """

    map: Map
    max_steps: int = 10_000
    window: int = 10

    def __post_init__(self) -> None:
        if not callable(self.map):
            raise TypeError(
                f"`FixedPoint(map=...)` must be callable. Got {type(self.map).__name__}. "
                "Pass a function of (x, y, data), e.g. of `fixed_points.prox_gradient`."
            )
        for name, least in (("max_steps", 1), ("window", 0)):
            mend = "Raise it, e.g. to 10."
            check_count("FixedPoint", name, getattr(self, name), mend, least=least)

    def solve(self, step: Callable[[Tensor], Tensor], y: Tensor, tol: float) -> Reached:
        """Iterate over vectors until $|T(y) - y|$ is at most `tol`, or rounding.

        Args:
            step: T at fixed x, over vectors of shape (n,).
            y: The start.
            tol: The residual to reach.

        Returns:
            The last point, at which T was evaluated.
        """
        eps = torch.finfo(y.dtype).eps
        image = step(y)
        residual = _tree.length(image - y)
        spent = 1
        moves: list[Tensor] = []  # differences of the images of successive points
        bends: list[Tensor] = []  # and of their residuals T(y) - y
        while math.isfinite(residual):
            if residual <= max(tol, _ROUNDING * eps * _tree.length(image)):
                return Reached(y, residual, Status.CONVERGED)
            if spent >= self.max_steps:
                return Reached(y, residual, Status.MAX_STEPS)
            r = image - y
            y_new = image
            if moves:
                bend = torch.stack(bends, dim=1)
                weights = linalg.lstsq(bend.cpu(), r[:, None].cpu(), driver="gelsd").solution
                y_new = image - torch.stack(moves, dim=1) @ weights[:, 0].to(r)
            image_new = step(y_new)
            residual_new = _tree.length(image_new - y_new)
            spent += 1
            if moves and not residual_new < residual:
                moves, bends = [], []  # the next step is a plain one, from the same point
                continue
            moves = [*moves, image_new - image][-self.window :] if self.window else []
            bends = [*bends, image_new - y_new - r][-self.window :] if self.window else []
            y, image, residual = y_new, image_new, residual_new
        return Reached(y, residual, Status.NONFINITE)


def prox_l1(v: Tensor, threshold: Tensor | float) -> Tensor:
    r"""Soft thresholding, the proximal operator of $t \|\cdot\|_1$: $\operatorname{sign}(v) \max(|v| - t, 0)$.

    Args:
        v: Any shape.
        threshold: t >= 0, a number or a tensor that broadcasts to v; gradients flow to it.

    Returns:
        A tensor of the shape of `v`.

    Example:
        >>> prox_l1(torch.tensor([-3.0, 0.5, 2.0]), 1.0)
        tensor([-2., 0., 1.])
    """
    return torch.sign(v) * torch.relu(v.abs() - threshold)


def prox_gradient(smooth: Objective, prox: Callable[[Tree, Tree, float], Tree], lr: float) -> Map:
    r"""The map of the proximal gradient method for $f = g + h$, g smooth and h with a simple proximal operator.

    $$T(x, y) = \operatorname{prox}_{\alpha h(x, \cdot)}(y - \alpha \nabla_y g(x, y)).$$

    Its fixed points are the minimizers of f where f is convex in y, and it contracts where g is strongly convex
    and $\alpha$ below 2 over the largest eigenvalue of its Hessian; at 2 over it the iteration may oscillate.

    Args:
        smooth: g, called as `smooth(x, y, data)`; returns a scalar tensor.
        prox: Called as `prox(x, v, lr)` with a tree v like y: the minimizer of $h(x, y) + |y - v|^2 / (2 \alpha)$.
        lr: alpha, > 0.

    Returns:
        T, for `FixedPoint`.

    Raises:
        ValueError: `lr` is out of its range.

    Example:
        >>> step = prox_gradient(
        ...     lambda x, y, data: 0.5 * ((y - 3.0) ** 2).sum(),
        ...     lambda x, v, lr: prox_l1(v, lr * x),
        ...     lr=1.0,
        ... )
        >>> step(torch.tensor(1.0), torch.zeros(2), None)
        tensor([2., 2.])

    References:
        Parikh and Boyd, Proximal algorithms (2014), Eq. 4.5.
    """
    for name, part in (("smooth", smooth), ("prox", prox)):
        if not callable(part):
            raise TypeError(
                f"`prox_gradient({name}=...)` must be callable. Got {type(part).__name__}. "
                f"Pass a function of {'(x, y, data)' if name == 'smooth' else '(x, v, lr)'}."
            )
    mend = "Use one over the largest eigenvalue of the Hessian of `smooth`."
    check_number("prox_gradient", "lr", lr, mend)

    def step(x: Tree, y: Tree, data: Any) -> Tree:
        return prox(x, _tree.axpy(-lr, gradient_of(smooth, x, y, data), y), lr)

    return step
