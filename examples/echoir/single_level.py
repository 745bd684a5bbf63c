"""The baseline: ordinary training, all parameters and all photographs on one level."""

from dataclasses import dataclass, replace
from typing import Any

import torch

import bilevel as bl


@dataclass(frozen=True)
class SingleLevel(bl.Solver):
    """One optimizer on the upper objective over x and y together.

    In the form of a solver, so that it shares the loop, the data, the checkpoints and the clock
    with what it is compared to.

    Attributes:
        optimizer: of all variables.
    """

    optimizer: bl.optim.Torch

    def init(
        self, problem: bl.BilevelProblem, x0: Any, y0: Any, data: Any, *, full_batch: bool
    ) -> bl.State:
        return bl.State(x0, y0, memory=self.optimizer.init([*x0.values(), *y0.values()]))

    def step(self, problem: bl.BilevelProblem, state: bl.State, data: Any) -> bl.State:
        x, y = (
            {name: value.detach().requires_grad_() for name, value in level.items()}
            for level in (state.x, state.y)
        )
        variables = [*x.values(), *y.values()]
        loss = problem.upper(x, y, data.upper)
        slopes = torch.autograd.grad(loss, variables)
        new, memory = self.optimizer.step(variables, slopes, state.memory)
        return replace(
            state,
            x=dict(zip(x, new, strict=False)),
            y=dict(zip(y, new[len(x) :], strict=True)),
            step=state.step + 1,
            metrics={"upper": loss.detach()},
            memory=memory,
        )
