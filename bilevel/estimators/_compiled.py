"""A hypergradient in one compiled graph, made once for a problem and kept with it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from bilevel import _tree
from bilevel._problem import BilevelProblem, split_data
from bilevel._solution import Status
from bilevel._types import Tree
from bilevel.estimators._base import Estimate
from bilevel.estimators._fused import Fused, Program


def estimate(
    fused: Fused,
    problem: BilevelProblem,
    x: Tensor,
    y: Tensor,
    data: Any,
    memory: Mapping[str, Any] | None,
) -> Estimate:
    """The hypergradient of a problem over vectors, by the program that was compiled for it, now or before."""
    program = problem.programs.get(fused)
    if program is not None:
        return _run(fused, program, x, y, data, memory)
    with problem.programs.making(fused, fused.program(problem), "the hypergradient") as program:
        return _run(fused, program, x, y, data, memory)


def precompiled(
    fused: Fused, problem: BilevelProblem, x: Tree, y: Tree, data: Any
) -> Estimate | None:
    """The hypergradient by a program that was compiled before for such trees; None where there is none."""
    known = problem.programs.get((_tree.kind(x), _tree.kind(y)))
    program = known and known.get(fused)
    if not program:
        return None
    (u, unravel_x), (v, unravel_y) = _tree.ravel(x), _tree.ravel(y)
    found = _run(fused, program, u.detach(), v.detach(), data, None)
    if u is x and v is y:
        return found
    return replace(found, grad=unravel_x(found.grad), y=unravel_y(found.y))


def _run(
    fused: Fused,
    program: Program,
    x: Tensor,
    y: Tensor,
    data: Any,
    memory: Mapping[str, Any] | None,
) -> Estimate:
    """Solvers, which carry a memory, start warm from the first step on: one program serves all of theirs."""
    parts = split_data(data)
    warm: Tensor | None = None
    if memory is not None:
        warm = memory["v"] if "v" in memory else torch.zeros_like(y)
    found = program(x, y, warm, parts.upper, parts.lower)
    numbers: Any = found[3].tolist()  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
    result = fused.estimate(found, numbers, warm is not None, memory)
    if result.status is Status.NONFINITE:
        return replace(result, grad=torch.full_like(x, math.nan), y=y, value=math.inf)
    return result
