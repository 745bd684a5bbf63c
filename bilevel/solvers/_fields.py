"""The checks of the fields that solvers have in common."""

from __future__ import annotations

from bilevel._errors import check_count, check_kind, check_number
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
        check_count(name, part, getattr(solver, part), "Raise it, e.g. to 10.")


def check_positive(solver: object, part: str, mend: str) -> None:
    """Raises unless a field of a solver is a finite number above 0."""
    check_number(type(solver).__name__, part, getattr(solver, part), mend)


def check_momentum(solver: object, momentum: float) -> None:
    """Raises unless `momentum` is in [0, 1)."""
    name, mend = type(solver).__name__, "Use 0 for none, or e.g. 0.9."
    check_number(name, "momentum", momentum, mend, zero=True)
    if momentum >= 1.0:
        where = f"{name}(momentum=...)"
        raise ValueError(f"`{where}` must be in [0, 1). Got momentum={momentum}. {mend}")


def check_schedule(solver: object, part: str) -> None:
    """Raises unless a field of a solver is a schedule."""
    schedule = getattr(solver, part)
    if schedule is not None and not callable(schedule):
        raise TypeError(
            f"`{type(solver).__name__}({part}=...)` must be a schedule, a function of the step. Got {schedule!r}. "
            f"Use e.g. `bilevel.schedules.constant({schedule!r})`."
        )
