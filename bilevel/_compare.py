"""Several methods on one problem at an equal budget."""

from __future__ import annotations

import importlib
import itertools
import math
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bilevel._certify import certify
from bilevel._errors import BilevelError, BilevelWarning, check_kind, check_number
from bilevel._iterate import iterate
from bilevel._memory import live_memory
from bilevel._oracle import Oracle
from bilevel._problem import BilevelProblem
from bilevel._solution import Evaluations, Status
from bilevel._types import Tree
from bilevel.solvers import Solver


@dataclass(frozen=True)
class Run:
    """What one method reached.

    Attributes:
        name: The method.
        upper: F(x, y) at its end; NaN where it did not run.
        gap: The value gap there, by `certify`.
        is_trusted: Whether the certificate trusts the answer.
        status: How it ended: RUNNING where the budget did, None where the method refused the problem.
        evaluations: Calls of the objectives.
        memory: Bytes of the tensors that its first two steps make, as many as live at a time.
        seconds: Wall-clock time.
        costs: Gradients and Hessian products spent after each step.
        values: F after each step.
        message: Why it ended.
    """

    name: str
    upper: float
    gap: float
    is_trusted: bool
    status: Status | None
    evaluations: Evaluations
    memory: int
    seconds: float
    costs: tuple[int, ...]
    values: tuple[float, ...]
    message: str


@dataclass(frozen=True)
class Comparison:
    """What several methods reached at an equal budget; prints as a table.

    Attributes:
        runs: One a method, in the order given.
        budget: What each was allowed, in words.
    """

    runs: tuple[Run, ...]
    budget: str

    def __str__(self) -> str:
        head = ["method", "F", "gap", "trusted", "gradients", "HVPs", "memory", "seconds", "ended"]
        rows = [head]
        for run in self.runs:
            ended = "refused" if run.status is None else run.status.name
            count = run.evaluations
            rows.append(
                [
                    run.name,
                    f"{run.upper:.6g}",
                    f"{run.gap:.2g}",
                    "yes" if run.is_trusted else "no",
                    str(count.gradients),
                    str(count.hvp),
                    _bytes(run.memory),
                    f"{run.seconds:.3g}",
                    "budget" if run.status is Status.RUNNING else ended,
                ]
            )
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) for row in rows]
        return "\n".join([*(line.rstrip() for line in lines), f"budget: {self.budget}"])

    def plot(self, path: str | Path) -> None:
        """Write a picture of F against the gradients and Hessian products spent.

        Args:
            path: The file; its ending chooses the format, e.g. `.png` or `.svg`.

        Raises:
            ImportError: matplotlib is not installed.
        """
        try:
            figures: Any = importlib.import_module("matplotlib.figure")
        except ImportError as error:
            raise ImportError(
                "`Comparison.plot` needs matplotlib. Got an environment without it. "
                "Install it: `pip install matplotlib`, or the extra `plot`."
            ) from error
        figure = figures.Figure(figsize=(6.4, 4.0), layout="constrained")
        axes = figure.subplots()
        for run in self.runs:
            if run.costs:
                axes.plot(run.costs, run.values, marker=".", label=run.name)
        axes.set_xlabel("gradients and Hessian products")
        axes.set_ylabel("F(x, y)")
        axes.set_xscale("log")
        axes.legend()
        figure.savefig(path)


def compare(
    problem: BilevelProblem,
    solvers: Mapping[str, Solver],
    x0: Tree,
    y0: Tree,
    *,
    budget: int | None = None,
    seconds: float | None = None,
) -> Comparison:
    """Run each solver on the full batch until it ends or its budget is spent, and certify what it reached.

    The budget is checked after each upper step, so that the last step may exceed it. A solver that refuses the
    problem, by an error in its first step or before, gets a row that says so; a later error goes out. F(x, y) of a
    method that has not solved the lower problem may lie below the optimum: look at the gap beside it.

    Args:
        problem: The problem.
        solvers: The solvers by the names of their rows.
        x0: Where the upper variable starts; not modified.
        y0: Where the lower variable starts; not modified.
        budget: Gradients and Hessian-vector products of F and f that each may spend, >= 1.
        seconds: Wall-clock time that each may spend, > 0.

    Returns:
        The comparison.

    Raises:
        ValueError: None or both of the budgets are given, one is out of its range, or there is no solver.
        TypeError: An argument is of the wrong kind.

    Example:
        >>> import torch, bilevel as bl
        >>> problem = bl.BilevelProblem(
        ...     upper=lambda x, y, data: ((y - 1.0) ** 2).sum() + 0.1 * (x**2).sum(),
        ...     lower=lambda x, y, data: ((y - 2.0 * x) ** 2).sum(),
        ... )
        >>> solvers = {"ASBLO": bl.ASBLO(), "implicit": bl.HypergradientDescent(bl.Implicit())}
        >>> x0, y0 = torch.zeros(1).double(), torch.zeros(1).double()
        >>> found = bl.compare(problem, solvers, x0, y0, budget=2000)
        >>> [round(run.upper, 4) for run in found.runs], [run.is_trusted for run in found.runs]
        ([0.0244, 0.0244], [True, True])
    """
    if (budget is None) == (seconds is None):
        raise ValueError(
            "`compare` needs one of budget and seconds. "
            f"Got {'neither' if budget is None else 'both'}. Pass e.g. budget=10_000."
        )
    for part, limit in (("budget", budget), ("seconds", seconds)):
        if limit is not None:
            check_number("compare", part, limit, "Pass e.g. budget=10_000.")
    check_kind(
        "compare(problem, ...)", problem, BilevelProblem, "Pass `BilevelProblem(upper, lower)`."
    )
    mend = 'Name the solvers in a dict, e.g. `{"ASBLO": ASBLO()}`.'
    check_kind("compare(solvers=...)", solvers, Mapping, mend)
    if not solvers:
        raise ValueError("`compare(solvers=...)` must hold a solver. Got none. Name at least one.")
    for name, solver in solvers.items():
        check_kind(f"compare(solvers={{{name!r}: ...}})'s name", name, str, mend)
        check_kind(f"compare(solvers={{{name!r}: ...}})", solver, Solver, "Pass e.g. `ASBLO()`.")
    words = f"{budget} gradients and HVPs" if budget is not None else f"{seconds} seconds"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", BilevelWarning)
        runs = [_run(problem, *pair, x0, y0, budget, seconds) for pair in solvers.items()]
    return Comparison(tuple(runs), f"{words} each")


def _run(
    problem: BilevelProblem,
    name: str,
    solver: Solver,
    x0: Tree,
    y0: Tree,
    budget: int | None,
    seconds: float | None,
) -> Run:
    costs: list[int] = []
    points: list[tuple[Tree, Tree]] = []
    started = time.perf_counter()
    try:
        states = iterate(problem, solver, x0, y0)
        first = next(states)
    except (BilevelError, ValueError) as error:
        nothing = Evaluations()
        return Run(
            name, math.nan, math.nan, False, None, nothing, 0, 0.0, (), (), str(error)
        )  # fmt: skip
    state = first
    for state in itertools.chain([first], states):  # an error from here on is no refusal
        count = state.evaluations
        costs.append(count.gradients + count.hvp)
        points.append((state.x, state.y))
        spent = time.perf_counter() - started
        if (budget is not None and costs[-1] >= budget) or (
            seconds is not None and spent >= seconds
        ):
            break
    elapsed = time.perf_counter() - started
    memory = live_memory(problem, solver, x0, y0)
    oracle = Oracle(problem)
    values = tuple(float(oracle.upper(x, y)) for x, y in points)
    certificate = certify(problem, state.x, state.y, pessimistic=solver.pessimistic)
    return Run(
        name=name,
        upper=values[-1],
        gap=certificate.value_gap,
        is_trusted=certificate.is_trusted,
        status=state.status,
        evaluations=state.evaluations,
        memory=memory,
        seconds=elapsed,
        costs=tuple(costs),
        values=values,
        message=state.message,
    )


def _bytes(count: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024.0:
            return f"{count:.4g} {unit}"
        count /= 1024.0
    return f"{count:.4g} GiB"
