r"""The bi-level problem in one level: the lower level stands by its KKT conditions, relaxed and then tightened.

$$\min_{x, y, \lambda, \nu} F(x, y) \quad\text{subject to}\quad
\nabla_y L = 0, \; h \le 0, \; \lambda \ge 0, \; -\lambda_j h_j \le t, \; h_= = 0, \quad
H \le 0, \; H_= = 0, \; x \in B, \quad f(x, y) \le f(x, z_i),$$

$L = f + \lambda^\top h + \nu^\top h_=$. Each of the values t is solved by SLSQP from the solution of the one before
(Scholtes, SIAM J. Optim. 2001). Where the lower level is not convex, its KKT conditions hold at points that do
not solve it: the points $z_i$, better lower solutions than former answers, cut those off (Mitsos, Lemonidis and
Barton, J. Global Optim. 2008).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from bilevel import _autodiff
from bilevel._box import Box
from bilevel._problem import CONSTRAINTS, BilevelProblem, constraint_value, lower_value
from bilevel._returned import excess
from bilevel._solution import Evaluations
from bilevel.estimators import _slsqp
from bilevel.estimators._gap import rounding
from bilevel.solvers._walls import Units

_LARGE = 300  # x, y and multipliers above which SLSQP is no longer the method
_FEASIBLE = 1e-8  # violation of a lower solution, in units of the constraints
_CUT_PENALTY = 10.0  # what a cut gives way where z breaks the lower constraints, in units of f


class Point(NamedTuple):
    """A point of the single-level problem.

    Attributes:
        x: Shape (m,).
        y: Shape (n,).
        multipliers: Of the lower inequalities, in units of f over those of h.
        equality_multipliers: Of the lower equalities, likewise.
    """

    x: Tensor
    y: Tensor
    multipliers: Tensor
    equality_multipliers: Tensor


class KKTForm:
    """The single-level problem of a problem over vectors.

    Args:
        problem: The problem over vectors.
        units: What F, f and the constraints are measured in.

    Attributes:
        evaluations: What was evaluated since it was made.
    """

    def __init__(self, problem: BilevelProblem, units: Units) -> None:
        self._problem, self._units = problem, units
        self.evaluations = Evaluations()

    def start(self, x: Tensor, y: Tensor) -> Point:
        """The point (x, y), with multipliers of one for the inequalities."""
        return Point(
            x,
            y,
            x.new_ones(self._count("lower_constraint")),
            x.new_zeros(self._count("lower_equality")),
        )

    def is_small(self, x: Tensor, y: Tensor) -> bool:
        """Whether SLSQP can be afforded, and knows the domain."""
        known = self._problem.domain is None or isinstance(self._problem.domain, Box)
        return known and sum(part.numel() for part in self.start(x, y)) <= _LARGE

    @property
    def upper_unit(self) -> float:
        """What F is measured in."""
        return self._units.upper

    def noise(self, lower: float, dtype: torch.dtype) -> float:
        """The rounding error of a difference of values of f near `lower`, in units of f."""
        return rounding(lower, dtype) / self._units.lower

    def _count(self, name: str) -> int:
        return self._units.constraints[name].numel() if name in self._units.constraints else 0

    def _constraint(self, name: str, x: Tensor, y: Tensor) -> Tensor:
        if getattr(self._problem, name) is None:
            return x.new_zeros(0)
        value = constraint_value(self._problem, name, x, y, None)
        return value / self._units.constraints[name]

    def _lower_value(self, x: Tensor, y: Tensor) -> Tensor:
        return lower_value(self._problem, x, y, None) / self._units.lower

    def solve(self, start: Point, cuts: Sequence[Tensor], relaxations: Sequence[float]) -> Point:
        """The solution found from `start` for the last of the relaxations t."""
        n, k = start.y.numel(), start.multipliers.numel()
        reach = math.sqrt(1.0 + float(start.y @ start.y) / n)
        with torch.no_grad():  # a constant in F takes no digits from SLSQP
            height = self._problem.upper(start.x, start.y, None)

        def outputs(x: Tensor, y: Tensor, lam: Tensor, nu: Tensor) -> Tensor:
            lower = self._lower_value(x, y)
            h, h_equal = (self._constraint(c, x, y) for c in ("lower_constraint", "lower_equality"))
            stationarity = _autodiff.differentiable_grad(
                lower + (lam * h).sum() + (nu * h_equal).sum(), y
            )
            return torch.cat(
                [
                    (self._problem.upper(x, y, None) - height).reshape(1) / self._units.upper,
                    stationarity * reach,
                    h_equal,
                    self._constraint("upper_equality", x, y),
                    lam * h,  # at least -t
                    -h,
                    -self._constraint("upper_constraint", x, y),
                    *[
                        (self._lower_value(x, z) + self._gives_way(x, z) - lower)[None]
                        for z in cuts
                    ],
                ]
            )

        equalities = n + self._count("lower_equality") + self._count("upper_equality")
        inequalities = 2 * k + self._count("upper_constraint") + len(cuts)
        bounds = [*self._bounds(start.x), *[(None, None)] * n, *[(0.0, None)] * k]
        bounds += [(None, None)] * start.equality_multipliers.numel()
        point = start
        self.evaluations += Evaluations(upper=1)
        for t in relaxations:
            slack = [t] * k + [0.0] * (inequalities - k)
            found = _slsqp.minimize(outputs, point, equalities, slack=slack, bounds=bounds)
            self.evaluations += Evaluations(
                upper=found.values,
                lower=found.values * (1 + len(cuts)),
                upper_grad=found.jacobians,
                lower_grad=found.values,
                hvp=found.jacobians * n,
            )
            if found.ran_away:
                break
            point = Point(*found.vectors)
        return point

    def _gives_way(self, x: Tensor, z: Tensor) -> Tensor:
        """What a cut lets f rise where z is no feasible lower point."""
        outside = self._constraint("lower_constraint", x, z).clamp(min=0.0).sum()
        return _CUT_PENALTY * (outside + self._constraint("lower_equality", x, z).abs().sum())

    def _bounds(self, x: Tensor) -> list[tuple[float | None, float | None]]:
        if not isinstance(self._problem.domain, Box):
            return [(None, None)] * x.numel()
        both = [
            [v if math.isfinite(v) else None for v in bound.tolist()]
            for bound in self._problem.domain.bounds(x)
        ]
        return list(zip(*both, strict=True))

    def drop(self, x: Tensor, y: Tensor, starts: Sequence[Tensor]) -> tuple[float, Tensor]:
        """How far f(x, .) lies lower than at y, at the lowest feasible point found from the starts, and where.

        In units of f; infinite where f falls without bound, minus infinity where no feasible point was found.
        """
        with torch.no_grad():
            height = self._lower_value(x, y)  # so that a constant in f takes no digits from SLSQP

        def outputs(v: Tensor) -> Tensor:
            h, h_equal = (self._constraint(c, x, v) for c in ("lower_constraint", "lower_equality"))
            return torch.cat([(self._lower_value(x, v) - height)[None], h_equal, -h])

        best, where = math.inf, y
        for start in starts:
            found = _slsqp.minimize(outputs, [start], self._count("lower_equality"), ftol=1e-12)
            self.evaluations += Evaluations(lower=found.values, lower_grad=found.jacobians)
            (v,) = found.vectors
            feasible = self.violation(x, v, level="lower") <= max(
                _FEASIBLE, 100.0 * torch.finfo(v.dtype).eps
            )
            if feasible and found.ran_away and found.value < -1.0:
                return math.inf, v
            if feasible and not found.ran_away and found.value < best:
                best, where = found.value, v
        self.evaluations += Evaluations(lower=1)
        return -best, where

    def violation(self, x: Tensor, y: Tensor, level: str = "") -> float:
        """The largest violation of a constraint, of one level or of both, in its units; infinite where one is NaN."""
        names = [name for name in CONSTRAINTS if name.startswith(level)]
        found = [excess(self._constraint(name, x, y).detach(), name) for name in names]
        return max([0.0, *(float(one.nan_to_num(math.inf).max()) for one in found if one.numel())])
