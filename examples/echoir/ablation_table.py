"""The table of an ablation, in Markdown: what a variant costs, and what it reaches over the seeds."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

Runs = Sequence[dict[str, Any]]


@dataclass(frozen=True)
class Row:
    """What is known of a variant.

    Attributes:
        labels: its first columns.
        parameters: of the network.
        flops: of one 256 x 256 image.
        step_seconds: of a training step.
        budgets: steps of its trainings for equal steps, and for equal time.
        runs: for each of the two the trainings that have ended, one a seed.
    """

    labels: tuple[str, ...]
    parameters: int
    flops: int
    step_seconds: float
    budgets: tuple[int, int]
    runs: tuple[Runs, Runs]


def markdown(labels: Sequence[str], rows: Sequence[Row], minutes: float) -> str:
    """The table.

    Args:
        labels: names of the first columns.
        rows: of the variants.
        minutes: of the trainings for equal time.
    """
    steps = rows[0].budgets[0]
    columns = [
        *labels,
        "parameters",
        "GFLOPs",
        "s a step",
        f"PSNR, SSIM after {steps:,} steps",
        f"PSNR, SSIM after {minutes:g} minutes",
        "steps then",
        "seeds",
    ]
    lines = [columns, ["---"] * len(columns)]
    for row in rows:
        figures = [f"{row.parameters:,}", f"{row.flops / 1e9:.3f}", f"{row.step_seconds:.3f}"]
        reached = [reach(runs) for runs in row.runs]
        seeds = min(len(runs) for runs in row.runs)
        lines.append([*row.labels, *figures, *reached, f"{row.budgets[1]:,}", str(seeds)])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def reach(runs: Runs) -> str:
    """Mean and standard deviation over the trainings that did not diverge."""
    if not runs:
        return ""
    good = [run for run in runs if "diverged" not in run]
    lost = len(runs) - len(good)
    cells = [f"{lost} of {len(runs)} diverged"] if lost else []
    if good:
        psnr, ssim = ([run[name] for run in good] for name in ("psnr_rgb", "ssim"))
        cells.insert(0, f"{spread(psnr, 2)} dB, {spread(ssim, 3)}")
    return "; ".join(cells)


def spread(values: Sequence[float], digits: int) -> str:
    """E.g. 29.18 ± 0.05; the sample standard deviation, of two values or more."""
    mean = f"{fmean(values):.{digits}f}"
    return f"{mean} ± {stdev(values):.{digits}f}" if len(values) > 1 else mean
