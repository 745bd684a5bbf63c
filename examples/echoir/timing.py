"""Seconds a training step, measured so that they can be compared on a busy machine: turn by turn."""

import time
from collections.abc import Callable, Iterator, Sequence
from itertools import count

import torch
from run import Run

import bilevel as bl


def clock(device: torch.device) -> float:
    """Seconds: with one thread on a CPU those of its work, which other programs hardly lengthen.

    On an idle machine they are the clock's, which counts elsewhere.
    """
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    elif torch.get_num_threads() == 1:
        return time.process_time()
    return time.perf_counter()


def take_turns(
    steps: Sequence[Callable[[], object]], rounds: int, device: torch.device
) -> list[list[float]]:
    """The seconds of each call: all once, then all again, so that a slow minute hits all alike."""
    seconds: list[list[float]] = [[] for _ in steps]
    for _ in range(rounds):
        for step, times in zip(steps, seconds, strict=True):
            began = clock(device)
            step()
            times.append(clock(device) - began)
    return seconds


def stepping(run: Run) -> Iterator[bl.State]:
    """The steps of a run, its batches made on the way, with neither log nor checkpoints."""
    solver = run.solver(lambda _: 0.0)
    batches = map(run.batch, count())
    return bl.iterate(run.problem, solver, run.x0, run.y0, batches=batches)
