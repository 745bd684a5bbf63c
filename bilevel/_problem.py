"""What a user states: two objectives, their constraints, and the data of one step."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bilevel import _tree
from bilevel._box import Box
from bilevel._errors import ObjectiveError, check_kind
from bilevel._programs import Programs
from bilevel._returned import check_size, excess, samples, scalar, vector
from bilevel._types import Objective, Projection, Tree

#: The constraints of a problem, by the name of their field.
CONSTRAINTS = ("upper_constraint", "lower_constraint", "upper_equality", "lower_equality")


class Batch(NamedTuple):
    """The data of one step, one part a level: D_val and D_tr of hyperparameter search.

    `upper` is passed to the upper objective and constraint, `lower` to the lower ones. Anything
    that is not a `Batch` is passed to both levels as it is.

    Attributes:
        upper: The third argument of `BilevelProblem.upper`.
        lower: The third argument of `BilevelProblem.lower`.

    Example:
        >>> Batch(upper=1, lower=2).lower
        2
    """

    upper: Any = None
    lower: Any = None


@dataclass(frozen=True)
class BilevelProblem:
    r"""A bi-level problem as two functions.

    $$\min_x F(x, y) \quad\text{subject to}\quad
    y \in \arg\min_{y'} \{ f(x, y') : h(x, y') \le 0, \; h_=(x, y') = 0 \},
    \quad H(x, y) \le 0, \quad H_=(x, y) = 0, \quad x \in B.$$

    The lower solution set may hold many points, and f need not be convex in y.

    Attributes:
        upper: F, called as `upper(x, y, data)`; returns a scalar tensor.
        lower: f, called as `lower(x, y, data)`; returns a scalar tensor.
        upper_constraint: H, called as `upper_constraint(x, y, data)`; returns a tensor, feasible where `<= 0`.
        lower_constraint: h, likewise.
        upper_equality: $H_=$, called as `upper_equality(x, y, data)`; returns a tensor, feasible where `== 0`.
        lower_equality: $h_=$, likewise.
        domain: Projects x onto B: a `Box`, or any callable from a tree like x to a tree like x.
        per_sample: If true, `lower` returns one loss a sample, shape (n,), and f is their mean.
            Solvers then form the difference f(x, y) - f(x, z) sample by sample, which keeps its
            digits in float32 where the difference of two means loses them.
        unravel: None for a problem that a user states. Where a solver has made one over vectors of it, the two
            functions that put a vector back into the user's trees x and y. What is such a tree already passes through
            them, and so can be an argument of the functions above.
        programs: What was compiled for the problem, and for those over vectors that were made of it, and at what trees
            it was checked.

    Raises:
        TypeError: One of the functions is not callable, or does not take the arguments that it is called with.

    Example:
        >>> problem = BilevelProblem(
        ...     upper=lambda x, y, data: ((y - 1.0) ** 2).sum() + 0.1 * (x**2).sum(),
        ...     lower=lambda x, y, data: ((y - 2.0 * x) ** 2).sum(),
        ... )
        >>> problem.lower(torch.ones(3), torch.zeros(3), None)
        tensor(12.)
    """

    upper: Objective
    lower: Objective
    upper_constraint: Objective | None = field(default=None, kw_only=True)
    lower_constraint: Objective | None = field(default=None, kw_only=True)
    upper_equality: Objective | None = field(default=None, kw_only=True)
    lower_equality: Objective | None = field(default=None, kw_only=True)
    domain: Projection | None = field(default=None, kw_only=True)
    per_sample: bool = field(default=False, kw_only=True)
    unravel: tuple[Callable[[Tensor], Tree], Callable[[Tensor], Tree]] | None = field(
        default=None, kw_only=True, repr=False
    )
    programs: Programs = field(default_factory=Programs, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name in ("upper", "lower", *CONSTRAINTS, "domain"):
            part = getattr(self, name)
            if not (callable(part) or (part is None and name not in ("upper", "lower"))):
                raise TypeError(
                    f"`BilevelProblem({name}=...)` must be callable. Got {type(part).__name__}. "
                    f"Pass a function {'of x' if name == 'domain' else 'of (x, y, data)'}."
                )
            if part is not None and self.unravel is None:
                _check_arguments(name, part)
        check_kind("BilevelProblem(per_sample=...)", self.per_sample, bool, "Pass True or False.")


def _check_arguments(name: str, fun: Callable[..., Any]) -> None:
    """Raises where `fun` cannot be called as the field `name` of a problem is; a signature may be unknown."""
    arguments = ("x",) if name == "domain" else ("x", "y", "data")
    try:
        signature = inspect.signature(fun)
    except (TypeError, ValueError):
        return
    try:
        signature.bind(*arguments)
    except TypeError:
        mend = "Add `data`, even where it is not used, and give further ones a default."
        raise ObjectiveError(
            f"`BilevelProblem({name}=...)` must be callable as `{name}({', '.join(arguments)})`. "
            f"Got a function of {signature}. "
            f"{'Take x alone.' if name == 'domain' else mend}"
        ) from None


def split_data(data: Any) -> Batch:
    """The data of each level: the parts of a `Batch`, or the same thing for both."""
    return data if isinstance(data, Batch) else Batch(upper=data, lower=data)


def data_of(name: str, data: Any) -> Any:
    """The data of the level that the field `name` of a problem belongs to."""
    parts = split_data(data)
    return parts.upper if name.startswith("upper") else parts.lower


def constrains_lower(problem: BilevelProblem) -> bool:
    """Whether the lower level has constraints."""
    return bool(problem.lower_constraint or problem.lower_equality)


def ravel(
    problem: BilevelProblem, x: Tree, y: Tree
) -> tuple[
    BilevelProblem, tuple[Tensor, Tensor], Callable[[Tensor], Tree], Callable[[Tensor], Tree]
]:
    """The same problem over two vectors, for the solvers that work with matrices.

    Returns:
        The problem over vectors, the vectors of `x` and `y`, and the functions that put a vector
        back into a tree like `x` and like `y`.
    """
    x_vector, unravel_x = _tree.ravel(x)
    y_vector, unravel_y = _tree.ravel(y)
    is_flat = x_vector is x and y_vector is y

    def over_vectors(fun: Objective) -> Objective:
        return fun if is_flat else lambda u, v, data: fun(unravel_x(u), unravel_y(v), data)

    def constraint(fun: Objective, name: str) -> Objective:
        over, first = over_vectors(fun), list[Tensor]()

        def steady(u: Tensor, v: Tensor, data: Any) -> Tensor:
            value = vector(over(u, v, data), name)
            if not first:
                first.append(value.detach())
            check_size(value, first[0], name)
            return value

        return steady

    domain = problem.domain
    if isinstance(domain, Box):
        low, high = domain.bounds(x)
        domain = Box(_tree.ravel(low)[0], _tree.ravel(high)[0])
    elif domain is not None:
        domain = _over_vectors(domain, unravel_x)
    constraints = [(name, getattr(problem, name)) for name in CONSTRAINTS]
    flat = BilevelProblem(
        over_vectors(problem.upper),
        over_vectors(problem.lower),
        **{name: constraint(fun, name) for name, fun in constraints if fun is not None},
        domain=domain,
        per_sample=problem.per_sample,
        unravel=(
            _then(unravel_x, problem.unravel and problem.unravel[0]),
            _then(unravel_y, problem.unravel and problem.unravel[1]),
        ),
    )
    kept = problem.programs.setdefault((_tree.kind(x), _tree.kind(y)), Programs())
    object.__setattr__(flat, "programs", kept)  # a flat problem is made anew for each step
    return flat, (x_vector, y_vector), unravel_x, unravel_y


def _then(
    first: Callable[[Tensor], Tree], second: Callable[[Tensor], Tree] | None
) -> Callable[[Tensor], Tree]:
    return first if second is None else lambda vector: second(first(vector))


def _over_vectors(project: Projection, unravel: Callable[[Tensor], Tree]) -> Projection:
    def projected(vector: Tensor) -> Tensor:
        return _tree.ravel(projected_by(project, unravel(vector)))[0]

    return projected


def projected_by(domain: Projection | None, x: Tree) -> Tree:
    """`domain(x)`, or `x` where there is no domain.

    Raises:
        StructureError: `domain` returns no tree like x.
    """
    if domain is None:
        return x
    image = domain(x)
    _tree.check_like(image, x, "BilevelProblem(domain=...)(x)")
    return image


def upper_value(problem: BilevelProblem, x: Tree, y: Tree, data: Any) -> Tensor:
    """F(x, y) on the data of its level, 0-d."""
    return scalar(problem.upper(x, y, data), "upper")


def lower_value(problem: BilevelProblem, x: Tree, y: Tree, data: Any) -> Tensor:
    """f(x, y) on the data of its level, 0-d: the mean where the problem is `per_sample`."""
    value = problem.lower(x, y, data)
    return samples(value).mean() if problem.per_sample else scalar(value, "lower")


def constraint_value(problem: BilevelProblem, name: str, x: Tree, y: Tree, data: Any) -> Tensor:
    """The constraint `name` of a problem that has it, on the data of its level, as a vector."""
    return vector(getattr(problem, name)(x, y, data_of(name, data)), name)


def violated(problem: BilevelProblem, x: Tree, y: Tree, data: Any) -> str:
    """The constraint that is violated most at (x, y), in words; empty where none is."""
    worst, words = 0.0, ""
    for name in CONSTRAINTS:
        if getattr(problem, name) is None:
            continue
        with torch.no_grad():
            value = constraint_value(problem, name, x, y, data)
        much = float(excess(value, name).max()) if value.numel() else 0.0
        if much > worst:
            rule = "== 0" if name.endswith("equality") else "<= 0"
            worst, words = much, f"`{name}` must be {rule}, and is violated by {much:.3g}"
    return words
