"""BOME: descend F as far as the value gap still falls, by the dynamic barrier."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from bilevel import _tree
from bilevel._problem import BilevelProblem
from bilevel._solution import State
from bilevel._types import Schedule, Tree
from bilevel.optim.torch import Torch
from bilevel.solvers import _fields, _walk_start
from bilevel.solvers._base import Solver
from bilevel.solvers._walk import Residuals, Walk


@dataclass(frozen=True)
class BOME(Solver):
    r"""Bilevel optimization made easy: a multiplier that makes the value gap fall at its own rate.

    With $q = f(x, y) - f(x, z)$, after T steps $z \leftarrow z - \alpha \nabla_y f(x, z)$, z held fixed,

    $$(x, y) \leftarrow (x, y) - \xi (\nabla F + \lambda \nabla q), \qquad
    \lambda = \max \Bigl( 0, \frac{\phi - \langle \nabla F, \nabla q \rangle}{\|\nabla q\|^2} \Bigr), \qquad
    \phi = \eta \|\nabla q\|^2:$$

    the direction nearest to $\nabla F$ along which q falls by $\phi$ at least. $\lambda$ grows by itself as
    y nears the lower solution, up to a ceiling. A step costs $T + 2$ gradients of f and one of F.

    Attributes:
        eta: $\eta$, in units of the problem: with 1 q falls as F can move y by its size, > 0.
        penalty: Schedule of the ceiling of $\lambda$, in the same units.
        value_steps: T, steps on z in each upper step, >= 1.
        upper_optimizer: Moves x. None: steps of one over a measured curvature on the full batch, Adam on batches.
        lower_optimizer: Moves y, likewise; its direction is divided by $1 + \lambda L_f / L_F$, where
            the L are one over the learning rates.
        value_optimizer: Moves z, likewise.
        rtol: Full batch: norms of the direction and of both lower gradients, over that of F's gradient, at which
            the run ends, > 0. The bias $\lambda q$ must be as small.

    Raises:
        ValueError: A parameter is out of its range.
        TypeError: A schedule or an optimizer is of the wrong kind.

    Example:
        >>> import torch, bilevel as bl
        >>> problem = bl.BilevelProblem(
        ...     upper=lambda x, y, data: 0.5 * (x - y[1]) ** 2 + 0.5 * (y[0] - 1.0) ** 2,
        ...     lower=lambda x, y, data: 0.5 * y[0] ** 2 - x * y[0],  # solved by (x, anything)
        ... )
        >>> x0, y0 = torch.tensor(3.0).double(), torch.tensor([0.0, 2.0]).double()
        >>> bl.solve(problem, bl.BOME(), x0, y0, max_steps=1000).x
        tensor(1.0000, dtype=torch.float64)

    References:
        Liu, Ye, Wright, Stone and Liu, BOME! Bilevel Optimization Made Easy: A Simple First-Order Approach
        (NeurIPS 2022), Algorithm 1.

    Note:
        The paper starts z at y in each step; here z goes on from where it was, as in `VPBGD`. The division of y's step
        by its curvature is ours, and so is the ceiling: where y comes to rest at the lower solution before x
        does, $\lambda$ is a division by zero, and x would stop with y.
    """

    eta: float = 0.5
    penalty: Schedule | None = None
    value_steps: int = 10
    upper_optimizer: Torch | None = None
    lower_optimizer: Torch | None = None
    value_optimizer: Torch | None = None
    rtol: float = 1e-4

    def __post_init__(self) -> None:
        _fields.check_parts(self, counts=("value_steps",))
        _fields.check_schedule(self, "penalty")
        _fields.check_positive(self, "eta", "Use e.g. 0.5.")

    def init(
        self, problem: BilevelProblem, x0: Tree, y0: Tree, data: Any, *, full_batch: bool
    ) -> State:
        """See `Solver.init`."""
        extra = {"z": _tree.detach(y0)}
        return _walk_start.init(self, problem, x0, y0, data, full_batch=full_batch, extra=extra)

    def step(self, problem: BilevelProblem, state: State, data: Any) -> State:
        """See `Solver.step`."""
        walk = Walk(self, problem, state, data)
        q = walk.value_gap(self.value_steps)
        ceiling = walk.penalty(self.penalty)
        upper, *grad_upper = walk.oracle.upper_grad(walk.x, walk.y)
        grad_q = [q.grad_x, q.grad_y]
        square = _tree.vdot(grad_q, grad_q)
        quotient = _tree.vdot(grad_upper, grad_q) / torch.where(square > 0.0, square, 1.0)
        weight = (self.eta * state.memory["unit"] - quotient).clamp(0.0, ceiling)  # lambda
        direction_x, direction_y = _tree.axpy(weight, grad_q, grad_upper)
        rest = (weight * q.residual, _tree.norm(direction_y))
        upper_x, upper_y = grad_upper
        walk.move_y(weight, upper_y, q.grad_y)
        walk.move_x(direction_x)
        residuals = Residuals(direction_x, rest, weight * q.value, upper_x, upper_y)
        metrics = {"upper": upper, "lower": q.lower, "value_gap": q.value, "multiplier": weight}
        return walk.end(residuals, self.rtol, metrics)
