"""LV-HBA: a single loop on the proximal Lagrangian of a constrained lower problem."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from bilevel import _tree
from bilevel._autodiff import value_and_grad
from bilevel._problem import BilevelProblem, projected_by, split_data
from bilevel._returned import vector
from bilevel._solution import State
from bilevel._types import Objective, Schedule, Tree
from bilevel.optim.torch import Torch
from bilevel.solvers import _fields, _walk_start
from bilevel.solvers._base import Solver
from bilevel.solvers._walk import Residuals, Walk

_RETURNS = 100  # steps back to the feasible set at most, each a gradient of h
_DUAL = 0.5  # of the largest stable product of the steps of z and of its multipliers


@dataclass(frozen=True)
class LVHBA(Solver):
    r"""Proximal Lagrangian value function based Hessian-free algorithm, for lower constraints $h(x, y) \le 0$.

    The value function is replaced by a saddle value in z and its multipliers $\lambda$, near y and $\zeta$:

    $$v(x, y, \zeta) = \min_z \max_{0 \le \lambda \le r} f(x, z) + \lambda^\top h(x, z)
    + \frac{|z - y|^2}{2 \gamma_1} - \frac{|\lambda - \zeta|^2}{2 \gamma_2}.$$

    A step moves $(z, \lambda)$ once down and up this function, and then

    $$(x, y) \leftarrow \Pi_C \{ (x, y) - \alpha (d_x, d_y) \}, \qquad
    \zeta \leftarrow \Pi_{[0, r]} \{ \zeta + \beta (\lambda - \zeta) / \gamma_2 \},$$

    $$d_x = \tfrac{1}{c_k} \nabla_x F + \nabla_x f(x, y) - \nabla_x f(x, z) - \lambda^\top \nabla_x h(x, z), \qquad
    d_y = \tfrac{1}{c_k} \nabla_y F + \nabla_y f(x, y) - \tfrac{1}{\gamma_1} (y - z),$$

    where C holds the points of the domain with $h(x, y) \le 0$. A step costs three gradients of f and one of F, besides
    those of h. f and h should be convex in y.

    Attributes:
        penalty: Schedule of $c_k$ in units of the problem: 1 holds y by f as F can move it by its size.
        gamma: $\gamma_1$ in units of one over the curvature of f in y, and $\gamma_2$ in units of the step of
            $\lambda$, > 1.
        bound: r, the largest multiplier, > 0.
        upper_optimizer: Moves x. None: steps of one over a measured curvature on the full batch, Adam on batches.
            The projection onto C is in the metric of the learning rates, as it must be for SGD.
        lower_optimizer: Moves y, likewise; its direction is divided by $1 + c L_f / L_F$, where
            the L are one over the learning rates.
        value_optimizer: Moves z, likewise.
        rtol: Full batch: changes of all variables, in units of F's gradient, at which the run ends, > 0. The penalty
            must have grown until its bias $c [f(x, y) - f(x, z)]$ is as small.

    Raises:
        ValueError: A parameter is out of its range.
        TypeError: A schedule or an optimizer is of the wrong kind.

    Example:
        >>> import itertools, torch, bilevel as bl
        >>> problem = bl.BilevelProblem(  # y = min(x, 1): the best x is 1
        ...     upper=lambda x, y, data: ((y - 2.0) ** 2).sum() + 0.5 * ((x - 0.5) ** 2).sum(),
        ...     lower=lambda x, y, data: ((y - x) ** 2).sum(),
        ...     lower_constraint=lambda x, y, data: y - 1.0,
        ... )
        >>> x0, y0 = torch.zeros(1).double(), torch.zeros(1).double()
        >>> for state in itertools.islice(bl.iterate(problem, bl.LVHBA(), x0, y0), 1000):
        ...     pass
        >>> state.y
        tensor([1.], dtype=torch.float64)

    References:
        Yao, Yu, Zeng and Zhang, Constrained Bi-Level Optimization: Proximal Lagrangian Value Function Approach and
        Hessian-free Algorithm (ICLR 2024), Algorithm 1 (LV-HBA).

    Note:
        The directions of x and y are multiplied by $c_k$, and y's step is divided by its curvature. The paper projects
        exactly; here steps along the gradient of the squared violation lead back to C, which is the projection
        where one linear constraint is violated, and has the same points of rest where several are.
    """

    penalty: Schedule | None = None
    gamma: float = 10.0
    bound: float = 1e6
    upper_optimizer: Torch | None = None
    lower_optimizer: Torch | None = None
    value_optimizer: Torch | None = None
    rtol: float = 1e-4

    def __post_init__(self) -> None:
        _fields.check_parts(self)
        _fields.check_schedule(self, "penalty")
        _fields.check_positive(self, "bound", "Use a number above all multipliers, e.g. 1e6.")
        _fields.check_positive(self, "gamma", "Use e.g. 10.")
        if self.gamma <= 1.0:
            raise ValueError(
                f"`LVHBA(gamma=...)` must be above 1. Got gamma={self.gamma}. Use e.g. 10."
            )

    def init(
        self, problem: BilevelProblem, x0: Tree, y0: Tree, data: Any, *, full_batch: bool
    ) -> State:
        """See `Solver.init`."""
        if problem.lower_constraint is None:
            raise ValueError(
                "`LVHBA` must be given a `BilevelProblem(lower_constraint=...)`. Got none. Use `MEHA()` without one."
            )
        h = _Constraint(problem, data)
        values = h.values(x0, y0)
        zero = torch.zeros_like(values)
        rows = torch.eye(values.numel(), dtype=values.dtype, device=values.device)
        square = sum(float(_tree.norm(h.pulled(row, x0, y0)[1])) ** 2 for row in rows)
        extra = {
            "z": _tree.detach(y0),
            "multipliers": zero,
            "zeta": zero,
            "jacobian": square or 1.0,
        }
        return _walk_start.init(
            self,
            problem,
            x0,
            y0,
            data,
            full_batch=full_batch,
            extra=extra,
            allowed=("lower_constraint",),
        )

    def step(self, problem: BilevelProblem, state: State, data: Any) -> State:
        """See `Solver.step`."""
        walk = Walk(self, problem, state, data)
        h, oracle, memory = _Constraint(problem, data), walk.oracle, walk.memory
        x, y, z = walk.x, walk.y, memory["z"]
        multipliers, zeta = memory["multipliers"], memory["zeta"]
        weight = walk.penalty(self.penalty)  # c_k
        curvature = walk.curvature("lower")
        pull = curvature / self.gamma  # 1 / gamma_1
        dual = _DUAL * curvature / memory["jacobian"]  # the step of lambda

        _, lower_z = oracle.lower_grad_y(x, z)
        _, constraint_z = h.pulled(multipliers, x, z)
        grad_z = _tree.axpy(1.0, constraint_z, _tree.axpy(pull, _tree.axpy(-1.0, y, z), lower_z))
        rise = dual * h.values(x, z) - (multipliers - zeta) / self.gamma
        memory["z"] = walk.move_z(z, lower_z, step=grad_z, stiff=1.0 + 1.0 / self.gamma)
        bound = min(self.bound, torch.finfo(rise.dtype).max)  # float16 holds no 1e6
        memory["multipliers"] = (multipliers + rise).clamp(0.0, bound)
        z, multipliers = memory["z"], memory["multipliers"]
        memory["zeta"] = (zeta + (multipliers - zeta) / self.gamma).clamp(0.0, bound)

        upper, upper_x, upper_y = oracle.upper_grad(x, y)
        lower, lower_x, lower_y = oracle.lower_grad(x, y)
        value, value_x, _ = oracle.lower_grad(x, z)
        constraint_x, _ = h.pulled(multipliers, x, z)
        slope_x = _tree.axpy(-1.0, constraint_x, _tree.axpy(-1.0, value_x, lower_x))
        walk.move_x(_tree.axpy(weight, slope_x, upper_x))
        grad_y = _tree.axpy(-pull, _tree.axpy(-1.0, z, y), lower_y)
        walk.move_y(weight, upper_y, lower_y, step=grad_y)
        rates = walk.rates(weight)
        walk.x, walk.y = h.returned(problem, walk.x, walk.y, rates)

        left_x = _tree.scale(1.0 / rates[0], _tree.axpy(-1.0, walk.x, x))
        left_y = _tree.scale(1.0 / rates[1], _tree.axpy(-1.0, walk.y, y))
        moved = _tree.norm(multipliers - state.memory["multipliers"]) / dual
        lag = _tree.norm(multipliers - zeta) / dual
        rest = (
            _tree.norm(left_y),
            weight * _tree.norm(grad_z),
            walk.memory["unit"] * memory["jacobian"] ** 0.5 * moved,
            walk.memory["unit"] * memory["jacobian"] ** 0.5 * lag / self.gamma,
        )
        gap = lower - value
        residuals = Residuals(left_x, rest, weight * gap, upper_x, upper_y)
        metrics = {
            "upper": upper,
            "lower": lower,
            "value_gap": gap,
            "multiplier": weight,
            "violation": h.values(walk.x, walk.y).max().clamp(min=0.0),
        }
        return walk.end(residuals, self.rtol, metrics)


class _Constraint:
    """h on the data of a step, as a vector."""

    def __init__(self, problem: BilevelProblem, data: Any) -> None:
        self._fun, self._data = cast("Objective", problem.lower_constraint), split_data(data).lower

    def _h(self, x: Tree, y: Tree) -> Tensor:
        return vector(self._fun(x, y, self._data), "lower_constraint")

    def values(self, x: Tree, y: Tree) -> Tensor:
        """h(x, y), shape (p,)."""
        with torch.no_grad():
            return self._h(x, y).detach()

    def pulled(self, multipliers: Tensor, x: Tree, y: Tree) -> tuple[Tree, Tree]:
        """The gradients of multipliers . h in x and in y."""

        def weighted(u: Tree, v: Tree) -> Tensor:
            return multipliers @ self._h(u, v)

        _, (grad_x, grad_y) = value_and_grad(weighted, x, y)
        return grad_x, grad_y

    def returned(
        self, problem: BilevelProblem, x: Tree, y: Tree, rates: tuple[float, float]
    ) -> tuple[Tree, Tree]:
        """A point of C near (x, y): steps along the gradient of |max(h, 0)|^2 / 2 in the metric of the rates.

        Each is as long as a linear h would need.
        """
        tol = 1e-2 * max(torch.finfo(leaf.dtype).eps for leaf in _tree.leaves(y)) ** 0.5
        for _ in range(_RETURNS):
            violation = self.values(x, y).clamp(min=0.0)
            if not float(violation.max()) > tol:
                break
            grad_x, grad_y = self.pulled(violation, x, y)
            descent = rates[0] * _tree.vdot(grad_x, grad_x) + rates[1] * _tree.vdot(grad_y, grad_y)
            if not float(descent) > 0.0:
                break
            length = float(violation @ violation / descent)
            x = _tree.axpy(-length * rates[0], grad_x, x)
            y = _tree.axpy(-length * rates[1], grad_y, y)
            x = projected_by(problem.domain, x)
        return x, y
