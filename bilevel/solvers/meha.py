"""MEHA: a single loop on the Moreau envelope of the lower problem."""

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
class MEHA(Solver):
    r"""Moreau-envelope based Hessian-free algorithm: one step on each variable, f may be weakly convex.

    The value function is replaced by $v_\gamma(x, y) = \min_z f(x, z) + \frac{1}{2 \gamma} |z - y|^2$. A step is

    $$z \leftarrow z - \eta \Bigl[ \nabla_y f(x, z) + \frac{z - y}{\gamma} \Bigr], \qquad
    x \leftarrow \Pi \Bigl\{ x - \alpha \Bigl[ \frac{\nabla_x F(x, y)}{c_k} + \nabla_x f(x, y) - \nabla_x f(x, z)
    \Bigr] \Bigr\},$$

    $$y \leftarrow y - \beta \Bigl[ \frac{\nabla_y F(x, y)}{c_k} + \nabla_y f(x, y) - \frac{y - z}{\gamma} \Bigr],$$

    each with what was moved before it, for a growing $c_k$. A step costs four gradients of f and two of F.

    Attributes:
        penalty: Schedule of $c_k$ in units of the problem: 1 holds y by f as F can move it by its size.
        gamma: $\gamma$ in units of one over the curvature of f in y, > 0; below 1 the envelope is smooth for any f.
        upper_optimizer: Moves x. None: steps of one over a measured curvature on the full batch, Adam on batches.
        lower_optimizer: Moves y, likewise; its direction is divided by $1 + c L_f / L_F$, where
            the L are one over the learning rates.
        value_optimizer: Moves z, likewise.
        rtol: Full batch: norms of the hypergradient and of both lower gradients, over that of F's gradient, at which
            the run ends, > 0. The penalty must have grown until its bias $c [f(x, y) - f(x, z)]$ is as small.

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
        >>> bl.solve(problem, bl.MEHA(), x0, y0, max_steps=1000).x
        tensor(1.0000, dtype=torch.float64)

    References:
        Liu, Liu, Yao, Zeng and Zhang, Moreau Envelope for Nonconvex Bi-Level Optimization: A Single-Loop and
        Hessian-Free Solution Strategy (ICML 2024), Algorithm 1.

    Note:
        The directions of x and y are multiplied by $c_k$, and y's step is divided by its curvature. The paper's $c_k$
        grows as a power of k below 1/2; the default on the full batch grows as soon as its problem is solved.
    """

    penalty: Schedule | None = None
    gamma: float = 10.0
    upper_optimizer: Torch | None = None
    lower_optimizer: Torch | None = None
    value_optimizer: Torch | None = None
    rtol: float = 1e-4

    def __post_init__(self) -> None:
        _fields.check_parts(self)
        _fields.check_schedule(self, "penalty")
        _fields.check_positive(self, "gamma", "Use e.g. 10, or 0.5 where f is not convex.")

    def init(
        self, problem: BilevelProblem, x0: Tree, y0: Tree, data: Any, *, full_batch: bool
    ) -> State:
        """See `Solver.init`."""
        extra = {"z": _tree.detach(y0)}
        return _walk_start.init(self, problem, x0, y0, data, full_batch=full_batch, extra=extra)

    def step(self, problem: BilevelProblem, state: State, data: Any) -> State:
        """See `Solver.step`."""
        walk = Walk(self, problem, state, data)
        oracle, y, z = walk.oracle, walk.y, walk.memory["z"]
        weight = walk.penalty(self.penalty)  # c_k
        pull = walk.curvature("lower") / self.gamma  # 1 / gamma

        _, lower_z = oracle.lower_grad_y(walk.x, z)
        grad_z = _tree.axpy(pull, _tree.axpy(-1.0, y, z), lower_z)
        z = walk.move_z(z, lower_z, step=grad_z, stiff=1.0 + 1.0 / self.gamma)

        upper, upper_x, _ = oracle.upper_grad(walk.x, y)
        lower, lower_x, _ = oracle.lower_grad(walk.x, y)
        value, value_x, _ = oracle.lower_grad(walk.x, z)
        hypergradient = _tree.axpy(weight, _tree.axpy(-1.0, value_x, lower_x), upper_x)
        walk.move_x(hypergradient)

        _, upper_y = oracle.upper_grad_y(walk.x, y)
        _, lower_y = oracle.lower_grad_y(walk.x, y)
        grad_y = _tree.axpy(-pull, _tree.axpy(-1.0, z, y), lower_y)
        walk.move_y(weight, upper_y, lower_y, step=grad_y)
        walk.memory["z"] = z
        gap = lower - value
        rest = (
            weight * _tree.norm(grad_z),
            _tree.norm(_tree.axpy(weight, grad_y, upper_y)),
        )
        residuals = Residuals(hypergradient, rest, weight * gap, upper_x, upper_y)
        metrics = {"upper": upper, "lower": lower, "value_gap": gap, "multiplier": weight}
        return walk.end(residuals, self.rtol, metrics)
