"""What the tests of the upper level find, and the point that they are made at."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bilevel import _tree
from bilevel._oracle import Oracle
from bilevel._returned import excess
from bilevel._solution import Status
from bilevel.estimators._constraints import (
    constraint_values,
    linearize,
)
from bilevel.estimators._gap import rounding
from bilevel.estimators._linear_program import Units
from bilevel.estimators._search import Local, LowerSolver

linalg: Any = torch.linalg  # its stubs are untyped
DENSE = 256  # largest y whose Hessian is formed
_RIVALS = 3  # other lower minima that are followed along a step


@dataclass(frozen=True)
class Stationarity:
    """What was found about the upper level.

    Attributes:
        hypergradient: Norm of the projected gradient of the Lagrangian, or None where there is none.
        curvature: Smallest eigenvalue of the lower Hessian along the active constraints, or None.
        problem: What is wrong, or empty.
        tested: What holds, in sentences.
        assumptions: What was not tested.
        untested: Why it is not known whether the upper level is stationary; empty where it is known.
        is_unique: Whether the lower solution is known to be locally the only one.
    """

    hypergradient: float | None = None
    curvature: float | None = None
    problem: str = ""
    tested: tuple[str, ...] = ()
    assumptions: tuple[str, ...] = ()
    untested: str = ""
    is_unique: bool = False


class UpperPoint:
    """A point whose lower problem is solved, with what every test of its upper level needs.

    Attributes:
        oracle: The problem over vectors.
        x: Upper variable, shape (m,).
        local: The lower solution found from y.
        y: Where it lies, shape (n,).
        rivals: Where the lowest of the other lower minima lie.
        data: The data of the problem.
        units: Of x, y and F, and the step of the tests.
        sign: 1 where y minimizes F over the lower solutions, -1 where it maximizes it.
        value: F there.
        upper_x: Its gradient in x.
        upper_y: Its gradient in y.
        held: The upper inequalities.
        equal: The upper equalities.
    """

    def __init__(
        self,
        oracle: Oracle,
        x: Tensor,
        local: Local,
        others: Sequence[Local],
        data: Any,
        units: Units,
        sign: float,
    ) -> None:
        self.oracle, self.x, self.local, self.data = oracle, x, local, data
        self.y, self.units, self.sign = local.y, units, sign
        self.rivals = _rivals(local, others, units.y)
        value, self.upper_x, self.upper_y = oracle.upper_grad(x, local.y)
        self.value = float(value)
        self.held = linearize(oracle.problem, "upper_constraint", x, local.y, data)
        self.equal = linearize(oracle.problem, "upper_equality", x, local.y, data)

    def solver(self, x: Tensor, *, is_smooth: bool = True) -> LowerSolver:
        """Solves the lower problem at an x."""
        return LowerSolver(self.oracle, x, self.data, self.units.y, is_smooth=is_smooth)

    def constraint(self, name: str, x: Tensor, y: Tensor) -> Tensor:
        """The upper constraint `name` there."""
        with torch.no_grad():
            return constraint_values(self.oracle.problem, name, x, y, self.data)

    def is_feasible(self, x: Tensor, y: Tensor) -> bool:
        """Whether the upper constraints hold there as well as at the point."""
        for name, held in (("upper_constraint", self.held), ("upper_equality", self.equal)):
            after = excess(self.constraint(name, x, y), name)
            size = linalg.vector_norm(held.in_x, dim=1) * self.units.x
            size = size + linalg.vector_norm(held.in_y, dim=1) * self.units.y
            if bool((after > excess(held.value, name) + 1e-2 * self.units.step * size).any()):
                return False
        return True

    def is_overtaken(self, solver: LowerSolver, solved: Local) -> bool:
        """Whether another minimum of f is the lower one here, so that y would jump to it."""
        found = [solver.solve(y) for y in self.rivals]
        least = min(
            [other.value for other in found if other.status is Status.CONVERGED], default=math.inf
        )
        return least < solved.value - rounding(solved.value, solved.y.dtype)

    def noise(self) -> float:
        """Changes of F below this mean nothing."""
        return 1e-8 * self.units.upper + rounding(self.value, self.x.dtype)


def _rivals(local: Local, others: Sequence[Local], size: float) -> list[Tensor]:
    """The lowest of the other minima, each once."""
    chosen = [local.y]
    apart = 1e-3 * size * math.sqrt(local.y.numel())
    for other in sorted(others, key=lambda other: other.value):
        if len(chosen) <= _RIVALS and all(_tree.length(other.y - y) > apart for y in chosen):
            chosen.append(other.y)
    return chosen[1:]
