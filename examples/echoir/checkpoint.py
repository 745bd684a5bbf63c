"""Checkpoints of a training run: a folder each, complete or absent; the newest two are kept.

`state.pt` holds all that the solver carries, `average.pt` the averaged weights, `run.json` the rest.
The library writes the first two with a checksum, so that a damaged one is noticed, and the one
before is taken.
"""

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from whole_file import replacing, sync_folder

import bilevel as bl

KEPT = 2


@dataclass(frozen=True)
class Checkpoint:
    """All that a run needs to go on as if it had never stopped.

    Attributes:
        state: of the solver.
        average: the exponential moving average of x and y, as a state of the same step.
        seconds: wall-clock time so far.
        finished: whether the run has come to its end.
    """

    state: bl.State
    average: bl.State
    seconds: float
    finished: bool = False


def save(folder: Path, checkpoint: Checkpoint):
    """Adds a checkpoint to a folder and removes the oldest."""
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = folder / "unfinished"
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir()
    bl.save_state(unfinished / "state.pt", checkpoint.state)
    bl.save_state(unfinished / "average.pt", checkpoint.average)
    run = {"seconds": checkpoint.seconds, "finished": checkpoint.finished}
    with replacing(unfinished / "run.json") as file:
        file.write_text(json.dumps(run))
    finished = folder / f"step-{checkpoint.state.step:08d}"
    shutil.rmtree(finished, ignore_errors=True)
    os.replace(unfinished, finished)
    sync_folder(folder)
    for old in _finished(folder)[KEPT:]:
        shutil.rmtree(old)


def load(folder: Path, device: torch.device) -> Checkpoint | None:
    """The newest checkpoint of a folder that is whole; None if the folder has none at all.

    Raises:
        ValueError: if all are damaged.
    """
    errors = []
    for path in _finished(folder):
        try:
            run = json.loads((path / "run.json").read_text())
            return Checkpoint(
                bl.load_state(path / "state.pt", map_location=device),
                bl.load_state(path / "average.pt", map_location=device),
                run["seconds"],
                run["finished"],
            )
        except (bl.BilevelError, OSError, json.JSONDecodeError, KeyError) as error:
            errors.append(f"{path}: {error}")
    if errors:
        raise ValueError(
            f"Resuming must find a whole checkpoint in {folder}. Got only damaged ones: "
            f"{'; '.join(errors)}. Start anew without --resume."
        )
    return None


def _finished(folder: Path) -> list[Path]:
    """Newest first."""
    return sorted(folder.glob("step-*"), reverse=True)
