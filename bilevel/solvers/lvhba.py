"""LV-HBA: a single loop on the proximal Lagrangian of a lower problem with constraints."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bilevel import _tree
from bilevel._problem import BilevelProblem, ravel, split_data
from bilevel._solution import State
from bilevel._types import Schedule, Tree
from bilevel.estimators import _slsqp, refuse_constraints
from bilevel.estimators._kkt import constraint_values, linearize
from bilevel.optim.torch import Torch
from bilevel.solvers import _walk
from bilevel.solvers._base import Solver
from bilevel.solvers._walk import Movers, Residuals, Walk


@dataclass(frozen=True)
class LVHBA(Solver):
    r"""Proximal Lagrangian value function based, Hessian-free bilevel algorithm: lower constraints in a single loop.

    The lower level is replaced by the saddle function

    $$v(x, y, w) = \min_z \max_{0 \le \lambda \le r} f(x, z) + \lambda^\top h(x, z)
    + \frac{1}{2 \gamma_1} |z - y|^2 - \frac{1}{2 \gamma_2} |\lambda - w|^2.$$

    A step moves z and $\lambda$ once towards its saddle, and then, for a growing $c_k$,

    $$d_x = \frac{\nabla_x F(x, y)}{c_k} + \nabla_x f(x, y) - \nabla_x f(x, z) - \nabla_x h(x, z)^\top \lambda, \qquad
    d_y = \frac{\nabla_y F(x, y)}{c_k} + \nabla_y f(x, y) - \frac{y - z}{\gamma_1},$$

    $(x, y) \leftarrow \Pi_C [(x, y) - (\alpha d_x, \beta d_y)]$ with $C = \{h(x, y) \le 0\}$, and w towards
    $\lambda$. f is taken to be convex in y, h convex in x and y. A step costs four gradients of f and two of F;
    the projection is computed by SLSQP where h is violated. It is slow near the answer, as first-order saddle methods
    are: `ASBLO` is exact.

    Attributes:
        penalty: Schedule of $c_k$ in units of the problem: 1 holds y by f as F can move it by its size.
        gamma: $\gamma_1$ and $\gamma_2$ in units of one over the curvatures that z and $\lambda$ see, > 0.
        max_multiplier: r, the largest $\lambda$, > 0.
        upper_optimizer: Moves x. None: steps of one over a measured curvature on the full batch, Adam on batches.
        lower_optimizer: Moves y, likewise; its direction is divided by $1 + c L_f / L_F$, where
            the L are one over the learning rates.
        value_optimizer: Moves z, likewise.
        rtol: Full batch: projected steps of x and y and the saddle's residuals, over the norm of F's gradient, at
            which the run ends, > 0. The penalty must have grown until its bias $c [f(x, y) - f(x, z)]$ is as small.

    Raises:
        ValueError: A parameter is out of its range.
        TypeError: A schedule or an optimizer is of the wrong kind.

    Example:
        >>> import torch, bilevel as bl
        >>> problem = bl.BilevelProblem(
        ...     upper=lambda x, y, data: ((x - 2.0) ** 2).sum() + (y**2).sum(),
        ...     lower=lambda x, y, data: ((y - 2.0 * x) ** 2).sum(),
        ...     lower_constraint=lambda x, y, data: y - 1.0,  # so y = min(2 x, 1)
        ... )
        >>> x0, y0 = torch.ones(1).double(), torch.ones(1).double()
        >>> solution = bl.solve(problem, bl.LVHBA(), x0, y0, max_steps=500)
        >>> bool(abs(solution.x - 2.0) < 0.2)
        True

    References:
        Yao, Yu, Zeng and Zhang, Constrained Bi-Level Optimization: Proximal Lagrangian Value Function Approach and
        Hessian-free Algorithm (ICLR 2024), Algorithm 1.

    Note:
        The directions of x and y are multiplied by $c_k$, and y moves after x, as in `MEHA`. The paper assumes that
        C is easy to project onto; the units, the measured steps and the numerical projection are ours.
    """

    penalty: Schedule | None = None
    gamma: float = 10.0
    max_multiplier: float = 1e3
    upper_optimizer: Torch | None = None
    lower_optimizer: Torch | None = None
    value_optimizer: Torch | None = None
    rtol: float = 1e-4

    def __post_init__(self) -> None:
        _walk.check_parts(self)
        _walk.check_schedule(self, "penalty")
        _walk.check_positive(self, "gamma", "Use e.g. 10.")
        _walk.check_positive(self, "max_multiplier", "Use e.g. 1e3.")

    def _movers(self) -> Movers:
        return Movers(self.upper_optimizer, self.lower_optimizer, self.value_optimizer)

    def init(
        self, problem: BilevelProblem, x0: Tree, y0: Tree, data: Any, *, full_batch: bool
    ) -> State:
        """See `Solver.init`."""
        refuse_constraints(problem, "LVHBA", allowed=("lower_constraint",))
        flat, (x, y), unravel_x, unravel_y = ravel(problem, x0, y0)
        h = constraint_values(flat.lower_constraint, x, y, split_data(data).lower).detach()
        extra = {"z": y, "lam": torch.zeros_like(h), "w": torch.zeros_like(h)}
        state = _walk.init(self._movers(), flat, x, y, data, full_batch=full_batch, extra=extra)
        return replace(state, x=unravel_x(state.x), y=unravel_y(state.y))

    def step(self, problem: BilevelProblem, state: State, data: Any) -> State:
        """See `Solver.step`."""
        flat, (x, y), unravel_x, unravel_y = ravel(problem, state.x, state.y)
        walk = Walk(self._movers(), flat, replace(state, x=x, y=y), data)
        weight = walk.penalty(self.penalty)  # c_k
        pull = walk.curvature("lower") / self.gamma  # 1 / gamma_1
        saddle = self._saddle(walk, flat, state.memory, pull, split_data(data).lower)
        oracle, z, lam = walk.oracle, saddle.z, saddle.lam

        upper, upper_x, _ = oracle.upper_grad(x, y)
        lower, lower_x, _ = oracle.lower_grad(x, y)
        value, value_x, _ = oracle.lower_grad(x, z)
        held = linearize(flat.lower_constraint, x, z, split_data(data).lower)
        of_x = upper_x + weight * (lower_x - value_x - held.in_x.T @ lam)
        walk.move_x(of_x)
        _, upper_y = oracle.upper_grad_y(walk.x, y)
        _, lower_y = oracle.lower_grad_y(walk.x, y)
        of_y = lower_y - pull * (y - z)
        walk.move_y(weight, upper_y, lower_y, step=of_y)
        free = walk.x, walk.y
        walk.x, walk.y = _projected(flat, walk.x, walk.y, split_data(data).lower)
        w = state.memory["w"]
        walk.memory |= {"z": z, "lam": lam, "w": w + (lam - w) / self.gamma}

        # what is left of each direction after the projection
        left_x = _left(of_x, x, free[0], walk.x)
        left_y = _left(upper_y + weight * of_y, y, free[1], walk.y)
        rest = (weight * saddle.residual, _tree.norm(left_y))
        gap = lower - value - lam @ held.value
        residuals = Residuals(left_x, rest, weight * gap, upper_x, upper_y)
        metrics = {"upper": upper, "lower": lower, "value_gap": gap, "multiplier": weight}
        state = walk.end(residuals, self.rtol, metrics)
        return replace(state, x=unravel_x(state.x), y=unravel_y(state.y))

    def _saddle(
        self,
        walk: Walk,
        flat: BilevelProblem,
        memory: Mapping[str, Any],
        pull: float,
        data: Any,
    ) -> _Saddle:
        """One step of z down, and of the multipliers up, the proximal Lagrangian."""
        z, lam, w = memory["z"], memory["lam"], memory["w"]
        _, lower_z = walk.oracle.lower_grad_y(walk.x, z)
        held = linearize(flat.lower_constraint, walk.x, z, data)
        slopes = (held.in_y**2).sum(1)
        # lambda sees the curvature |h_y|^2 / L; without a slope in y it has nothing to follow
        rate = pull * self.gamma / torch.where(slopes > 0.0, slopes, torch.ones_like(slopes))
        rise = rate * held.value - (lam - w) / self.gamma
        new_lam = (lam + 0.25 * rise).clamp(0.0, self.max_multiplier)
        # z answers to where lambda is going, which damps the oscillation of a saddle
        ahead = (2.0 * new_lam - lam).clamp(min=0.0)
        grad_z = lower_z + held.in_y.T @ ahead + pull * (z - walk.y)
        moved = walk.move_z(z, lower_z, step=grad_z, stiff=1.0 + 1.0 / self.gamma)
        residual = _tree.norm(grad_z) + _tree.norm(held.in_y.T @ (new_lam - lam))
        return _Saddle(moved, new_lam, residual)


class _Saddle(NamedTuple):
    """Where z and the multipliers are, and how far they were from the saddle."""

    z: Tensor
    lam: Tensor
    residual: Tensor


def _projected(flat: BilevelProblem, x: Tensor, y: Tensor, data: Any) -> tuple[Tensor, Tensor]:
    """The nearest point at which the lower constraint holds."""

    def outputs(u: Tensor, v: Tensor) -> Tensor:
        square = 0.5 * (((u - x) ** 2).sum() + ((v - y) ** 2).sum())
        return torch.cat([square[None], -constraint_values(flat.lower_constraint, u, v, data)])

    if not bool((outputs(x, y)[1:] < 0.0).any()):
        return x, y
    found = _slsqp.minimize(outputs, [x, y], 0, ftol=1e-14)
    x, y = found.vectors
    return x if flat.domain is None else flat.domain(x), y


def _left(grad: Tensor, before: Tensor, free: Tensor, after: Tensor) -> Tensor:
    """The gradient that a step stands for once it has been projected."""
    length = _tree.length(free - before)
    return (before - after) * (_tree.length(grad) / length) if length > 0.0 else grad
