"""T4: seconds and memory of a hypergradient through 10, 50 and 100 steps of a network of a million parameters."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

import bilevel as bl
from speed import by_hand, ours
from speed.entries import peer
from speed.race import FLOOR, OURS, Contender, Result, Rules, answers, cold, mebibytes, race, rows
from speed.work import Answer, Hypergradient, Work, relative_error

WIDTHS = (64, 968, 968, 10)  # 1,010,602 parameters
SAMPLES = 32  # on each level
STEPS = (10, 50, 100)
ALL = 2**40  # bytes: room for the graphs of all steps
COMPILED = 10  # steps up to which torch compiles, whose graph grows with each, and JAX takes part


def work() -> Work:
    """Each training sample has a weight, sigmoid(x_i); random data, since only the cost counts."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    def labels() -> Tensor:
        return torch.randint(WIDTHS[-1], (SAMPLES,), generator=generator)

    X, of_X, V, of_V = normal(SAMPLES, WIDTHS[0]), labels(), normal(SAMPLES, WIDTHS[0]), labels()

    def network(samples: Tensor, *y: Tensor) -> Tensor:
        for weight, bias in zip(y[:-2:2], y[1:-2:2], strict=True):
            samples = torch.tanh(torch.addmm(bias, samples, weight))
        return torch.addmm(y[-1], samples, y[-2])

    def upper(x: Tensor, *y: Tensor) -> Tensor:
        return cross_entropy(network(V, *y), of_V)

    def lower(x: Tensor, *y: Tensor) -> Tensor:
        losses = cross_entropy(network(X, *y), of_X, reduction="none")
        return (torch.sigmoid(x) * losses).mean()

    y: list[Tensor] = []
    for fan_in, fan_out in pairwise(WIDTHS):
        y += [normal(fan_in, fan_out) / fan_in**0.5, torch.zeros(fan_out)]
    data = X, of_X, V, of_V, torch.zeros(())
    x = torch.zeros(SAMPLES)
    return Work(upper, lower, x, tuple(y), lr=0.05, family="Classifier", data=data)


def contenders(task: Work, steps: int) -> list[Contender]:
    def contender(library: str, method: str, make: partial[Hypergradient]) -> Contender:
        return Contender(library, method, lambda: partial(make(), task.x, task.y))

    estimator = bl.Unrolled(steps, lr=task.lr)

    def graphs(memory: int) -> partial[Hypergradient]:
        return partial(ours.hypergradient, task, replace(estimator, graph_memory=memory))

    compiled = partial(ours.compiled, task, replace(estimator, compile=True))
    in_one_graph = contender(OURS, "unrolled, compile=True", compiled)
    lean = contender(OURS, "unrolled, recomputed, graph_memory=0", graphs(0))
    in_jax = contender("JAX", "unrolled", partial(peer, "JAX", "unrolled", task, steps))
    return [
        contender(FLOOR, "unrolled", partial(by_hand.unrolled, task, steps)),
        contender(FLOOR, "unrolled, recomputed", partial(by_hand.recomputed, task, steps)),
        contender(OURS, "unrolled", graphs(ALL)),
        contender(OURS, "unrolled, recomputed", graphs(estimator.graph_memory)),
        *([lean] if steps == max(STEPS) else []),
        *([in_one_graph] if steps <= COMPILED else []),
        contender("TorchOpt", "unrolled", partial(peer, "TorchOpt", "unrolled", task, steps)),
        contender("BOAT", "unrolled", partial(peer, "BOAT", "unrolled", task, steps)),
        contender("higher", "unrolled", partial(peer, "higher", "unrolled", task, steps)),
        *([in_jax] if steps <= COMPILED else []),
    ]


def tables(rules: Rules) -> str:
    task = work()
    parts = []
    for steps in STEPS:
        results = race(contenders(task, steps), rules)
        truth = answers(results)["unrolled"].value

        def extra(result: Result, answer: Answer, truth: Tensor = truth) -> list[str]:
            apart = relative_error(answer.value, truth)
            # Inside of a graph memory cannot be counted.
            memory = mebibytes(result) if answer.cold is None else ""
            return [memory, f"{apart:.0e}", cold(answer)]

        columns = "MiB", "apart", "s to compile"
        parts.append(f"{steps} lower steps\n\n" + rows(results, extra, columns))
    about = (
        f"{sum(y.numel() for y in task.y):,} parameters, {SAMPLES} samples on each level, float32. "
        "`apart`: from the first row. Keeping the whole graph is faster, computing it twice is leaner: "
        "`Unrolled(graph_memory=...)` says how much of it is kept: all in the first row of the library, in the second "
        "64 MiB, the default, which is all of 10 steps.\n\n"
    )
    return about + "\n\n".join(parts)
