"""Minimizing by a number of steps that does not depend on the numbers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

#: y, the length of the first gradient, and what the steps know of y beside its gradient: 1 that its value can fall no
#: further than it rounds, -1 that the curvature there is negative, 0 nothing.
Reached = tuple[Tensor, Tensor, Tensor]


class FixedSteps(ABC):
    """The same operations on tensors whatever the numbers are, which can be traced and batched."""

    @abstractmethod
    def minimized(self, fun: Callable[[Tensor], Tensor], y: Tensor, tol: float) -> Reached:
        """Where the steps lead from y, shape (n,).

        Steps after the gradient has fallen to `tol` times the first one change nothing.
        """

    @abstractmethod
    def cost(self, n: int) -> tuple[int, int, int]:
        """Values, gradients and Hessian-vector products of all steps together, for n variables."""


def length(vector: Tensor) -> Tensor:
    """The Euclidean norm, whose derivative nobody asks for; the squares of its entries need not fit into the dtype."""
    peak = vector.abs().amax()
    unit = torch.where(peak > 0.0, peak, 1.0)
    part = vector / unit
    return unit * torch.sqrt(torch.sum(part * part))
