"""A minimum of a function that may have kinks there: quasi-Newton steps, then a poll that uses values alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from bilevel import _tree
from bilevel.estimators._gap import rounding

Value = Callable[[Tensor], float]
#: `y -> (value, gradient)`; the gradient need not mean anything at a kink itself.
ValueAndGradient = Callable[[Tensor], tuple[float, Tensor]]

_STEPS, _STEPS_EACH = 100, 10  # quasi-Newton steps at most: so many, and so many a variable
_DECREASE, _SLOPE = 1e-4, 0.5  # the weak Wolfe conditions
_TRIALS = 40  # of a line search
_NEGLIGIBLE = 1e-20  # of what was gained so far: three smaller decreases in a row end the run
_POLL = (1e-2, 1e-4, 1e-6)  # radii, in units
_POLLED = 6  # random directions, each with its opposite
_RESTARTS = 4  # after a poll that found a lower value
_AGREES = 1e-6  # of the rise within a poll's radius: a smaller decrease counts as none


class Reached(NamedTuple):
    """Where a run ended."""

    y: Tensor
    value: float
    is_minimum: bool  # whether the poll found no lower value


def minimize(
    fun: ValueAndGradient, value_of: Value, y: Tensor, size: float, first_step: float
) -> Reached:
    """Minimize a function with kinks locally, from points at which it is differentiable.

    Args:
        fun: The function and its gradient.
        value_of: The function alone.
        y: The start, shape (n,); left by a small random step, since it may lie on a kink.
        size: The unit of y.
        first_step: Length of the first step, in units and per root of n.

    References:
        Lewis and Overton, Nonsmooth optimization via quasi-Newton methods, Mathematical Programming 141 (2013),
        algorithms 2.1 and 2.6.
    """
    generator = torch.Generator().manual_seed(0)  # the same steps at every call
    reach = size * math.sqrt(y.numel())
    value, here = value_of(y), y
    for _ in range(_RESTARTS):
        start = here + first_step * size * _tree.normal_like(here, generator)
        found, found_value = _quasi_newton(fun, start, first_step * reach)
        if found_value < value or not math.isfinite(value):
            here, value = found, found_value
        if not math.isfinite(value):
            break
        lower = _poll(value_of, here, value, size, generator)
        if lower is None:
            return Reached(here, value, is_minimum=True)
        here, value = lower
    return Reached(here, value, is_minimum=False)


def _quasi_newton(fun: ValueAndGradient, y: Tensor, first_step: float) -> tuple[Tensor, float]:
    """BFGS with a weak Wolfe line search (algorithm 2.1): it converges at kinks, too."""
    value, grad = fun(y)
    eps = torch.finfo(y.dtype).eps
    n, first, small = y.numel(), value, 0
    inverse: Tensor | None = None  # of the Hessian, as far as it is known
    for _ in range(_STEPS + _STEPS_EACH * n):
        length = _tree.length(grad)
        if not (math.isfinite(value) and 0.0 < length < math.inf):
            break
        direction = -grad * (first_step / length) if inverse is None else -(inverse @ grad)
        slope = float(direction @ grad)
        if not slope < 0.0:
            break
        found = _weak_wolfe(fun, y, value, direction, slope)
        if found is None:
            break
        new, new_value, new_grad = found
        step, bend = new - y, new_grad - grad
        gained, moved = value - new_value, _tree.length(step)
        y, value, grad = new, new_value, new_grad
        negligible = max(_NEGLIGIBLE * (first - value), 0.5 * eps * abs(value))
        small = small + 1 if gained <= negligible else 0
        if small == 3 or moved <= 0.5 * eps * _tree.length(y):
            break
        curvature = float(step @ bend)
        if not curvature > 0.0:
            continue
        if inverse is None:
            scale = curvature / float(bend @ bend)
            inverse = scale * torch.eye(n, dtype=y.dtype, device=y.device)
        image = inverse @ bend
        cross = torch.outer(image, step)
        inverse = inverse - (cross + cross.T) / curvature
        inverse = inverse + (1.0 + float(bend @ image) / curvature) / curvature * torch.outer(
            step, step
        )
    return y, value


def _weak_wolfe(
    fun: ValueAndGradient, y: Tensor, value: float, direction: Tensor, slope: float
) -> tuple[Tensor, float, Tensor] | None:
    """A step that lowers f and flattens its slope, by bisection (algorithm 2.6); else the lowest one, or None."""
    low, high, t = 0.0, math.inf, 1.0
    best: tuple[Tensor, float, Tensor] | None = None
    for _ in range(_TRIALS):
        there = y + t * direction
        new_value, grad = fun(there)
        # written so that a NaN shortens the step
        if not new_value < value + _DECREASE * t * slope:
            high = t
        else:
            best = there, new_value, grad
            if float(grad @ direction) >= _SLOPE * slope:
                return best
            low = t
        t = 2.0 * low if high == math.inf else 0.5 * (low + high)
    return best


def _poll(
    value_of: Value, y: Tensor, value: float, size: float, generator: torch.Generator
) -> tuple[Tensor, float] | None:
    """A lower point around y, by values alone, or None."""
    noise = rounding(value, y.dtype)
    for radius in _POLL:
        shifts = [radius * size * _tree.normal_like(y, generator) for _ in range(_POLLED)]
        points = [y + sign * shift for shift in shifts for sign in (1.0, -1.0)]
        values = [value_of(point) for point in points]
        finite = [v for v in values if math.isfinite(v)]
        if not finite:
            continue
        least = min(finite)
        if least < value - _AGREES * max(abs(v - value) for v in finite) - noise:
            return points[values.index(least)], least
    return None
