"""What the one loop asks of a solver."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from bilevel._problem import BilevelProblem
from bilevel._solution import State
from bilevel._types import Tree


class Solver(ABC):
    """A frozen set of numbers and parts; all that changes is in the `State`."""

    @property
    def pessimistic(self) -> bool:
        """Whether y is to maximize F over the lower solutions; the answer is certified as what was solved."""
        return False

    def nearby(self) -> Solver:
        """The solver for a further start of `solve(starts=...)`: one whose answer depends on where it starts."""
        return self

    @abstractmethod
    def init(
        self, problem: BilevelProblem, x0: Tree, y0: Tree, data: Any, *, full_batch: bool
    ) -> State:
        """The state before the first step.

        Args:
            problem: The problem.
            x0: Upper variable, not modified.
            y0: Lower variable, not modified.
            data: The first batch, or None where there are no batches.
            full_batch: Whether the objectives are the same in every step.
        """

    @abstractmethod
    def step(self, problem: BilevelProblem, state: State, data: Any) -> State:
        """The state after one more upper step on `data`. `state` is not modified."""
