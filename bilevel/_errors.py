"""The errors of the library: one small tree, each also an error that Python users already catch."""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import NoReturn


class BilevelError(Exception):
    """Base class of every error that this library defines."""


class ObjectiveError(BilevelError, TypeError):
    """An objective or a constraint returned something else than its contract says."""


class StructureError(BilevelError, ValueError):
    """A tree of variables has the wrong structure, shape, dtype or names."""


class InfeasibleError(BilevelError, ValueError):
    """No feasible point was found, or an iterate left the feasible set and could not return."""


class NonFiniteError(BilevelError, ArithmeticError):
    """An objective, a gradient or a product became NaN or infinite."""


class UnboundedError(BilevelError, ArithmeticError):
    """An objective decreases without bound, so that its problem has no solution."""


class CheckpointError(BilevelError, ValueError):
    """A saved state is damaged, or is not a saved state at all."""


class BilevelWarning(UserWarning):
    """The class of every warning that this library emits."""


def check_kind(where: str, value: object, kind: type | tuple[type, ...], mend: str) -> None:
    """Raises a TypeError in the library's one form unless `value` is an instance of `kind`."""
    if isinstance(value, kind):
        return
    kinds = kind if isinstance(kind, tuple) else (kind,)
    if isinstance(value, type) and issubclass(value, kind):  # the commonest slip
        mend = f"Create one: `{value.__name__}(...)`."
    _refuse_kind(where, value, " or ".join(f"`{one.__name__}`" for one in kinds), mend)


def check_count(owner: str, part: str, value: object, mend: str, *, least: int = 1) -> None:
    """Raises unless the field `part` of `owner` is a whole number of at least `least`; NumPy's are, True is none."""
    where = f"{owner}({part}=...)"
    if isinstance(value, bool) or not isinstance(value, Integral):
        _refuse_kind(where, value, "`int`", f"Pass a whole number. {mend}")
    if value < least:
        raise ValueError(f"`{where}` must be at least {least}. Got {part}={value}. {mend}")


def check_number(owner: str, part: str, value: object, mend: str, *, zero: bool = False) -> None:
    """Raises unless the field `part` of `owner` is a finite number > 0, or >= 0 where `zero` is allowed."""
    where = f"{owner}({part}=...)"
    if isinstance(value, bool) or not isinstance(value, Real):
        _refuse_kind(where, value, "`float` or `int`", mend)
    number = float(value)
    if not (math.isfinite(number) and (number > 0.0 or (zero and number == 0.0))):
        rule = f"a finite number {'>=' if zero else '>'} 0"
        raise ValueError(f"`{where}` must be {rule}. Got {part}={value}. {mend}")


def _refuse_kind(where: str, value: object, names: str, mend: str) -> NoReturn:
    got = f"the class {value.__name__}" if isinstance(value, type) else type(value).__name__
    raise TypeError(f"`{where}` must be an instance of {names}. Got {got}. {mend}")
