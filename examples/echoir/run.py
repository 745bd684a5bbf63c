"""One training run: steps a solver, averages its weights, shows and records how it goes.

A signal stops it between two steps, saved, so that it can be resumed bit for bit. Where several
processes train together, all stop at the same step, and the first alone measures, logs and saves.
"""

import json
import math
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from checkpoint import Checkpoint, load, save
from prefetch import prefetch
from processes import ALONE, Processes
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from whole_file import replacing

import bilevel as bl

SAVE_EVERY = 60.0  # seconds: what a power failure may cost
LOG_EVERY = 10  # steps

Done = Callable[[int], float]  # the share of a run that is done at a step


class Interrupted(Exception):  # noqa: N818  (not an error)
    """SIGINT or SIGTERM came; the run has been saved."""


@dataclass(frozen=True)
class Run:
    """What is stepped, and how it is watched.

    Attributes:
        name: of the method, for folders and messages.
        problem: with `x0` and `y0`, made by `bl.from_module`.
        solver: makes it, from a function that maps a step to the share of the run that is done.
        x0: upper start.
        y0: lower start.
        batch: the batch of a step, a pure function of it.
        psnr: PSNR in dB of a state, on the photographs held out.
        keep: called with the averaged state and its PSNR whenever that is the best yet.
        facts: what else to log of a state.
        folder: for checkpoints and metrics.
        device: of the tensors.
        ema: decay of the moving average of the weights, smaller at the start.
        look_every: steps between two measurements of the PSNR, besides that at the end.
        processes: that train together.
    """

    name: str
    problem: bl.BilevelProblem
    solver: Callable[[Done], bl.Solver]
    x0: dict[str, torch.Tensor]
    y0: dict[str, torch.Tensor]
    batch: Callable[[int], bl.Batch]
    psnr: Callable[[bl.State], float]
    keep: Callable[[bl.State, float], None]
    facts: Callable[[Done, bl.State], dict[str, float]]
    folder: Path
    device: torch.device
    ema: float
    look_every: int
    processes: Processes = ALONE

    def train(
        self, console: Console, *, seconds: float, steps: int | None = None, resume: bool = False
    ) -> Checkpoint:
        """Steps to the end.

        Args:
            console: where to show it.
            seconds: time to take. The share that is done, on which learning rates depend, is a
                share of it, so that a machine that becomes slower still ends in time and at rest.
            steps: do exactly so many instead, however long it takes.
            resume: go on from the newest checkpoint in the folder, if there is one.

        Returns:
            The last checkpoint, which is on disk too.

        Raises:
            Interrupted: if a signal came; the newest checkpoint is of the step it came in.
            bl.BilevelError: if training diverged; the checkpoint before stays.
            ConnectionError: if another process has ended; likewise.
        """
        now = load(self.folder / "checkpoints", self.device) if resume else None
        if now is not None and now.finished:
            return now
        start: dict[str, Any] = {"state": now.state} if now else {"x0": self.x0, "y0": self.y0}
        if now is None:
            first = bl.State(self.x0, self.y0)
            now = Checkpoint(first, _copy(first), 0.0)
        clock = _Clock(now.seconds, seconds, steps)
        batches = prefetch(self.batch, now.state.step)
        states = bl.iterate(self.problem, self.solver(clock.done), batches=batches, **start)
        rows = self._rows(now.state.step)
        best = max((row["psnr"] for row in rows if "psnr" in row), default=-math.inf)
        with (
            self._open_log(rows) if self.processes.is_first else nullcontext() as log,
            _signals() as asked,
            _progress(console) as progress,
        ):
            return self._loop(states, now, clock, asked, progress, log, best)

    def _loop(self, states, now, clock, asked, progress, log, best) -> Checkpoint:
        bar = progress.add_task(self.name, total=1.0, step=now.state.step, facts="")
        saved_at = time.perf_counter()
        seen: dict[str, float] = {}  # the latest PSNR, once there is one
        stepping, since = 0.0, 0  # seconds and steps since the last row
        began = time.perf_counter()
        for state in states:
            since += 1
            if state.status.is_failure:
                raise state.status.error(f"{self.name}: {state.message}")
            _average(now.average, state, self.ema)
            average = replace(now.average, step=state.step)
            stop, clock.seconds = self.processes.agree(bool(asked), clock.read())
            finished = clock.done(state.step) >= 1
            now = Checkpoint(state, average, clock.seconds, finished)
            if not self.processes.is_first:
                if finished or stop:
                    return self._left(now)
                continue
            if state.step % LOG_EVERY == 0 or finished:
                _wait(self.device)
            stepping += time.perf_counter() - began
            look = state.step % self.look_every == 0 or finished
            if look or state.step % LOG_EVERY == 0:
                row = {"step": state.step, "seconds": round(now.seconds, 2)}
                row |= {"step_seconds": round(stepping / since, 4)}
                stepping, since = 0.0, 0
                row |= self.facts(clock.done, state)
                row |= {name: float(value) for name, value in state.metrics.items()}
                if look:
                    seen = {"psnr": self.psnr(average)}
                    row |= seen
                if look and seen["psnr"] > best:
                    best = seen["psnr"]
                    self.keep(average, best)
                log.write(json.dumps(row) + "\n")
                log.flush()
                done = clock.done(state.step)
                progress.update(bar, completed=done, step=state.step, facts=_facts(seen | row))
            if finished or stop or time.perf_counter() - saved_at > SAVE_EVERY:
                os.fsync(log.fileno())  # what is before a checkpoint is not done again
                save(self.folder / "checkpoints", now)
                saved_at = time.perf_counter()
            if finished or stop:
                return self._left(now)
            began = time.perf_counter()
        raise RuntimeError(f"`{self.name}` ended by itself, with {now.state.status}.")

    def _left(self, now: Checkpoint) -> Checkpoint:
        """The last checkpoint of a run that is done; of one that was told to stop there is none to return."""
        if not now.finished:
            raise Interrupted(f"{self.name} stopped at step {now.state.step}")
        return now

    def _rows(self, step: int) -> list[dict[str, Any]]:
        """What an earlier part of the run has logged up to this step; the rest is done anew."""
        path = self.folder / "metrics.jsonl"
        lines = path.read_text().splitlines() if step and path.exists() else []
        # A power failure may have cut the last line, which is of a later step than any checkpoint.
        rows = [json.loads(line) for line in lines if line.endswith("}")]
        return [row for row in rows if row["step"] <= step]

    def _open_log(self, rows: list[dict[str, Any]]):
        """The metrics, one JSON object a line."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / "metrics.jsonl"
        with replacing(path) as file:
            file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        return path.open("a")


class _Clock:
    """How much of a run is done: by steps where their number is given, by time otherwise.

    `seconds` are those at the last step's end, which processes agree on: learning rates depend on them.
    """

    def __init__(self, seconds: float, limit: float, steps: int | None):
        self.seconds, self.limit, self.steps = seconds, limit, steps
        self._origin = time.perf_counter() - seconds

    def read(self) -> float:
        return time.perf_counter() - self._origin

    def done(self, step: int) -> float:
        share = step / self.steps if self.steps else self.seconds / self.limit
        return min(1.0, share)


def _wait(device: torch.device):
    """Until an accelerator has done what it was given, so that the clock shows its work."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def _copy(state: bl.State) -> bl.State:
    x, y = ({k: v.clone() for k, v in level.items()} for level in (state.x, state.y))
    return bl.State(x, y)


def _average(average: bl.State, state: bl.State, decay: float):
    """An exponential moving average: over the last 1 / (1 - decay) steps, and over fewer at the start."""
    share = 1 - min(decay, (1 + state.step) / (10 + state.step))
    for mean, now in ((average.x, state.x), (average.y, state.y)):
        for name, value in mean.items():
            value.lerp_(now[name], share)


def _facts(row: dict[str, Any]) -> str:
    """The progress line: loss, value gap, sigma where the solver has them, PSNR, step time."""
    forms = {
        "upper": "loss {:.4f}",
        "value_gap": "gap {:.1e}",
        "sigma": "sigma {:.3f}",
        "psnr": "PSNR {:.2f} dB",
        "step_seconds": "{:.3f} s a step",
    }
    return "  ".join(form.format(row[name]) for name, form in forms.items() if name in row)


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        TextColumn("step {task.fields[step]}"),
        TextColumn("{task.fields[facts]}"),
        TimeRemainingColumn(),
        console=console,
    )


@contextmanager
def _signals() -> Iterator[list[int]]:
    """A list that SIGINT and SIGTERM are noted in, to be looked at between two steps."""
    asked: list[int] = []
    kinds = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(kind, lambda number, _: asked.append(number)) for kind in kinds]
    try:
        yield asked
    finally:
        for kind, handler in zip(kinds, before, strict=True):
            signal.signal(kind, handler)
