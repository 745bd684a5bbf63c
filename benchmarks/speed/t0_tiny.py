"""T0: steps a second where the arithmetic is nothing, on a quadratic of two variables."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from statistics import median

import torch
from page import table
from torch import Tensor

import bilevel as bl
from speed import by_hand, ours
from speed.entries import peer
from speed.race import (
    FLOOR,
    OURS,
    Contender,
    Result,
    Rules,
    Run,
    answers,
    cold,
    frozen,
    milliseconds,
    race,
    reason,
    rows,
    timed,
)
from speed.work import Answer, Hypergradient, Work, descend, relative_error

STEPS = 50  # upper steps of a measurement
LOWER_STEPS = 10
RTOL, PRODUCTS = 1e-10, 10  # of the linear system
CERTIFIED = "10 steps + CG, with the certificate of `solve`"
COMPILED = "10 steps + CG, compile=True"
UNROLLED_COMPILED = "unrolled, compile=True"
STEPWISE, AT_ONCE = "10 steps + CG, jit of a step", "10 steps + CG, jit of all steps"
MANY = (1, 10, 100, 1000)
LR = 0.1  # of the upper steps


def work() -> Work:
    """Lower curvature 1 and 2; ten steps leave a thousandth of the distance."""
    hessian = torch.tensor([[1.5, 0.5], [0.5, 1.5]], dtype=torch.float64)
    target = torch.tensor([1.0, 0.5], dtype=torch.float64)

    def upper(x: Tensor, y: Tensor) -> Tensor:
        return 0.5 * ((y - target) ** 2).sum() + 0.05 * (x**2).sum()

    def lower(x: Tensor, y: Tensor) -> Tensor:
        return 0.5 * y @ (hessian @ y) - y @ x

    zero = torch.zeros(2, dtype=torch.float64)
    data = hessian, target, torch.tensor(0.1, dtype=torch.float64)
    return Work(upper, lower, zero, (zero,), lr=0.5, family="Quadratic", data=data)


def contenders(task: Work) -> list[Contender]:
    def loop(make: Callable[[], Hypergradient]) -> Callable[[], Run]:
        def prepare() -> Run:
            return partial(descend, make(), task, STEPS, LR)

        return prepare

    def solver(estimator: bl.Estimator) -> bl.Solver:
        upper = bl.optim.Torch(torch.optim.SGD, lr=LR)
        return bl.HypergradientDescent(estimator, upper_optimizer=upper)

    def library(method: str, run: Callable[..., Answer], estimator: bl.Estimator) -> Contender:
        return Contender(OURS, method, lambda: partial(run, task, solver(estimator), STEPS))

    def other(name: str, method: str, *numbers: float) -> Callable[[], Run]:
        return loop(lambda: peer(name, method, task, *numbers))

    cg = LOWER_STEPS, RTOL, PRODUCTS
    exact, graph = ours.implicit(task, *cg), bl.Unrolled(LOWER_STEPS, lr=task.lr)
    return [
        Contender(FLOOR, "10 steps + CG", loop(lambda: by_hand.implicit(task, *cg))),
        Contender(FLOOR, "unrolled", loop(lambda: by_hand.unrolled(task, LOWER_STEPS))),
        library("10 steps + CG", ours.iterated, exact),
        library(CERTIFIED, ours.solved, exact),
        library("unrolled", ours.iterated, graph),
        Contender(OURS, COMPILED, loop(lambda: ours.compiled(task, replace(exact, compile=True)))),
        Contender(
            OURS, UNROLLED_COMPILED, loop(lambda: ours.compiled(task, replace(graph, compile=True)))
        ),
        Contender("TorchOpt", "10 steps + CG", other("TorchOpt", "implicit", *cg)),
        Contender("TorchOpt", "unrolled", other("TorchOpt", "unrolled", LOWER_STEPS)),
        # Without a stopping test, more products than variables divide by a residual of zero.
        Contender("Betty", "10 steps + CG", other("Betty", "implicit", LOWER_STEPS, 2)),
        Contender("Betty", "10 steps + Neumann", other("Betty", "neumann", LOWER_STEPS, PRODUCTS)),
        Contender("BOAT", "10 steps + CG", other("BOAT", "implicit", LOWER_STEPS, PRODUCTS)),
        Contender("BOAT", "unrolled", other("BOAT", "unrolled", LOWER_STEPS)),
        Contender("higher", "unrolled", other("higher", "unrolled", LOWER_STEPS)),
        Contender("JAX", STEPWISE, lambda: peer("JAX", "stepwise", task, LR, STEPS, *cg)),
        Contender("JAX", AT_ONCE, lambda: peer("JAX", "at_once", task, LR, STEPS, *cg)),
    ]


def tables(rules: Rules) -> str:
    results = race(contenders(work()), rules)
    same = answers(results)
    for method in (CERTIFIED, COMPILED, "10 steps + Neumann", STEPWISE, AT_ONCE):
        same[method] = same["10 steps + CG"]
    same[UNROLLED_COMPILED] = same["unrolled"]

    def extra(result: Result, answer: Answer) -> list[str]:
        twin = same[result.contender.method]
        rate = STEPS / median(result.seconds)
        return [f"{rate:.0f}", f"{relative_error(answer.value, twin.value):.0e}", cold(answer)]

    about = (
        f"{STEPS} upper steps of gradient descent, each with {LOWER_STEPS} lower steps from where the last one ended; "
        "`apart` is how far x at the end is from that of the same method by hand.\n\n"
    )
    columns = "steps a second", "apart", "s to compile"
    return about + rows(results, extra, columns) + "\n\n" + _many(rules)


def starts(count: int) -> Tensor:
    """x of as many problems, seeded; each has its y at zero."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, 2, dtype=torch.float64, generator=generator)


def at_once(count: int) -> tuple[Run, Run]:
    """The same steps for `count` problems, by one `solve_many` and by hand, one after the other."""
    task, x = work(), starts(count)
    y = torch.zeros(count, 2, dtype=torch.float64)
    numbers = LOWER_STEPS, RTOL, PRODUCTS
    upper = bl.optim.Torch(torch.optim.SGD, lr=LR)
    solver = bl.HypergradientDescent(
        ours.implicit(task, *numbers),
        upper_optimizer=upper,
        rtol=1e-12,  # none rests early: the floor takes all steps
    )
    by_one = by_hand.implicit(task, *numbers)

    def together() -> Answer:
        return Answer(bl.solve_many(task.problem, solver, x, y, max_steps=STEPS).x)

    def loop() -> Answer:
        runs = [descend(by_one, replace(task, x=one), STEPS, LR).value for one in x]
        return Answer(torch.stack(runs))

    return together, loop


def _many(rules: Rules) -> str:
    """Milliseconds a problem. The loop by hand takes as long for each, so that it is timed on one."""
    loop = at_once(1)[1]
    loop()
    lines, reasons = [], set[str]()
    for count in MANY:
        run = at_once(count)[0]
        run()
        in_jax = by_vmap(count) if rules.with_peers else ""
        if isinstance(in_jax, str):
            reasons.add(in_jax)
        floors, ours_, theirs = list[float](), list[float](), list[float]()
        with frozen():
            for _ in range(rules.repeats):
                floors.append(timed(loop, 1))
                ours_.append(timed(run, 1) / count)
                if not isinstance(in_jax, str):
                    theirs.append(timed(in_jax, 10) / count)
        faster = median(b / a for a, b in zip(ours_, floors, strict=True))
        cells = [milliseconds(median(times)) if times else "" for times in (ours_, floors, theirs)]
        lines.append([str(count), *cells, f"{faster:.3g}"])
    about = (
        "Many such problems at once, by `solve_many`, against a loop of the floor over them, and by `vmap` in JAX, "
        "where all steps are one program:\n\n"
    )
    head = ["problems", "ms a problem", "ms in the loop", "ms in JAX", "times faster"]
    return about + table(head, lines) + "".join(f"\n\nJAX: {why}" for why in reasons if why)


def by_vmap(count: int) -> Run | str:
    """The same in JAX, or why not."""
    try:
        run = peer("JAX", "many", work(), starts(count), LR, STEPS, LOWER_STEPS, RTOL, PRODUCTS)
        run()
    except Exception as error:  # noqa: BLE001  # as in a race
        return reason(error)
    return run
