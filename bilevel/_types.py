"""The types that the whole library shares."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

from torch import Tensor

#: A tensor, or nested dicts, lists and tuples of tensors.
Tree: TypeAlias = Any

#: `(x, y, data) -> scalar tensor` for an objective, `-> tensor` for a constraint.
Objective: TypeAlias = Callable[[Tree, Tree, Any], Tensor]

#: Projects the upper variable onto its domain B.
Projection: TypeAlias = Callable[[Tree], Tree]

#: A number for every step: `schedule(0)` is the first.
Schedule: TypeAlias = Callable[[int], float]
