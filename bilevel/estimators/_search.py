"""The lower problem solved again and again: locally, and from many starts."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bilevel import _tree
from bilevel._oracle import CountedGradient, Oracle
from bilevel._problem import constrains_lower
from bilevel._solution import Status
from bilevel.estimators._gap import rounding
from bilevel.estimators._kkt import ConstrainedLower
from bilevel.estimators._kkt_point import KKTPoint
from bilevel.estimators._lower import LowerObjective
from bilevel.estimators._nonsmooth import minimize
from bilevel.estimators._screen import low_points
from bilevel.optim import Newton
from bilevel.optim._base import Minimum, Point, SmoothFunction

_RADII = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0)  # of the random starts, in units of y
SMALL, MEDIUM = 300, 3000  # sizes of y up to which all starts, or few, can be afforded
#: Weights of f against F on the way from the minimum of F to one of f.
_PATH = (0.0, 0.3, 1.0, 3.0, 10.0)
_FAR = 100.0  # growth of y at which the path from there is given up
#: Ends of Newton's method at a kink: no step that lowers f, or no finite Hessian.
_NO_NEWTON = (Status.STALLED, Status.MAX_STEPS, Status.NONFINITE)
_LEAVE = 5e-3  # first step of a solve at kinks, in units of y
_UNBOUNDED = 1e8  # growth of |y| there at which a minimum is not believed to exist
_TO_UPPER = 8  # Newton steps for each
_SAME = 1e-8  # of the change of f within one unit of y: minima nearer to each other count as one


@dataclass(frozen=True)
class Local:
    """A local solve of the lower problem.

    Attributes:
        y: Where it ended, shape (n,).
        value: f there, `-inf` where f falls without bound.
        status: CONVERGED (to rounding, too), or why it is no solution.
        point: With the multipliers.
        is_smooth: Whether the gradient vanishes there, as it does not at a kink.
    """

    y: Tensor
    value: float
    status: Status
    point: KKTPoint
    is_smooth: bool = True


class LowerSolver:
    """Solves `min f(x, .)` locally: by Newton's method, or with constraints by SciPy and the KKT equations.

    Where Newton's method stalls, as it does at a kink of f, a method for kinks goes on, there and in all later solves.

    Attributes:
        constrained: Whether the lower problem has constraints.
        kkt: The lower problem with its KKT system.
    """

    def __init__(
        self, oracle: Oracle, x: Tensor, data: Any, size: float, *, is_smooth: bool = True
    ) -> None:
        self.constrained = constrains_lower(oracle.problem)
        self.kkt = ConstrainedLower(oracle, x, data, size)
        self._oracle, self._x = oracle, x
        self._hessian: Tensor | None = None
        self._newton = Newton()
        self._size, self._is_smooth = size, is_smooth

    def solve(self, y: Tensor) -> Local:
        """The solution found from y."""
        if self.constrained:
            point = self.kkt.solve(y)
            return Local(point.y, point.value, point.status, point)
        if not self._is_smooth:
            return self._solve_at_kinks(y)
        lower = LowerObjective(self._oracle, self._x, self._hessian)
        start = lower.evaluate(y)
        found = self._newton.minimize(lower, start, 1e-10 * _tree.length(start.grad))
        self._hessian = lower.lower_hessian
        value, status = found.point.value, found.status
        if status is Status.STALLED and found.residual <= 1e-6 * _tree.length(start.grad):
            status = Status.CONVERGED
        if status in _NO_NEWTON and math.isfinite(start.value) and y.numel() <= SMALL:
            self._is_smooth = False
            return self._solve_at_kinks(found.point.y if math.isfinite(value) else y)
        if status is Status.LOWER_UNBOUNDED:
            value = -math.inf
        elif not math.isfinite(value):
            value = math.nan
        return Local(found.point.y, value, status, KKTPoint.free(found.point.y, value))

    def _solve_at_kinks(self, y: Tensor) -> Local:
        def with_gradient(v: Tensor) -> tuple[float, Tensor]:
            value, grad = self._oracle.lower_grad_y(self._x, v)
            return float(value), grad

        found = minimize(
            with_gradient, lambda v: float(self._oracle.lower(self._x, v)), y, self._size, _LEAVE
        )
        status = Status.CONVERGED if found.is_minimum else Status.STALLED
        if not math.isfinite(found.value):
            status = Status.NONFINITE
        value = found.value
        if value == -math.inf or _tree.length(found.y) > _UNBOUNDED * (1.0 + _tree.length(y)):
            value, status = -math.inf, Status.LOWER_UNBOUNDED
        return Local(found.y, value, status, KKTPoint.free(found.y, value), is_smooth=False)


@dataclass(frozen=True)
class Search:
    """What the starts found.

    Attributes:
        nearest: The solve from the point itself.
        lowest: The lowest minimum of f found.
        minima: All local solutions found, that from the point itself first.
        starts: Number of local solves that were made.
        lower_size: How much f rises within one unit of y from its minimum.
        same: Values of f nearer to each other than this count as equal.
        upper_size: How much F changes within one unit of y.
        lower_far: How much f changes within a distance of 1, where that is more than a unit of y.
        upper_far: How much F does.
    """

    nearest: Local
    lowest: Local
    minima: tuple[Local, ...]
    starts: int
    lower_size: float = 0.0
    same: float = 0.0
    upper_size: float = 0.0
    lower_far: float = 0.0
    upper_far: float = 0.0


def search(oracle: Oracle, x: Tensor, y: Tensor, data: Any, size: float, sign: float) -> Search:
    """Solve the lower problem from `y`, from points around it, and from where `sign F` is small.

    Args:
        oracle: The problem over vectors.
        x: Upper variable, shape (m,).
        y: The point, shape (n,).
        data: The data of the problem.
        size: The unit of y.
        sign: 1 where y should minimize F over the lower solutions, -1 where it should maximize it.
    """
    solver = LowerSolver(oracle, x, data, size)
    nearest = solver.solve(y)
    if nearest.status in (Status.NONFINITE, Status.LOWER_UNBOUNDED):
        return Search(nearest, nearest, (nearest,), 1)
    starts = _around(y, size)
    units = starts[:3]  # the radii up to one unit
    lower_size = _range([abs(float(oracle.lower(x, v)) - nearest.value) for v in units])
    # relative to what f changes by, not to f: a constant added to it is no matter but for its rounding
    eps = torch.finfo(y.dtype).eps
    same = max(_SAME, 10.0 * eps) * lower_size + rounding(nearest.value, y.dtype)
    upper = float(oracle.upper(x, y))
    upper_size = _range([abs(float(oracle.upper(x, units[-1])) - upper)])
    lower_far, upper_far = lower_size, upper_size
    if size < 1.0:
        far = [y + (v - y) / size for v in units]
        lower_far = _range(
            [lower_size, *(abs(float(oracle.lower(x, v)) - nearest.value) for v in far)]
        )
        upper_far = _range([upper_size, abs(float(oracle.upper(x, far[-1])) - upper)])
    if y.numel() <= SMALL:
        starts = [*starts, _toward_upper(oracle, x, nearest.y, size, sign)]
        starts += low_points(oracle, x, nearest.y)
    else:
        starts = starts[::3] if y.numel() <= MEDIUM else []
    found, lowest, solves = [nearest], nearest, 1
    for start in starts:
        value = float(oracle.lower(x, start))
        if not math.isfinite(value):
            continue
        local = solver.solve(start)
        solves += 1
        if local.status is Status.LOWER_UNBOUNDED:
            lowest = local
            break
        if local.status is not Status.CONVERGED:
            continue
        found.append(local)
        if local.value < lowest.value - same:
            lowest = local
    return Search(
        nearest,
        lowest,
        tuple(found),
        solves,
        lower_size,
        same,
        upper_size,
        lower_far,
        upper_far,
    )


def _range(changes: list[float]) -> float:
    """The largest finite one."""
    return max([change for change in changes if math.isfinite(change)], default=0.0)


def _around(y: Tensor, size: float) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)  # the same starts at every call
    noise = torch.randn(len(_RADII), y.numel(), generator=generator, dtype=torch.float64).to(y)
    return [y + radius * size * row for radius, row in zip(_RADII, noise, strict=True)]


class _Weighted(SmoothFunction):
    """`sign F(x, .) + weight f(x, .)` at fixed x."""

    def __init__(self, oracle: Oracle, x: Tensor, sign: float, weight: float) -> None:
        self._oracle, self._x, self._sign, self._weight = oracle, x, sign, weight

    def _at(self, y: Tensor) -> CountedGradient:
        return self._oracle.linearized(self._x, y, upper=self._sign, lower=self._weight)

    def evaluate(self, y: Tensor) -> Point:
        linear = self._at(y)
        value = float(linear.value)
        return Point(y, value, linear.grad, torch.finfo(y.dtype).eps * abs(value))

    @property
    def has_hessian(self) -> bool:
        return False

    def hessian(self, point: Point, *, refresh: bool) -> Tensor:
        return self._at(point.y).hessian()

    def hvp(self, point: Point) -> Any:
        return self._at(point.y).hvp


def _toward_upper(oracle: Oracle, x: Tensor, y: Tensor, size: float, sign: float) -> Tensor:
    """Where a path from the minimum of `sign F` to a minimum of f ends: F chooses the basin.

    Minimizing f at once from the minimum of F may step over the basin next to it.
    """
    far = _FAR * (size + _tree.length(x) + _tree.length(y))
    here, ratio = y, 0.0
    for weight in _PATH:
        fun = _Weighted(oracle, x, sign, weight * ratio)
        found: Minimum = Newton(max_steps=_TO_UPPER).minimize(
            fun, fun.evaluate(here), stop=lambda point: _tree.length(point.y - y) > far
        )
        if not _tree.is_finite(found.point.y):
            break
        here = found.point.y
        if weight == 0.0:  # f in units of F, over this distance
            change = abs(float(oracle.upper(x, here)) - float(oracle.upper(x, y)))
            rise = abs(float(oracle.lower(x, here)) - float(oracle.lower(x, y)))
            ratio = change / rise if rise > 0.0 and math.isfinite(rise) else 1.0
    return here
