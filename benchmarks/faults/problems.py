"""Problems that have no answer, starts that are none, data and objectives that are not what they should be."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import bilevel as bl
from benchmarks.faults.fault import Fault, Lost, expect, message_of

ONE, ZERO = torch.ones(1).double(), torch.zeros(1).double()


def upper(x: Tensor, y: Tensor, data: Any) -> Tensor:
    return ((y - 1.0) ** 2).sum() + 0.1 * (x**2).sum()


def lower(x: Tensor, y: Tensor, data: Any) -> Tensor:
    return ((y - 2.0 * x) ** 2).sum()


GOOD = bl.BilevelProblem(upper, lower)
ANSWER = 2.0 / 4.1
IMPLICIT = bl.HypergradientDescent(bl.Implicit())


def solved(problem: bl.BilevelProblem, solver: bl.Solver, x: Any = ZERO, y: Any = ZERO):
    return bl.solve(problem, solver, x, y, max_steps=500, throw=False)


def is_finite(*variables: Tensor) -> bool:
    return all(bool(torch.isfinite(v).all()) for v in variables)


def ends(
    problem: bl.BilevelProblem,
    promised: dict[str, tuple[bl.Solver, bl.Status]],
    x: Tensor,
    y: Tensor,
    _: Path,
) -> str:
    """Each solver ends in the status that is promised, with finite variables."""
    for name, (solver, status) in promised.items():
        solution = solved(problem, solver, x, y)
        expect(solution.status is status, f"{name}: {solution.status.name}, not {status.name}")
        expect(is_finite(solution.x, solution.y), f"{name}: variables that are not finite", Lost)
    return ", ".join(f"{name}: {status.name}" for name, (_, status) in promised.items())


def start_that_is_nan(_: Path) -> str:
    for name, solver in {"ASBLO": bl.ASBLO(), "Implicit": IMPLICIT, "F2SA": bl.F2SA()}.items():
        solution = solved(GOOD, solver, ONE * math.nan)
        expect(solution.status is bl.Status.NONFINITE, f"{name}: {solution.status.name}")
        expect(solution.steps == 0, f"{name} made {solution.steps} steps")
    return "NONFINITE before the first step"


def start_outside_of_f(_: Path) -> str:
    """The logarithm of a negative number."""
    problem = bl.BilevelProblem(upper, lambda x, y, data: lower(x, y, data) - y.log().sum())
    solution = solved(problem, bl.ASBLO(), ONE, -ONE)
    expect(solution.status is bl.Status.NONFINITE, solution.status.name)
    expect("f(x0, y0)" in solution.message, solution.message)
    expect(torch.equal(solution.y, -ONE), "other variables than the start", Lost)
    return "NONFINITE before the first step, and the message names f(x0, y0)"


def start_outside_of_the_barrier(_: Path) -> str:
    solution = solved(GOOD, bl.ASBLO(first_stage=6), ONE, 1e4 * ONE)
    expect(solution.status is bl.Status.CONVERGED, solution.status.name)
    expect(abs(solution.x.item() - ANSWER) < 1e-4, f"x = {solution.x.item()}")
    return "y is brought inside by descending f; CONVERGED to the answer in closed form"


def start_outside_of_the_constraints(_: Path) -> str:
    problem = bl.BilevelProblem(upper, lower, upper_constraint=lambda x, y, data: 1.0 - x)
    solution = solved(problem, bl.ASBLO(), -5.0 * ONE, ZERO)
    expect(solution.status is bl.Status.CONVERGED, solution.status.name)
    expect(abs(solution.x.item() - 1.0) < 1e-5, f"x = {solution.x.item()}, not 1")
    return "CONVERGED to the border of the constraint, where the answer is"


def zero_gradients(_: Path) -> str:
    """At a start where every gradient is zero there is nothing to do, and where F is flat nothing to choose."""
    solution = solved(GOOD, bl.ASBLO(), ANSWER * ONE, 2.0 * ANSWER * ONE)
    expect(solution.status is bl.Status.CONVERGED, f"at the answer: {solution.status.name}")
    flat = bl.BilevelProblem(lambda x, y, data: 0.0 * (x.sum() + y.sum()) + 1.0, lower)
    for name, solver in {"ASBLO": bl.ASBLO(), "Implicit": IMPLICIT}.items():
        solution = solved(flat, solver, ONE, ZERO)
        expect(not solution.status.is_failure, f"{name}: {solution.status.name}")
        expect(is_finite(solution.x, solution.y), f"{name}: not finite", Lost)
        expect(abs(solution.y.item() - 2.0 * solution.x.item()) < 1e-4, f"{name}: f is not solved")
    return "CONVERGED at the answer; a flat F ends well too, with the lower problem solved"


def singular(_: Path) -> str:
    """f does not see y[1]: the inverse Hessian does not exist, ASBLO needs none."""
    problem = bl.BilevelProblem(
        lambda x, y, data: 0.5 * (x - y[1]) ** 2 + 0.5 * (y[0] - 1.0) ** 2,
        lambda x, y, data: 0.5 * y[0] ** 2 - x * y[0],
    )
    x0, y0 = torch.tensor(3.0).double(), torch.tensor([0.0, 2.0]).double()
    estimate = bl.hypergradient(problem, x0, y0, bl.Implicit())
    expect(estimate.status is bl.Status.LINEAR_UNSOLVED, estimate.status.name)
    solution = solved(problem, bl.ASBLO(), x0, y0)
    expect(solution.status is bl.Status.CONVERGED, solution.status.name)
    expect(abs(solution.x.item() - 1.0) < 1e-4, f"x = {solution.x.item()}")
    return "Implicit: LINEAR_UNSOLVED; ASBLO: CONVERGED to the answer in closed form"


def indefinite(_: Path) -> str:
    """y = 0 is a saddle of f, where its gradient is zero and its Hessian is not positive."""
    problem = bl.BilevelProblem(
        lambda x, y, data: ((y[0] - 1.0) ** 2) + (x**2).sum() + y[1] ** 2,
        lambda x, y, data: 0.25 * (y[0] ** 2 - 1.0) ** 2 + (y[1] - x.sum()) ** 2,
    )
    y0 = torch.zeros(2).double()
    for name, solver in {"ASBLO": bl.ASBLO(), "Implicit": IMPLICIT}.items():
        solution = solved(problem, solver, ONE, y0)
        on_minimum = abs(abs(solution.y[0].item()) - 1.0) < 1e-3
        expect(
            on_minimum or solution.status.is_failure,
            f"{name}: {solution.status.name} at y = {solution.y.tolist()}, a saddle of f",
        )
    return "no solver takes the saddle for a lower solution"


def autocast(_: Path) -> str:
    """F and f computed in bfloat16 by autocast, the variables in float32."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
    inputs = torch.randn(64, 4)
    targets = inputs.sum(1, keepdim=True).tanh()

    def loss(model: Any, data: Any) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return ((model(inputs) - targets) ** 2).mean()

    problem, x0, y0 = bl.from_module(net, lower=["2.*"], upper_loss=loss, lower_loss=loss)
    before = float(problem.upper(x0, y0, None))
    adam = bl.optim.Torch(torch.optim.Adam, lr=1e-2)
    asblo = bl.ASBLO(value_optimizer=adam, lower_optimizer=adam, upper_optimizer=adam)
    for name, solver in {"ASBLO": asblo, "F2SA": bl.F2SA(upper_optimizer=adam)}.items():
        state = list(bl.iterate(problem, solver, x0, y0, [None] * 100))[-1]
        leaves = [*state.x.values(), *state.y.values()]
        expect(is_finite(*leaves), f"{name}: variables that are not finite", Lost)
        expect(state.status is bl.Status.RUNNING, f"{name}: {state.status.name}")
        after = float(problem.upper(state.x, state.y, None))
        expect(after < 0.5 * before, f"{name}: F {after:.3g} after {before:.3g}")
        expect({leaf.dtype for leaf in leaves} == {torch.float32}, f"{name}: another dtype")
    return "100 steps more than halve F, the variables stay float32: ASBLO, F2SA"


def half_overflow(_: Path) -> str:
    """Products above 65,504 do not exist in float16."""

    def half(x: Tensor, y: Tensor, data: float) -> Tensor:
        with torch.autocast("cpu", torch.float16):
            return (data * (y - 1.0)) @ (data * (y - 1.0)) + 0.1 * x @ x

    problem = bl.BilevelProblem(half, lambda x, y, data: lower(x, y, None))
    x, y = torch.ones(2), 2.0 * torch.ones(2)
    states = list(bl.iterate(problem, bl.ASBLO(), x, y, [1.0, 1.0, 1.0, 300.0]))
    expect(states[-1].status is bl.Status.NONFINITE, states[-1].status.name)
    expect(torch.equal(states[-1].x, states[-2].x), "x moved", Lost)
    return "NONFINITE in that step, variables of the step before"


def inference(_: Path) -> str:
    """Gradients do not exist there, and torch.func returns zeros without a word."""
    with torch.inference_mode():
        name = message_of(
            bl.BilevelError, lambda: solved(GOOD, bl.ASBLO(), torch.ones(1)), "inference"
        )
    with torch.no_grad():
        solution = solved(GOOD, bl.ASBLO())
    expect(abs(solution.x.item() - ANSWER) < 1e-4, f"under no_grad x = {solution.x.item()}")
    return f"{name} that says so; under no_grad the answer is right"


def batch_error(data: Any, kind: type[Exception], word: str, _: Path) -> str:
    name = message_of(
        kind, lambda: list(bl.iterate(GOOD, bl.ASBLO(), ZERO, ZERO, data)), "Got", word
    )
    return f"{name} that says what to pass"


def mean_of_data(x: Tensor, y: Tensor, data: Any) -> Tensor:
    return ((y - x - data) ** 2).mean()


def empty_batch(_: Path) -> str:
    """The mean over no samples is NaN."""
    problem = bl.BilevelProblem(lambda x, y, d: mean_of_data(x, y, d) + (x**2).sum(), mean_of_data)
    stream = [torch.ones(4).double()] * 3 + [torch.ones(0).double()]
    states = list(bl.iterate(problem, bl.ASBLO(), ZERO, ZERO, stream))
    expect([s.status.name for s in states][-1] == "NONFINITE", states[-1].status.name)
    expect(torch.equal(states[-1].x, states[-2].x), "x moved", Lost)
    return "NONFINITE in that step, variables of the step before"


def batch_of_other_shape(folder: Path) -> str:
    """The objective's own error comes through, and the states before are on disk."""
    problem = bl.BilevelProblem(
        lambda x, y, d: ((y - x - d) ** 2).sum() + (x**2).sum(),
        lambda x, y, d: ((y - x - d) ** 2).sum(),
    )
    x, y = torch.zeros(2).double(), torch.zeros(2).double()
    stream = [torch.ones(2).double()] * 3 + [torch.ones(3).double()]
    checkpoint = bl.callbacks.Checkpoint(folder / "run", every=1)

    def run() -> None:
        for state in bl.iterate(problem, bl.ASBLO(), x, y, stream):
            checkpoint(state)

    name = message_of(RuntimeError, run, "size of tensor")
    state = checkpoint.newest()
    expect(state is not None and state.step == 3, "the state of step 3 is not on disk", Lost)
    return f"the objective's {name} comes through, the state of the step before is on disk"


def raising(folder: Path) -> str:
    """An objective that raises once, as a broken loader does; then the run goes on."""
    calls = {"until": math.inf}

    def unsteady(x: Tensor, y: Tensor, data: Any) -> Tensor:
        calls["until"] -= 1
        if calls["until"] < 0:
            raise OSError("the loader's worker was killed")
        return lower(x, y, data)

    problem = bl.BilevelProblem(upper, unsteady)
    checkpoint = bl.callbacks.Checkpoint(folder / "run", every=1)
    unharmed = list(islice(bl.iterate(problem, bl.ASBLO(), ZERO, ZERO, [None] * 9), 9))[-1]
    calls["until"] = 12
    start = partial(bl.solve, problem, bl.ASBLO(), ZERO, ZERO, [None] * 9, max_steps=9)
    message_of(OSError, lambda: start(callback=checkpoint), "worker was killed")
    calls["until"] = math.inf
    state = checkpoint.newest()
    expect(state is not None, "no state on disk", Lost)
    rest = [None] * (9 - state.step)
    last = list(bl.iterate(problem, bl.ASBLO(), batches=rest, state=state))[-1]
    expect(torch.equal(last.x, unharmed.x), "another end than that of the unharmed run", Lost)
    return (
        "its error comes through; from the checkpoint the run ends as the unharmed one, bit for bit"
    )


def returns(value: Callable[[Tensor], Any], word: str, _: Path) -> str:
    problem = bl.BilevelProblem(lambda x, y, data: value(y), lower)
    name = message_of(bl.ObjectiveError, lambda: solved(problem, bl.ASBLO()), "must", word)
    return f"{name} before the first step"


ASBLO, LOWER, UPPER = bl.ASBLO(), bl.Status.LOWER_UNBOUNDED, bl.Status.UPPER_UNBOUNDED
BOTTOMLESS = bl.BilevelProblem(upper, lambda x, y, data: -((y - x) ** 2).sum())
SLIDE = bl.BilevelProblem(lambda x, y, data: y.sum(), lower)
NOWHERE = bl.BilevelProblem(upper, lower, upper_constraint=lambda x, y, data: 1.0 + x**2)

FAULTS = [
    Fault("the start is NaN", "x0 is NaN", start_that_is_nan),
    Fault("the start is outside of f's domain", "f holds log y, y0 = -1", start_outside_of_f),
    Fault(
        "the start is outside of the barrier",
        "y0 = 10,000 and the slack of the seventh stage",
        start_outside_of_the_barrier,
    ),
    Fault("the start is infeasible", "x0 = -5 under x >= 1", start_outside_of_the_constraints),
    Fault(
        "no point is feasible",
        "H = 1 + x^2",
        partial(ends, NOWHERE, {"ASBLO": (ASBLO, bl.Status.INFEASIBLE)}, ONE, ONE),
    ),
    Fault(
        "the lower problem is unbounded",
        "f = -|y - x|^2",
        partial(
            ends,
            BOTTOMLESS,
            {"ASBLO": (ASBLO, LOWER), "Implicit": (IMPLICIT, LOWER)}
            | {type(s).__name__: (s, LOWER) for s in (bl.F2SA(), bl.BOME(), bl.SOBA())},
            ONE,
            ZERO,
        ),
    ),
    Fault(
        "the upper problem is unbounded",
        "F = y, y = 2 x",
        partial(
            ends,
            SLIDE,
            {"ASBLO": (ASBLO, UPPER), "Implicit": (IMPLICIT, UPPER)},
            ONE,
            ZERO,
        ),
    ),
    Fault("the lower Hessian is singular", "f does not see y[1]", singular),
    Fault("the lower Hessian is indefinite", "y0 is a saddle of f", indefinite),
    Fault("all gradients are zero", "the start is the answer; F is flat", zero_gradients),
    Fault("the objectives are computed in bfloat16", "torch.autocast in F and f", autocast),
    Fault("a value does not fit float16", "F = 180,000 under autocast in step 4", half_overflow),
    Fault("gradients are switched off", "torch.inference_mode and torch.no_grad", inference),
    Fault("there are no batches", "batches=[]", partial(batch_error, [], ValueError, "Got none")),
    Fault(
        "one batch in the place of many",
        "batches is a tensor",
        partial(batch_error, ONE, TypeError, "one Tensor"),
    ),
    Fault("the batches are a number", "batches=3", partial(batch_error, 3, TypeError, "one int")),
    Fault("an empty batch", "a mean over no samples in step 4", empty_batch),
    Fault("a batch of another shape", "three entries for two in step 4", batch_of_other_shape),
    Fault("an objective raises", "OSError at a call in the middle of a step", raising),
    Fault(
        "an objective returns a vector",
        "F = y of two entries",
        partial(returns, lambda y: torch.cat([y, y]), "scalar"),
    ),
    Fault("an objective returns a number", "F = 1.0", partial(returns, lambda y: 1.0, "float")),
]
