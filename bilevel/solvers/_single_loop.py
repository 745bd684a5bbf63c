"""ASBLO on mini-batches: one loop, first derivatives only, three passes a step."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bilevel import _tree
from bilevel._oracle import Oracle
from bilevel._problem import BilevelProblem, projected_by
from bilevel._solution import State, Status
from bilevel._types import Schedule, Tree
from bilevel.barriers import Barrier, relaxed
from bilevel.optim.torch import Torch

_AVERAGING = 0.9  # of the gap over the batches: one batch alone says next to nothing about it
_RELAXATION = (
    0.1  # of the slack: nearer to the border than this the barrier is continued by a parabola
)


class SingleLoop(NamedTuple):
    """What the single loop takes from `ASBLO`, its schedules in the units of the problem."""

    mu: Schedule
    theta: Schedule | None
    sigma: Schedule
    epsilon: Schedule
    barrier: Callable[[float], Barrier]
    pessimistic: bool
    value_steps: int
    lower_steps: int
    value_optimizer: Torch
    lower_optimizer: Torch
    upper_optimizer: Torch
    multiplier: str
    max_multiplier: float


def init(loop: SingleLoop, problem: BilevelProblem, x0: Tree, y0: Tree, data: Any) -> State:
    """Measure the units on the first batch, and start y and z at y0."""
    x, y = _tree.detach(x0), _tree.detach(y0)
    oracle = Oracle(problem, data)
    _, upper_y = oracle.upper_grad_y(x, y)
    _, lower_y = oracle.lower_grad_y(x, y)
    square = float(_tree.vdot(y, y)) or float(_tree.size(y))
    pull, push = (float(_tree.norm(g)) * math.sqrt(square) for g in (upper_y, lower_y))
    finite = math.isfinite(pull) and math.isfinite(push)
    return State(
        x=x,
        y=y,
        status=Status.RUNNING if finite else Status.NONFINITE,
        message="" if finite else f"{Status.NONFINITE.value} (at x0, y0)",
        memory={
            "z": _tree.detach(y0),
            "units": [push or pull or 1.0, pull or push or 1.0, square],
            "optimizers": {
                "z": loop.value_optimizer.init(_tree.leaves(y)),
                "y": loop.lower_optimizer.init(_tree.leaves(y)),
                "x": loop.upper_optimizer.init(_tree.leaves(x)),
            },
        },
        evaluations=oracle.evaluations,
    )


class _Numbers(NamedTuple):
    """The schedules at one step, in the user's units."""

    mu: float
    theta: float | None
    sigma: float
    epsilon: float
    barrier: Barrier
    max_multiplier: float
    rate_y: float
    rate_z: float


def _numbers(loop: SingleLoop, k: int, memory: Mapping[str, Any]) -> _Numbers:
    (lower, upper, square), optimizers = memory["units"], memory["optimizers"]
    return _Numbers(
        mu=loop.mu(k) * lower / square,
        theta=None if loop.theta is None else loop.theta(k) * upper / square,
        sigma=loop.sigma(k) * upper,
        epsilon=loop.epsilon(k) * lower,
        barrier=loop.barrier(lower),
        max_multiplier=loop.max_multiplier * upper / lower,
        rate_y=loop.lower_optimizer.rate(optimizers["y"]["count"]),
        rate_z=loop.value_optimizer.rate(optimizers["z"]["count"]),
    )


def step(loop: SingleLoop, problem: BilevelProblem, state: State, data: Any) -> State:
    r"""One step of z, y and x on one batch.

    The gradients of all three come from three passes at the same point: f(x, z), f(x, y) and F(x, y).
    f(x, y) and f(x, z) see the same batch, so that its noise cancels in their difference.
    """
    k = state.step
    numbers = _numbers(loop, k, state.memory)
    sign = -1.0 if loop.pessimistic else 1.0
    oracle = Oracle(problem, data)
    optimizers = dict(state.memory["optimizers"])
    x, y, z = state.x, state.y, state.memory["z"]

    for _ in range(loop.value_steps - 1):  # z <- z - alpha (grad f + mu z), Eq. 14
        _, lower_z = oracle.lower_grad_y(x, z)
        z, optimizers["z"] = _moved(loop.value_optimizer, z, lower_z, optimizers["z"], numbers.mu)
    value_z, lower_x_at_z, lower_z = oracle.lower_grad(x, z)
    losses_z = oracle.losses
    # v(x) - f(x, z) is known without a batch
    slack = numbers.epsilon + 0.5 * numbers.mu * _tree.vdot(z, z)

    average: Tensor | None = state.memory.get("gap")
    for _ in range(loop.lower_steps - 1):
        value_y, lower_y = oracle.lower_grad_y(x, y)
        average = _averaged(average, _gap(value_y, value_z, oracle.losses, losses_z))
        _, upper_y = oracle.upper_grad_y(x, y)
        weight = _multiplier(loop, numbers, average, slack)
        grad_y, ridge = _pull(numbers, weight, _tree.scale(sign, upper_y), lower_y)
        y, optimizers["y"] = _moved(loop.lower_optimizer, y, grad_y, optimizers["y"], ridge)
    value_y, lower_x, lower_y = oracle.lower_grad(x, y)
    gap = _gap(value_y, value_z, oracle.losses, losses_z)
    average = _averaged(average, gap)
    upper, upper_x, upper_y = oracle.upper_grad(x, y)
    weight = _multiplier(loop, numbers, average, slack)
    grad_y, ridge = _pull(numbers, weight, _tree.scale(sign, upper_y), lower_y)
    # Eq. 16: the hypergradient, lambda a constant
    difference = _tree.axpy(-1.0, lower_x_at_z, lower_x)
    hypergradient = _tree.axpy(sign * weight.value, difference, upper_x)

    norm = _tree.norm(hypergradient)
    z, optimizers["z"] = _moved(loop.value_optimizer, z, lower_z, optimizers["z"], numbers.mu)
    y, optimizers["y"] = _moved(loop.lower_optimizer, y, grad_y, optimizers["y"], ridge)
    # The value function lies below f(x, y): where y is the better lower minimizer, z goes on from there,
    # from the moved y: one step behind it, z would lose again, and x climb on the lag.
    z = _tree.where(average < 0.0, y, z)
    x, optimizers["x"] = _moved(loop.upper_optimizer, x, hypergradient, optimizers["x"])
    x = projected_by(problem.domain, x)
    evaluations = state.evaluations + oracle.evaluations
    # The moved variables too: an optimizer may overflow where its gradient did not.
    lengths = (norm, *map(_tree.norm, (grad_y, lower_z, x, y, z)))
    if not bool(
        torch.isfinite(torch.stack([part.to(norm) for part in (*lengths, upper, value_y)])).all()
    ):
        message = f"{Status.NONFINITE.value} (at step {k + 1}; F = {float(upper):.6g}, f = {float(value_y):.6g})"
        return replace(state, status=Status.NONFINITE, message=message, evaluations=evaluations)
    return State(
        x=x,
        y=y,
        step=k + 1,
        metrics={
            "upper": upper,
            "lower": value_y,
            "value_gap": gap,
            "slack": slack,
            "multiplier": weight.value,
            "hypergradient": norm,
            "sigma": numbers.sigma,
            "mu": numbers.mu,
            "theta": _theta(numbers, weight),
            "epsilon": numbers.epsilon,
        },
        memory={
            **state.memory,
            "z": z,
            "gap": average.clamp(min=0.0),  # zero where z has become y
            "optimizers": optimizers,
        },
        evaluations=evaluations,
    )


def _gap(
    value_y: Tensor, value_z: Tensor, losses_y: Tensor | None, losses_z: Tensor | None
) -> Tensor:
    """f(x, y) - f(x, z) in float64 (which mps lacks): sample by sample where there are samples."""
    wide = torch.float32 if value_y.device.type == "mps" else torch.float64
    if losses_y is None or losses_z is None:
        return value_y.to(wide) - value_z.to(wide)
    return (losses_y.to(wide) - losses_z.to(wide)).mean()


def _averaged(before: Tensor | None, gap: Tensor) -> Tensor:
    return gap if before is None else _AVERAGING * before + (1.0 - _AVERAGING) * gap


class _Weight(NamedTuple):
    """The multiplier lambda = P'(zeta), and P''(zeta), 0-d."""

    value: Tensor
    curvature: Tensor


def _multiplier(loop: SingleLoop, numbers: _Numbers, gap: Tensor, slack: Tensor) -> _Weight:
    """Lambda and P'' at the known slack, or at the averaged gap by the relaxed barrier.

    A negative gap says that z is not the lower minimizer yet. It counts as further slack: otherwise x would
    run after -lambda f(x, z) faster than z can follow.
    """
    gap = gap.to(slack.dtype)
    if loop.multiplier == "slack":
        value = numbers.barrier.derivative(gap.clamp(max=0.0) - slack, numbers.sigma)
        curvature = torch.zeros_like(value)
    else:
        smooth = relaxed(numbers.barrier, _RELAXATION * slack)
        value = smooth.derivative(gap - slack, numbers.sigma)
        curvature = smooth.second_derivative(gap - slack, numbers.sigma)
    return _Weight(value.clamp(max=numbers.max_multiplier), curvature)


def _pull(numbers: _Numbers, weight: _Weight, upper_y: Tree, lower_y: Tree) -> tuple[Tree, Tensor]:
    r"""The gradient in y of Eq. 15 without its ridge, and theta, over their curvature in units of the learning rate.

    alpha_y = 1 / (L_F + lambda L_f + P'' |grad f|^2), with L_F = 1 / lr_y and L_f = 1 / lr_z.
    """
    grad = _tree.axpy(weight.value, lower_y, upper_y)
    ratio = (
        numbers.rate_y / numbers.rate_z if numbers.rate_z > 0.0 else 1.0
    )  # schedules may end at 0
    stiffness = 1.0 + weight.value * ratio
    stiffness = stiffness + numbers.rate_y * weight.curvature * _tree.vdot(lower_y, lower_y)
    return _tree.scale(1.0 / stiffness, grad), _theta(numbers, weight) / stiffness


def _theta(numbers: _Numbers, weight: _Weight) -> float | Tensor:
    return weight.value * numbers.mu if numbers.theta is None else numbers.theta


def _moved(
    optimizer: Torch,
    tree: Tree,
    grad: Tree,
    memory: dict[str, Any],
    ridge: float | Tensor | None = None,
) -> tuple[Tree, dict[str, Any]]:
    """One step along `grad + ridge tree`, the ridge beside the optimizer.

    An adaptive optimizer would make full steps of a ridge, however small, wherever the gradient is smaller yet: it
    would wipe out what f hardly sees (as weight decay in the gradient of Adam does; Loshchilov and Hutter, 2019).
    """
    rate = optimizer.rate(memory["count"])
    leaves, memory = optimizer.step(_tree.leaves(tree), _tree.leaves(grad), memory)
    moved = _tree.unflatten_like(tree, leaves)
    return (moved if ridge is None else _tree.axpy(-rate * ridge, tree, moved)), memory
