"""What a step of ASBLO costs on EchoIR, in steps of single-level training on as many patches.

    python benchmarks/echoir_step.py [--preset cpu] [--patch 64] [--batch 4] [--lower-batch 4]

The steps take turns, and with one thread on a CPU their seconds are those of the processor: what else the
machine does hardly shows. F and f see as many patches as the single level does. f(x, z), f(x, y) and F(x, y) make
three passes where single-level training makes one. Memory is that of the tensors that live at a time, of two steps.
"""

import sys
from dataclasses import dataclass
from functools import partial
from itertools import repeat
from pathlib import Path
from statistics import median
from typing import Literal

import numpy as np
import torch
import tyro
from rich.console import Console
from rich.table import Table

import bilevel as bl
from bilevel.diagnostics import LiveMemory

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "echoir"))

from arguments import Arguments as Training
from console import pick_device
from methods import training_runs
from model import PRESETS
from photographs import Photograph, Split
from run import Run
from timing import take_turns
from train import new_network

GOALS = {"restoration": 3.1, "echo": 2.5, "both": 4.6}  # times a single-level step
MEMORY_GOAL = 1.3
SETTLING = 3  # steps that pay for caches


@dataclass(frozen=True)
class Arguments:
    """Times ASBLO's step on EchoIR.

    Attributes:
        preset: of the network.
        patch: height and width of the patches.
        batch: patches of F, and of the single level.
        lower_batch: patches of f.
        rounds: steps of each that are timed.
        device: `cpu`, `cuda`, ...; the fastest there is, by default.
        threads: of the CPU.
    """

    preset: Literal[tuple(PRESETS)] = "small"
    patch: int = 64
    batch: int = 4
    lower_batch: int = 4
    rounds: int = 9
    device: str | None = None
    threads: int = 1


@dataclass(frozen=True)
class Cost:
    """Of one step: the median seconds, and those over the single-level step of the same round."""

    seconds: float
    ratio: float
    memory: float  # over the single level's


def costs(a: Arguments) -> dict[str, Cost]:
    """Of the single level, and of ASBLO by its lower objective."""
    torch.set_num_threads(a.threads)
    device = pick_device(a.device)
    runs = {"single level": prepare(a, "restoration", "single-level", device)}
    runs |= {lower: prepare(a, lower, "asblo", device) for lower in GOALS}
    steps = [partial(next, stepping(run)) for run in runs.values()]
    seconds = [times[SETTLING:] for times in take_turns(steps, SETTLING + a.rounds, device)]
    memory = [live_memory(run) for run in runs.values()]
    return {
        name: Cost(
            median(times),
            median(t / single for t, single in zip(times, seconds[0], strict=True)),
            peak / memory[0],
        )
        for name, times, peak in zip(runs, seconds, memory, strict=True)
    }


def prepare(a: Arguments, lower: str, method: str, device: torch.device) -> Run:
    training = Training(
        preset=a.preset,
        lower=lower,
        patch=a.patch,
        batch=a.batch,
        lower_batch=a.lower_batch,
        amp=False,
    )
    pixels = np.random.default_rng(0).integers(256, size=(2 * a.patch, 2 * a.patch, 3))
    photographs = (Photograph("noise", pixels.astype(np.uint8)),)
    data = Split(photographs, photographs, photographs)
    net = new_network(training, PRESETS[a.preset], device)
    runs = training_runs(
        training, (method,), data, net, device, restored=lambda *_: [], keep=lambda *_: None
    )
    return runs[method]


def stepping(run: Run):
    """Its steps, all on one batch."""
    solver = run.solver(lambda _: 0.0)
    return bl.iterate(run.problem, solver, run.x0, run.y0, batches=repeat(run.batch(0)))


def live_memory(run: Run) -> int:
    """Bytes of the tensors that two steps make, as many as live at a time."""
    steps = stepping(run)
    with LiveMemory() as memory:
        for _ in range(2):
            next(steps)
    return memory.peak


def main(a: Arguments) -> None:
    about = f"preset {a.preset}, {a.patch} x {a.patch}, {a.batch} and {a.lower_batch} patches"
    table = Table("step", "seconds", "ratio", "goal", "memory", "goal", title=about)
    for name, cost in costs(a).items():
        goals = (f"{GOALS[name]}", f"{MEMORY_GOAL}") if name in GOALS else ("", "")
        ratios = f"{cost.ratio:.2f}", goals[0], f"{cost.memory:.2f}", goals[1]
        table.add_row(name, f"{cost.seconds:.3f}", *ratios)
    Console().print(table)


if __name__ == "__main__":
    main(tyro.cli(Arguments))
