"""Curvature from differences of gradients: what a step is divided by where no learning rate was given."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from bilevel import _tree
from bilevel._types import Tree

#: Steps of the power method: enough to see the steepest direction within a factor of two.
_PROBES = 3
_ROUNDING = 1e3  # times that of the point: a shorter step tells nothing
FORGET = 0.98  # of the steepest secant, each step: where curvature falls, the steps grow again


def size(tree: Tree) -> float:
    """The length of a variable, that of a vector of ones at least."""
    return max(_tree.length(tree), math.sqrt(_tree.size(tree)))


def probed(gradient: Callable[[Tree], Tree], y: Tree) -> float:
    """The curvature along the steepest direction at `y`, by the power method on differences of gradients.

    It takes four gradients. 0 where the gradient does not change; NaN or infinity where it is not finite.
    """
    at_y = gradient(y)
    h = size(y) * max(torch.finfo(leaf.dtype).eps for leaf in _tree.leaves(y)) ** (1.0 / 3.0)
    direction, found = at_y, 0.0
    for _ in range(_PROBES):
        norm = _tree.length(direction)
        if norm == 0.0:
            direction = _tree.map_leaves(torch.ones_like, y)
            norm = math.sqrt(_tree.size(y))
        step = h / norm
        difference = _tree.axpy(-1.0, at_y, gradient(_tree.axpy(step, direction, y)))
        found, direction = _tree.length(difference) / h, difference
    return found


def steepest(
    so_far: float, before: tuple[Tree, Tree], now: tuple[Tree, Tree], *, forget: float = 1.0
) -> float:
    """The larger of what is left of `so_far` and the secant between two pairs of point and gradient."""
    moved = _tree.length(_tree.axpy(-1.0, before[0], now[0]))
    turned = _tree.length(_tree.axpy(-1.0, before[1], now[1]))
    eps = max(torch.finfo(leaf.dtype).eps for leaf in _tree.leaves(now[0]))
    if not moved > _ROUNDING * eps * _tree.length(now[0]):
        return so_far
    secant = turned / moved
    return max(forget * so_far, secant) if math.isfinite(secant) else so_far
