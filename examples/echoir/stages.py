"""The stages of a training: patches grow and batches shrink, as a function of the step alone.

A resumed run therefore sees the same patches. The learning rate follows the share of the run that is
done, which is the step's where their number is given.
"""

import math
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate

import bilevel as bl

PerStage = int | tuple[int, ...]  # one number for all stages, or one for each


@dataclass(frozen=True)
class Stage:
    """What a step takes.

    Attributes:
        patch: height and width of the patches.
        batch: patches for F.
        lower_batch: patches for f.
    """

    patch: int
    batch: int
    lower_batch: int


@dataclass(frozen=True)
class Stages:
    """Stages one after the other.

    Attributes:
        ends: the step at which each but the last is over.
        each: what they take.
    """

    ends: tuple[int, ...]
    each: tuple[Stage, ...]

    def at(self, step: int) -> Stage:
        """That of a step, counted from 0."""
        return self.each[bisect_right(self.ends, step)]

    @property
    def patches(self) -> tuple[int, ...]:
        """The sizes that occur."""
        return tuple(sorted({stage.patch for stage in self.each}))


def plan(
    lengths: tuple[int, ...],
    steps: int | None,
    *,
    patch: PerStage,
    batch: PerStage,
    lower_batch: PerStage,
) -> Stages:
    """The stages of a run.

    Args:
        lengths: steps of each stage; none for a run in one piece.
        steps: of the run, if they are not as many: the stages keep their shares.
        patch: height and width of the patches, for all stages or for each.
        batch: patches for F, likewise.
        lower_batch: patches for f, likewise.

    Raises:
        ValueError: if there are not as many numbers as stages.

    Example:
        >>> stages = plan((2, 1), 30, patch=(8, 16), batch=4, lower_batch=(2, 1))
        >>> stages.at(19), stages.at(20)
        (Stage(patch=8, batch=4, lower_batch=2), Stage(patch=16, batch=4, lower_batch=1))
    """
    columns = []
    for name, values in (("patch", patch), ("batch", batch), ("lower-batch", lower_batch)):
        several = (values,) * max(1, len(lengths)) if isinstance(values, int) else values
        if len(several) != max(1, len(lengths)):
            raise ValueError(
                f"`--{name}` must be one number, or one for each of the {len(lengths)} stages. Got "
                f"{values}. Give as many as --stages has, or leave it out."
            )
        columns.append(several)
    total = sum(lengths)
    ends = tuple(end * (steps or total) // total for end in accumulate(lengths[:-1]))
    return Stages(ends, tuple(Stage(*row) for row in zip(*columns, strict=True)))


def learning_rate(
    highest: float,
    lowest: float,
    done: Callable[[int], float],
    *,
    warmup: int = 0,
    hold: float = 0.0,
) -> bl.Schedule:
    """Up in a few steps, constant for a while, then half a cosine down.

    Args:
        highest: in between.
        lowest: at the end.
        done: the share of the run that is done at a step.
        warmup: steps up, for Adam's moments to settle.
        hold: share of the run until which it stays at the highest.

    Example:
        >>> lr = learning_rate(1.0, 0.1, lambda step: step / 10, hold=0.2)
        >>> [round(lr(step), 3) for step in (0, 2, 6, 10)]
        [1.0, 1.0, 0.55, 0.1]
    """
    floor = lowest / highest

    def lr(step: int) -> float:
        rise = min(1.0, (step + 1) / warmup) if warmup else 1.0
        fall = max(0.0, (done(step) - hold) / (1 - hold))
        return highest * rise * ((1 + floor) / 2 + (1 - floor) / 2 * math.cos(math.pi * fall))

    return lr
