"""stocBiO: warm-started steps on the lower problem, then a Neumann series for the hypergradient."""

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


@dataclass(frozen=True)
class StocBiO(Solver):
    r"""Stochastic bilevel optimizer: steps on y from where it was, and a truncated Neumann series.

    A step is T times $y \leftarrow y - \alpha \nabla_y f(x, y)$, then at the new y

    $$v = -\eta \sum_{q=0}^{Q-1} (I - \eta \nabla^2_{yy} f)^q\, \nabla_y F, \qquad
    x \leftarrow x - \gamma [\nabla_x F + \nabla^2_{xy} f\, v].$$

    The series starts anew in each step, so that an error of $(1 - \eta m)^Q$ stays, m the smallest curvature of f in y:
    the run then ends with its steps, not CONVERGED. `AmIGO` and `SOBA` carry v on and have no such error. A step costs
    $T + 1$ gradients of f, one of F and $Q + 1$ products with second derivatives of f.

    Attributes:
        lower_steps: T, steps on y in each upper step, >= 1.
        linear_steps: Q, terms of the series, >= 1.
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
        >>> bl.solve(problem, bl.StocBiO(), x0, y0, max_steps=500).x
        tensor([0.5000], dtype=torch.float64)

    References:
        Ji, Yang and Liang, Bilevel Optimization: Convergence Analysis and Enhanced Design (ICML 2021), Algorithms 2
        (stocBiO) and 3 (the series).

    Note:
        The paper draws samples for each factor of the series; here all see the batch of the step. $\eta$ is one over
        the norm that the products with the Hessian show, the one of the term included.
    """

    lower_steps: int = 10
    linear_steps: int = 50
    upper_optimizer: Torch | None = None
    lower_optimizer: Torch | None = None
    rtol: float = 1e-4

    def __post_init__(self) -> None:
        _fields.check_parts(self, counts=("lower_steps", "linear_steps"))

    def init(
        self, problem: BilevelProblem, x0: Tree, y0: Tree, data: Any, *, full_batch: bool
    ) -> State:
        """See `Solver.init`."""
        return _walk_start.init(self, problem, x0, y0, data, full_batch=full_batch, extra={})

    def step(self, problem: BilevelProblem, state: State, data: Any) -> State:
        """See `Solver.step`."""
        walk = Walk(self, problem, state, data)
        for _ in range(self.lower_steps):
            walk.descend(walk.oracle.lower_grad_y(walk.x, walk.y)[1])
        adjoint = Adjoint(walk, problem, data)
        residual = adjoint.upper_y
        v = torch.zeros_like(residual)
        for _ in range(self.linear_steps):  # residual = (I - eta H)^q grad_y F
            product = adjoint.hvp(residual)
            eta = adjoint.step_size
            v, residual = v - eta * residual, residual - eta * product
        hypergradient = adjoint.hypergradient(v)
        walk.move_x(hypergradient)
        return adjoint.end(hypergradient, _tree.norm(residual), self.rtol)
