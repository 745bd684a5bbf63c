"""The box of an upper variable, and the projection onto it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bilevel import _tree
from bilevel._errors import StructureError
from bilevel._types import Tree


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
