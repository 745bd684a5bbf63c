"""The errors of the library: one small tree, each also an error that Python users already catch."""

from __future__ import annotations


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
    names = " or ".join(f"`{one.__name__}`" for one in kinds)
    got = type(value).__name__
    if isinstance(value, type):  # the commonest slip: the class for its instance
        got = f"the class {value.__name__}"
        mend = f"Create one: `{value.__name__}(...)`." if issubclass(value, kind) else mend
    raise TypeError(f"`{where}` must be an instance of {names}. Got {got}. {mend}")
