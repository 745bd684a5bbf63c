"""A hypergradient in one compiled graph, made once for a problem and kept with it."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import FunctionType
from typing import Any, cast

import torch
from torch import Tensor

from bilevel import _tree
from bilevel._problem import BilevelProblem, split_data
from bilevel._solution import Status
from bilevel._types import Tree
from bilevel.estimators._base import Estimate
from bilevel.estimators._fused import Fused, Program

compiler: Any = torch  # the stubs of `torch.compile` are untyped
#: How torch names what belongs to itself, to this module's neighbours, or to a frozen program.
_FIXED = re.compile(
    r"self\b|__import__\('torch'\)|list\(dict\.keys\(__import__\('torch'\)"
    r"|G\['(?!__import_)|G\['__import_(torch|bilevel)(_dot_|'\])"
)


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
    program = problem.programs[fused] = _compile(fused.program(problem))
    try:
        return _run(fused, program, x, y, data, memory)
    except Exception as error:
        del problem.programs[fused]
        error.add_note(
            "While compiling the hypergradient, as `compile=True` asks for. Both objectives must be made of torch "
            "operations without branches on numbers, and torch needs a C++ compiler for the CPU. "
            "Leave `compile` out to compute step by step."
        )
        raise


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


def _compile(program: Program) -> Program:
    """Compiled as a whole.

    Its code is copied first: torch keeps what it compiled with the code, and gives up where one code was compiled
    for many functions, which here may be those of many problems.
    """
    function = cast(FunctionType, program)
    own = FunctionType(
        function.__code__.replace(),
        function.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    options: dict[str, Any] = {}
    if hasattr(torch.compiler, "skip_guard_on_globals_unsafe"):  # as old as the option
        options["guard_filter_fn"] = _may_change
    return compiler.compile(own, fullgraph=True, options=options)


def _may_change(guards: Sequence[Any]) -> list[bool]:
    """Which of the things that torch would look at before each call to look at.

    Not at what the library and torch are made of, which takes longer than the call itself; at the variables, the
    data, the state of torch, and all that the objectives use.
    """
    return [
        guard.guard_type != "DUPLICATE_INPUT" and not _FIXED.match(guard.name) for guard in guards
    ]


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
