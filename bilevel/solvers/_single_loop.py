"""ASBLO on mini-batches: one loop, first derivatives only, three passes a step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bilevel import _tree
from bilevel._oracle import Oracle
from bilevel._problem import BilevelProblem
from bilevel._solution import Evaluations, State, Status
from bilevel._types import Schedule, Tree
from bilevel.optim.torch import Torch
from bilevel.solvers._loop_step import (
    Form,
    Number,
    Numbers,
    first_average,
    kept,
    measured,
    moved,
)


class SingleLoop(NamedTuple):
    """What the single loop takes from `ASBLO`, its schedules in the units of the problem.

    Attributes:
        form: Decides which operations a step is made of.
        mu, theta, sigma, epsilon, kappa, max_multiplier: See `ASBLO`.
        optimizers: Of "z", "y" and "x".
    """

    form: Form
    mu: Schedule
    theta: Schedule | None
    sigma: Schedule
    epsilon: Schedule
    kappa: float
    max_multiplier: float
    optimizers: Mapping[str, Torch]


def init(loop: SingleLoop, problem: BilevelProblem, x0: Tree, y0: Tree, data: Any) -> State:
    """Measure the units on the first batch, and start y and z at y0."""
    x, y = _tree.detach(x0), _tree.detach(y0)
    oracle = Oracle(problem, data)
    _, upper_y = oracle.upper_grad_y(x, y)
    _, lower_y = oracle.lower_grad_y(x, y)
    square = float(_tree.vdot(y, y)) or float(_tree.size(y))
    pull, push = (float(_tree.norm(g)) * math.sqrt(square) for g in (upper_y, lower_y))
    finite = math.isfinite(pull) and math.isfinite(push)
    trees = {"z": y, "y": y, "x": x}
    return State(
        x=x,
        y=y,
        status=Status.RUNNING if finite else Status.NONFINITE,
        message="" if finite else f"{Status.NONFINITE.value} (at x0, y0)",
        memory={
            "z": _tree.detach(y0),
            "units": [push or pull or 1.0, pull or push or 1.0, square],
            "optimizers": {
                name: loop.optimizers[name].init(_tree.leaves(tree)) for name, tree in trees.items()
            },
        },
        evaluations=oracle.evaluations,
    )


def numbers_after(loop: SingleLoop, state: State) -> Numbers:
    """The numbers of the step that goes on from `state`."""
    k, memory = state.step, state.memory
    lower, upper, square = memory["units"]
    rate_y, rate_z = (
        loop.optimizers[name].rate(memory["optimizers"][name]["count"]) for name in ("y", "z")
    )
    return Numbers(
        mu=loop.mu(k) * lower / square,
        theta=None if loop.theta is None else loop.theta(k) * upper / square,
        sigma=loop.sigma(k) * upper,
        epsilon=loop.epsilon(k) * lower,
        kappa=loop.kappa * lower,
        max_multiplier=loop.max_multiplier * upper / lower,
        rate_y=rate_y,
        stiffness=rate_y / rate_z if rate_z > 0.0 else 1.0,  # schedules may end at 0
        kept=kept(is_first="gap" not in memory),
    )


def step(loop: SingleLoop, problem: BilevelProblem, state: State, data: Any) -> State:
    """One step of z, y and x on one batch."""
    numbers, memory = numbers_after(loop, state), state.memory
    optimizers = dict(memory["optimizers"])
    oracle = Oracle(problem, data)

    def move(name: str, tree: Tree, grad: Tree, ridge: Number | None) -> Tree:
        optimizer, before = loop.optimizers[name], optimizers[name]
        leaves, optimizers[name] = optimizer.step(_tree.leaves(tree), _tree.leaves(grad), before)
        new = _tree.unflatten_like(tree, leaves)
        rate = optimizer.rate(before["count"])
        return new if ridge is None else _tree.axpy(-rate * ridge, tree, new)

    x, y, z = state.x, state.y, memory["z"]
    average = memory["gap"] if "gap" in memory else first_average(_tree.leaves(y)[0])
    found = moved(loop.form, numbers, oracle, move, problem.domain, x, y, z, average)
    norm = found.hypergradient
    lengths = _tree.norms(*found.checked)
    parts = [part.to(norm) for part in (norm, *lengths, found.upper, found.lower)]
    evaluations = state.evaluations + oracle.evaluations
    if not bool(torch.isfinite(torch.stack(parts)).all()):
        return failed(state, found.upper, found.lower, evaluations)
    memory = {**memory, "z": found.z, "gap": found.average, "optimizers": optimizers}
    return following(state, numbers, found.x, found.y, measured(found), memory, evaluations)


def following(
    state: State,
    numbers: Numbers,
    x: Tree,
    y: Tree,
    metrics: Mapping[str, Any],
    memory: Mapping[str, Any],
    evaluations: Evaluations,
) -> State:
    """The state after a step that led to x and y."""
    schedules = {name: getattr(numbers, name) for name in ("sigma", "mu", "epsilon")}
    return State(
        x=x,
        y=y,
        step=state.step + 1,
        metrics={**metrics, **schedules},
        memory=memory,
        evaluations=evaluations,
    )


def failed(
    state: State, upper: float | Tensor, lower: float | Tensor, evaluations: Evaluations
) -> State:
    """The state before, and that the step after it met numbers that are not finite."""
    values = f"F = {float(upper):.6g}, f = {float(lower):.6g}"
    message = f"{Status.NONFINITE.value} (at step {state.step + 1}; {values})"
    return replace(state, status=Status.NONFINITE, message=message, evaluations=evaluations)
