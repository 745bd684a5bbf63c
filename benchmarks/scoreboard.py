"""Solves a folder of published test problems with every solver at its defaults, and writes what was solved.

    make scoreboard        or        python benchmarks/scoreboard.py FOLDER [--methods ASBLO ...] [--only NAME ...]

FOLDER holds a `load.py` whose `load()` returns problems by name, in the package's convention, with the best known
value `F_ref`. Each solve runs in a process of its own, on one core, and is killed at the time limit.

A problem is solved where F is within 1 % of max(1, |F_ref|) of the reference or better, y is a lower solution
(value gap below 1e-3 of max(1, |f|), against SLSQP from many starts), and no constraint is violated by more than 1e-6.
The table goes to docs/scoreboard.md, every outcome to docs/scoreboard.json; neither is written for a part of the run.
"""

from __future__ import annotations

import importlib.util
import json
import math
import multiprocessing
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from page import DOCS, table, write
from scipy.optimize import minimize
from torch import Tensor

import bilevel as bl

F_TOL, GAP_TOL, VIOLATION_TOL = 1e-2, 1e-3, 1e-6
MAX_STEPS = 1000
STARTS = 12  # random ones of the lower problem, where the value gap is measured
METHODS: dict[str, Callable[[], bl.Solver]] = {
    "ASBLO": bl.ASBLO,
    "Implicit": lambda: bl.HypergradientDescent(bl.Implicit()),
    "ImplicitKKT": lambda: bl.HypergradientDescent(bl.ImplicitKKT()),
    "Unrolled": lambda: bl.HypergradientDescent(bl.Unrolled(100, lr=0.1)),
    "VPBGD": bl.VPBGD,
    "F2SA": bl.F2SA,
    "BOME": bl.BOME,
    "MEHA": bl.MEHA,
}


@dataclass(frozen=True)
class Arguments:
    """Solves a folder of test problems with every solver.

    Attributes:
        folder: holds the problems' load.py.
        methods: names of solvers.
        only: names of problems; all if none is given.
        suite: of problems; both if not given.
        limit: seconds a solve may take.
        jobs: solves at a time.
    """

    folder: tyro.conf.Positional[Path]
    methods: tuple[str, ...] = tuple(METHODS)
    only: tuple[str, ...] = ()
    suite: str | None = None
    limit: float = 60.0
    jobs: int = 1


@dataclass(frozen=True)
class Outcome:
    """One problem, one method."""

    problem: str
    suite: str
    lower_class: str
    method: str
    solved: bool
    reason: str  # why not
    upper: float | None
    reference: float
    value_gap: float | None
    violation: float | None
    status: str
    gradients: int
    hvps: int
    seconds: float


def load(folder: Path) -> dict[str, Any]:
    """The problems by name."""
    path = folder / "load.py"
    if not path.is_file():
        raise SystemExit(f"`FOLDER` must hold a load.py. Got {folder}, which has none.")
    sys.path.insert(0, str(folder))
    spec = importlib.util.spec_from_file_location("load", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["load"] = module  # its dataclasses look themselves up
    spec.loader.exec_module(module)
    return module.load()


def stated(case: Any) -> bl.BilevelProblem:
    return bl.BilevelProblem(
        case.upper,
        case.lower,
        upper_constraint=case.upper_constraint,
        lower_constraint=case.lower_constraint,
    )


def violation(constraint: Any, x: Tensor, y: Tensor) -> float:
    return 0.0 if constraint is None else max(0.0, float(constraint(x, y, None).max()))


def lowest(case: Any, x: Tensor, y: Tensor) -> float:
    """The smallest f(x, .) that SLSQP finds from `y`, the start, the reference and points around y."""

    def fun(v: np.ndarray) -> tuple[float, np.ndarray]:
        leaf = torch.tensor(v, requires_grad=True)
        value = case.lower(x, leaf, None)
        (grad,) = torch.autograd.grad(value, leaf)
        return float(value), grad.numpy()

    def slack(v: np.ndarray) -> np.ndarray:
        return -case.lower_constraint(x, torch.tensor(v), None).numpy()

    def slope(v: np.ndarray) -> np.ndarray:
        jacobian = torch.func.jacrev(lambda u: case.lower_constraint(x, u, None))
        return -jacobian(torch.tensor(v)).numpy()

    constraint = [{"type": "ineq", "fun": slack, "jac": slope}] if case.lower_constraint else []
    center = y.numpy()
    noise = np.random.default_rng(0).standard_normal((STARTS, center.size))
    starts = [center, case.y0.numpy(), *(center + (np.abs(center).max() + 1.0) * noise)]
    starts += [np.array(case.y_ref)] if case.y_ref else []
    best = math.inf
    for start in starts:
        found = minimize(
            fun,
            start,
            jac=True,
            method="SLSQP",
            constraints=constraint,
            options={"maxiter": 300, "ftol": 1e-12},
        )
        finite = math.isfinite(found.fun) and np.isfinite(found.x).all()
        if finite and violation(case.lower_constraint, x, torch.tensor(found.x)) <= 1e-7:
            best = min(best, found.fun)
    return best


def judge(case: Any, method: str, solution: bl.Solution) -> Outcome:
    x, y = solution.x, solution.y
    upper, lower = float(case.upper(x, y, None)), float(case.lower(x, y, None))
    worst = max(violation(c, x, y) for c in (case.upper_constraint, case.lower_constraint))
    gap = max(0.0, lower - lowest(case, x, y)) if math.isfinite(lower) else math.inf
    reasons: list[str] = []
    if not upper <= case.F_ref + F_TOL * max(1.0, abs(case.F_ref)):
        reasons.append(f"F is {upper:.4g}, not {case.F_ref:.4g}")
    if not gap <= GAP_TOL * max(1.0, abs(lower)):
        reasons.append(f"value gap {gap:.1e}")
    if not worst <= VIOLATION_TOL:
        reasons.append(f"violation {worst:.1e}")
    return Outcome(
        problem=case.name,
        suite=case.suite,
        lower_class=case.lower_class,
        method=method,
        solved=not reasons,
        reason="; ".join(reasons),
        upper=upper if math.isfinite(upper) else None,
        reference=case.F_ref,
        value_gap=gap if math.isfinite(gap) else None,
        violation=worst if math.isfinite(worst) else None,
        status=solution.status.name,
        gradients=solution.evaluations.gradients,
        hvps=solution.evaluations.hvp,
        seconds=round(solution.seconds, 3),
    )


def unsolved(case: Any, method: str, status: str, reason: str, seconds: float) -> Outcome:
    return Outcome(
        problem=case.name,
        suite=case.suite,
        lower_class=case.lower_class,
        method=method,
        solved=False,
        reason=reason,
        upper=None,
        reference=case.F_ref,
        value_gap=None,
        violation=None,
        status=status,
        gradients=0,
        hvps=0,
        seconds=seconds,
    )


def work(case: Any, method: str, pipe: Any):
    """What the process of one solve does: solve, say so, judge."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    problem, solver = stated(case), METHODS[method]()
    try:
        solution = bl.solve(problem, solver, case.x0, case.y0, max_steps=MAX_STEPS, throw=False)
        pipe.send("solved")
        outcome = judge(case, method, solution)
    except ValueError as error:  # a constraint that the method does not take
        outcome = unsolved(case, method, "REFUSED", str(error).split(". ")[0], 0.0)
    except (RuntimeError, bl.BilevelError, ArithmeticError) as error:
        outcome = unsolved(case, method, "ERROR", f"{type(error).__name__}: {error}", 0.0)
    pipe.send(outcome)


def run(case: Any, method: str, limit: float) -> Outcome:
    """One solve in a process of its own; the limit is for the solve, not for judging it."""
    context = multiprocessing.get_context("fork")
    mine, theirs = context.Pipe(duplex=False)
    process = context.Process(target=work, args=(case, method, theirs), daemon=True)
    started = time.perf_counter()
    process.start()
    theirs.close()
    try:
        if not mine.poll(limit):
            return unsolved(case, method, "TIMEOUT", f"took longer than {limit:g} s", limit)
        found = mine.recv()
        return mine.recv() if found == "solved" else found
    except EOFError:
        return unsolved(case, method, "DIED", "the process died", time.perf_counter() - started)
    finally:
        process.kill()
        process.join()


def row(outcomes: list[Outcome]) -> list[str]:
    tried = [o for o in outcomes if o.status != "REFUSED"]
    solved = sum(o.solved for o in outcomes)
    seconds = [o.seconds for o in tried] or [0.0]
    return [
        outcomes[0].method,
        f"{solved} of {len(outcomes)}",
        f"{solved / len(outcomes):.0%}",
        f"{len(outcomes) - len(tried)}",
        f"{statistics.median(seconds):.1f}",
        f"{max(seconds):.1f}",
        f"{statistics.median([o.gradients for o in tried] or [0]):.0f}",
    ]


def report(outcomes: list[Outcome]) -> str:
    """The tables by suite, and what ASBLO did not solve."""
    head = ["method", "solved", "", "refused", "median s", "longest s", "median gradients"]
    parts: list[str] = []
    for suite in dict.fromkeys(o.suite for o in outcomes):
        of_suite = [o for o in outcomes if o.suite == suite]
        methods = dict.fromkeys(o.method for o in of_suite)
        rows = [row([o for o in of_suite if o.method == method]) for method in methods]
        parts.append(f"### The {suite} problems\n\n{table(head, rows)}")
    missed = [o for o in outcomes if o.method == "ASBLO" and not o.solved]
    if missed:
        rows = [[o.problem, o.suite, o.lower_class, o.status, o.reason] for o in missed]
        head = ["problem", "suite", "lower level", "status", "why not"]
        parts.append(f"### What ASBLO does not solve\n\n{table(head, rows)}")
    return "\n\n".join(parts)


def main(a: Arguments):
    torch.set_num_threads(1)
    cases = [
        case
        for case in load(a.folder).values()
        if (not a.only or case.name in a.only) and a.suite in (None, case.suite)
    ]
    pairs = [(case, method) for method in a.methods for case in cases]
    outcomes: list[Outcome] = []
    with ThreadPoolExecutor(a.jobs) as pool:
        for o in pool.map(lambda pair: run(*pair, a.limit), pairs):
            outcomes.append(o)
            verdict = "solved" if o.solved else o.reason
            print(f"{o.method:12} {o.problem:30} {o.seconds:6.1f} s  {verdict[:100]}", flush=True)
    text = report(outcomes)
    print("\n" + text)
    if a.only or a.suite or set(a.methods) != set(METHODS):
        return
    today = datetime.now(UTC).date().isoformat()
    result = {"date": today, "limit": a.limit, "outcomes": [asdict(o) for o in outcomes]}
    (DOCS / "scoreboard.json").write_text(json.dumps(result, indent=1) + "\n")
    write(DOCS / "scoreboard.md", f"Measured on {today}.\n\n{text}")


if __name__ == "__main__":
    main(tyro.cli(Arguments))
