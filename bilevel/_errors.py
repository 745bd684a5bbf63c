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
