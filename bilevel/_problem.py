"""What a user states: two objectives, their constraints, and the data of one step."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from bilevel import _tree
from bilevel._errors import ObjectiveError, StructureError, check_kind
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


@dataclass(frozen=True, eq=False)
class Box:
    """The set `low <= x <= high`; calling it projects a tree of tensors onto the set.

    Attributes:
        low: Lower bound: a number, a tensor that broadcasts to x, or a tree like x. `-inf` is allowed.
        high: Upper bound, likewise. `+inf` is allowed.

    Raises:
        ValueError: `low` lies above `high` somewhere, or one of them is NaN.
        TypeError: A bound is neither a number, nor a tensor, nor a tree of them.
        StructureError: The bounds do not fit each other.

    Example:
        >>> Box(0.0, 1.0)(torch.tensor([-2.0, 0.5, 2.0]))
        tensor([0.0000, 0.5000, 1.0000])
    """

    low: Tree = -float("inf")
    high: Tree = float("inf")

    def __post_init__(self) -> None:
        lows, highs = _leaves_of_bound(self.low, "low"), _leaves_of_bound(self.high, "high")
        if len(lows) > 1 and len(highs) > 1 and _tree.names(self.low) != _tree.names(self.high):
            raise StructureError(
                "`Box(low=..., high=...)` must have two bounds of one structure. "
                f"Got {_tree.names(self.low)} and {_tree.names(self.high)}. Give both for the same leaves."
            )
        for low, high in zip(lows * len(highs), highs * len(lows), strict=True):
            try:
                ordered = bool(torch.all(low <= high))
            except RuntimeError as error:
                raise StructureError(
                    "`Box(low=..., high=...)` must have bounds that broadcast to each other. "
                    f"Got shapes {tuple(low.shape)} and {tuple(high.shape)}. Use a number or the shape of x."
                ) from error
            if not ordered:
                raise ValueError(
                    f"`Box(low=..., high=...)` must have low <= high. Got low={self.low}, high={self.high}. "
                    "Swap or widen the bounds."
                )

    def __call__(self, x: Tree) -> Tree:
        lows, highs = map(_tree.leaves, self.bounds(x))
        triples = zip(_tree.leaves(x), lows, highs, strict=True)
        return _tree.unflatten_like(
            x, [torch.maximum(torch.minimum(leaf, high), low) for leaf, low, high in triples]
        )

    def bounds(self, x: Tree) -> tuple[Tree, Tree]:
        """The two bounds as trees of tensors with the structure and shapes of `x`."""
        return _spread(self.low, x, "low"), _spread(self.high, x, "high")


def _leaves_of_bound(bound: Tree, name: str) -> list[Tensor]:
    parts: list[Any] = list(_tree.leaves(bound))
    for part in parts:
        if not isinstance(part, Tensor | int | float):
            raise TypeError(
                f"`Box({name}=...)` must be a number, a tensor, or a tree of them. "
                f"Got {type(part).__name__}. Pass e.g. 0.0, or a tensor like x."
            )
    # numbers in float64, so that none is rounded before the dtype of x is known
    return [
        part if isinstance(part, Tensor) else torch.tensor(part, dtype=torch.float64)
        for part in parts
    ]


def _spread(bound: Tree, x: Tree, name: str) -> Tree:
    parts = _leaves_of_bound(bound, name)
    targets = _tree.leaves(x)
    if isinstance(bound, Tensor | int | float):
        parts = parts * len(targets)
    elif _tree.names(bound) != _tree.names(x):
        raise StructureError(
            f"`Box({name}=...)` must be a number, a tensor, or a tree like x with the leaves "
            f"{_tree.names(x)}. Got {_tree.names(bound)}. Give one bound for each leaf of x."
        )
    try:
        spread = [
            part.to(dtype=leaf.dtype, device=leaf.device).expand(leaf.shape)
            for part, leaf in zip(parts, targets, strict=True)
        ]
    except RuntimeError as error:
        raise StructureError(
            f"`Box({name}=...)` must broadcast to the shape of x. "
            f"Got {[tuple(part.shape) for part in parts]} for x of "
            f"{[tuple(leaf.shape) for leaf in targets]}. Use a number or the shape of x."
        ) from error
    return _tree.unflatten_like(x, spread)


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
            functions that put a vector back into the user's trees x and y.

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

    def over_vectors(fun: Objective | None) -> Any:
        def over(u: Tensor, v: Tensor, data: Any) -> Tensor:
            return cast(Objective, fun)(unravel_x(u), unravel_y(v), data)

        return fun and over

    def constraint(name: str) -> Any:
        over, first = over_vectors(getattr(problem, name)), list[Tensor]()

        def steady(u: Tensor, v: Tensor, data: Any) -> Tensor:
            value = vector(over(u, v, data), name)
            if not first:
                first.append(value.detach())
            check_size(value, first[0], name)
            return value

        return over and steady

    domain = problem.domain
    if isinstance(domain, Box):
        low, high = domain.bounds(x)
        domain = Box(_tree.ravel(low)[0], _tree.ravel(high)[0])
    elif domain is not None:
        domain = _over_vectors(domain, unravel_x)
    flat = BilevelProblem(
        over_vectors(problem.upper),
        over_vectors(problem.lower),
        **{name: constraint(name) for name in CONSTRAINTS},
        domain=domain,
        per_sample=problem.per_sample,
        unravel=(
            _then(unravel_x, problem.unravel and problem.unravel[0]),
            _then(unravel_y, problem.unravel and problem.unravel[1]),
        ),
    )
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


def scalar(value: Any, name: str) -> Tensor:
    """`value` if it is a scalar floating tensor.

    Raises:
        ObjectiveError: It is not; the message names the function and the mend.
    """
    rule = f"`BilevelProblem({name}=...)` must return a scalar tensor."
    if not isinstance(value, Tensor):
        raise ObjectiveError(
            f"{rule} Got {type(value).__name__}. Compute it with torch, and return the tensor."
        )
    if value.numel() != 1:
        raise ObjectiveError(
            f"{rule} Got shape {tuple(value.shape)}. Reduce it, e.g. with `.sum()`."
        )
    if not value.is_floating_point():
        raise ObjectiveError(f"{rule} Got dtype {value.dtype}. Convert it, e.g. with `.double()`.")
    return value.reshape(())


def samples(value: Any) -> Tensor:
    """`value` if it is a vector of losses, as `per_sample=True` promises.

    Raises:
        ObjectiveError: It is not a floating tensor of one dimension.
    """
    if (
        not isinstance(value, Tensor)
        or value.dim() != 1
        or value.numel() == 0
        or not value.is_floating_point()
    ):
        got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise ObjectiveError(
            "`BilevelProblem(lower=..., per_sample=True)` must return one loss a sample, shape (n,). "
            f"Got {got}. Drop the reduction, or `per_sample=True`."
        )
    return value


def lower_value(problem: BilevelProblem, x: Tree, y: Tree, data: Any) -> Tensor:
    """f(x, y) on the data of its level, 0-d: the mean where the problem is `per_sample`."""
    value = problem.lower(x, y, data)
    return samples(value).mean() if problem.per_sample else scalar(value, "lower")


def vector(value: Any, name: str) -> Tensor:
    """`value` as a vector if it is a floating tensor, as the constraint `name` of a problem must return.

    Raises:
        ObjectiveError: It is not; the message names the constraint and the mend.
    """
    if not isinstance(value, Tensor) or not value.is_floating_point():
        got = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise ObjectiveError(
            f"`BilevelProblem({name}=...)` must return a floating-point tensor, feasible where "
            f"{'== 0' if name.endswith('equality') else '<= 0'}. Got {got}. Return e.g. `y - 1.0`, not `y < 1.0`."
        )
    return value.reshape(-1)


def constraint_value(problem: BilevelProblem, name: str, x: Tree, y: Tree, data: Any) -> Tensor:
    """The constraint `name` of a problem that has it, on the data of its level, as a vector."""
    return vector(getattr(problem, name)(x, y, data_of(name, data)), name)


def check_size(value: Tensor, before: Tensor, name: str) -> None:
    """Raises unless the constraint `name` has as many entries as at a call before."""
    if value.numel() != before.numel():
        raise ObjectiveError(
            f"`BilevelProblem({name}=...)` must return as many entries at each call. "
            f"Got {before.numel()}, and then {value.numel()}. "
            "Keep entries that do not bind, e.g. by `torch.where`, in place of leaving them out."
        )


def excess(value: Tensor, name: str) -> Tensor:
    """How far each entry of the constraint `name` is from being feasible, shape (k,), 0 where it is."""
    return value.abs() if name.endswith("equality") else value.clamp(min=0.0)


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
