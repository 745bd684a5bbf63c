"""The library, through its public interface."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from itertools import islice

import torch
from torch import Tensor
from torch._inductor.utils import fresh_inductor_cache

import bilevel as bl
from speed.work import Answer, Hypergradient, Lower, Work


def sgd(work: Work, steps: int) -> bl.optim.Torch:
    """The gradient descent on y of all contenders."""
    return bl.optim.Torch(torch.optim.SGD, lr=work.lr, momentum=work.momentum, max_steps=steps)


def implicit(work: Work, steps: int, rtol: float, products: int) -> bl.Implicit:
    """Exactly what `by_hand.implicit` does."""
    return bl.Implicit(
        bl.linear.CG(rtol=rtol, max_steps=products), minimizer=sgd(work, steps), tol=0.0
    )


def hypergradient(work: Work, method: bl.Estimator) -> Hypergradient:
    """By `bl.hypergradient`, which checks the problem at every call."""
    problem = work.problem

    def run(x: Tensor, y: Lower) -> Answer:
        found = bl.hypergradient(problem, x, y[0] if len(y) == 1 else y, method)
        count = found.evaluations
        at = (found.y,) if isinstance(found.y, Tensor) else tuple(found.y)
        return Answer(found.grad, at, count.gradients, count.hvp)

    return run


def compiled(work: Work, method: bl.Estimator) -> Hypergradient:
    """By one compiled graph, which the first call makes and `bl.hypergradient` finds with the problem."""
    run = hypergradient(work, method)
    cold = seconds_to_compile(lambda: run(work.x, work.y))
    return lambda x, y: replace(run(x, y), cold=cold)


def seconds_to_compile(first: Callable[[], object]) -> float:
    """By the clock, of a first call."""
    began = time.perf_counter()
    # Torch keeps what it compiled on disk, where the next run of the benchmarks would find it.
    with fresh_inductor_cache():
        first()
    return time.perf_counter() - began


def iterated(work: Work, solver: bl.Solver, steps: int) -> Answer:
    """`steps` upper steps by `bl.iterate`; x at the end."""
    *_, state = islice(bl.iterate(work.problem, solver, work.x, work.start), steps)
    return _answer(state)


def solved(work: Work, solver: bl.Solver, steps: int) -> Answer:
    """The same by `bl.solve`, which certifies the answer too."""
    return _answer(bl.solve(work.problem, solver, work.x, work.start, max_steps=steps, throw=False))


def _answer(found: bl.State | bl.Solution) -> Answer:
    y = (found.y,) if isinstance(found.y, Tensor) else tuple(found.y)
    return Answer(found.x, y, found.evaluations.gradients, found.evaluations.hvp)
