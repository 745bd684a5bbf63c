"""Schedules: a number for every step. Any function of the step is one; these are the usual ones."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from bilevel._types import Schedule

__all__ = ["constant", "geometric", "join", "polynomial"]


def _check(rule: bool, name: str, text: str, value: float, mend: str) -> None:
    if not (rule and math.isfinite(value)):
        raise ValueError(f"`{name}=...)` must be a finite number{text}. Got {value}. {mend}")


@dataclass(frozen=True)
class Constant:
    """See `constant`."""

    value: float

    def __post_init__(self) -> None:
        _check(True, "constant(value", "", self.value, "Pass the number itself, e.g. 0.1.")

    def __call__(self, step: int) -> float:
        return self.value


def constant(value: float) -> Schedule:
    """The same number at every step.

    Args:
        value: The number.

    Returns:
        A function of the step.

    Raises:
        ValueError: `value` is not finite.

    Example:
        >>> [constant(0.1)(k) for k in range(3)]
        [0.1, 0.1, 0.1]
    """
    return Constant(value)


@dataclass(frozen=True)
class Geometric:
    """See `geometric`."""

    initial: float
    ratio: float
    floor: float = 0.0

    def __post_init__(self) -> None:
        name = "geometric("
        _check(
            self.initial > 0, f"{name}initial", " above 0", self.initial, "Pass the first value."
        )
        _check(self.ratio > 0, f"{name}ratio", " above 0", self.ratio, "Pass e.g. 0.5 to halve.")
        _check(
            self.floor >= 0, f"{name}floor", " of at least 0", self.floor, "Pass the last value."
        )

    def __call__(self, step: int) -> float:
        return max(self.initial * self.ratio**step, self.floor)


def geometric(initial: float, ratio: float, floor: float = 0.0) -> Schedule:
    r"""Multiplied by the same ratio at every step: $\max(c\, r^k, \text{floor})$.

    Args:
        initial: The value c at step 0; above 0.
        ratio: The factor r from one step to the next; above 0, below 1 to decrease.
        floor: The least value; at least 0.

    Returns:
        A function of the step.

    Raises:
        ValueError: A parameter is out of range or not finite.

    Example:
        >>> [geometric(1.0, 0.5, floor=0.2)(k) for k in range(4)]
        [1.0, 0.5, 0.25, 0.2]
    """
    return Geometric(initial, ratio, floor)


@dataclass(frozen=True)
class Polynomial:
    """See `polynomial`."""

    initial: float
    power: float
    scale: float = 1.0
    floor: float = 0.0

    def __post_init__(self) -> None:
        name = "polynomial("
        _check(
            self.initial > 0, f"{name}initial", " above 0", self.initial, "Pass the first value."
        )
        _check(True, f"{name}power", "", self.power, "Pass e.g. 1.0; below 0 it grows.")
        _check(self.scale > 0, f"{name}scale", " above 0", self.scale, "Pass a number of steps.")
        _check(
            self.floor >= 0, f"{name}floor", " of at least 0", self.floor, "Pass the last value."
        )

    def __call__(self, step: int) -> float:
        return max(self.initial * (1.0 + step / self.scale) ** -self.power, self.floor)


def polynomial(initial: float, power: float, scale: float = 1.0, floor: float = 0.0) -> Schedule:
    r"""A power of the step: $\max(c\, (1 + k / s)^{-p}, \text{floor})$.

    Args:
        initial: The value c at step 0; above 0.
        power: The exponent p; above 0 to decrease, below 0 to grow.
        scale: The number of steps s after which the decay sets in; above 0.
        floor: The least value; at least 0.

    Returns:
        A function of the step.

    Raises:
        ValueError: A parameter is out of range or not finite.

    Example:
        >>> [polynomial(1.0, 2.0, scale=10.0)(k) for k in (0, 10, 90)]
        [1.0, 0.25, 0.01]
    """
    return Polynomial(initial, power, scale, floor)


@dataclass(frozen=True)
class Joined:
    """See `join`."""

    schedules: tuple[Schedule, ...]
    boundaries: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.schedules) != len(self.boundaries) + 1:
            raise ValueError(
                "`join(schedules, boundaries)` must have one boundary between any two schedules. "
                f"Got {len(self.schedules)} schedules and {len(self.boundaries)} boundaries. "
                "Pass one boundary fewer than schedules."
            )
        steps = (0, *self.boundaries)
        if any(later <= earlier for earlier, later in pairwise(steps)):
            raise ValueError(
                "`join(boundaries=...)` must be positive and increasing. "
                f"Got {list(self.boundaries)}. Sort them, and leave out repeated ones."
            )

    def __call__(self, step: int) -> float:
        part = sum(step >= boundary for boundary in self.boundaries)
        return self.schedules[part](step - (0, *self.boundaries)[part])


def join(schedules: Sequence[Schedule], boundaries: Sequence[int]) -> Schedule:
    """One schedule after the other, each counting its steps from its own start.

    Args:
        schedules: The parts, in order.
        boundaries: The step at which each part but the first begins.

    Returns:
        A function of the step.

    Raises:
        ValueError: The numbers of parts and boundaries do not fit, or the boundaries do not
            increase.

    Example:
        >>> warm = join([constant(1.0), geometric(1.0, 0.5)], boundaries=[2])
        >>> [warm(k) for k in range(5)]
        [1.0, 1.0, 1.0, 0.5, 0.25]
    """
    return Joined(tuple(schedules), tuple(boundaries))
