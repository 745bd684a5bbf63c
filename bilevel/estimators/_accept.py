"""Whether a problem is one that the library, or a method, can take."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bilevel import _tree
from bilevel._autodiff import unused_leaves
from bilevel._errors import ObjectiveError
from bilevel._problem import (
    CONSTRAINTS,
    BilevelProblem,
    constraint_value,
    lower_value,
    projected_by,
    split_data,
    upper_value,
)
from bilevel._returned import check_size
from bilevel._solution import Evaluations
from bilevel._types import Tree


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
        return upper_value(problem, u, v, parts.upper)

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
        given = "" if data is None else f", data {_described(data)}"
        error.add_note(
            "While calling the objectives of the BilevelProblem for the first time, "
            f"with x0 {_tree.shapes(x)}, y0 {_tree.shapes(y)}{given}."
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


def check_once(problem: BilevelProblem, x: Tree, y: Tree, data: Any) -> None:
    """`check_problem`, unless it passed at such trees before: it takes a gradient of F and of f."""
    _tree.check_variable(x, "x0")
    _tree.check_variable(y, "y0")
    kinds = _tree.kind(x), _tree.kind(y)
    if kinds not in problem.programs.checked:
        check_problem(problem, x, y, data)
        problem.programs.checked.add(kinds)


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


def _described(data: Any) -> str:
    """The kind of a step's data, and of a tensor the shape."""
    return f"{tuple(data.shape)}" if isinstance(data, Tensor) else f"of kind {type(data).__name__}"


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
