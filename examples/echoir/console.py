"""What the command lines share: errors as one line, the device, the table of scores."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from rich.console import Console
from rich.table import Table
from scores import Result, Score, mean

BAD_INPUT = 2  # the exit code of a user's mistake, as argument parsers have it
NO_ROOM = 74  # EX_IOERR: the disk or the memory did not suffice; what was written before stays


@contextmanager
def fail_plainly() -> Iterator[None]:
    """Prints a user's mistake, or that disk or memory did not suffice, as a message and not as a traceback."""
    try:
        yield
    except ValueError as error:
        _leave(str(error), BAD_INPUT)
    except OSError as error:
        _leave(
            f"The disk must take what is written. Got {error}. Make room or name another folder; what was "
            "written before stays.",
            NO_ROOM,
        )
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        _leave(
            f"The memory must hold the patches of a step, or a tile of an image. Got {error}. Lower the sizes: "
            "--batch, --lower-batch and --patch in training, --tile in restoring.",
            NO_ROOM,
        )


def _leave(message: str, code: int):
    Console(stderr=True, soft_wrap=True, highlight=False).print(message, markup=False)
    sys.exit(code)


def _is_out_of_memory(error: Exception) -> bool:
    """On a CPU torch has no error of its own for it."""
    kinds = (MemoryError, torch.OutOfMemoryError)
    return isinstance(error, kinds) or "allocate memory" in str(error)


def pick_device(name: str | None) -> torch.device:
    """The named device, or the fastest there is.

    Raises:
        ValueError: if it is not there.
    """
    if name is None:
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        return accelerator or torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"`--device` must name a device of this machine. Got {name!r}. Use e.g. cpu or cuda."
        ) from error
    return device


def score_table(methods: dict[str, list[Result]], title: str) -> Table:
    """A table of PSNR and SSIM: a row an image, a column for the input and one for each method."""
    table = Table(title=title)
    table.add_column("photograph")
    first = next(iter(methods.values()))
    columns = {"input": [result.scores()[0] for result in first]}
    columns |= {name: [r.scores()[1] for r in results] for name, results in methods.items()}
    for name in columns:
        table.add_column(f"{name}\nPSNR dB (Y) / SSIM", justify="right")
    for i, result in enumerate(first):
        table.add_row(result.name, *(_cell(scores[i]) for scores in columns.values()))
    table.add_section()
    table.add_row("mean", *(_cell(mean(scores)) for scores in columns.values()), style="bold")
    return table


def _cell(score: Score) -> str:
    return f"{score.psnr_rgb:.2f} ({score.psnr_y:.2f}) / {score.ssim:.3f}"
