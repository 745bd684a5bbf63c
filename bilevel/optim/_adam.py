"""The steps of `Adam` and `AdamW` as pure functions, bit for bit those of `torch.optim`.

On the CPU `torch.optim` takes the leaves one by one in Python. The same operations over lists of tensors do not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bilevel._tree import kernels

#: The options of the two, with their defaults.
ADAM_OPTIONS: dict[Any, dict[str, Any]] = {
    torch.optim.Adam: {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0},
    torch.optim.AdamW: {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 1e-2},
}


@dataclass(frozen=True)
class Adam:
    """The numbers of `torch.optim.Adam` or `AdamW`.

    Attributes:
        beta1: Decay of the gradients' average, in [0, 1).
        beta2: Decay of the squares' average, in [0, 1).
        eps: Added to the root, >= 0.
        weight_decay: >= 0.
        is_decoupled: Whether it acts beside the gradient, as in `AdamW`.
    """

    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    is_decoupled: bool

    def step(
        self,
        leaves: Sequence[Tensor],
        grads: Sequence[Tensor],
        slots: Sequence[Mapping[str, Any]],
        lr: float,
    ) -> tuple[list[Tensor], list[dict[str, Any]]]:
        """New leaves and slots; the arguments stay as they are.

        Args:
            leaves: The variables, on the CPU.
            grads: Their gradients.
            slots: Named as `torch.optim` names them, empty before the first step.
            lr: Learning rate, >= 0.
        """
        with torch.no_grad():
            if slots[0]:
                count = slots[0]["step"] + 1  # all leaves move together
                averages = [slot["exp_avg"].clone() for slot in slots]
                squares = kernels._foreach_mul([slot["exp_avg_sq"] for slot in slots], self.beta2)
            else:
                is_wide = torch.get_default_dtype() == torch.float64
                count = torch.ones((), dtype=torch.float64 if is_wide else torch.float32)
                averages, squares = ([torch.zeros_like(leaf) for leaf in leaves] for _ in range(2))
            t = count.item()
            # Copies keep their layout when moved in place, and with it the kernels that they will meet; a sum of
            # two tensors may have another layout.
            if self.weight_decay and self.is_decoupled:
                new = kernels._foreach_mul(leaves, 1 - lr * self.weight_decay)
            else:
                new = [leaf.clone() for leaf in leaves]
            if self.weight_decay and not self.is_decoupled:
                grads = kernels._foreach_add(grads, leaves, alpha=self.weight_decay)
            kernels._foreach_lerp_(averages, grads, 1 - self.beta1)
            kernels._foreach_addcmul_(squares, grads, grads, value=1 - self.beta2)
            roots = kernels._foreach_sqrt(squares)
            kernels._foreach_div_(roots, (1 - self.beta2**t) ** 0.5)
            kernels._foreach_add_(roots, self.eps)
            size = lr / (1 - self.beta1**t)
            kernels._foreach_addcdiv_(new, averages, roots, value=-size)
        return new, [
            {"step": count, "exp_avg": average, "exp_avg_sq": square}
            for average, square in zip(averages, squares, strict=True)
        ]


def plain_adam(
    optimizer: Any, options: Mapping[str, Any], lr: float, leaves: Sequence[Tensor]
) -> Adam | None:
    """`optimizer` where it is `Adam` or `AdamW`, with numbers in range for its options, on the CPU; else None."""
    defaults = ADAM_OPTIONS.get(optimizer)
    if defaults is None or not options.keys() <= defaults.keys():
        return None
    given = {**defaults, **options}
    betas, eps, weight_decay = given["betas"], given["eps"], given["weight_decay"]
    is_plain = (
        len(betas) == 2
        and all(isinstance(beta, float) and 0.0 <= beta < 1.0 for beta in betas)
        and all(isinstance(n, (float, int)) and n >= 0.0 for n in (eps, weight_decay, lr))
        and all(leaf.is_cpu for leaf in leaves)
    )
    if not is_plain:
        return None
    return Adam(betas[0], betas[1], eps, weight_decay, optimizer is torch.optim.AdamW)
