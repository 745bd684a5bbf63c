"""Steps of gradient descent, kept so that a cotangent can go back through them."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor

from bilevel._oracle import CountedGradient, Oracle

_AT_HAND = 2**16  # numbers up to which all iterates are kept: half a megabyte in float64
_GRAPHS = 2**26  # bytes up to which all their graphs are kept too


class Tape:
    r"""What is kept of the steps $y_{t+1} = y_t - \alpha \nabla_y f(x, y_t)$, taken one by one.

    Of small iterates all are kept, and their graphs too where those are small, by the measure of the first. Of large
    ones it is every $\sqrt T$-th, and those between are computed a second time, as all graphs are.
    """

    def __init__(self, oracle: Oracle, x: Tensor, y: Tensor, lr: float, steps: int) -> None:
        self._oracle, self._x, self._lr, self._steps = oracle, x, lr, steps
        self._taken = 0
        self._is_at_hand = steps * y.numel() <= _AT_HAND
        self._every = 1 if self._is_at_hand else math.ceil(math.sqrt(steps))
        self._checkpoints: list[Tensor] = []
        self._graphs: list[CountedGradient] = []

    def step(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """The next iterate, and the gradient of f that led there."""
        if self._taken == 0 and self._is_at_hand:
            linear, size = self._oracle.weighed(self._x, y)
            if self._steps * size <= _GRAPHS:
                self._graphs.append(linear)
            grad = linear.grad
        elif self._graphs:
            self._graphs.append(self._oracle.linearized(self._x, y))
            grad = self._graphs[-1].grad
        else:
            _, grad = self._oracle.lower_grad_y(self._x, y)
        if not self._graphs and self._taken % self._every == 0:
            self._checkpoints.append(y)
        self._taken += 1
        return y - self._lr * grad, grad

    def back(self, adjoint: Callable[[CountedGradient], None]) -> None:
        """Call `adjoint` with the gradient of f at each iterate, from the last to the first, and drop its graph."""
        while self._graphs:
            adjoint(self._graphs.pop())
        end = self._steps
        while self._checkpoints:
            segment = [self._checkpoints.pop()]
            start = len(self._checkpoints) * self._every
            while len(segment) < end - start:
                _, grad = self._oracle.lower_grad_y(self._x, segment[-1])
                segment.append(segment[-1] - self._lr * grad)
            end = start
            while segment:
                adjoint(self._oracle.linearized(self._x, segment.pop()))
