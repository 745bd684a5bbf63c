"""TorchOpt 0.7.3: a differentiable optimizer to unroll, or a module that solves and is differentiated implicitly."""

from __future__ import annotations

import torch
import torchopt
from speed.work import Answer, Hypergradient, Lower, Work
from torch import Tensor, nn

from peers.variables import LowerVariable, fill, values


def unrolled(work: Work, steps: int) -> Hypergradient:
    lower = LowerVariable(work.y)
    start = torchopt.extract_state_dict(lower, by="reference")

    def hypergradient(x: Tensor, y: Lower) -> Answer:
        torchopt.recover_state_dict(lower, start)
        fill(lower, y)
        x = x.detach().requires_grad_(True)
        optimizer = torchopt.MetaSGD(lower, lr=work.lr, momentum=work.momentum)
        for _ in range(steps):
            optimizer.step(lower(work.lower, x))
        (found,) = torch.autograd.grad(lower(work.upper, x), x)
        return Answer(found, values(lower))

    return hypergradient


def implicit(work: Work, steps: int, rtol: float, products: int) -> Hypergradient:
    solver = torchopt.linear_solve.solve_cg(rtol=rtol, maxiter=products)

    class Inner(torchopt.nn.ImplicitMetaGradientModule, linear_solve=solver):
        def __init__(self, x: Tensor, y: Tensor) -> None:
            super().__init__()
            self.x = x  # a meta-parameter, since it was an argument that requires a gradient
            self.y = nn.Parameter(y.detach().clone())

        def objective(self) -> Tensor:
            return work.lower(self.x, self.y)

        def solve(self) -> None:
            parameters = tuple(self.parameters())
            optimizer = torch.optim.SGD(parameters, lr=work.lr, momentum=work.momentum)
            with torch.enable_grad():
                for _ in range(steps):
                    optimizer.zero_grad()
                    self.objective().backward(inputs=parameters)
                    optimizer.step()

    def hypergradient(x: Tensor, y: Lower) -> Answer:
        x = x.detach().requires_grad_(True)
        inner = Inner(x, *y)
        inner.solve()
        (found,) = torch.autograd.grad(work.upper(x, inner.y), x)
        return Answer(found, (inner.y.detach(),))

    return hypergradient
