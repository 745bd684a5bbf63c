"""What the checks are made of: the error, equality to the bit, and problems with a twist."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any, cast

import torch
from torch import Tensor

from bilevel import _tree
from bilevel._autodiff import LinearizedGradient
from bilevel._errors import BilevelError
from bilevel._problem import BilevelProblem, projected_by
from bilevel._solution import Evaluations, State
from bilevel._types import Objective, Tree
from bilevel.testing._case import ZooProblem

linalg: Any = torch.linalg  # its stubs are untyped


class ContractError(BilevelError, AssertionError):
    """A solver or an estimator breaks a rule that the library relies on."""


def require(rule_holds: bool, rule: str, got: object, mend: str) -> None:
    """Raises a `ContractError` in the library's one form, unless the rule holds."""
    if not rule_holds:
        raise ContractError(f"{rule}. Got {got}. {mend}")


def require_counts(name: str, evaluations: Evaluations, calls: Mapping[str, int]) -> None:
    """Raises unless the counted evaluations are the calls that happened."""
    counted = {"upper": evaluations.upper, "lower": evaluations.lower}
    require(
        counted == dict(calls),
        f"`{name}` must report the calls of the objectives that it made: {dict(calls)}",
        counted,
        "Add up the evaluations of each `Oracle` and `Estimate`.",
    )


def same(first: Any, second: Any) -> bool:
    """Equality to the bit, of states and of all that they hold; NaN equals itself."""
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        alike = first.dtype == second.dtype and first.shape == second.shape
        return alike and bool(((first == second) | (first.isnan() & second.isnan())).all())
    if isinstance(first, State) and isinstance(second, State):
        return not different_fields(first, second)
    if isinstance(first, Mapping) and isinstance(second, Mapping):
        a, b = cast("Mapping[Any, Any]", first), cast("Mapping[Any, Any]", second)
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(first, list | tuple) and isinstance(second, list | tuple):
        c, d = cast("tuple[Any, ...]", first), cast("tuple[Any, ...]", second)
        return len(c) == len(d) and all(map(same, c, d))
    if isinstance(first, float) and math.isnan(first):
        return isinstance(second, float) and math.isnan(second)
    return bool(first == second)


def different_fields(first: State, second: State) -> list[str]:
    """The names of the fields in which two states differ."""
    names = [field.name for field in fields(State)]
    return [name for name in names if not same(getattr(first, name), getattr(second, name))]


def counted(problem: BilevelProblem, calls: dict[str, int]) -> BilevelProblem:
    """The problem, counting the calls of its objectives under `"upper"` and `"lower"`."""

    def counting(name: str, fun: Objective) -> Objective:
        def objective(x: Tree, y: Tree, data: Any) -> Tensor:
            calls[name] += 1
            return fun(x, y, data)

        return objective

    upper, lower = counting("upper", problem.upper), counting("lower", problem.lower)
    return replace(problem, upper=upper, lower=lower)


def breaking(problem: BilevelProblem, level: str, after: int) -> BilevelProblem:
    """The problem, with an objective that is NaN after so many calls."""
    fun: Objective = getattr(problem, level)
    calls = 0

    def objective(x: Tree, y: Tree, data: Any) -> Tensor:
        nonlocal calls
        calls += 1
        return fun(x, y, data) * (math.nan if calls > after else 1.0)

    return replace(problem, **{level: objective})


def in_float32(problem: BilevelProblem) -> BilevelProblem:
    """The problem for variables in float32: its values and gradients have that many digits."""

    def rounded(fun: Objective) -> Objective:
        return lambda x, y, data: fun(x.double(), y.double(), data).float()

    return replace(problem, upper=rounded(problem.upper), lower=rounded(problem.lower))


def halves(vector: Tensor) -> Tree:
    """A vector as a nested tree."""
    middle = vector.numel() // 2
    return {"b": [vector[:middle].clone()], "a": (vector[middle:].clone()[:, None],)}


def whole(tree: Tree) -> Tensor:
    """The vector that `halves` made a tree of."""
    return torch.cat([tree["b"][0], tree["a"][0][:, 0]])


def over_halves(problem: BilevelProblem) -> BilevelProblem:
    """The problem over nested trees."""

    def unwrapped(fun: Objective) -> Objective:
        return lambda x, y, data: fun(whole(x), whole(y), data)

    domain = problem.domain

    def projected(x: Tree) -> Tree:
        return halves(projected_by(domain, whole(x)))

    return replace(
        problem,
        upper=unwrapped(problem.upper),
        lower=unwrapped(problem.lower),
        domain=None if domain is None else projected,
    )


def away(case: ZooProblem) -> tuple[Tensor, Tensor]:
    """A point near the start of a problem where no gradient vanishes."""
    return case.x0 + 0.3 * torch.cos(3.0 * torch.arange(case.x0.numel()).to(case.x0)), case.y0


def exact_hypergradient(case: ZooProblem, x: Tensor) -> Tensor:
    """The closed form where f is quadratic in y: torch differentiates the formula of its solution."""

    def lower(u: Tensor, v: Tensor) -> Tensor:
        return case.problem.lower(u, v, None)

    u, zero = x.clone().requires_grad_(), torch.zeros_like(case.y0, requires_grad=True)
    hessian = LinearizedGradient(lower, x, zero).hessian()
    (slope,) = torch.autograd.grad(lower(u, zero), zero, create_graph=True)
    (grad,) = torch.autograd.grad(case.problem.upper(u, -linalg.solve(hessian, slope), None), u)
    return grad


def distance(found: Tensor, exact: Tensor) -> float:
    """The relative distance."""
    return _tree.length(found.to(exact) - exact) / _tree.length(exact)
