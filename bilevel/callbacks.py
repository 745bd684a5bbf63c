"""What `solve` calls with each state, or a loop of one's own."""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch

from bilevel._checkpoint import load_state, save_state
from bilevel._errors import BilevelWarning, CheckpointError, check_count, check_kind
from bilevel._solution import State, Status

__all__ = ["Checkpoint"]


@dataclass(frozen=True)
class Checkpoint:
    """Saves the states of a run as it goes, so that a run that was killed goes on as if it had not been.

    Each save is complete or absent, see `save_state`. A folder holds one run. Of several processes
    that share a run, one should save.

    Attributes:
        folder: Where to save; made with the first state.
        every: Steps between two saves, >= 1. A state that ends the run is saved too.
        keep: Files to keep, >= 1. The one before the newest is for the case that a disk spoils the newest.

    Raises:
        TypeError: `folder` is no path, or a number no integer.
        ValueError: A number is below 1.

    Example:
        >>> import tempfile, bilevel as bl
        >>> problem = bl.BilevelProblem(
        ...     upper=lambda x, y, data: ((y - 1.0) ** 2).sum() + 0.1 * (x**2).sum(),
        ...     lower=lambda x, y, data: ((y - 2.0 * x) ** 2).sum(),
        ... )
        >>> checkpoint = Checkpoint(Path(tempfile.mkdtemp()) / "run", every=2)
        >>> zero = torch.zeros(1).double()
        >>> _ = bl.solve(problem, bl.ASBLO(), zero, zero, max_steps=5, callback=checkpoint)
        >>> state = checkpoint.newest()  # None, were there nothing to go on from
        >>> state.step, next(bl.iterate(problem, bl.ASBLO(), state=state)).step
        (4, 5)
    """

    folder: str | os.PathLike[str]
    every: int = 100
    keep: int = 2

    def __post_init__(self) -> None:
        check_kind(
            "Checkpoint(folder=...)", self.folder, (str, os.PathLike), "Pass the path of a folder."
        )
        check_count("Checkpoint", "every", self.every, "Use e.g. 100.")
        check_count("Checkpoint", "keep", self.keep, "Use e.g. 2.")

    def __call__(self, state: State) -> None:
        """Save the state, if it is one to be saved.

        Raises:
            ValueError: The folder holds a later state, which is of another run.
            OSError: The state cannot be written; those that were saved stay.
        """
        if state.step % self.every and state.status is Status.RUNNING:
            return
        files = self._files()
        if files and _step(files[0]) > state.step:
            raise ValueError(
                "`Checkpoint(folder=...)` must hold no state later than the one to be saved, which is of step "
                f"{state.step}. Got {files[0]}. Go on from `newest()`, or use a folder for each run."
            )
        path = Path(self.folder) / f"step-{state.step:09d}.pt"
        path.parent.mkdir(parents=True, exist_ok=True)
        save_state(path, state)
        for old in self._files()[self.keep :]:
            old.unlink()

    def newest(self, map_location: str | torch.device | None = None) -> State | None:
        """The state to go on from, or None where the folder has none.

        A damaged file is set aside under another name, and the one before it is taken.

        Args:
            map_location: As of `load_state`.

        Warns:
            BilevelWarning: A file was damaged.

        Raises:
            CheckpointError: All files are damaged.
        """
        damaged: list[tuple[Path, CheckpointError]] = []
        for path in self._files():
            try:
                state = load_state(path, map_location=map_location)
            except CheckpointError as error:
                damaged.append((path, error))
                continue
            for spoiled, error in damaged:
                spoiled.rename(spoiled.with_suffix(".damaged"))
                warnings.warn(
                    f"{error} Going on from step {state.step}.", BilevelWarning, stacklevel=2
                )
            return state
        if damaged:
            raise CheckpointError(
                f"`Checkpoint.newest()` must find a whole state in {os.fspath(self.folder)!r}. Got only damaged "
                f"ones: {'; '.join(str(error) for _, error in damaged)} Start anew in another folder."
            )
        return None

    def _files(self) -> list[Path]:
        """Of all states saved, the latest first."""
        return sorted(Path(self.folder).glob("step-*.pt"), key=_step, reverse=True)


def _step(path: Path) -> int:
    return int(path.stem.removeprefix("step-"))
