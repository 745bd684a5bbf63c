"""Numbers that break at a chosen step of a run: NaN, infinities, a spike, an optimizer that overflows."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import bilevel as bl
from benchmarks.faults.fault import Fault, Lost, expect

X0, Y0 = torch.tensor([0.7, 0.3]).double(), torch.tensor([0.1, -0.4]).double()
GOOD_STEPS = 3
SPIKE_STEPS = 600
WITH_HESSIANS = ("Implicit", "Unrolled", "SOBA", "AmIGO", "StocBiO")


class Spoiled:
    """A problem with a known answer, one of whose objectives can be spoiled between two steps."""

    def __init__(self) -> None:
        self.level, self.kind = "", ""
        self.problem = bl.BilevelProblem(self._upper, self._lower)

    def _upper(self, x: Tensor, y: Tensor, data: Any) -> Tensor:
        shift = 0.0 if data is None else data
        return self._spoil("upper", ((y - 1.0 - shift) ** 2).sum() + 0.1 * (x**2).sum(), x, y)

    def _lower(self, x: Tensor, y: Tensor, data: Any) -> Tensor:
        shift = 0.0 if data is None else data
        value = ((y - 2.0 * x - shift) ** 2).sum() + 0.05 * (y**4).sum()
        return self._spoil("lower", value, x, y)

    def _spoil(self, level: str, value: Tensor, x: Tensor, y: Tensor) -> Tensor:
        if level != self.level:
            return value
        still = [v - v.detach() for v in (x, y)]  # zero, with a derivative
        if self.kind == "gradient":  # that of a root at zero: 0 / 0
            return value + sum((v**2).sum().sqrt() for v in still)
        if self.kind == "second":  # |v|^1.5 has a slope at zero, and no curvature
            return value + sum(v.abs().pow(1.5).sum() for v in still)
        change = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}
        return value * 1e10 if self.kind == "spike" else value + change[self.kind]


def adam(**options: Any) -> bl.optim.Torch:
    return bl.optim.Torch(torch.optim.Adam, lr=1e-2, **options)


def on_batches() -> dict[str, bl.Solver]:
    descent = partial(bl.HypergradientDescent, upper_optimizer=adam())
    return {
        "ASBLO": bl.ASBLO(),
        "Implicit": descent(bl.Implicit()),
        "Unrolled": descent(bl.Unrolled(max_steps=30, lr=0.2)),
        "F2SA": bl.F2SA(),
        "SOBA": bl.SOBA(),
        "BOME": bl.BOME(),
        "MEHA": bl.MEHA(),
        "VPBGD": bl.VPBGD(),
        "AmIGO": bl.AmIGO(),
        "StocBiO": bl.StocBiO(),
    }


def full_batch() -> dict[str, bl.Solver]:
    return {"ASBLO": bl.ASBLO(), "F2SA": bl.F2SA(), "SOBA": bl.SOBA()}


def batches() -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(0)
    while True:
        yield 0.01 * torch.randn(2, generator=generator).double()


def started(
    solver: bl.Solver, spoiled: Spoiled, level: str, kind: str, data: Any = None
) -> tuple[Iterator[bl.State], bl.State]:
    """A run that is spoiled from now on, and its state after the good steps."""
    states = bl.iterate(spoiled.problem, solver, X0, Y0, data)
    before = list(islice(states, GOOD_STEPS))[-1]
    spoiled.level, spoiled.kind = level, kind
    return states, before


def same(first: bl.State, second: bl.State) -> bool:
    return torch.equal(first.x, second.x) and torch.equal(first.y, second.y)


def breaks(level: str, kind: str, solvers: dict[str, bl.Solver], data: Any, _: Path) -> str:
    """Each solver ends in the step after the spoiling, with the variables from before."""
    for name, solver in solvers.items():
        spoiled = Spoiled()
        states, before = started(solver, spoiled, level, kind, data() if data else None)
        state = next(states)
        expect(state.status is bl.Status.NONFINITE, f"{name}: {state.status.name}")
        expect(same(state, before), f"{name}: other variables than those before the fault", Lost)
    return f"NONFINITE in that step, variables of the step before: {', '.join(solvers)}"


def without_second_derivatives(_: Path) -> str:
    """First-order methods do not notice that there is no curvature."""
    solvers = {name: s for name, s in on_batches().items() if name not in WITH_HESSIANS}
    for name, solver in solvers.items():
        pair = []
        for kind in ("", "second"):
            spoiled = Spoiled()
            states, _before = started(solver, spoiled, "lower" if kind else "", kind, batches())
            pair.append(next(states))
        expect(same(*pair), f"{name}: another step than without the fault")
    return f"the same steps, for none is asked for: {', '.join(solvers)}"


def newton_without_curvature(_: Path) -> str:
    spoiled = Spoiled()
    states, _before = started(bl.ASBLO(), spoiled, "lower", "second")
    state = next(states)
    spoiled.kind = "nan" if state.status.is_failure else ""
    spoiled.level = ""
    last = list(states)[-1]
    expected = bl.solve(spoiled.problem, bl.ASBLO(), X0, Y0, max_steps=500)
    expect(last.status is bl.Status.CONVERGED, last.status.name)
    expect(torch.allclose(last.x, expected.x, atol=1e-4), f"another answer: {last.x.tolist()}")
    return "the step is made without it; CONVERGED to the answer of the unharmed run"


def line_search(kind: str, _: Path) -> str:
    """A transient fault costs a step of the line search, no more."""
    spoiled = Spoiled()
    solver = bl.HypergradientDescent(bl.Implicit())
    states, before = started(solver, spoiled, "upper", kind)
    during = next(states)
    expect(same(during, before), "x moved to where F is not finite", Lost)
    spoiled.level = ""
    last = list(states)[-1]
    expected = bl.solve(spoiled.problem, solver, X0, Y0, max_steps=500)
    expect(last.status is bl.Status.CONVERGED, last.status.name)
    expect(torch.allclose(last.x, expected.x, atol=1e-6), "another answer")
    expect(last.recoveries > 0, "recoveries are not counted")
    return (
        f"every trial point is rejected, {last.recoveries} recoveries; CONVERGED to the same answer"
    )


def line_search_for_good(_: Path) -> str:
    spoiled = Spoiled()
    states, before = started(bl.HypergradientDescent(bl.Implicit()), spoiled, "upper", "nan")
    last = list(states)[-1]
    expect(last.status is bl.Status.NONFINITE, last.status.name)
    expect(same(last, before), "other variables than those before the fault", Lost)
    return f"NONFINITE {last.step - before.step + 1} steps later, variables of the last good step"


def beyond_the_domain(_: Path) -> str:
    problem = bl.BilevelProblem(
        lambda x, y, data: (y.log() + 0.1 / y).sum(), lambda x, y, data: ((y - x) ** 2).sum()
    )
    start = torch.tensor([3.0]).double()
    solution = bl.solve(
        problem, bl.HypergradientDescent(bl.Implicit()), start, start, max_steps=100
    )
    expect(solution.status is bl.Status.CONVERGED, solution.status.name)
    expect(abs(solution.x.item() - 0.1) < 1e-6, f"x = {solution.x.item()}, not 0.1")
    expect(solution.recoveries > 0, "recoveries are not counted")
    return f"CONVERGED to the answer in closed form, {solution.recoveries} recoveries"


def goes_on(_: Path) -> str:
    """The failed state is the one before, so that the run goes on once the batch is mended."""
    for name, solver in on_batches().items():
        stream, spoiled = list(islice(batches(), 6)), Spoiled()
        unharmed = list(bl.iterate(spoiled.problem, solver, X0, Y0, stream))[-1]
        states, _before = started(solver, spoiled, "upper", "nan", stream)
        failed = next(states)
        spoiled.level = ""
        state = replace(failed, status=bl.Status.RUNNING, message="")
        rest = stream[GOOD_STEPS:]
        last = list(bl.iterate(spoiled.problem, solver, batches=rest, state=state))[-1]
        expect(same(last, unharmed), f"{name}: another end than that of the unharmed run", Lost)
    return "from the failed state, with the batch mended, the end of the unharmed run bit for bit"


def spike(max_norm: float | None, _: Path) -> str:
    """One batch with values of 1e10."""
    optimizer = adam(max_norm=max_norm) if max_norm else adam()
    parts = {f"{part}_optimizer": optimizer for part in ("upper", "lower", "value")}
    solvers = {"ASBLO": bl.ASBLO(**parts), "BOME": bl.BOME(**parts)}
    for name, solver in solvers.items():
        ends = []
        for kind in ("", "spike"):
            spoiled = Spoiled()
            states, _before = started(solver, spoiled, "upper" if kind else "", kind, batches())
            hit = next(states)
            expect(hit.status is bl.Status.RUNNING, f"{name}: {hit.status.name}")
            spoiled.level = ""
            ends.append(list(islice(states, SPIKE_STEPS))[-1])
        expect(ends[1].status is bl.Status.RUNNING, f"{name}: {ends[1].status.name}")
        finite = bool(torch.isfinite(torch.cat([ends[1].x, ends[1].y])).all())
        expect(finite, f"{name}: variables that are not finite", Lost)
        apart = float((ends[1].x - ends[0].x).norm() / ends[0].x.norm())
        if max_norm:
            expect(apart < 0.1, f"{name}: {apart:.2g} from the unharmed run")
    if max_norm:
        names = ", ".join(solvers)
        return (
            f"the run goes on, after {SPIKE_STEPS} steps within 10 % of the unharmed one: {names}"
        )
    return "all stays finite and the run goes on, but Adam's second moment keeps it slow: use `max_norm`"


def overflow(_: Path) -> str:
    """An optimizer's step that leaves the floating-point numbers."""
    far = bl.optim.Torch(torch.optim.Adam, lr=1e308)
    far_y = bl.optim.Torch(torch.optim.SGD, lr=1e308)
    solvers = {
        "ASBLO": bl.ASBLO(upper_optimizer=far),
        "ASBLO's z": bl.ASBLO(value_optimizer=far_y),
        "Implicit": bl.HypergradientDescent(bl.Implicit(), upper_optimizer=far),
        "F2SA": bl.F2SA(upper_optimizer=far_y),
        "SOBA": bl.SOBA(upper_optimizer=far_y),
    }
    for name, solver in solvers.items():
        state = list(bl.iterate(Spoiled().problem, solver, X0, Y0, [torch.zeros(2)] * 3))[-1]
        expect(state.status is bl.Status.NONFINITE, f"{name}: {state.status.name}")
        finite = bool(torch.isfinite(torch.cat([state.x, state.y])).all())
        expect(finite, f"{name}: variables that are not finite", Lost)
    return f"NONFINITE, variables of the last finite step: {', '.join(solvers)}"


def _broken(level: str, kind: str, what: str) -> list[Fault]:
    on = {n: s for n, s in on_batches().items() if kind != "second" or n in WITH_HESSIANS}
    of = {n: s for n, s in full_batch().items() if kind != "second" or n == "SOBA"}
    how = "the objective returns it from step 4 on"
    return [
        Fault(f"{what}, on batches", how, partial(breaks, level, kind, on, batches)),
        Fault(f"{what}, on the full batch", how, partial(breaks, level, kind, of, None)),
    ]


FAULTS = [
    *_broken("upper", "nan", "F is NaN"),
    *_broken("upper", "inf", "F is infinite, its gradient is not"),
    *_broken("upper", "-inf", "F is minus infinity"),
    *_broken("upper", "gradient", "the gradient of F is NaN, F is not"),
    *_broken("lower", "nan", "f is NaN"),
    *_broken("lower", "inf", "f is infinite, its gradient is not"),
    *_broken("lower", "gradient", "the gradient of f is NaN, f is not"),
    *_broken("lower", "second", "Hessian-vector products of f are NaN, its gradient is not"),
    Fault(
        "the same, for methods of first order",
        "|v|^1.5 is added to f at v = 0 in step 4",
        without_second_derivatives,
    ),
    Fault(
        "the same, for ASBLO's Newton steps",
        "|v|^1.5 is added to f at v = 0 in step 4, full batch",
        newton_without_curvature,
    ),
    Fault("F is NaN in one line search", "for the whole of step 4", partial(line_search, "nan")),
    Fault(
        "F is infinite in one line search", "for the whole of step 4", partial(line_search, "inf")
    ),
    Fault("F is NaN for good, in a line search", "from step 4 on", line_search_for_good),
    Fault(
        "a trial step leaves the domain of F",
        "F = log y + 0.1 / y, from x = 3: the line search overshoots zero",
        beyond_the_domain,
    ),
    Fault("going on after NaN", "one batch of six is spoiled, then mended", goes_on),
    Fault(
        "a loss spike of 1e10 in one batch, `max_norm=1`",
        "F is multiplied by 1e10 in step 4",
        partial(spike, 1.0),
    ),
    Fault(
        "a loss spike of 1e10 in one batch, without `max_norm`",
        "F is multiplied by 1e10 in step 4",
        partial(spike, None),
    ),
    Fault("an optimizer's step overflows", "a learning rate of 1e308", overflow),
]
