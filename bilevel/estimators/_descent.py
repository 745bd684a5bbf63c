"""A fixed number of steps of an optimizer, as operations on tensors that can be traced."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bilevel._autodiff import func
from bilevel.estimators._fixed_steps import FixedSteps, Reached, length
from bilevel.optim import Torch

_OPTIONS: dict[Any, dict[str, Any]] = {
    torch.optim.SGD: {"momentum": 0.0, "dampening": 0.0, "weight_decay": 0.0, "nesterov": False},
    torch.optim.Adam: {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0},
    torch.optim.AdamW: {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 1e-2},
}
Rule = Callable[[Tensor, Tensor], Tensor]  # the next variable, from the variable and its gradient


@dataclass(frozen=True)
class Descent(FixedSteps):
    """The steps of `bilevel.optim.Torch`, written out.

    Attributes:
        optimizer: SGD, Adam or AdamW of `torch.optim`.
        rates: The learning rate of each step.
        max_norm: See `Torch`.
        options: The remaining arguments of the optimizer, with its defaults.
    """

    optimizer: type[torch.optim.Optimizer]
    rates: tuple[float, ...]
    max_norm: float | None
    options: tuple[tuple[str, Any], ...]

    def rules(self) -> Iterator[Rule]:
        """The rule of each step; they share the optimizer's memory and are to be used in order."""
        make = _sgd if self.optimizer is torch.optim.SGD else _adam
        yield from make(self, dict(self.options))

    def minimized(self, fun: Callable[[Tensor], Tensor], y: Tensor, tol: float) -> Reached:
        """See `FixedSteps.minimized`."""
        gradient = func.grad(fun)
        g = gradient(y)
        first = length(g)
        for t, rule in enumerate(self.rules()):
            g = gradient(y) if t else g
            new = rule(y, g)
            y = torch.where(length(g) > tol * first, new, y) if tol else new
        return y, first, torch.zeros_like(first)

    def cost(self, n: int) -> tuple[int, int, int]:
        """See `FixedSteps.cost`."""
        return len(self.rates), len(self.rates), 0

    def shortened(self, grad: Tensor) -> Tensor:
        """The gradient, shape (n,) or (K, n), no longer than `max_norm`."""
        if self.max_norm is None:
            return grad
        length = torch.sqrt(torch.sum(grad * grad, dim=-1, keepdim=True))
        return grad * (self.max_norm / length).clamp(max=1.0)


def descent(where: str, minimizer: object) -> Descent:
    """The steps of `minimizer` written out.

    Raises:
        ValueError: It stops where its numbers tell it to, or has options that are not written out here.
    """
    rule = (
        f"`{where}` must take a fixed number of steps of SGD, Adam or AdamW to be one program for all problems, "
        "as `compile=True` and `solve_many` need it."
    )
    mend = "Pass e.g. `bilevel.optim.Torch(torch.optim.SGD, lr=0.1, max_steps=20)`."
    if not isinstance(minimizer, Torch):
        raise ValueError(f"{rule} Got {type(minimizer).__name__}. {mend}")
    known = _OPTIONS.get(minimizer.optimizer)
    if known is None:
        got = getattr(minimizer.optimizer, "__name__", repr(minimizer.optimizer))
        raise ValueError(f"{rule} Got {got}. {mend}")
    strange = sorted(set(minimizer.options) - set(known))
    if strange:
        raise ValueError(
            f"{rule} Got the options {strange}, of which {sorted(known)} are known. Leave them out."
        )
    return Descent(
        optimizer=minimizer.optimizer,  # pyright: ignore[reportArgumentType]  # a key of _OPTIONS
        rates=tuple(minimizer.rate(t) for t in range(minimizer.max_steps)),
        max_norm=minimizer.max_norm,
        options=tuple(sorted({**known, **minimizer.options}.items())),
    )


def _sgd(steps: Descent, options: dict[str, Any]) -> Iterator[Rule]:
    momentum: float = options["momentum"]
    decay: float = options["weight_decay"]
    velocity: Tensor | None = None
    for rate in steps.rates:

        def rule(y: Tensor, grad: Tensor, rate: float = rate) -> Tensor:
            nonlocal velocity
            d = steps.shortened(grad)
            if decay:
                d = d + decay * y
            if momentum:
                damped: Tensor = (1.0 - options["dampening"]) * d
                new = d if velocity is None else momentum * velocity + damped
                d = d + momentum * new if options["nesterov"] else new
                velocity = new
            return y - rate * d

        yield rule


def _adam(steps: Descent, options: dict[str, Any]) -> Iterator[Rule]:
    (beta1, beta2), decay = options["betas"], options["weight_decay"]
    is_decoupled = steps.optimizer is torch.optim.AdamW
    mean: Tensor | None = None
    square: Tensor | None = None
    for t, rate in enumerate(steps.rates, 1):

        def rule(y: Tensor, grad: Tensor, t: int = t, rate: float = rate) -> Tensor:
            nonlocal mean, square
            d = steps.shortened(grad)
            if decay and is_decoupled:
                y = y * (1.0 - rate * decay)
            elif decay:
                d = d + decay * y
            mean = _average(mean, d, beta1)
            square = _average(square, d * d, beta2)
            size = torch.sqrt(square) / (1.0 - beta2**t) ** 0.5 + options["eps"]
            return y - rate / (1.0 - beta1**t) * mean / size

        yield rule


def _average(before: Tensor | None, new: Tensor, beta: float) -> Tensor:
    return (1.0 - beta) * new if before is None else beta * before + (1.0 - beta) * new
