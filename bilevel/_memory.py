"""How much memory the steps of a solver take."""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bilevel import _tree
from bilevel._iterate import iterate
from bilevel._problem import BilevelProblem
from bilevel._types import Tree
from bilevel.solvers import Solver

_WEIGHED_STEPS = 2  # of a run of its own, in which memory is measured


class LiveMemory(TorchDispatchMode):
    """Measures, as a context, the bytes of the tensors that are made in it and live at a time.

    Attributes:
        peak: The largest number of them.

    Example:
        >>> import torch
        >>> with LiveMemory() as memory:
        ...     for _ in range(3):
        ...         one = torch.zeros(100, dtype=torch.float64)
        >>> memory.peak  # a new one is made while the one before lives
        1600
    """

    def __init__(self) -> None:
        super().__init__()  # pyright: ignore[reportUnknownMemberType]
        self.peak, self._now = 0, 0
        self._seen: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in _tree.leaves(result):
            if not isinstance(leaf, Tensor):  # pyright: ignore[reportUnnecessaryIsInstance]
                continue
            storage = leaf.untyped_storage()
            if storage not in self._seen:
                self._seen.add(storage)
                self._now += storage.nbytes()
                weakref.finalize(storage, self._drop, storage.nbytes())
                self.peak = max(self.peak, self._now)
        return result

    def _drop(self, size: int) -> None:
        self._now -= size


def live_memory(problem: BilevelProblem, solver: Solver, x0: Tree, y0: Tree) -> int:
    """Bytes of the tensors that the first two steps make on the full batch, as many as live at a time."""
    with LiveMemory() as memory:
        for state in iterate(problem, solver, x0, y0):
            if state.step >= _WEIGHED_STEPS:
                break
    return memory.peak
