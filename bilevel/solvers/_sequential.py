"""ASBLO on the full batch: a sequence of unconstrained problems, each solved to its tolerance."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bilevel import _tree
from bilevel._problem import BilevelProblem, ravel
from bilevel._solution import Evaluations, State, Status
from bilevel._types import Projection, Tree
from bilevel.estimators._base import Estimate
from bilevel.estimators.value_function import ValueFunction
from bilevel.optim._base import Minimizer, Point
from bilevel.optim.quasi_newton import QuasiNewton
from bilevel.solvers._scales import Scales, measure

_STAGE_TOL = (
    1e-3  # predicted decrease of phi at which a stage is solved, in units of F times epsilon
)
_GAP_TOL = 1e-6  # largest value gap of an answer, in units of f
_SHARP = 5e-3  # of the estimated error of x: how far the last stage may stay from its solution
_FAR = 1e10  # growth of |x| at which a minimum is not believed to exist
_SHARP_STEPS = 20  # at most: rounding may keep x from getting any nearer
_ROUNDING = (
    100.0  # the slack stays this many times above the rounding error of f, a step above that of x
)


class Sequence(NamedTuple):
    """The sequence of approximations that `ASBLO` walks along.

    Attributes:
        stage: The approximation number k in the units of the problem.
        epsilon: Its slack in units of f.
        minimizer: Finds z and y.
        optimizer: Takes the upper steps.
        rtol: Estimated relative error of x at which the walk ends.
        pessimistic: Whether y maximizes F.
        first_stage: The stage to begin with.
    """

    stage: Callable[[int, float, float, float], ValueFunction]
    epsilon: Callable[[int], float]
    minimizer: Minimizer
    optimizer: QuasiNewton
    rtol: float
    pessimistic: bool
    first_stage: int


def init(sequence: Sequence, problem: BilevelProblem, x0: Tree, y0: Tree) -> State:
    """Measure the units and stand at the start of the path."""
    flat, (x, y), unravel_x, unravel_y = ravel(problem, x0, y0)
    jointly = sequence.first_stage == 0 and not sequence.pessimistic
    scales: Scales = measure(flat, x, y, sequence.minimizer, jointly=jointly)
    return State(
        x=unravel_x(scales.x),
        y=unravel_y(scales.y),
        status=scales.status,
        message="" if scales.status is Status.RUNNING else f"{scales.status.value} (from x0)",
        memory={
            "stage": sequence.first_stage,
            "units": [scales.lower, scales.upper, scales.square],
            "quasi_newton": sequence.optimizer.init(x),
            "warm": {"z": scales.z},
            "reach": 1.0 + _tree.length(scales.x),
        },
        evaluations=scales.evaluations,
    )


def step(sequence: Sequence, problem: BilevelProblem, state: State) -> State:
    """One quasi-Newton step on phi_k; where that solves stage k, the next stage begins."""
    flat, (x, y), unravel_x, unravel_y = ravel(problem, state.x, state.y)
    memory = dict(state.memory)
    k: int = memory["stage"]
    method = sequence.stage(k, *memory["units"])
    spent, recoveries = Evaluations(), state.recoveries

    def evaluate(u: Tensor) -> Point:
        nonlocal spent, recoveries
        estimate = method.estimate(flat, u, y, None, memory["warm"])
        spent = spent + estimate.evaluations
        recoveries += estimate.status is Status.NONFINITE
        return Point(u, estimate.value, estimate.grad, estimate.noise, estimate)

    start = memory.pop("next_x", x)  # present where a stage begins
    point = _recalled(x, y, memory) if "phi" in memory else evaluate(start)
    if not math.isfinite(point.value):
        status = point.extra.status
        return replace(
            state,
            status=status,
            message=f"{status.value} (in stage {k})",
            evaluations=state.evaluations + spent,
        )
    rounding = torch.finfo(x.dtype).eps
    tol = max(_STAGE_TOL * sequence.epsilon(k), 10.0 * rounding) * memory["units"][1]
    stuck = False
    if not _is_solved(sequence.optimizer, point, memory, flat.domain, tol):
        memory["warm"], y = point.extra.memory, point.extra.y
        new, quasi_newton = sequence.optimizer.step(
            evaluate, point, memory["quasi_newton"], flat.domain
        )
        # Without a step along the quasi-Newton direction, the next try is along the gradient.
        stuck = new is None and memory["quasi_newton"]["steps"].shape[0] == 0
        memory["quasi_newton"] = quasi_newton
        point = new or point
    estimate: Estimate = point.extra
    x, y = point.y, estimate.y
    memory["warm"] = estimate.memory
    memory["phi"] = estimate.kept()
    status, message = Status.RUNNING, ""
    if "target" in memory:
        memory["sharp_steps"] -= 1
        stuck = stuck or memory["sharp_steps"] == 0
    if _tree.length(x) > _FAR * memory["reach"]:
        status = Status.UPPER_UNBOUNDED
        message = f"{status.value} (in stage {k})"
    elif stuck or _is_solved(sequence.optimizer, point, memory, flat.domain, tol):
        status, message = _close_stage(sequence, x, y, estimate, memory, flat.domain)
    return State(
        x=unravel_x(x),
        y=unravel_y(y),
        step=state.step + 1,
        status=status,
        message=message,
        metrics={
            **estimate.info,
            "phi": point.value,
            "stage": k,
            "sigma": method.sigma,
            "mu": method.mu,
            "epsilon": method.epsilon,
        },
        memory=memory,
        evaluations=state.evaluations + spent,
        recoveries=recoveries,
    )


def _recalled(x: Tensor, y: Tensor, memory: dict[str, Any]) -> Point:
    estimate = Estimate.recalled(memory["phi"], y, memory["warm"])
    return Point(x, estimate.value, estimate.grad, estimate.noise, estimate)


def _is_solved(
    optimizer: QuasiNewton,
    point: Point,
    memory: dict[str, Any],
    domain: Projection | None,
    tol: float,
) -> bool:
    """Whether the quasi-Newton model predicts no decrease of phi worth a step, and no step in the last stage."""
    if not bool(point.grad.any()):
        return True
    if memory["quasi_newton"]["steps"].shape[0] == 0:
        return False
    direction = optimizer.direction(point, memory["quasi_newton"], domain)
    if "target" in memory:
        return _tree.length(direction) <= memory["target"]
    return -0.5 * float(direction @ point.grad) <= tol


def _close_stage(
    sequence: Sequence,
    x: Tensor,
    y: Tensor,
    estimate: Estimate,
    memory: dict[str, Any],
    domain: Projection | None,
) -> tuple[Status, str]:
    """Set the memory for the next stage, or for the sharp solve that ends the last one.

    The errors of x and y are O(1/lambda), so that two stages with multipliers lambda' < lambda tell how much is
    left: |x - x'| r / (1 - r), r = lambda'/lambda. The same line predicts where the next stage's solution lies.
    y counts too: at a bound x stands still while y still moves.
    """
    k, (lower_unit, _, _) = memory["stage"], memory["units"]
    before: dict[str, Any] | None = memory.get("before")
    multiplier = estimate.info["multiplier"]
    size = extent(x)
    error, relative = math.inf, math.inf
    if before is not None and before["multiplier"] < multiplier:
        ratio = before["multiplier"] / multiplier
        moved_x, moved_y = _tree.length(x - before["x"]), _tree.length(y - before["y"])
        error = moved_x * ratio / (1.0 - ratio)
        relative = max(moved_x / size, moved_y / extent(y)) * ratio / (1.0 - ratio)
    # lambda ~ epsilon^(-1/2): its error 1/lambda and its noise lambda times the rounding error meet at eps.
    eps = torch.finfo(x.dtype).eps
    resolution = max(eps * lower_unit, _ROUNDING * estimate.info["gap_noise"])
    is_accurate = relative <= sequence.rtol and estimate.info["value_gap"] <= _GAP_TOL * lower_unit
    is_last = sequence.epsilon(k + 1) * lower_unit < resolution
    is_sharp = memory.pop("target", None) is not None
    if is_accurate or is_last:
        if is_sharp:
            reason = "the slack reached the rounding error of f"
            reason = f"estimated relative error {relative:.2g}" if is_accurate else reason
            return _verdict(estimate, f"{reason}, after {k + 1} stages")
        floor = _ROUNDING * eps * size
        memory["target"] = max(_SHARP * min(error, size), _SHARP * sequence.rtol * size, floor)
        memory["sharp_steps"] = _SHARP_STEPS
        return Status.RUNNING, ""
    del memory["phi"]
    memory["stage"] = k + 1
    memory["before"] = {"x": x, "y": y, "multiplier": multiplier}
    if before is not None:
        shift = (x - before["x"]) * _extrapolation(sequence, k, before["multiplier"], multiplier)
        memory["next_x"] = x + shift if domain is None else domain(x + shift)
    return Status.RUNNING, ""


def extent(v: Tensor) -> float:
    """The length of a variable, a thousandth of that of ones at least: what its errors are relative to."""
    return max(_tree.length(v), 1e-3 * math.sqrt(v.numel()))


def _extrapolation(sequence: Sequence, k: int, before: float, now: float) -> float:
    """How far along x - x' the next solution lies, by the line in 1/lambda through the last two."""
    if not before < now:
        return 0.0
    following = now * math.sqrt(sequence.epsilon(k) / sequence.epsilon(k + 1))
    gained = 1.0 / before - 1.0 / now
    return min(1.0, (1.0 / now - 1.0 / following) / gained) if gained > 0.0 else 0.0


def _verdict(estimate: Estimate, message: str) -> tuple[Status, str]:
    if estimate.status is Status.CONVERGED:
        return Status.CONVERGED, message
    return estimate.status, f"{estimate.status.value}; {message}"
