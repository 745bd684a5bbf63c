"""The step of the single loop in one compiled graph, made once for a problem and kept with it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bilevel import _tree
from bilevel._problem import BilevelProblem, ravel, split_data
from bilevel._programs import Programs
from bilevel._solution import Evaluations, State
from bilevel._types import Tree
from bilevel.optim._written_out import WrittenOut, written_out
from bilevel.solvers._loop_step import (
    METRICS,
    Form,
    Number,
    Numbers,
    first_average,
    measured,
    moved,
)
from bilevel.solvers._single_loop import SingleLoop, failed, following, numbers_after
from bilevel.solvers._traced import Traced


class FusedLoop(NamedTuple):
    """What a program is made for; hashable.

    Attributes:
        form: Decides which operations a step is made of.
        has_theta: Whether theta is a number of its own.
        optimizers: Of z, y and x.
    """

    form: Form
    has_theta: bool
    optimizers: tuple[WrittenOut, ...]

    @property
    def counts(self) -> tuple[int, int, int]:
        """How many steps each of them makes in one of x."""
        return self.form.value_steps, self.form.lower_steps, 1


_NAMES: tuple[str, ...] = ("z", "y", "x")  # in the order of `FusedLoop.optimizers`
_FIELDS = ("value_optimizer", "lower_optimizer", "upper_optimizer")


def fused(loop: SingleLoop) -> FusedLoop:
    """What a program of this loop is made for.

    Raises:
        ValueError: One of them is not written out as operations that can be traced.
    """
    rule = "must be SGD, Adam or AdamW to be traced, as `ASBLO(compile=True)` needs it."
    mend = "Pass e.g. `bilevel.optim.Torch(torch.optim.Adam, lr=1e-3)`, or leave out `compile`."
    written = [
        written_out(loop.optimizers[name], f"`ASBLO({field}=...)` {rule}", mend)
        for name, field in zip(_NAMES, _FIELDS, strict=True)
    ]
    return FusedLoop(loop.form, loop.theta is not None, tuple(written))


def started(fused: FusedLoop, state: State) -> State:
    """The state of the single loop before its first step, in the form of a program: vectors."""
    vectors = {"z": state.memory["z"], "y": state.y, "x": state.x}
    optimizers: dict[str, Any] = {}
    for optimizer, (name, tree) in zip(fused.optimizers, vectors.items(), strict=True):
        vector, _ = _tree.ravel(tree)
        optimizers[name] = {"count": 0, "moments": list(optimizer.first(vector))}
    z = _tree.ravel(state.memory["z"])[0]
    return replace(state, memory={**state.memory, "z": z, "optimizers": optimizers})


def is_fused(state: State) -> bool:
    """Whether a state of the single loop has the form of a program."""
    return "moments" in state.memory["optimizers"]["x"]


def step(
    loop: SingleLoop, fused: FusedLoop, problem: BilevelProblem, state: State, data: Any
) -> State:
    """One step of z, y and x on one batch, by the program that was compiled for it, now or before."""
    programs = problem.programs.get((_tree.kind(state.x), _tree.kind(state.y)), Programs())
    program = programs.get(fused)
    if program is not None:
        return _run(program, loop, fused, state, data)
    flat, *_ = ravel(problem, state.x, state.y)
    with flat.programs.making(fused, _program(fused, flat), "the step of ASBLO") as program:
        return _run(program, loop, fused, state, data)


def _run(program: Any, loop: SingleLoop, fused: FusedLoop, state: State, data: Any) -> State:
    numbers, memory, parts = numbers_after(loop, state), state.memory, split_data(data)
    (x, unravel_x), (y, unravel_y) = _tree.ravel(state.x), _tree.ravel(state.y)
    average = memory["gap"] if "gap" in memory else first_average(y)
    optimizers = dict(memory["optimizers"])
    flat = [0.0 if number is None else number for number in numbers]
    for name, count in zip(_NAMES, fused.counts, strict=True):
        for t in range(optimizers[name]["count"], optimizers[name]["count"] + count):
            flat += loop.optimizers[name].rate(t), t + 1
    with torch.no_grad():  # an objective may hold parameters, of which no one wants a graph
        x, y, z, average, packed, moments = program(
            x,
            y,
            memory["z"],
            average,
            [optimizers[name]["moments"] for name in _NAMES],
            torch.tensor(flat, dtype=average.dtype).to(average.device),
            parts.upper,
            parts.lower,
        )
    a, b = fused.form.value_steps, fused.form.lower_steps
    # A program cannot count: so much it evaluates by its form.
    spent = Evaluations(upper=b, lower=a + b, upper_grad=b, lower_grad=a + b)
    evaluations = state.evaluations + spent
    values = packed.tolist()
    if not all(map(math.isfinite, values)):
        return failed(state, values[0], values[1], evaluations)
    for name, count, new in zip(_NAMES, fused.counts, moments, strict=True):
        optimizers[name] = {"count": optimizers[name]["count"] + count, "moments": new}
    memory = {**memory, "z": z, "gap": average, "optimizers": optimizers}
    metrics = dict(zip(METRICS, values, strict=False))  # what is checked comes after them
    return following(state, numbers, unravel_x(x), unravel_y(y), metrics, memory, evaluations)


def _program(fused: FusedLoop, problem: BilevelProblem) -> Callable[..., Any]:
    """The step, of a problem over vectors."""

    def taken(
        x: Tensor,
        y: Tensor,
        z: Tensor,
        average: Tensor,
        moments: list[list[Tensor]],
        numbers: Tensor,
        upper_data: Any,
        lower_data: Any,
    ) -> tuple[Tree, Tree, Tree, Tensor, Tensor, list[list[Tensor]]]:
        given = list(numbers.unbind())
        head, tail = given[: len(Numbers._fields)], given[len(Numbers._fields) :]
        at = Numbers(*head) if fused.has_theta else Numbers(*head)._replace(theta=None)
        kept = dict(zip(_NAMES, moments, strict=True))
        optimizers = dict(zip(_NAMES, fused.optimizers, strict=True))
        paces: dict[str, list[Tensor]] = {}  # of each step the rate and the number
        for name, count in zip(_NAMES, fused.counts, strict=True):
            paces[name], tail = tail[: 2 * count], tail[2 * count :]

        def move(name: str, vector: Tree, grad: Tree, ridge: Number | None) -> Tree:
            rate, t, *paces[name] = paces[name]
            new, after = optimizers[name].moved(vector, grad, tuple(kept[name]), t, rate)
            kept[name] = list(after)
            return new if ridge is None else _tree.axpy(-rate * ridge, vector, new)

        passes = Traced(problem, upper_data, lower_data)
        found = moved(fused.form, at, passes, move, problem.domain, x, y, z, average)
        parts: list[Any] = [*measured(found).values(), *map(_tree.norm, found.checked)]
        packed = torch.stack([part.to(average.dtype) for part in parts])
        new = [kept[name] for name in _NAMES]
        return found.x, found.y, found.z, found.average, packed, new

    return taken
