"""The checks of the fields that solvers have in common."""

from __future__ import annotations

import math

from bilevel._errors import check_kind
from bilevel.optim.torch import Torch

OPTIMIZERS = ("upper_optimizer", "lower_optimizer", "value_optimizer")  # of x, y and z


def check_parts(solver: object, *, counts: tuple[str, ...] = ()) -> None:
    """Raises unless the optimizers, `rtol`, and the named numbers of steps of a solver are in their range."""
    name = type(solver).__name__
    for part in OPTIMIZERS:
        optimizer = getattr(solver, part, None)
        if optimizer is not None:
            mend = "Wrap the class, e.g. `Torch(torch.optim.Adam, lr=1e-3)`, or leave it out."
            check_kind(f"{name}({part}=...)", optimizer, Torch, mend)
    check_positive(solver, "rtol", "Use e.g. 1e-5.")
    for part in counts:
        check_kind(f"{name}({part}=...)", getattr(solver, part), int, "Pass a whole number.")
        check_at_least_one(solver, part)


def check_at_least_one(solver: object, part: str) -> None:
    """Raises unless a field of a solver is 1 or more."""
    where, value = f"{type(solver).__name__}({part}=...)", getattr(solver, part)
    if value < 1:
        raise ValueError(f"`{where}` must be at least 1. Got {part}={value}. Raise it.")


def check_positive(solver: object, part: str, mend: str) -> None:
    """Raises unless a field of a solver is a finite number above 0."""
    where, value = f"{type(solver).__name__}({part}=...)", getattr(solver, part)
    check_kind(where, value, (float, int), mend)
    if not (value > 0.0 and math.isfinite(value)):
        raise ValueError(f"`{where}` must be a finite number > 0. Got {part}={value}. {mend}")


def check_momentum(solver: object, momentum: float) -> None:
    """Raises unless `momentum` is in [0, 1)."""
    where = f"{type(solver).__name__}(momentum=...)"
    if not 0.0 <= momentum < 1.0:
        mend = "Use 0 for none, or e.g. 0.9."
        raise ValueError(f"`{where}` must be in [0, 1). Got momentum={momentum}. {mend}")


def check_schedule(solver: object, part: str) -> None:
    """Raises unless a field of a solver is a schedule."""
    schedule = getattr(solver, part)
    if schedule is not None and not callable(schedule):
        raise TypeError(
            f"`{type(solver).__name__}({part}=...)` must be a schedule, a function of the step. Got {schedule!r}. "
            f"Use e.g. `bilevel.schedules.constant({schedule!r})`."
        )
