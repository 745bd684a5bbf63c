"""What the single loops share: how x, y and z move in one step, and when a run ends.

A variable moves by the optimizer that the user gave. Without one it moves by its gradient over its
curvature on the full batch, and by Adam on batches.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bilevel import _tree
from bilevel._oracle import Oracle
from bilevel._problem import BilevelProblem, projected_by
from bilevel._solution import Evaluations, State, Status
from bilevel._types import Schedule, Tree
from bilevel.optim.torch import Torch
from bilevel.schedules import geometric, polynomial
from bilevel.solvers._base import Solver
from bilevel.solvers._curvature import FORGET, size, steepest
from bilevel.solvers._walk_start import Movers

FULL_BATCH = geometric(0.1, 1.1)  # stages wait for the residuals: no schedule of the step is needed
ON_BATCHES = polynomial(0.1, -1.0, scale=10.0)
_FIRST_STEP = 0.1  # of the size of x: the only step before a secant of the hypergradient is known
_FAR = 1e10  # growth of a variable at which its minimum is not believed to exist
_SWING = (
    3.0  # growth of the residuals over their least at which x outruns y, and its steps are halved
)
_STAGED_SWING = 10.0  # where the penalty grows too, which moves the residuals by itself
_SHORTEST = (
    2.0**-10
)  # of the measured step of x: what no longer converges then is not saved by more
_FLOOR = 1e-3  # of the steepest F so far: F may be flat at the answer


class Residuals(NamedTuple):
    """How far a step still was from where the method stops, all in the unit of a slope of F."""

    x: Tree  # the hypergradient
    rest: tuple[Tensor, ...]  # norms that vanish at the solution, 0-d
    bias: Tensor  # an estimate of what the method's own approximation leaves of F, 0-d, in the unit of F
    upper_x: Tree
    upper_y: Tree


class Gap(NamedTuple):
    """The value gap q(x, y) = f(x, y) - f(x, z), its gradient with z held fixed, and what it is made of."""

    value: Tensor  # 0-d
    grad_x: Tree
    grad_y: Tree
    lower: Tensor  # f(x, y), 0-d
    residual: Tensor  # norm of the gradient of f at z, 0-d


class Walk:
    """One step of a single loop. It changes its own attributes; the state it came from stays.

    Attributes:
        oracle: F and f on the data of this step.
        x, y: The variables, moved in place of the old ones.
        memory: The memory of the next state.
        spent: Evaluations by other oracles than this one.
    """

    def __init__(self, solver: Solver, problem: BilevelProblem, state: State, data: Any) -> None:
        self.oracle = Oracle(problem, data)
        self.x, self.y = state.x, state.y
        self.memory = dict(state.memory)
        self._problem, self._state = problem, state
        self._movers = Movers.of(solver, full_batch=self.memory["full_batch"])
        self._curvature = dict(state.memory["curvature"])
        self._optimizers = dict(state.memory["optimizers"])
        self._before: dict[str, Any] = dict(state.memory["before"])
        self._penalty, self._is_staged = 1.0, False
        self._learned: set[str] = set()
        self.spent = Evaluations()

    def penalty(self, schedule: Schedule | None) -> float:
        """The weight of f against F in this step; None is the mode's own schedule."""
        if schedule is None:
            schedule = FULL_BATCH if self.memory["full_batch"] else ON_BATCHES
        self._penalty, self._is_staged = schedule(self.memory["stage"]), True
        return self._penalty * self.memory["unit"]

    def curvature(self, name: str) -> float:
        """Of f ("lower") or F ("upper") in y: one over the learning rate where the user gave one."""
        given = self._movers.z if name == "lower" else self._movers.y
        if given is None:
            return self._curvature[name]
        rate = given.rate(self._optimizers["z" if name == "lower" else "y"]["count"])
        return 1.0 / rate if rate > 0.0 else math.inf

    def learn(self, name: str, key: str, point: Tree, grad: Tree) -> None:
        """Take the secant between this gradient in y and the last one under `key` as curvature.

        The distance counts x too, without which a step of x alone would look like infinite curvature.
        """
        if not self.memory["full_batch"]:
            return
        now = ([self.x, point], grad)
        if key in self._before:
            self._secant(name, self._before[key], now)
        self._before[key] = now

    def _secant(self, name: str, before: tuple[Tree, Tree], now: tuple[Tree, Tree]) -> None:
        """Take one secant into account; the first of a step lets a little of the steepest so far be forgotten."""
        forget = 1.0 if name in self._learned else FORGET
        self._learned.add(name)
        self._curvature[name] = steepest(self._curvature[name], before, now, forget=forget)

    def moved(self, name: str, tree: Tree, grad: Tree, curvature: float) -> Tree:
        """`tree` after a step against `grad`, by the optimizer of that name or by one over `curvature`."""
        optimizer: Torch | None = getattr(self._movers, name)
        if optimizer is None:
            return _tree.axpy(-1.0 / curvature, grad, tree)
        new, self._optimizers[name] = optimizer.step(
            _tree.leaves(tree), _tree.leaves(grad), self._optimizers[name]
        )
        return _tree.unflatten_like(tree, new)

    def move_z(
        self, z: Tree, lower_z: Tree, *, step: Tree | None = None, stiff: float = 1.0
    ) -> Tree:
        """Z after a step down f, whose gradient there is `lower_z`.

        `step` takes the place of that gradient where a method adds terms to f, and `stiff` is the factor by which they
        raise its curvature.
        """
        self.learn("lower", "f at z", z, lower_z)
        return self.moved(
            "z", z, lower_z if step is None else step, stiff * self.curvature("lower")
        )

    def value_gap(self, steps: int) -> Gap:
        """The value gap, after so many steps of z: `steps + 2` gradients of f.

        The value function lies below f(x, y): where y is the better lower minimizer, z goes on from there.
        """
        z = self.memory["z"]
        for _ in range(steps):
            _, lower_z = self.oracle.lower_grad_y(self.x, z)
            z = self.move_z(z, lower_z)
        value, value_x, value_z = self.oracle.lower_grad(self.x, z)
        lower, lower_x, lower_y = self.oracle.lower_grad(self.x, self.y)
        gap = lower - value
        self.memory["z"] = _tree.where(gap < 0.0, self.y, z)
        return Gap(gap, _tree.axpy(-1.0, value_x, lower_x), lower_y, lower, _tree.norm(value_z))

    def move_y(
        self, weight: float | Tensor, upper_y: Tree, lower_y: Tree, *, step: Tree | None = None
    ) -> None:
        r"""Move y down $F + \lambda f$ by a step of $1 / (L_F + \lambda L_f)$.

        With it y moves on f as fast as z does, however large lambda is: both lag equally behind x, and their
        lags cancel in the hypergradient. `step` takes the place of `lower_y` where a method adds terms to f.
        """
        self.learn("upper", "F at y", self.y, upper_y)
        self.learn("lower", "f at y", self.y, lower_y)
        grad = _tree.axpy(weight, lower_y if step is None else step, upper_y)
        upper, lower = self.curvature("upper"), self.curvature("lower")
        if self._movers.y is None:
            self.y = _tree.axpy(-1.0, _tree.scale(1.0 / (upper + weight * lower), grad), self.y)
            return
        ratio = lower / upper if math.isfinite(lower) else 1.0  # schedules may end at 0
        self.y = self.moved("y", self.y, _tree.scale(1.0 / (1.0 + weight * ratio), grad), upper)

    def descend(self, lower_y: Tree) -> None:
        """Move y down f, whose gradient there is `lower_y`."""
        self.learn("lower", "f at y", self.y, lower_y)
        self.y = self.moved("y", self.y, lower_y, self._curvature["lower"])

    def learn_hessian(self, v: Tensor, product: Tensor) -> None:
        """Take the secant between this product with the lower Hessian and the last one as its norm.

        The distance counts x and y too, in units of v: without that a change of the Hessian itself would
        look like an infinite norm.
        """
        length = _tree.length(v)
        if not self.memory["full_batch"]:
            self.bound_hessian(v, product)
            return
        point = [self.x, self.y]
        if "v" in self._before:
            before, v_before, product_before = self._before["v"]
            moved = _tree.axpy(
                -length / size(point), before, _tree.scale(length / size(point), point)
            )
            pair = ([_tree.zeros_like(moved), v_before], product_before), ([moved, v], product)
            self._secant("hessian", *pair)
        self._before["v"] = (point, v, product)

    def bound_hessian(self, v: Tensor, product: Tensor, *, forget: float = 1.0) -> None:
        """Take the norm of a product with the lower Hessian, over that of its vector, into account."""
        length = _tree.length(v)
        seen = _tree.length(product) / length if length > 0.0 else 0.0
        before = self._curvature["hessian"]
        self._curvature["hessian"] = max(forget * before, seen) if math.isfinite(seen) else before

    @property
    def hessian_norm(self) -> float:
        """The largest norm of the lower Hessian that its products have shown of late."""
        return self._curvature["hessian"]

    def move_x(self, grad: Tree, *, caution: float = 1.0) -> None:
        """Move x against the hypergradient, and back into its domain."""
        before = self.x
        if self._movers.x is None:
            self.memory["rate_x"] = self._upper_rate(grad) * self.memory["shorter"] / caution
            self.x = _tree.axpy(-self.memory["rate_x"], grad, self.x)
        else:
            self.x = self.moved("x", self.x, grad, 1.0)
        self.x = projected_by(self._problem.domain, self.x)
        if self._movers.x is None:
            self._before["hypergradient"] = (before, grad)

    def rates(self, weight: float) -> tuple[float, float]:
        """How far x and y moved in this step along a gradient of length one."""
        if self._movers.x is None:
            rate = self.memory["rate_x"]
        else:
            rate = self._movers.x.rate(self._optimizers["x"]["count"] - 1)
        return rate, 1.0 / (self.curvature("upper") + weight * self.curvature("lower"))

    def _upper_rate(self, grad: Tree) -> float:
        """One over the steepest secant of the hypergradient of late; no step is longer than x."""
        slope, length = _tree.length(grad), size(self.x)
        if "hypergradient" not in self._before or self._curvature["x"] == 0.0:
            self._curvature["x"] = slope / (_FIRST_STEP * length)
        else:
            before = self._before["hypergradient"]
            known = (
                0.9 * self._curvature["x"]
            )  # forgotten even where x hardly moved: it is to move again
            self._curvature["x"] = max(known, steepest(known, before, (self.x, grad)))
        return 1.0 / max(self._curvature["x"], slope / length) if slope > 0.0 else 1.0

    def end(self, residuals: Residuals, rtol: float, metrics: Mapping[str, Any]) -> State:
        """The state after this step: running, converged, or the one before with the reason of a failure."""
        state, before = self._state, self._state.memory
        evaluations = state.evaluations + self.oracle.evaluations + self.spent
        norm = _tree.norm(residuals.x)
        values = (metrics["upper"], metrics["lower"])  # infinite ones may have finite gradients
        parts = (norm, *residuals.rest, residuals.bias, *values)
        numbers = torch.stack([part.to(norm) for part in parts])
        if not (bool(torch.isfinite(numbers).all()) and self._is_finite()):
            words = ", ".join(
                f"{name} = {float(value):.6g}" for name, value in zip("Ff", values, strict=True)
            )
            message = f"{Status.NONFINITE.value} (at step {state.step + 1}; {words})"
            return replace(state, status=Status.NONFINITE, message=message, evaluations=evaluations)
        self.memory["curvature"], self.memory["optimizers"] = self._curvature, self._optimizers
        self.memory["before"] = self._before
        status, message = Status.RUNNING, ""
        if before["full_batch"]:
            status, message = self._status(residuals, rtol)
        else:
            self.memory["stage"] += 1
        return State(
            x=self.x,
            y=self.y,
            step=state.step + 1,
            status=status,
            message=message,
            metrics={**metrics, "hypergradient": norm},
            memory=self.memory,
            evaluations=evaluations,
        )

    def _is_finite(self) -> bool:
        """Whether the moved variables are: an optimizer may overflow where its gradient did not."""
        return bool(torch.isfinite(_tree.norm(self.x) + _tree.norm(self.y)))

    def _status(self, residuals: Residuals, rtol: float) -> tuple[Status, str]:
        """Whether all residuals are small against the slope of F, or a variable has run away.

        A stage of the penalty is over where its problem is solved as well as it approximates the bilevel one: its
        bias is one over the penalty. A penalty that grows without waiting freezes y on its way.
        """
        reach_x, reach_y = self.memory["reach"]
        for variable, reach, status in (
            (self.x, reach_x, Status.UPPER_UNBOUNDED),
            (self.y, reach_y, Status.LOWER_UNBOUNDED),
            (self.memory.get("z", self.y), reach_y, Status.LOWER_UNBOUNDED),
        ):
            if _tree.length(variable) > _FAR * reach:
                return (
                    status,
                    f"{status.value}, or its steps are too long (at step {self._state.step + 1})",
                )
        slope = math.hypot(_tree.length(residuals.upper_x), _tree.length(residuals.upper_y))
        self.memory["steepest"] = max(self.memory["steepest"], slope)
        slope = max(slope, _FLOOR * self.memory["steepest"])
        x = self._state.x
        moved = projected_by(self._problem.domain, _tree.axpy(-1.0, residuals.x, x))
        left = _tree.length(_tree.axpy(-1.0, moved, x))  # |x - P(x - g)|
        largest = max(left, *(float(norm) for norm in residuals.rest))
        is_over = largest * self._penalty <= slope
        self._calm(largest, anew=is_over and self._is_staged)
        if is_over:
            self.memory["stage"] += 1
        # The bias falls as the penalty grows, the rounding error of the hypergradient grows with it.
        rtol = max(rtol, math.sqrt(max(torch.finfo(leaf.dtype).eps for leaf in _tree.leaves(x))))
        if max(largest, abs(float(residuals.bias)) / size(self.y)) <= rtol * slope:
            return Status.CONVERGED, f"the residuals are {largest / slope:.2g} of the slope of F"
        return (
            Status.RUNNING,
            f"the residuals are still {largest / (slope or 1.0):.2g} of the slope of F",
        )

    def _calm(self, residual: float, *, anew: bool) -> None:
        """Halve the steps of x where the residuals have grown out of their least.

        The measured curvature is that of a hypergradient that lags behind x. Where f is ill-conditioned y and v lag by
        many steps, and steps of one over it swing ever wider.
        """
        least = math.inf if anew else self.memory["least"]
        if residual > (_STAGED_SWING if self._is_staged else _SWING) * least:
            self.memory["shorter"] = max(0.5 * self.memory["shorter"], _SHORTEST)
            least = residual
        self.memory["least"] = min(least, residual)
