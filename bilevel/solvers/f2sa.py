"""F2SA and F3SA: two copies of y, one of them pulled by F, whose difference is the hypergradient."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from bilevel import _tree
from bilevel._problem import BilevelProblem
from bilevel._solution import State
from bilevel._types import Schedule, Tree
from bilevel.optim.torch import Torch
from bilevel.solvers import _fields, _walk_start
from bilevel.solvers._base import Solver
from bilevel.solvers._walk import Residuals, Walk


@dataclass(frozen=True)
class F2SA(Solver):
    r"""Fully first-order stochastic approximation; with `momentum` it is F3SA.

    With z for the lower solution, y for that of the penalized problem, and a growing $\lambda_k$, a step is T times

    $$z \leftarrow z - \gamma_k \nabla_y f(x, z), \qquad
    y \leftarrow y - \alpha_k [\nabla_y F(x, y) + \lambda_k \nabla_y f(x, y)],$$

    and then $x \leftarrow x - \xi \alpha_k \{\nabla_x F(x, y) + \lambda_k [\nabla_x f(x, y) - \nabla_x f(x, z)]\}$,
    whose distance to the hypergradient is $O(1 / \lambda_k)$. A step costs $2T + 2$ gradients of f and $T + 1$ of
    F. With `momentum` $\beta > 0$ each gradient g becomes $h = g + \beta (h^- - g^-)$, where $g^-$ is that of the
    point before on the batch of now; a step then costs twice as much, but the first.

    Attributes:
        penalty: Schedule of $\lambda_k$ in units of the problem: 1 holds y by f as F can move it by its size.
        inner_steps: T, steps on z and on y in each upper step, >= 1.
        momentum: $\beta = 1 - \eta_k$ of F3SA, in [0, 1); 0 is F2SA.
        upper_optimizer: Moves x. None: steps of one over a measured curvature on the full batch, Adam on batches.
        lower_optimizer: Moves y, likewise; its direction is divided by $1 + \lambda L_f / L_F$, where
            the L are one over the learning rates.
        value_optimizer: Moves z, likewise.
        rtol: Full batch: norms of the hypergradient and of both lower gradients, over that of F's gradient, at which
            the run ends, > 0. The penalty must have grown until its bias $\lambda [f(x, y) - f(x, z)]$ is as small.

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
        >>> bl.solve(problem, bl.F2SA(), x0, y0, max_steps=500).x
        tensor(1.0000, dtype=torch.float64)

    References:
        Kwon, Kwon, Wright and Nowak, A Fully First-Order Method for Stochastic Bilevel Optimization (ICML 2023),
        Algorithms 1 (F2SA) and 2 (F3SA).

    Note:
        The paper draws new samples for each gradient; here all gradients of a step see the same batch, so
        that its noise cancels in $\nabla_x f(x, y) - \nabla_x f(x, z)$. The units and the measured steps are ours.
    """

    penalty: Schedule | None = None
    inner_steps: int = 10
    momentum: float = 0.0
    upper_optimizer: Torch | None = None
    lower_optimizer: Torch | None = None
    value_optimizer: Torch | None = None
    rtol: float = 1e-4

    def __post_init__(self) -> None:
        _fields.check_parts(self, counts=("inner_steps",))
        _fields.check_schedule(self, "penalty")
        _fields.check_momentum(self, self.momentum)

    def init(
        self, problem: BilevelProblem, x0: Tree, y0: Tree, data: Any, *, full_batch: bool
    ) -> State:
        """See `Solver.init`."""
        extra: dict[str, Any] = {"z": _tree.detach(y0), "estimates": {}}
        return _walk_start.init(self, problem, x0, y0, data, full_batch=full_batch, extra=extra)

    def step(self, problem: BilevelProblem, state: State, data: Any) -> State:
        """See `Solver.step`."""
        walk = Walk(self, problem, state, data)
        weight = walk.penalty(self.penalty)
        oracle, z = walk.oracle, walk.memory["z"]
        recursive = _Recursive(self.momentum, walk.memory["estimates"])

        def at_y(x: Tree, y: Tree) -> tuple[list[Tensor], list[Tree]]:
            (upper, upper_y), (lower, lower_y) = (
                oracle.upper_grad_y(x, y),
                oracle.lower_grad_y(x, y),
            )
            return [upper, lower], [upper_y, lower_y]

        def at_z(x: Tree, z: Tree) -> tuple[list[Tensor], list[Tree]]:
            lower, lower_z = oracle.lower_grad_y(x, z)
            return [lower], [lower_z]

        def at_all(x: Tree, y: Tree, z: Tree) -> tuple[list[Tensor], list[Tree]]:
            (upper, *of_upper), (lower, *of_lower) = (
                oracle.upper_grad(x, y),
                oracle.lower_grad(x, y),
            )
            value, *of_value = oracle.lower_grad(x, z)
            return [upper, lower, value], [*of_upper, *of_lower, *of_value]

        for _ in range(self.inner_steps):
            _, (lower_z,) = recursive.estimate("z", at_z, walk.x, z)
            z = walk.move_z(z, lower_z)
            _, (upper_y, lower_y) = recursive.estimate("y", at_y, walk.x, walk.y)
            walk.move_y(weight, upper_y, lower_y)
        (upper, lower, value), gradients = recursive.estimate("x", at_all, walk.x, walk.y, z)
        upper_x, upper_y, lower_x, lower_y, value_x, value_z = gradients
        hypergradient = _tree.axpy(weight, _tree.axpy(-1.0, value_x, lower_x), upper_x)
        gap = lower - value
        # The value function lies below f(x, y): where y is the better lower minimizer, z goes on from there.
        walk.memory["z"] = _tree.where(gap < 0.0, walk.y, z)
        walk.memory["estimates"] = recursive.kept
        walk.move_x(hypergradient)
        rest = (
            weight * _tree.norm(value_z),
            _tree.norm(_tree.axpy(weight, lower_y, upper_y)),
        )
        residuals = Residuals(hypergradient, rest, weight * gap, upper_x, upper_y)
        metrics = {"upper": upper, "lower": lower, "value_gap": gap, "multiplier": weight}
        return walk.end(residuals, self.rtol, metrics)


class _Recursive:
    """Gradients with the recursive momentum of F3SA: h = g + beta (h_before - g_before)."""

    def __init__(self, momentum: float, kept: dict[str, Any]) -> None:
        self._momentum = momentum
        self.kept = dict(kept)

    def estimate(
        self, name: str, gradients: Callable[..., tuple[list[Tensor], list[Tree]]], *point: Tree
    ) -> tuple[list[Tensor], list[Tree]]:
        """The values at `point`, and the estimates of the gradients there."""
        values, now = gradients(*point)
        if self._momentum == 0.0:
            return values, now
        if name in self.kept:
            _, before = gradients(*self.kept[name]["point"])  # on the batch of now
            h = self.kept[name]["h"]
            errors = [_tree.axpy(-1.0, g, old) for g, old in zip(before, h, strict=True)]
            now = [_tree.axpy(self._momentum, e, g) for e, g in zip(errors, now, strict=True)]
        self.kept[name] = {"point": point, "h": now}
        return values, now
