"""SGD, Adam and AdamW of `torch.optim` as operations on tensors that can be traced, rates and counts among them.

`_adam` has the same steps bit for bit, which a trace cannot: there the rate and the count are numbers of Python.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bilevel.optim._adam import ADAM_OPTIONS
from bilevel.optim.torch import Torch

_OPTIONS: dict[Any, dict[str, Any]] = {
    torch.optim.SGD: {"momentum": 0.0, "dampening": 0.0, "weight_decay": 0.0, "nesterov": False},
    **ADAM_OPTIONS,
}
Moments = tuple[
    Tensor, ...
]  # what an optimizer keeps of the gradients before, each like the variable


@dataclass(frozen=True)
class WrittenOut:
    """An optimizer without its rate; hashable.

    Attributes:
        optimizer: SGD, Adam or AdamW of `torch.optim`.
        max_norm: See `Torch`.
        options: The remaining arguments of the optimizer, with its defaults.
    """

    optimizer: type[torch.optim.Optimizer]
    max_norm: float | None
    options: tuple[tuple[str, Any], ...]

    def first(self, y: Tensor) -> Moments:
        """The moments before the first step."""
        if self.optimizer is not torch.optim.SGD:
            return torch.zeros_like(y), torch.zeros_like(y)
        return (torch.zeros_like(y),) if dict(self.options)["momentum"] else ()

    def moved(
        self,
        y: Tensor,
        grad: Tensor,
        moments: Moments | None,
        t: int | Tensor,
        rate: float | Tensor,
    ) -> tuple[Tensor, Moments]:
        """The next variable and moments.

        Args:
            y: Shape (n,) or (K, n).
            grad: Like y.
            moments: Those of the step before; None before the first.
            t: Number of the step, >= 1.
            rate: Its learning rate.
        """
        options, d = dict(self.options), self._shortened(grad)
        if self.optimizer is torch.optim.SGD:
            return _sgd(options, y, d, moments, t, rate)
        options["is_decoupled"] = self.optimizer is torch.optim.AdamW
        return _adam(options, y, d, moments, t, rate)

    def _shortened(self, grad: Tensor) -> Tensor:
        """The gradient no longer than `max_norm`."""
        if self.max_norm is None:
            return grad
        length = torch.sqrt(torch.sum(grad * grad, dim=-1, keepdim=True))
        return grad * (self.max_norm / length).clamp(max=1.0)


def written_out(minimizer: object, rule: str, mend: str) -> WrittenOut:
    """The optimizer of a `Torch`.

    Args:
        minimizer: What should be a `Torch` of such an optimizer.
        rule: What the error says must hold.
        mend: What it says to pass instead.

    Raises:
        ValueError: It is something else, or has options that are not written out here.
    """
    if not isinstance(minimizer, Torch):
        raise ValueError(f"{rule} Got {type(minimizer).__name__}. {mend}")
    known = _OPTIONS.get(minimizer.optimizer)
    if known is None:
        got = getattr(minimizer.optimizer, "__name__", repr(minimizer.optimizer))
        raise ValueError(f"{rule} Got {got}. {mend}")
    strange = sorted(set(minimizer.options) - set(known))
    if strange:
        raise ValueError(
            f"{rule} Got the options {strange}; known are {sorted(known)}. Leave out the others."
        )
    return WrittenOut(
        optimizer=minimizer.optimizer,  # pyright: ignore[reportArgumentType]  # a key of _OPTIONS
        max_norm=minimizer.max_norm,
        options=tuple(
            (name, tuple(option) if name == "betas" else option)  # given as a list too
            for name, option in sorted({**known, **minimizer.options}.items())
        ),
    )


def _sgd(
    options: dict[str, Any],
    y: Tensor,
    d: Tensor,
    moments: Moments | None,
    t: int | Tensor,
    rate: float | Tensor,
) -> tuple[Tensor, Moments]:
    momentum: float = options["momentum"]
    if options["weight_decay"]:
        d = d + options["weight_decay"] * y
    if not momentum:
        return y - rate * d, ()
    damped = d
    if options["dampening"]:  # but the first gradient is taken whole
        late = (t > 1).to(t.dtype) if isinstance(t, Tensor) else t > 1
        damped = d * (1.0 - options["dampening"] * late)
    velocity = momentum * moments[0] + damped if moments else damped
    d = d + momentum * velocity if options["nesterov"] else velocity
    return y - rate * d, (velocity,)


def _adam(
    options: dict[str, Any],
    y: Tensor,
    d: Tensor,
    moments: Moments | None,
    t: int | Tensor,
    rate: float | Tensor,
) -> tuple[Tensor, Moments]:
    beta1, beta2 = options["betas"]
    if options["is_decoupled"]:
        y = y * (1.0 - rate * options["weight_decay"])
    elif options["weight_decay"]:
        d = d + options["weight_decay"] * y
    mean, square = moments or (None, None)
    mean = _average(mean, d, beta1)
    square = _average(square, d * d, beta2)
    size = torch.sqrt(square) / (1.0 - beta2**t) ** 0.5 + options["eps"]
    return y - rate / (1.0 - beta1**t) * mean / size, (mean, square)


def _average(before: Tensor | None, new: Tensor, beta: float) -> Tensor:
    return (1.0 - beta) * new if before is None else beta * before + (1.0 - beta) * new
