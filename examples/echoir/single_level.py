"""The baseline: ordinary training, all parameters and all photographs on one level."""

from dataclasses import dataclass, replace
from typing import Any

import torch

import bilevel as bl


@dataclass(frozen=True)
class SingleLevel(bl.Solver):
    """AdamW on the upper objective over x and y together.

    In the form of a solver, so that it shares the loop, the data, the checkpoints and the clock
    with what it is compared to.

    Attributes:
        lr: learning rate, a function of the step.
        weight_decay: AdamW's.
    """

    lr: bl.Schedule
    weight_decay: float = 1e-4

    def init(
        self, problem: bl.BilevelProblem, x0: Any, y0: Any, data: Any, *, full_batch: bool
    ) -> bl.State:
        return bl.State(x0, y0, memory={"optimizer": {}})

    def step(self, problem: bl.BilevelProblem, state: bl.State, data: Any) -> bl.State:
        x, y = (
            {name: value.clone().requires_grad_() for name, value in level.items()}
            for level in (state.x, state.y)
        )
        optimizer = torch.optim.AdamW(
            [*x.values(), *y.values()], lr=self.lr(state.step), weight_decay=self.weight_decay
        )
        known = {
            index: {name: value.clone() for name, value in moments.items()}
            for index, moments in state.memory["optimizer"].items()
        }
        optimizer.load_state_dict(optimizer.state_dict() | {"state": known})
        loss = problem.upper(x, y, data.upper)
        loss.backward()
        optimizer.step()
        return replace(
            state,
            x={name: value.detach() for name, value in x.items()},
            y={name: value.detach() for name, value in y.items()},
            step=state.step + 1,
            metrics={"upper": loss.detach()},
            memory={"optimizer": optimizer.state_dict()["state"]},
        )
