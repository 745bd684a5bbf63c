"""Adam and AdamW in the operations of `torch.optim`, bit for bit, for all leaves at once and without its wrapper."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

foreach: Any = torch  # the stubs of its kernels for lists are untyped
#: The options of the two, with their defaults.
DEFAULTS: dict[Any, dict[str, Any]] = {
    torch.optim.Adam: {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0},
    torch.optim.AdamW: {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 1e-2},
}


class PlainAdam(NamedTuple):
    """The numbers of Adam that stay the same from step to step."""

    beta1: float
    beta2: float
    eps: float
    decay: float
    is_decoupled: bool

    def step(
        self,
        variables: Sequence[Tensor],
        grads: Sequence[Tensor],
        slots: Sequence[Mapping[str, Any]],
        t: int,
        rate: float,
    ) -> tuple[list[Tensor], list[dict[str, Any]]]:
        """New variables and slots after step number `t`, >= 1."""
        leaves = [leaf.detach() for leaf in variables]
        grads = [grad.detach() for grad in grads]
        if slots[0]:
            count: Tensor = slots[0]["step"] + 1
            means = [slot["exp_avg"] for slot in slots]
            squares = [slot["exp_avg_sq"] for slot in slots]
        else:
            is_wide = torch.get_default_dtype() == torch.float64
            count = torch.ones((), dtype=torch.float64 if is_wide else torch.float32)
            means = squares = [torch.zeros_like(leaf) for leaf in leaves]
        if self.is_decoupled and self.decay:
            leaves = foreach._foreach_mul(leaves, 1 - rate * self.decay)
        elif self.decay:
            grads = foreach._foreach_add(grads, leaves, alpha=self.decay)
        means = foreach._foreach_lerp(means, grads, 1 - self.beta1)
        squares = foreach._foreach_mul(squares, self.beta2)
        foreach._foreach_addcmul_(squares, grads, grads, 1 - self.beta2)
        sizes = foreach._foreach_sqrt(squares)
        foreach._foreach_div_(sizes, (1 - self.beta2**t) ** 0.5)
        foreach._foreach_add_(sizes, self.eps)
        new = foreach._foreach_addcdiv(leaves, means, sizes, -(rate / (1 - self.beta1**t)))
        pairs = zip(means, squares, strict=True)
        return new, [{"step": count, "exp_avg": m, "exp_avg_sq": s} for m, s in pairs]


def plain_adam(optimizer: object, options: Mapping[str, Any]) -> PlainAdam | None:
    """Its numbers, where `optimizer` is Adam or AdamW with no other options; None too where torch refuses them."""
    defaults = DEFAULTS.get(optimizer)
    if defaults is None or not options.keys() <= defaults.keys():
        return None
    given = {**defaults, **options}
    (beta1, beta2), eps, decay = given["betas"], given["eps"], given["weight_decay"]
    numbers = (beta1, beta2, eps, decay)
    if not all(isinstance(number, float | int) and number >= 0.0 for number in numbers):
        return None
    if not (beta1 < 1.0 and beta2 < 1.0):
        return None
    return PlainAdam(beta1, beta2, eps, decay, optimizer is torch.optim.AdamW)
