"""Solves every problem of the zoo with ASBLO and with Implicit, at their defaults.

    make zoo        or        python benchmarks/zoo.py

Prints the table and writes it to docs/zoo.md. A row is a problem; where it has several starts, the error and
the value gap are the largest, the counts and the seconds the means. `solved` counts the starts that ended
within the problem's tolerance of an optimum.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from page import DOCS, table, write

import bilevel as bl
from bilevel.testing import problems

SOLVERS = {"ASBLO": bl.ASBLO(), "Implicit": bl.HypergradientDescent(bl.Implicit())}
UNROLLED = bl.HypergradientDescent(bl.Unrolled(max_steps=100, lr=0.5))  # for BDA alone
MAX_STEPS = 1000


@dataclass(frozen=True)
class Run:
    """One problem from one start, solved by one method."""

    solved: bool
    error: float
    gap: float
    gradients: int
    hvps: int
    seconds: float
    status: bl.Status
    x: torch.Tensor


def solve(case: problems.ZooProblem, solver: bl.Solver) -> Run:
    solution = bl.solve(case.problem, solver, case.x0, case.y0, max_steps=MAX_STEPS, throw=False)
    error = case.error(solution.x)
    return Run(
        solved=error <= case.tolerance,
        error=error,
        gap=bl.certify(case.problem, solution.x, solution.y).value_gap,
        gradients=solution.evaluations.gradients,
        hvps=solution.evaluations.hvp,
        seconds=solution.seconds,
        status=solution.status,
        x=solution.x,
    )


def row(problem: str, method: str, runs: list[Run]) -> list[str]:
    mean = len(runs)
    return [
        problem,
        method,
        f"{sum(run.solved for run in runs)} of {len(runs)}",
        f"{max(run.error for run in runs):.1e}",
        f"{max(abs(run.gap) for run in runs):.1e}",
        f"{sum(run.gradients for run in runs) / mean:.0f}",
        f"{sum(run.hvps for run in runs) / mean:.0f}",
        f"{sum(run.seconds for run in runs) / mean:.2f}",
        ", ".join(sorted({run.status.name for run in runs})),
    ]


def main() -> None:
    torch.set_num_threads(1)
    rows: list[list[str]] = []
    bda: list[list[str]] = []
    groups = itertools.groupby(problems.zoo(), key=lambda case: case.name.split(" from ")[0])
    for problem, group in groups:
        cases = list(group)
        runs = {name: [solve(case, solver) for case in cases] for name, solver in SOLVERS.items()}
        rows += [row(problem, name, found) for name, found in runs.items()]
        print("  ".join(rows[-2]), "  ".join(rows[-1]), sep="\n", flush=True)
        if problem.startswith("BDA"):
            bda = [
                [
                    case.name.split(" from ")[-1],
                    *(f"{float(found[i].x) + 0.0:.5f}" for found in runs.values()),
                    f"{round(float(solve(case, UNROLLED).x), 5) + 0.0:.5f}",
                ]
                for i, case in enumerate(cases)
            ]
    head = [
        "problem",
        "method",
        "solved",
        "error",
        "value gap",
        "gradients",
        "HVPs",
        "seconds",
        "status",
    ]
    text = table(head, rows)
    if bda:
        text += "\n\nWhere x ends on BDA, whose solution is x = 1:\n\n"
        text += table(["start", *SOLVERS, "Unrolled"], bda)
    print("\n" + text)
    write(DOCS / "zoo.md", text)


if __name__ == "__main__":
    main()
