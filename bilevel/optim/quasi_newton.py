"""Quasi-Newton steps on the upper variable: limited-memory BFGS, projected onto the domain."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bilevel import _tree
from bilevel._box import Box
from bilevel._errors import check_count
from bilevel._types import Projection
from bilevel.optim._base import Point

_SUFFICIENT_DECREASE = 1e-4
_CURVATURE = 0.9  # weak Wolfe condition
_FIRST_STEP = 0.1  # length of the first trial, in units of the cap


@dataclass(frozen=True)
class QuasiNewton:
    r"""Limited-memory BFGS with a weak Wolfe line search, for full-batch upper problems.

    Without a domain the line search brackets a step that satisfies the weak Wolfe conditions. With a
    `Box` the direction is taken over the free variables and the path projected onto the box; with any
    other projection the step is a spectral projected gradient. A step is no longer than
    $\sqrt n \max(1, \mathrm{rms}(x))$.

    Attributes:
        history: Pairs of steps and gradient differences kept, > 0.
        max_trials: Evaluations at most in one line search, > 0.

    Raises:
        ValueError: A parameter is out of its range.

    References:
        Nocedal and Wright, Numerical Optimization (2006), algorithm 7.4; Lewis and Overton (2013),
        algorithm 2.6, for the line search; Birgin, Martinez and Raydan (2000) for the spectral step.
    """

    history: int = 30
    max_trials: int = 25

    def __post_init__(self) -> None:
        for name in ("history", "max_trials"):
            check_count("QuasiNewton", name, getattr(self, name), "Raise it, e.g. to 10.")

    def init(self, x: Tensor) -> dict[str, Any]:
        """The memory before the first step."""
        empty = x.new_zeros((0, x.numel()))
        return {"steps": empty, "changes": empty}

    def step(
        self,
        evaluate: Callable[[Tensor], Point],
        point: Point,
        memory: Mapping[str, Any],
        domain: Projection | None = None,
    ) -> tuple[Point | None, dict[str, Any]]:
        """One step from `point`.

        Args:
            evaluate: Value and gradient at a vector; an infinite value rejects the trial.
            point: Where the run stands.
            memory: From `init` or the step before.
            domain: Projects onto the feasible set.

        Returns:
            The new point, or None where no step along the direction decreases the function, and the
            new memory. On None the memory is empty, so that the next step is along the gradient.
        """
        direction = self.direction(point, memory, domain)
        new = (
            _wolfe(evaluate, point, direction, self.max_trials)
            if domain is None
            else _backtrack(evaluate, point, direction, domain, self.max_trials)
        )
        if new is None or torch.equal(new.y, point.y):  # a step below the resolution of x is none
            return None, self.init(point.y)
        return new, self._remember(memory, new.y - point.y, new.grad - point.grad)

    def direction(
        self, point: Point, memory: Mapping[str, Any], domain: Projection | None
    ) -> Tensor:
        """The step that would be tried first from `point`, shape (n,)."""
        x, grad = point.y, point.grad
        cap = math.sqrt(x.numel()) * max(1.0, _tree.rms(x))
        steps, changes = memory["steps"], memory["changes"]
        if domain is not None and not isinstance(domain, Box):
            return _spectral(x, grad, steps, changes, domain, cap)
        free = _free(x, grad, domain)
        direction = -_two_loop(grad * free, steps * free, changes * free) * free
        if not float(direction @ grad) < 0.0:
            direction = -grad * free
        length = _tree.length(direction)
        if length == 0.0:
            return direction
        limit = cap if steps.shape[0] else _FIRST_STEP * cap
        scaled = limit / length
        return direction * (scaled if not steps.shape[0] else min(1.0, scaled))

    def _remember(self, memory: Mapping[str, Any], step: Tensor, change: Tensor) -> dict[str, Any]:
        curvature = float(step @ change)
        if not curvature > 1e-10 * _tree.length(step) * _tree.length(change):
            return dict(memory)
        keep = self.history - 1
        return {
            "steps": torch.cat(
                [memory["steps"][-keep:] if keep else memory["steps"][:0], step[None]]
            ),
            "changes": torch.cat(
                [memory["changes"][-keep:] if keep else memory["changes"][:0], change[None]]
            ),
        }


def _free(x: Tensor, grad: Tensor, domain: Box | None) -> Tensor:
    """One where a coordinate may move along minus the gradient, zero where its bound holds it."""
    if domain is None:
        return torch.ones_like(x)
    low, high = domain.bounds(x)
    held = ((x <= low) & (grad > 0)) | ((x >= high) & (grad < 0))
    return (~held).to(x.dtype)


def _two_loop(grad: Tensor, steps: Tensor, changes: Tensor) -> Tensor:
    """The inverse Hessian approximation times `grad` (Nocedal and Wright, algorithm 7.4)."""
    products: Any = (steps * changes).sum(1)
    curvatures: list[float] = products.tolist()
    used = [i for i, c in enumerate(curvatures) if c > 0.0]
    q = grad
    alphas: dict[int, float] = {}
    for i in reversed(used):
        alphas[i] = float(steps[i] @ q) / curvatures[i]
        q = q - alphas[i] * changes[i]
    if used:
        last = used[-1]
        q = q * (curvatures[last] / float(changes[last] @ changes[last]))
    for i in used:
        q = q + (alphas[i] - float(changes[i] @ q) / curvatures[i]) * steps[i]
    return q


def _spectral(
    x: Tensor, grad: Tensor, steps: Tensor, changes: Tensor, domain: Projection, cap: float
) -> Tensor:
    size = _tree.length(grad)
    if size == 0.0:
        return torch.zeros_like(x)
    scale = _FIRST_STEP * cap / size
    if steps.shape[0]:
        scale = float(steps[-1] @ steps[-1]) / float(steps[-1] @ changes[-1])
    return domain(x - min(scale, cap / size) * grad) - x


def _wolfe(
    evaluate: Callable[[Tensor], Point], point: Point, direction: Tensor, max_trials: int
) -> Point | None:
    """A step that satisfies the weak Wolfe conditions, else the best one that decreases, else None."""
    slope = float(direction @ point.grad)
    if not slope < 0.0:
        return None
    low, high, t = 0.0, math.inf, 1.0
    best: Point | None = None
    for _ in range(max_trials):
        new = evaluate(point.y + t * direction)
        if not _decreases(point, new, t * slope):
            if -t * slope <= _noise(point, new):
                return best
            high = t
        else:
            best = new
            if float(direction @ new.grad) >= _CURVATURE * slope:
                return new
            low = t
        if math.isfinite(high):
            t = 0.5 * (low + high)
        elif t >= 10.0:  # the cap on the length of a step holds for its extension too
            return best
        else:
            t = 2.0 * low
    return best


def _backtrack(
    evaluate: Callable[[Tensor], Point],
    point: Point,
    direction: Tensor,
    domain: Projection,
    max_trials: int,
) -> Point | None:
    t = 1.0
    for _ in range(max_trials):
        x = domain(point.y + t * direction)
        slope = float((x - point.y) @ point.grad)
        if not slope < 0.0:
            return None
        new = evaluate(x)
        if _decreases(point, new, slope):
            return new
        if -slope <= _noise(point, new):
            return None
        t *= 0.5
    return None


def _decreases(point: Point, new: Point, slope: float) -> bool:
    """Sufficient decrease; below the rounding error of the values, the gradient decides instead."""
    if not math.isfinite(new.value):
        return False
    if new.value <= point.value + _SUFFICIENT_DECREASE * slope:
        return True
    return new.value <= point.value + _noise(point, new) and _tree.length(new.grad) < _tree.length(
        point.grad
    )


def _noise(point: Point, new: Point) -> float:
    # where the value is infinite its rounding error is too, and would end the search at the first overshoot
    return 16.0 * (max(point.noise, new.noise) if math.isfinite(new.value) else point.noise)
