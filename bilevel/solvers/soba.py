"""SOBA and MA-SOBA: y, the linear system and x move at once, each by one step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from bilevel import _tree
from bilevel._problem import BilevelProblem
from bilevel._solution import State
from bilevel._types import Tree
from bilevel.optim.torch import Torch
from bilevel.solvers import _fields, _walk_start
from bilevel.solvers._adjoint import Adjoint
from bilevel.solvers._base import Solver
from bilevel.solvers._walk import Walk

_CAUTION = 4.0  # x moves before y and v have answered: its measured steps are this much shorter


@dataclass(frozen=True)
class SOBA(Solver):
    r"""Stochastic bilevel algorithm: one step each on y, on the linear system and on x.

    v follows the solution of $\nabla^2_{yy} f\, v + \nabla_y F = 0$. All three directions are taken at the same point,

    $$D_y = \nabla_y f, \qquad D_v = \nabla^2_{yy} f\, v + \nabla_y F, \qquad
    D_x = \nabla^2_{xy} f\, v + \nabla_x F,$$

    and then $y \leftarrow y - \rho D_y$, $v \leftarrow v - \rho_v D_v$, $x \leftarrow x - \gamma D_x$. With `momentum`
    $\beta > 0$ x moves along the moving average $h \leftarrow \beta h + (1 - \beta) D_x$ instead: MA-SOBA. A step
    costs one gradient of f, one of F and two products with second derivatives of f.

    Attributes:
        momentum: $\beta$ of MA-SOBA, in [0, 1); 0 is SOBA.
        upper_optimizer: Moves x. None: steps of one over a measured curvature on the full batch, Adam on batches.
        lower_optimizer: Moves y, likewise.
        rtol: Full batch: norms of the hypergradient, of f's gradient in y and of the linear system's residual, over
            that of F's gradient, at which the run ends, > 0.

    Raises:
        ValueError: A parameter is out of its range.
        TypeError: An optimizer is of the wrong kind.

    Example:
        >>> import torch, bilevel as bl
        >>> problem = bl.BilevelProblem(
        ...     upper=lambda x, y, data: ((y - 1.0) ** 2).sum(),
        ...     lower=lambda x, y, data: ((y - 2.0 * x) ** 2).sum(),
        ... )
        >>> x0, y0 = torch.zeros(1).double(), torch.zeros(1).double()
        >>> bl.solve(problem, bl.SOBA(), x0, y0, max_steps=500).x
        tensor([0.5000], dtype=torch.float64)

    References:
        Dagreou, Ablin, Vaiter and Moreau, A framework for bilevel optimization that enables stochastic and
        global variance reduction algorithms (NeurIPS 2022), Algorithm 1 with the directions of SOBA; Chen, Xiao and
        Balasubramanian, Optimal Algorithms for Stochastic Bilevel Optimization under Relaxed Smoothness
        Conditions (2023), Algorithm 1 (MA-SOBA).

    Note:
        The papers draw samples for each direction; here all see the batch of the step. $\rho_v$ is one over the
        norm that the products with the Hessian show.
    """

    momentum: float = 0.0
    upper_optimizer: Torch | None = None
    lower_optimizer: Torch | None = None
    rtol: float = 1e-5

    def __post_init__(self) -> None:
        _fields.check_parts(self)
        _fields.check_momentum(self, self.momentum)

    def init(
        self, problem: BilevelProblem, x0: Tree, y0: Tree, data: Any, *, full_batch: bool
    ) -> State:
        """See `Solver.init`."""
        extra = {"v": torch.zeros_like(_tree.ravel(y0)[0])}
        return _walk_start.init(self, problem, x0, y0, data, full_batch=full_batch, extra=extra)

    def step(self, problem: BilevelProblem, state: State, data: Any) -> State:
        """See `Solver.step`."""
        walk = Walk(self, problem, state, data)
        adjoint, v = Adjoint(walk, problem, data), state.memory["v"]
        direction_v = adjoint.residual(v)
        direction_x = adjoint.hypergradient(v)
        walk.descend(adjoint.lower_y)
        walk.memory["v"] = v - adjoint.step_size * direction_v
        step = direction_x
        if self.momentum > 0.0:
            average = state.memory.get("average", direction_x)
            step = _tree.axpy(self.momentum, average, _tree.scale(1.0 - self.momentum, direction_x))
            walk.memory["average"] = step
        walk.move_x(step, caution=_CAUTION)
        return adjoint.end(direction_x, _tree.norm(direction_v), self.rtol)
