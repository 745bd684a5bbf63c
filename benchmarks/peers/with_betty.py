"""Betty 0.2.1: a problem a level, and an engine that runs them. It has no unrolling that runs on this torch."""

from __future__ import annotations

import logging

import torch
from betty.configs import Config, EngineConfig
from betty.engine import Engine
from betty.problems import ImplicitProblem
from speed.work import Answer, Hypergradient, Lower, Work
from torch import Tensor

from peers.variables import LowerVariable, UpperVariable, fill, values


def implicit(work: Work, steps: int, products: int) -> Hypergradient:
    """`products` of its conjugate gradients, which have no stopping test."""
    return _implicit(work, steps, Config(type="cg", cg_iterations=products, unroll_steps=steps))


def neumann(work: Work, steps: int, products: int) -> Hypergradient:
    """`products` of its Neumann series, whose step is that which suits gradient descent without momentum."""
    alpha = work.lr / (1.0 + work.momentum**0.5) ** 2
    config = Config(
        type="neumann", neumann_iterations=products, neumann_alpha=alpha, unroll_steps=steps
    )
    return _implicit(work, steps, config)


def _implicit(work: Work, steps: int, config: Config) -> Hypergradient:
    class Above(ImplicitProblem):
        found: Tensor

        def get_batch(self) -> None:
            return None

        def training_step(self, batch: None) -> Tensor:
            return self.below.module(work.upper, self.module())

        def custom_optimizer_step(self) -> None:
            self.found = self.module.x.grad.clone()

    class Below(ImplicitProblem):
        def get_batch(self) -> None:
            return None

        def training_step(self, batch: None) -> Tensor:
            return self.module(work.lower, self.above())

    def forget(message: logging.LogRecord) -> bool:
        return False

    logging.getLogger("betty").addFilter(forget)
    x, y = UpperVariable(work.x), LowerVariable(work.y)
    above = Above(
        name="above",
        module=x,
        optimizer=torch.optim.SGD(x.parameters(), lr=1.0),
        config=Config(retain_graph=True),
    )
    below = Below(
        name="below",
        module=y,
        optimizer=torch.optim.SGD(y.parameters(), lr=work.lr, momentum=work.momentum),
        config=config,
    )
    engine = Engine(
        problems=[above, below],
        config=EngineConfig(train_iters=steps, strategy="cpu"),
        dependencies={"u2l": {above: [below]}, "l2u": {below: [above]}},
    )

    def hypergradient(x: Tensor, y: Lower) -> Answer:
        fill(above.module, (x,))
        fill(below.module, y)
        below.optimizer.state.clear()  # the momentum of the call before
        engine.run()
        return Answer(above.found, values(below.module))

    return hypergradient
