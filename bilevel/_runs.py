"""How far many runs are that go on side by side."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bilevel.estimators._fused import FIRST, Found

linalg: Any = torch.linalg  # its stubs are untyped


@dataclass(frozen=True)
class Runs:
    """How far the runs of K problems are; one that has ended stands still in all of it.

    Attributes:
        x: The upper variables, shape (K, m).
        y: The lower variables, shape (K, n).
        warm: What the next linear systems start from, shape (K, n).
        numbers: What the last good estimates measured, shape (K, N); NaN where there is none.
        goes: Which go on, shape (K,).
        converged: Which have arrived, shape (K,); those that neither have nor go on met numbers that are not finite.
        taken: Upper steps of each, shape (K,).
        length: Norms of the last hypergradients, shape (K,).
        scale: Largest gradients of f that a solve began with, shape (K,).
        steps: Upper steps that were computed, as many as the longest run took.
    """

    x: Tensor
    y: Tensor
    warm: Tensor
    numbers: Tensor
    goes: Tensor
    converged: Tensor
    taken: Tensor
    length: Tensor
    scale: Tensor
    steps: int

    @classmethod
    def at(cls, x: Tensor, y: Tensor) -> Runs:
        """Before the first step."""
        zeros = torch.zeros_like(x[:, 0])
        every = torch.ones_like(zeros, dtype=torch.bool)
        return cls(
            x=x,
            y=y,
            warm=torch.zeros_like(y),
            numbers=torch.full_like(y[:, :1], math.nan),
            goes=every,
            converged=~every,
            taken=zeros.long(),
            length=zeros + math.inf,
            scale=zeros,
            steps=0,
        )

    def after(self, found: Found, x: Tensor, rtol: float) -> Runs:
        """The same a step later.

        Args:
            found: The estimates, each with a leading axis of K.
            x: Where they lead, shape (K, m).
            rtol: A step no longer than this times the length of x is the last, and so is one that is not finite.
        """
        grad, y, warm, numbers = found
        goes = self.goes & torch.isfinite(numbers).all(1) & torch.isfinite(x).all(1)
        size = linalg.vector_norm(self.x, dim=1).clamp(min=1e-3 * math.sqrt(x.shape[1]))
        arrives = goes & (linalg.vector_norm(x - self.x, dim=1) <= rtol * size)
        return Runs(
            x=_where(goes, x, self.x),
            y=_where(goes, y, self.y),
            warm=_where(goes, warm, self.warm),
            numbers=_where(goes, numbers, self.numbers),
            goes=goes & ~arrives,
            converged=self.converged | arrives,
            taken=self.taken + goes,
            length=torch.where(goes, linalg.vector_norm(grad, dim=1), self.length),
            scale=torch.where(goes, torch.maximum(self.scale, numbers[:, FIRST]), self.scale),
            steps=self.steps + 1,
        )


def _where(condition: Tensor, new: Tensor, old: Tensor) -> Tensor:
    return torch.where(condition[:, None], new, old)
