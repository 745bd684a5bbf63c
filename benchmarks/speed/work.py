"""What every contender is given, and what it gives back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import bilevel as bl

Lower = tuple[Tensor, ...]


@dataclass(frozen=True)
class Work:
    """A bilevel problem and the steps of gradient descent that suit its lower level.

    Attributes:
        upper: F(x, *y).
        lower: f(x, *y).
        x: where the upper variable starts.
        y: where the lower variable starts, one tensor or more.
        lr: of gradient descent on y.
        momentum: of gradient descent on y.
        family: in `peers.in_jax`, whose two functions are the objectives in JAX; empty where none is.
        data: what those functions are given before x and y.
    """

    upper: Callable[..., Tensor]
    lower: Callable[..., Tensor]
    x: Tensor
    y: Lower
    lr: float
    momentum: float = 0.0
    family: str = ""
    data: Lower = ()

    @property
    def quadratic(self) -> bool:
        """Whether f is a quadratic in y."""
        return self.family == "Quadratic"

    @property
    def problem(self) -> bl.BilevelProblem:
        """The same for the library."""
        if len(self.y) == 1:
            return bl.BilevelProblem(
                lambda x, y, _: self.upper(x, y), lambda x, y, _: self.lower(x, y)
            )
        return bl.BilevelProblem(
            lambda x, y, _: self.upper(x, *y), lambda x, y, _: self.lower(x, *y)
        )

    @property
    def start(self) -> Tensor | Lower:
        """`y` as the library takes it."""
        return self.y[0] if len(self.y) == 1 else self.y


@dataclass(frozen=True)
class Answer:
    """What a contender found, and what it evaluated where that is known.

    Attributes:
        value: what the task asks for, e.g. the hypergradient.
        y: the lower variable at the end.
        gradients: backward passes through F and f.
        hvps: products with second derivatives of f.
        cold: seconds of the first call, where that compiled.
    """

    value: Tensor
    y: Lower = ()
    gradients: int | None = None
    hvps: int | None = None
    cold: float | None = None


Hypergradient = Callable[[Tensor, Lower], Answer]


def descend(hypergradient: Hypergradient, work: Work, steps: int, lr: float) -> Answer:
    """`steps` of gradient descent on x, each with a hypergradient from where the last one left y; x at the end."""
    x, y = work.x, work.y
    gradients: list[int | None] = []
    hvps: list[int | None] = []
    cold = None
    for _ in range(steps):
        found = hypergradient(x, y)
        x, y = torch.sub(x, found.value, alpha=lr), found.y
        gradients.append(found.gradients)
        hvps.append(found.hvps)
        cold = found.cold
    return Answer(x, y, total(gradients), total(hvps), cold)


def total(counts: list[int | None]) -> int | None:
    """The sum of what is known, None where something is not."""
    known = [count for count in counts if count is not None]
    return sum(known) if len(known) == len(counts) else None


def relative_error(found: Tensor, truth: Tensor) -> float:
    return float((found - truth).detach().norm() / truth.detach().norm())
