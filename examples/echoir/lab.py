"""Trainings of an ablation, each as train.py would make it, and what is known of them so far."""

import json
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from arguments import Arguments
from methods import training_runs
from model import PRESETS, EchoIRConfig, count
from photographs import Split
from rich.console import Console
from run import Run
from scores import Result, mean
from timing import stepping, take_turns
from train import new_network, restorer
from variants import Variant
from whole_file import replacing

import bilevel as bl

TIMED, SETTLING = 12, 2  # steps of each variant; the first pay for caches


class Results:
    """One JSON file, written anew after each training.

    Attributes:
        costs: of each variant: parameters, flops (of 256 x 256 pixels), step_seconds.
        runs: one for each training that has ended.

    Raises:
        ValueError: if the file is damaged, or of other settings.
    """

    def __init__(self, path: Path, settings: dict[str, Any]):
        self.path, self.settings = path, settings
        self.costs: dict[str, dict[str, float]] = {}
        self.runs: list[dict[str, Any]] = []
        if not path.is_file():
            return
        try:
            known = json.loads(path.read_text())
            before, self.costs, self.runs = (known[k] for k in ("settings", "costs", "runs"))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"An ablation must go on from whole results. Got {path}, which is damaged: {error!r}. Remove "
                "it, or use another --output."
            ) from error
        different = [k for k in settings if before.get(k) != settings[k]]
        if different:
            raise ValueError(
                "An ablation must go on with the settings that it was begun with. Got "
                + ", ".join(f"{k}={settings[k]} after {before.get(k)}" for k in different)
                + f" in {path}. Use those, or another --output."
            )

    def find(self, name: str, seed: int, steps: int) -> dict[str, Any] | None:
        """A training that has ended, or None."""
        key = {"variant": name, "seed": seed, "steps": steps}
        return next((run for run in self.runs if key.items() <= run.items()), None)

    def write(self):
        """The file is the old or the new one, never half of one."""
        known = {k: getattr(self, k) for k in ("settings", "costs", "runs")}
        with replacing(self.path) as file:
            file.write_text(json.dumps(known, indent=1))


@dataclass(frozen=True)
class Lab:
    """Makes trainings.

    Attributes:
        shared: what they have in common.
        folder: for theirs.
        data: the photographs, the same split for all seeds.
        device: where.
    """

    shared: Arguments
    folder: Path
    data: Split
    device: torch.device

    def config(self, variant: Variant) -> EchoIRConfig:
        """Of a variant's network."""
        return replace(PRESETS[self.shared.preset], **variant.net)

    def prepare(
        self, variant: Variant, seed: int, steps: int
    ) -> tuple[Run, Callable[[bl.State], list[Result]]]:
        """A training, and what restores the photographs held out with its weights."""
        folder = self.folder / f"{variant.name}-{seed}-{steps}"
        a = replace(self.shared, seed=seed, steps=steps, output=folder, look_every=steps)
        net = new_network(a, self.config(variant), self.device)
        restored = restorer(a, self.data, net, self.device)
        of = (variant.method,)
        runs = training_runs(
            a, of, self.data, net, self.device, restored=restored, keep=lambda *_: None
        )
        return runs[variant.method], restored

    def costs(self, rows: Sequence[Variant]) -> dict[str, dict[str, float]]:
        """Parameters, FLOPs, and the median step of each variant."""
        steps = [stepping(self.prepare(variant, 0, 1)[0]) for variant in rows]
        turns = take_turns([partial(next, s) for s in steps], SETTLING + TIMED, self.device)
        return {
            variant.name: count(self.config(variant)) | {"step_seconds": median(times[SETTLING:])}
            for variant, times in zip(rows, turns, strict=True)
        }

    def train(self, variant: Variant, seed: int, steps: int, console: Console) -> dict[str, Any]:
        """Trains, or goes on, and returns the scores. To diverge is a result too.

        Raises:
            Interrupted: as `Run.train` does.
        """
        run, restored = self.prepare(variant, seed, steps)
        known = {"variant": variant.name, "seed": seed, "steps": steps}
        try:
            done = run.train(console, seconds=math.inf, steps=steps, resume=True)
        except bl.BilevelError as error:
            return known | {"diverged": str(error)}
        score = mean(result.scores()[1] for result in restored(done.average))
        shutil.rmtree(run.folder / "checkpoints")
        return known | asdict(score) | {"seconds": round(done.seconds, 2)}
