"""What a hypergradient estimator is given, and what it returns."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from bilevel import _tree
from bilevel._errors import check_kind
from bilevel._oracle import Oracle
from bilevel._problem import (
    BilevelProblem,
    ravel,
)
from bilevel._solution import Evaluations, Status
from bilevel._types import Tree
from bilevel.estimators._accept import check_once, refuse_constraints

_LINEAR_SOLVED = 1e-6  # relative residual up to which a linear system counts as solved, in float64
FALLEN = (
    1e-2  # what may be left of the first gradient of f where the lower problem counts as solved
)


def linear_tolerance(dtype: torch.dtype, tol: float = 0.0) -> float:
    """The relative residual up to which the linear system of an implicit hypergradient counts as solved.

    Where the lower problem may be left at `tol`, so may be the linear system, as long as that says something: the
    error follows both.
    """
    return max(_LINEAR_SOLVED, 100.0 * torch.finfo(dtype).eps, min(tol, FALLEN))


@dataclass(frozen=True)
class Estimate:
    """A hypergradient and what is known about it.

    Attributes:
        grad: The hypergradient, a tree like x.
        y: The lower variable at which it was taken, a tree like y.
        value: The upper value whose gradient this is: F(x, y), or phi of the value-function methods.
        status: CONVERGED, or why the numbers are not to be trusted.
        info: Measured numbers by name; `lower_residual` is always among them.
        noise: Rounding error of `value`.
        memory: What the next estimate nearby can start from.
        evaluations: What this estimate cost.
    """

    grad: Tree
    y: Tree
    value: float
    status: Status = Status.CONVERGED
    info: Mapping[str, float] = field(default_factory=dict[str, float])
    noise: float = 0.0
    memory: Mapping[str, Any] = field(default_factory=dict[str, Any])
    evaluations: Evaluations = field(default_factory=Evaluations)

    def kept(self) -> dict[str, Any]:
        """What a solver's memory holds of this estimate, beside y and `memory`: tensors and plain numbers."""
        return {
            "grad": self.grad,
            "value": self.value,
            "status": self.status.name,
            "info": dict(self.info),
            "noise": self.noise,
        }

    @classmethod
    def recalled(cls, kept: Mapping[str, Any], y: Tensor, memory: Mapping[str, Any]) -> Estimate:
        """The estimate again, from what `kept` gave."""
        return cls(
            grad=kept["grad"],
            y=y,
            value=kept["value"],
            status=Status[kept["status"]],
            info=kept["info"],
            noise=kept["noise"],
            memory=memory,
        )


class Estimator(ABC):
    """Estimates the gradient of the upper value with respect to the upper variable.

    Attributes:
        constraints: The constraints of a `BilevelProblem` that the estimator takes into account, by field name.
    """

    constraints: ClassVar[tuple[str, ...]] = ()

    @property
    def pessimistic(self) -> bool:
        """Whether y maximizes F over the lower solutions instead of minimizing it."""
        return False

    def precompiled(self, problem: BilevelProblem, x: Tree, y: Tree, data: Any) -> Estimate | None:
        """The estimate by a program that was compiled for such x and y before, or None where there is none."""
        return None

    @abstractmethod
    def estimate(
        self,
        problem: BilevelProblem,
        x: Tensor,
        y: Tensor,
        data: Any = None,
        memory: Mapping[str, Any] | None = None,
    ) -> Estimate:
        """The hypergradient at `x`, for a problem over vectors.

        Args:
            problem: The problem over vectors (see `bilevel.hypergradient` for trees).
            x: Upper variable, shape (m,).
            y: Where the lower solve starts, shape (n,).
            data: A `Batch`, or what both objectives get as their third argument.
            memory: `Estimate.memory` of an estimate nearby, or None.
        """


def failed(oracle: Oracle, x: Tensor, y: Tensor, status: Status) -> Estimate:
    """An estimate without numbers, where `status` says why there are none."""
    return Estimate(
        grad=torch.full_like(x, math.nan),
        y=y,
        value=math.inf,
        status=status,
        info={"lower_residual": math.inf},
        evaluations=oracle.evaluations,
    )


def hypergradient(
    problem: BilevelProblem, x: Tree, y: Tree, method: Estimator, data: Any = None
) -> Estimate:
    r"""The hypergradient $d F(x, y^*(x)) / dx$ at `x`, by `method`.

    The lower problem is solved from `y` by the method's own minimizer, so that `Estimate.y` is
    (an approximation of) $y^*(x)$; nothing that is passed in is modified.

    Args:
        problem: The problem.
        x: Upper variable.
        y: Where the lower solve starts.
        method: The estimator, e.g. `Implicit()`. Constraints are refused unless the estimator takes them; upper ones
            change no hypergradient.
        data: A `Batch`, or what both objectives get as their third argument.

    Returns:
        The estimate; `Estimate.status` says whether it is to be trusted. How far `grad` is from the true hypergradient
        is in `Estimate.info["error_bound"]`, where `Implicit(error_bound=True)` or `ValueFunction(error_bound=True)`
        asks for it: it costs a linear solve more.

    Raises:
        StructureError: `x` or `y` is no tree of floating tensors.
        ObjectiveError: An objective returns no scalar, or x or y is used by no objective.
        TypeError: `problem` or `method` is of another kind.
        ValueError: The problem has constraints that `method` does not take.

    Example:
        >>> import torch, bilevel as bl
        >>> problem = bl.BilevelProblem(
        ...     upper=lambda x, y, data: 0.5 * ((y - 1.0) ** 2).sum(),
        ...     lower=lambda x, y, data: 0.5 * ((y - 3.0 * x) ** 2).sum(),
        ... )
        >>> bl.hypergradient(problem, torch.ones(1), torch.zeros(1), method=bl.Implicit()).grad
        tensor([6.])
    """
    mend = "Pass `BilevelProblem(upper, lower)`."
    check_kind("hypergradient(problem, ...)", problem, BilevelProblem, mend)
    mend = "Pass an estimator, e.g. `Implicit()`; a solver goes to `solve`."
    check_kind("hypergradient(method=...)", method, Estimator, mend)
    known = method.precompiled(problem, x, y, data)
    if known is not None:
        return known
    check_once(problem, x, y, data)
    refuse_constraints(problem, "hypergradient", method.constraints)
    flat, (x_vector, y_vector), unravel_x, unravel_y = ravel(
        problem, _tree.detach(x), _tree.detach(y)
    )
    estimate = method.estimate(flat, x_vector, y_vector, data)
    return replace(estimate, grad=unravel_x(estimate.grad), y=unravel_y(estimate.y))
