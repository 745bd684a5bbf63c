"""What a hypergradient estimator is given, and what it returns."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from bilevel import _tree
from bilevel._autodiff import unused_leaves
from bilevel._errors import ObjectiveError, check_kind
from bilevel._oracle import Oracle
from bilevel._problem import (
    CONSTRAINTS,
    BilevelProblem,
    constraint_value,
    lower_value,
    projected_by,
    ravel,
    split_data,
)
from bilevel._returned import check_size, scalar
from bilevel._solution import Evaluations, Status
from bilevel._types import Tree

_LINEAR_SOLVED = 1e-6  # relative residual up to which a linear system counts as solved, in float64
FALLEN = (
    1e-2  # what may be left of the first gradient of f where the lower problem counts as solved
)


def linear_tolerance(dtype: torch.dtype) -> float:
    """The relative residual up to which the linear system of an implicit hypergradient counts as solved."""
    return max(_LINEAR_SOLVED, 100.0 * torch.finfo(dtype).eps)


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
    check_problem(problem, x, y, data)
    refuse_constraints(problem, "hypergradient", method.constraints)
    flat, (x_vector, y_vector), unravel_x, unravel_y = ravel(
        problem, _tree.detach(x), _tree.detach(y)
    )
    estimate = method.estimate(flat, x_vector, y_vector, data)
    return replace(estimate, grad=unravel_x(estimate.grad), y=unravel_y(estimate.y))


def refuse_constraints(problem: BilevelProblem, name: str, allowed: tuple[str, ...] = ()) -> None:
    """Raises where `problem` has constraints that are not `allowed`: the caller called `name` would ignore them."""
    for kind in CONSTRAINTS:
        if getattr(problem, kind) is not None and kind not in allowed:
            raise ValueError(
                f"`{name}` takes a domain of x, and no `BilevelProblem({kind}=...)`. Got one. "
                "Put bounds on x into `domain`, and a constraint on y into the objective as a penalty or a barrier, "
                "or use `ASBLO()` on the full batch, which takes all kinds; `ImplicitKKT` takes lower ones."
            )


def check_problem(problem: BilevelProblem, x: Tree, y: Tree, data: Any) -> Evaluations:
    """Raises where the variables, or the way in which the objectives use them, cannot be right.

    Returns:
        What the check evaluated: each objective once, with its gradient.

    Raises:
        StructureError: `x` or `y` is no tree of floating tensors.
        ObjectiveError: An objective returns no scalar, a constraint no tensor of finite entries and of one size, or
            a variable is used neither by the objectives nor by the constraints that should depend on it.
    """
    _tree.check_variable(x, "x0")
    _tree.check_variable(y, "y0")
    _check_domain(problem, x)
    parts = split_data(data)

    def upper(u: Tree, v: Tree) -> Tensor:
        return scalar(problem.upper(u, v, parts.upper), "upper")

    def lower(u: Tree, v: Tree) -> Tensor:
        return lower_value(problem, u, v, parts.lower)

    try:
        unused_in_upper = unused_leaves(upper, x, y)
        unused_in_lower = unused_leaves(lower, x, y)
        of_constraints = {
            name: unused_leaves(partial(_total, problem, name, data), x, y)
            for name in CONSTRAINTS
            if getattr(problem, name) is not None
        }
    except Exception as error:
        error.add_note(
            "While calling the objectives of the BilevelProblem for the first time, "
            f"with x0 {_tree.shapes(x)}, y0 {_tree.shapes(y)}."
        )
        raise
    of_upper = [unused_in_upper, *(u for n, u in of_constraints.items() if n.startswith("upper"))]
    of_lower = [unused_in_lower, *(u for n, u in of_constraints.items() if n.startswith("lower"))]
    free = _common([unused[1] for unused in of_lower])
    if free:
        raise ObjectiveError(
            "`BilevelProblem(lower=...)` must depend on every leaf of y, or a lower constraint must. "
            f"Got no dependence on {_leaf_names('y0', y, free)}. "
            "Use it in the lower objective, or leave it out of y0."
        )
    nowhere = _common([unused[0] for unused in (*of_upper, *of_lower)])
    if nowhere:
        raise ObjectiveError(
            "The objectives must depend on every leaf of x. "
            f"Got no dependence of either on {_leaf_names('x0', x, nowhere)}. "
            "Use it in `upper` or `lower` (without `.detach()` or `.item()`), or leave it out of x0."
        )
    if len(_common([unused[1] for unused in of_upper])) == len(_tree.leaves(y)):
        raise ObjectiveError(
            "`BilevelProblem(upper=...)` must depend on y, or an upper constraint must. "
            "Got no dependence on any leaf of y0. "
            "Without it the problem has one level: minimize `upper` over x with any optimizer."
        )
    return Evaluations(upper=1, lower=1, upper_grad=1, lower_grad=1)


def _total(problem: BilevelProblem, name: str, data: Any, x: Tree, y: Tree) -> Tensor:
    """The sum of a constraint, after a look at its entries."""

    def entries() -> Tensor:
        return constraint_value(problem, name, x, y, data)

    value = entries()
    check_size(entries(), value, name)
    bottomless = [i for i, is_bottomless in enumerate(torch.isneginf(value)) if is_bottomless]
    if bottomless:
        raise ObjectiveError(
            f"`BilevelProblem({name}=...)` must have finite entries at x0, y0. "
            f"Got -inf in its entries {bottomless}. Leave out what never binds, or start elsewhere."
        )
    return value.sum()


def _common(parts: list[list[int]]) -> list[int]:
    """What is in all of the lists."""
    return [i for i in parts[0] if all(i in part for part in parts)]


def _check_domain(problem: BilevelProblem, x: Tree) -> None:
    """Raises where the domain is no projection: what it returns is not finite, or not left alone."""
    once = projected_by(problem.domain, _tree.detach(x))
    again = projected_by(problem.domain, once)
    rule = "`BilevelProblem(domain=...)` must project x onto a set: its image must be finite and stay where it is."
    if _tree.is_finite(x) and not _tree.is_finite(once):
        raise ObjectiveError(
            f"{rule} Got NaN or infinity at x0. Return the nearest point of the set."
        )
    moved = _tree.length(_tree.axpy(-1.0, once, again))
    eps = max(torch.finfo(leaf.dtype).eps for leaf in _tree.leaves(once))
    if moved > math.sqrt(eps) * (1.0 + _tree.length(once)):
        raise ObjectiveError(
            f"{rule} Got an image that the domain moves on by {moved:.3g}. Return the nearest point of the set."
        )


def _leaf_names(variable: str, tree: Tree, indices: list[int]) -> str:
    names = _tree.names(tree)
    return ", ".join(f"`{variable}{names[i]}`" for i in indices)
