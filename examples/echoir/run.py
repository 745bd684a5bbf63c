"""One training run: steps a solver, averages its weights, shows and records how it goes.

A signal stops it between two steps, saved, so that it can be resumed bit for bit.
"""

import json
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from checkpoint import Checkpoint, load, save
from prefetch import prefetch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

import bilevel as bl

SAVE_EVERY = 60.0  # seconds: what a power failure may cost
LOG_EVERY = 10  # steps
LOOK_EVERY = 100  # steps: the PSNR of held-out crops, which costs as much as two of them


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
        folder: for checkpoints and metrics.
        device: of the tensors.
    """

    name: str
    problem: bl.BilevelProblem
    solver: Callable[[Callable[[int], float]], bl.Solver]
    x0: dict[str, torch.Tensor]
    y0: dict[str, torch.Tensor]
    batch: Callable[[int], bl.Batch]
    psnr: Callable[[bl.State], float]
    folder: Path
    device: torch.device

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
        """
        now = load(self.folder / "checkpoints", self.device) if resume else None
        if now is not None and now.finished:
            return now
        start: dict[str, Any] = {"state": now.state} if now else {"x0": self.x0, "y0": self.y0}
        if now is None:
            first = bl.State(self.x0, self.y0)
            now = Checkpoint(first, _copy(first), 0.0)
        clock = _Clock(time.perf_counter() - now.seconds, seconds, steps)
        batches = prefetch(self.batch, now.state.step)
        states = bl.iterate(self.problem, self.solver(clock.done), batches=batches, **start)
        with (
            self._open_log(now.state.step) as log,
            _signals() as asked,
            _progress(console) as progress,
        ):
            return self._loop(states, now, clock, asked, progress, log)

    def _loop(self, states, now, clock, asked, progress, log) -> Checkpoint:
        bar = progress.add_task(self.name, total=1.0, step=now.state.step, facts="")
        saved_at = time.perf_counter()
        seen: dict[str, float] = {}  # the latest PSNR, once there is one
        stepping, since = 0.0, 0  # seconds and steps since the last row
        began = time.perf_counter()
        for state in states:
            since += 1
            finished = clock.done(state.step) >= 1
            if state.step % LOG_EVERY == 0 or finished:
                _wait(self.device)
            stepping += time.perf_counter() - began
            if state.status.is_failure:
                raise state.status.error(f"{self.name}: {state.message}")
            _average(now.average, state)
            average = replace(now.average, step=state.step)
            now = Checkpoint(state, average, clock.seconds(), finished)
            if state.step % LOOK_EVERY == 0 or now.finished:
                seen = {"psnr": self.psnr(average)}
            if state.step % LOG_EVERY == 0 or now.finished:
                row = {"step": state.step, "seconds": round(now.seconds, 2), **seen}
                row |= {"step_seconds": round(stepping / since, 4)}
                stepping, since = 0.0, 0
                row |= {name: float(value) for name, value in state.metrics.items()}
                log.write(json.dumps(row) + "\n")
                log.flush()
                done = clock.done(state.step)
                progress.update(bar, completed=done, step=state.step, facts=_facts(row))
            if now.finished or asked or time.perf_counter() - saved_at > SAVE_EVERY:
                save(self.folder / "checkpoints", now)
                saved_at = time.perf_counter()
            if now.finished:
                return now
            if asked:
                raise Interrupted(f"{self.name} stopped at step {state.step}")
            began = time.perf_counter()
        raise RuntimeError(f"`{self.name}` ended by itself, with {now.state.status}.")

    def _open_log(self, step: int):
        """The metrics, one JSON object a line, up to this step; the rest is written anew."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / "metrics.jsonl"
        rows = path.read_text().splitlines() if step and path.exists() else []
        path.write_text("".join(f"{row}\n" for row in rows if json.loads(row)["step"] <= step))
        return path.open("a")


@dataclass(frozen=True)
class _Clock:
    """How much of a run is done: by steps where their number is given, by time otherwise."""

    origin: float
    limit: float
    steps: int | None

    def seconds(self) -> float:
        return time.perf_counter() - self.origin

    def done(self, step: int) -> float:
        share = step / self.steps if self.steps else self.seconds() / self.limit
        return min(1.0, share)


def _wait(device: torch.device):
    """Until an accelerator has done what it was given, so that the clock shows its work."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def _copy(state: bl.State) -> bl.State:
    x, y = ({k: v.clone() for k, v in level.items()} for level in (state.x, state.y))
    return bl.State(x, y)


def _average(average: bl.State, state: bl.State):
    """An exponential moving average over the last thousand steps, and over fewer at the start."""
    share = 1 - min(0.999, (1 + state.step) / (10 + state.step))
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
