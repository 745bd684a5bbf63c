"""A point of the constrained lower problem at a fixed x, with its multipliers, and the problem linearized there."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from bilevel import _tree
from bilevel._oracle import CountedGradient
from bilevel._solution import Status
from bilevel.estimators._constraints import Linearized, positive

linalg: Any = torch.linalg  # its stubs are untyped


class KKTModel:
    """What the KKT conditions at a point and their matrix are made of; the Hessian is formed once.

    Attributes:
        grad: Of f in y, shape (n,).
        inequality: The constraint h, linearized.
        equality: The equalities, linearized.
        lagrangian: The gradient of L in y, with its products.
    """

    def __init__(
        self,
        grad: Tensor,
        inequality: Linearized,
        equality: Linearized,
        lagrangian: CountedGradient,
    ) -> None:
        self.grad, self.inequality, self.equality = grad, inequality, equality
        self.lagrangian = lagrangian

    @cached_property
    def hessian(self) -> Tensor:
        """Of L in y, shape (n, n)."""
        return self.lagrangian.hessian()

    def slope(self, size: float) -> float:
        """The unit of a gradient in y: its size, or what the curvature makes of one unit of y."""
        return max(_tree.length(self.grad), float(linalg.matrix_norm(self.hessian)) * size) or 1.0

    def depth_and_force(self, multipliers: Tensor, size: float) -> tuple[Tensor, Tensor]:
        """The values of h and the multipliers, (k,), both in units, so that they compare."""
        along = reach(self.inequality, size)
        return self.inequality.value / along, multipliers * along / (self.slope(size) * size)


@dataclass(frozen=True)
class KKTPoint:
    """A point of the lower problem and how well it satisfies the KKT conditions.

    Attributes:
        y: The point, shape (n,).
        value: f there.
        multipliers: Of h, shape (k,), >= 0.
        equality_multipliers: Of the equalities, shape (l,).
        active: Which of h hold y: those with a positive multiplier, shape (k,).
        residual: Largest violation of the KKT conditions, each relative to its own size.
        infeasibility: The part of `residual` that is due to the constraints.
        status: CONVERGED, LOWER_UNSOLVED, LOWER_UNBOUNDED, INFEASIBLE or NONFINITE.
        model: The problem linearized there, where it was needed to measure the residual.
    """

    y: Tensor
    value: float
    multipliers: Tensor
    equality_multipliers: Tensor
    active: Tensor
    residual: float
    infeasibility: float
    status: Status
    model: KKTModel | None = field(default=None, repr=False, compare=False)

    @classmethod
    def free(cls, y: Tensor, value: float) -> KKTPoint:
        """A solution of a lower problem without constraints."""
        return cls._bare(y, value, 0.0, Status.CONVERGED)

    @classmethod
    def without_answer(cls, y: Tensor, status: Status) -> KKTPoint:
        """Where the search for a solution ended with none, for the reason `status`."""
        value = -math.inf if status is Status.LOWER_UNBOUNDED else math.nan
        return cls._bare(y, value, math.inf, status)

    @classmethod
    def _bare(cls, y: Tensor, value: float, residual: float, status: Status) -> KKTPoint:
        none, no = y.new_zeros(0), y.new_zeros(0, dtype=torch.bool)
        return cls(y, value, none, none, no, residual, residual, status)


def reach(constraint: Linearized, size: float) -> Tensor:
    """How much each entry changes over one unit of y, which is `size`, (k,)."""
    return positive(linalg.vector_norm(constraint.in_y, dim=1) * size)
