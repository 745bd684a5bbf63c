"""V-PBGD: joint gradient descent on F plus a penalty of the value gap."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from bilevel import _tree
from bilevel._problem import BilevelProblem
from bilevel._solution import State
from bilevel._types import Schedule, Tree
from bilevel.optim.torch import Torch
from bilevel.solvers import _fields, _walk_start
from bilevel.solvers._base import Solver
from bilevel.solvers._walk import Residuals, Walk


@dataclass(frozen=True)
class VPBGD(Solver):
    r"""Value-gap penalty-based bilevel gradient descent.

    $F + \gamma [f(x, y) - \min_z f(x, z)]$ is minimized over x and y at once. A step is T times
    $z \leftarrow z - \beta \nabla_y f(x, z)$, and then, z held fixed,

    $$(x, y) \leftarrow \Pi \{ (x, y) - \alpha [\nabla F(x, y) + \gamma (\nabla f(x, y) - \nabla_x f(x, z))] \}.$$

    Its solution is $O(1 / \gamma)$ from that of the problem. y takes one step where x takes one, so that it lags behind
    x the more the larger $\gamma$ is; `F2SA`, whose y takes as many steps as z, bears larger penalties. A
    step costs $T + 2$ gradients of f and one of F.

    Attributes:
        penalty: Schedule of $\gamma$ in units of the problem: 1 holds y by f as F can move it by its size.
        value_steps: T, steps on z in each upper step, >= 1.
        upper_optimizer: Moves x. None: steps of one over a measured curvature on the full batch, Adam on batches.
        lower_optimizer: Moves y, likewise; its direction is divided by $1 + \gamma L_f / L_F$, where
            the L are one over the learning rates.
        value_optimizer: Moves z, likewise.
        rtol: Full batch: norms of the hypergradient and of both lower gradients, over that of F's gradient, at which
            the run ends, > 0. The penalty must be so large that its bias $\gamma [f(x, y) - f(x, z)]$ is as small.

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
        >>> bl.solve(problem, bl.VPBGD(), x0, y0, max_steps=1000).x
        tensor(1.0000, dtype=torch.float64)

    References:
        Shen and Chen, On Penalty-based Bilevel Gradient Descent Method (ICML 2023), Algorithm 1 (V-PBGD).

    Note:
        The paper starts z at y in each step, which leaves a bias of the order of the last lower residual for any
        $\gamma$; here z goes on from where it was. The units, the growing penalty and the measured steps are ours.
    """

    penalty: Schedule | None = None
    value_steps: int = 10
    upper_optimizer: Torch | None = None
    lower_optimizer: Torch | None = None
    value_optimizer: Torch | None = None
    rtol: float = 1e-4

    def __post_init__(self) -> None:
        _fields.check_parts(self, counts=("value_steps",))
        _fields.check_schedule(self, "penalty")

    def init(
        self, problem: BilevelProblem, x0: Tree, y0: Tree, data: Any, *, full_batch: bool
    ) -> State:
        """See `Solver.init`."""
        extra = {"z": _tree.detach(y0)}
        return _walk_start.init(self, problem, x0, y0, data, full_batch=full_batch, extra=extra)

    def step(self, problem: BilevelProblem, state: State, data: Any) -> State:
        """See `Solver.step`."""
        walk = Walk(self, problem, state, data)
        gap = walk.value_gap(self.value_steps)
        weight = walk.penalty(self.penalty)
        upper, upper_x, upper_y = walk.oracle.upper_grad(walk.x, walk.y)
        hypergradient = _tree.axpy(weight, gap.grad_x, upper_x)
        rest = (
            weight * gap.residual,
            _tree.norm(_tree.axpy(weight, gap.grad_y, upper_y)),
        )
        walk.move_y(weight, upper_y, gap.grad_y)
        walk.move_x(hypergradient)
        residuals = Residuals(hypergradient, rest, weight * gap.value, upper_x, upper_y)
        metrics = {
            "upper": upper,
            "lower": gap.lower,
            "value_gap": gap.value,
            "multiplier": weight,
        }
        return walk.end(residuals, self.rtol, metrics)
