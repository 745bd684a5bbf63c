"""Compiled functions: how they are made, and where those of a problem are kept."""

from __future__ import annotations

import re
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from types import FunctionType
from typing import Any, cast

import torch

compiler: Any = torch  # the stubs of `torch.compile` are untyped
#: How torch names what belongs to itself, to the modules of the library, or to a frozen program.
_FIXED = re.compile(
    r"self\b|__import__\('torch'\)|list\(dict\.keys\(__import__\('torch'\)"
    r"|G\['(?!__import_)|G\['__import_(torch|bilevel)(_dot_|'\])"
)


class Programs(dict[Any, Any]):
    """Compiled functions by what they were compiled for; they stay in the process that made them.

    Attributes:
        checked: The kinds of the trees x and y at which the problem was found to be in order.
    """

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.checked: set[Any] = set()

    def __reduce__(self) -> tuple[type[Programs], tuple[()]]:
        return Programs, ()

    @contextmanager
    def making(self, key: Any, function: Callable[..., Any], words: str) -> Generator[Any]:
        """The compiled `function`, kept under `key` unless its first call, which compiles, fails in this context.

        Args:
            key: What it is compiled for; hashable.
            function: What to compile.
            words: What it computes, for a note to the error of an objective that cannot be compiled.
        """
        program = self[key] = _compiled(function)
        try:
            yield program
        except Exception as error:
            del self[key]
            error.add_note(
                f"While compiling {words}, as `compile=True` asks for. Both objectives must be made of torch "
                "operations without branches on numbers and without communication between processes, and torch needs a "
                "C++ compiler for the CPU. "
                "Leave `compile` out to compute step by step."
            )
            raise


def _compiled(program: Callable[..., Any]) -> Any:
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
