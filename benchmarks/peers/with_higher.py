"""higher 0.2.1: an inner loop whose steps stay in the graph. It has no implicit differentiation."""

from __future__ import annotations

import higher
import torch
from speed.work import Answer, Hypergradient, Lower, Work
from torch import Tensor

from peers.variables import LowerVariable, fill


def unrolled(work: Work, steps: int) -> Hypergradient:
    lower = LowerVariable(work.y)
    optimizer = torch.optim.SGD(lower.parameters(), lr=work.lr, momentum=work.momentum)

    def hypergradient(x: Tensor, y: Lower) -> Answer:
        fill(lower, y)
        x = x.detach().requires_grad_(True)
        with higher.innerloop_ctx(lower, optimizer) as (inner, inner_optimizer):
            for _ in range(steps):
                inner_optimizer.step(inner(work.lower, x))
            (found,) = torch.autograd.grad(inner(work.upper, x), x)
            return Answer(found, tuple(leaf.detach() for leaf in inner.parameters()))

    return hypergradient
