"""Steps of gradient descent, kept so that a cotangent can go back through them."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from bilevel import _tree
from bilevel._autodiff import weighed
from bilevel._oracle import CountedSteps, Oracle
from bilevel._types import Tree

_Adjoint = Callable[[CountedSteps], None]


class Tape:
    r"""What is kept of the steps $y_{t+1} = y_t - \alpha \nabla_y f(x, y_t)$, taken one by one.

    The graphs of the last of them are kept, as many as fit into `memory`, by the measure of the first. Of the others
    it is some iterates: so many that the steps from each to the next, taken again on the way back, are no more than
    those whose graphs fit. Where these would be too many iterates, fewer are kept, and those between computed twice:
    once for the iterates, once for the graphs.

    Attributes:
        first: Length of the gradient of f that led the first step.
    """

    def __init__(
        self, oracle: Oracle, x: Tensor, y: Tree, lr: float, steps: int, memory: int
    ) -> None:
        self._oracle, self._x, self._lr, self._steps, self._memory = oracle, x, lr, steps, memory
        self._taken, self.first = 0, 0.0
        self._y = y  # where the graph begins, or the next step where there is none
        self._graph: CountedSteps | None = None  # of the last steps
        self._iterates: list[Tree] = []  # of the others, every so many

    def step(self) -> None:
        """Take the next one."""
        before = self._y
        if self._taken == 0:
            self.first = self._take_first()
        elif self._taken < self._others:
            self._y, _ = self._plain(before)
        else:
            self._graph = self._graph or self._oracle.descent_steps(self._x, before, self._lr)
            self._graph.step()
        if self._taken < self._others and self._taken % self._every == 0:
            self._iterates.append(before)
        self._taken += 1

    @property
    def y(self) -> Tree:
        """The last iterate."""
        return self._y if self._graph is None else self._graph.reached()

    def upper_grad(self) -> tuple[Tensor, Tensor]:
        """F at the last iterate, and its gradient in x through all steps."""
        if self._graph is not None and not self._iterates:
            return self._graph.upper_grad()
        upper, grad, cotangent = self._oracle.upper_grad(self._x, self.y)
        of_x, _ = self.back(cotangent)
        return upper, grad + of_x

    def back(self, cotangent: Tree) -> tuple[Tensor, Tree]:
        """From a cotangent of the last iterate those of x and of the first."""
        of_x = torch.zeros_like(self._x)

        def adjoint(steps: CountedSteps) -> None:
            nonlocal of_x, cotangent
            more, cotangent = steps.vjp(cotangent)
            of_x = of_x + more

        if self._graph is not None:
            adjoint(self._graph)
            self._graph = None
        self._back(self._iterates, self._every, self._others, adjoint)
        return of_x, cotangent

    def _take_first(self) -> float:
        """Take the first step, which is the measure of all; the length of the gradient of f that led it."""
        y = self._y
        if self._memory == 0:
            self._divide(y, 0)
            self._y, slope = self._plain(y)
            return _tree.length(slope)
        graph = self._oracle.descent_steps(self._x, y, self._lr)
        slope, sizes = weighed(graph.step, *_tree.leaves(y))
        first = _tree.length([leaf.detach() for leaf in slope])
        total = math.inf if sizes is None else sum(sizes.values())
        if self._steps * total <= self._memory:
            self._graph = graph
            self._divide(y, self._steps)
            return first
        self._y = graph.reached()
        del graph, slope
        # What is still there, the data for example, belongs to no step: but its iterate does.
        own = math.inf if sizes is None else total - sum(sizes.values()) + _tree.nbytes(y)
        self._divide(y, min(int(self._memory // own), self._steps - 1))
        return first

    def _divide(self, y: Tree, kept: int) -> None:
        """Decide which iterates to keep, where the graphs of the last `kept` steps are."""
        self._others = self._steps - kept
        self._at_once = max(1, kept)  # graphs on the way back
        few = max(2 * math.ceil(math.sqrt(self._steps)), self._memory // _tree.nbytes(y))
        is_enough = self._others <= few * self._at_once
        # Else as many iterates as the steps between two of them have pieces, which keeps both few.
        between = math.ceil(math.sqrt(self._others * self._at_once))
        self._every = self._at_once if is_enough else between

    def _plain(self, y: Tree) -> tuple[Tree, Tree]:
        return self._oracle.descended(self._x, y, self._lr)

    def _back(self, iterates: list[Tree], every: int, end: int, adjoint: _Adjoint) -> None:
        """Go back from step `end` to the first of the iterates, which are `every` steps apart."""
        while iterates:
            y, start = iterates.pop(), len(iterates) * every
            if every > self._at_once:
                self._back(self._between(y, end - start), self._at_once, end - start, adjoint)
            else:
                graph = self._oracle.descent_steps(self._x, y, self._lr)
                for _ in range(start, end):
                    graph.step()
                adjoint(graph)
            end = start

    def _between(self, y: Tree, steps: int) -> list[Tree]:
        """Of so many iterates from y on, every one from which as many graphs as fit reach the next."""
        found = [y]
        while len(found) * self._at_once < steps:
            for _ in range(self._at_once):
                y, _ = self._plain(y)
            found.append(y)
        return found
