"""A test problem together with its answer."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bilevel._problem import BilevelProblem
from bilevel._tree import norm


@dataclass(frozen=True, eq=False)
class ZooProblem:
    """A problem and its answer.

    Attributes:
        name: The problem and its sizes; a case of `cases` names its start as well.
        problem: The problem; its data is None.
        starts: Pairs (x0, y0) from which a solver is expected to find the answer.
        x_star: The global optimum, shape (n_x,).
        y_star: The lower variable there, shape (n_y,).
        upper_star: F there.
        lower_star: f there.
        tolerance: How far from an optimum x may end; see `error`.
        relative: Whether the error is relative to the norm of `x_star`.
        reason: Why this tolerance, or why these starts.
        reference: Where the problem and its answer come from.
        local_optima: Further x at which a solver may end.

    Example:
        >>> from bilevel.testing.problems import bda
        >>> case = bda()
        >>> case.error(torch.tensor([1.5]))
        0.5
        >>> [start.name for start in case.cases()][:2]
        ['BDA from x = 0, y = 0', 'BDA from x = 3, y = 2']
    """

    name: str
    problem: BilevelProblem
    starts: tuple[tuple[Tensor, Tensor], ...]
    x_star: Tensor
    y_star: Tensor
    upper_star: float
    lower_star: float
    tolerance: float
    reason: str
    reference: str
    relative: bool = False
    local_optima: tuple[Tensor, ...] = ()

    @property
    def x0(self) -> Tensor:
        """The upper variable of the first start."""
        return self.starts[0][0]

    @property
    def y0(self) -> Tensor:
        """The lower variable of the first start."""
        return self.starts[0][1]

    def error(self, x: Tensor) -> float:
        """The distance of x from the nearest optimum, relative where the problem says so."""
        optima = (self.x_star, *self.local_optima)
        distance = min(float(norm(x - optimum)) for optimum in optima)
        return distance / float(norm(self.x_star)) if self.relative else distance

    def cases(self) -> tuple[ZooProblem, ...]:
        """The same problem once for each start."""
        if len(self.starts) == 1:
            return (self,)
        return tuple(
            replace(self, name=f"{self.name} from x = {x[0]:g}, y = {y[-1]:g}", starts=((x, y),))
            for x, y in self.starts
        )


def vector(*numbers: float) -> Tensor:
    """A float64 vector."""
    return torch.tensor(numbers, dtype=torch.float64)
