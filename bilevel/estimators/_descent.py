"""A fixed number of steps of an optimizer, as operations on tensors that can be traced."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from bilevel._autodiff import func
from bilevel.estimators._fixed_steps import FixedSteps, Reached, length
from bilevel.optim._written_out import Moments, WrittenOut, written_out
from bilevel.optim.torch import Torch

Rule = Callable[[Tensor, Tensor], Tensor]  # the next variable, from the variable and its gradient


@dataclass(frozen=True)
class Descent(FixedSteps):
    """The steps of `bilevel.optim.Torch`, written out.

    Attributes:
        optimizer: Moves the variable.
        rates: The learning rate of each step.
    """

    optimizer: WrittenOut
    rates: tuple[float, ...]

    def rules(self) -> Iterator[Rule]:
        """The rule of each step; they share the optimizer's memory and are to be used in order."""
        moments: Moments | None = None
        for t, rate in enumerate(self.rates, 1):

            def rule(y: Tensor, grad: Tensor, t: int = t, rate: float = rate) -> Tensor:
                nonlocal moments
                y, moments = self.optimizer.moved(y, grad, moments, t, rate)
                return y

            yield rule

    def minimized(self, fun: Callable[[Tensor], Tensor], y: Tensor, tol: float) -> Reached:
        """See `FixedSteps.minimized`."""
        gradient = func.grad(fun)
        g = gradient(y)
        first = length(g)
        for t, rule in enumerate(self.rules()):
            g = gradient(y) if t else g
            new = rule(y, g)
            y = torch.where(length(g) > tol * first, new, y) if tol else new
        return y, first, torch.zeros_like(first)

    def cost(self, n: int) -> tuple[int, int, int]:
        """See `FixedSteps.cost`."""
        return len(self.rates), len(self.rates), 0


def descent(where: str, minimizer: object) -> Descent:
    """The steps of `minimizer` written out.

    Raises:
        ValueError: It stops where its numbers tell it to, or has options that are not written out.
    """
    optimizer = written_out(
        minimizer,
        f"`{where}` must take a fixed number of steps of SGD, Adam or AdamW to be one program for all problems, "
        "as `compile=True` and `solve_many` need it.",
        "Pass e.g. `bilevel.optim.Torch(torch.optim.SGD, lr=0.1, max_steps=20)`.",
    )
    steps = cast(Torch, minimizer)
    return Descent(optimizer, tuple(steps.rate(t) for t in range(steps.max_steps)))
