r"""Whether (x, y) is stationary for the upper level, along the lower solutions.

Where y*(x) is smooth, the hypergradient of F and of each upper constraint is known by implicit differentiation,
and the multipliers of the nearly active ones are fitted by non-negative least squares. Where it is not - S(x)
holds many points, or a constraint is weakly active - that formula does not hold, and the linearized problem in
x, y and the multipliers is solved on each branch of the complementarity conditions instead: there y may move
along the lower solutions as well, as the optimistic value function lets it.

Either way a direction only counts where a step along it, with the lower problem solved again, lowers F. Where
neither is an answer - at a kink of f, above all - F is followed along directions of x without derivatives.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from bilevel import _tree
from bilevel._box import Box
from bilevel._oracle import Oracle
from bilevel._returned import excess
from bilevel._solution import Status
from bilevel.estimators._base import linear_tolerance
from bilevel.estimators._constraints import (
    Linearized,
    constraint_values,
    fit_multipliers,
    linearize,
    positive,
)
from bilevel.estimators._directions import Directions
from bilevel.estimators._gap import rounding
from bilevel.estimators._kkt_system import KKTSystem
from bilevel.estimators._linear_program import LinearProgram, Units
from bilevel.estimators._optimum import OptimalValue
from bilevel.estimators._search import SMALL, Local, LowerSolver
from bilevel.linear import CG

linalg: Any = torch.linalg  # its stubs are untyped
_RIVALS = 3  # other lower minima that are followed along a step
DENSE = 256  # largest y whose Hessian is formed
_LINEAR_PROGRAM = 400  # largest number of x and y together for the linearized problem
_BRANCHES = 5  # weakly active constraints whose combinations are all tried
_SHORTER = 0.1  # of a step, again and again: whether F falls at all as its slope says
_NOT_CURVED = "f is not curved around y as its Hessian says, as at a kink"
_WEAK = 1e-3  # in units: multipliers and distances up to which a constraint is weakly active


@dataclass(frozen=True)
class Stationarity:
    """What was found about the upper level.

    Attributes:
        hypergradient: Norm of the projected gradient of the Lagrangian, or None where there is none.
        curvature: Smallest eigenvalue of the lower Hessian along the active constraints, or None.
        problem: What is wrong, or empty.
        tested: What holds, in sentences.
        assumptions: What was not tested.
        untested: Why it is not known whether the upper level is stationary; empty where it is known.
        is_unique: Whether the lower solution is known to be locally the only one.
    """

    hypergradient: float | None = None
    curvature: float | None = None
    problem: str = ""
    tested: tuple[str, ...] = ()
    assumptions: tuple[str, ...] = ()
    untested: str = ""
    is_unique: bool = False


class UpperLevel:
    """The upper level at a point whose lower problem is solved; `others` are the other lower minima known."""

    def __init__(
        self,
        oracle: Oracle,
        x: Tensor,
        local: Local,
        others: Sequence[Local],
        data: Any,
        units: Units,
        sign: float,
    ) -> None:
        self._others = _rivals(local, others, units.y)
        self._oracle, self._x, self._local, self._data = oracle, x, local, data
        self._y, self._units, self._sign = local.y, units, sign
        value, self._upper_x, self._upper_y = oracle.upper_grad(x, local.y)
        self._value = float(value)
        self._held = linearize(oracle.problem, "upper_constraint", x, local.y, data)
        self._equal = linearize(oracle.problem, "upper_equality", x, local.y, data)

    def examine(self) -> Stationarity:
        """Find out whether F falls along the lower solutions."""
        if not self._local.is_smooth:
            return self._by_directions(Stationarity(untested="f has a kink at y"))
        found = self._by_derivatives()
        return self._by_directions(found) if found.untested else found

    def _by_derivatives(self) -> Stationarity:
        n = self._y.numel()
        solver = LowerSolver(self._oracle, self._x, self._data, self._units.y)
        if n > DENSE:
            if solver.constrained:
                return Stationarity(untested=f"there are more than {DENSE} lower variables")
            if self._has_kink():
                return Stationarity(untested=_NOT_CURVED)
            return self._smooth(None, None)
        system = solver.kkt.system(self._local.point)
        relative = system.curvature
        size = float(linalg.matrix_norm(system.hessian)) if relative is not None else 0.0
        curvature = None if relative is None or not math.isfinite(size) else relative * size
        if not _tree.is_finite(system.matrix):
            return Stationarity(untested="the lower Hessian is not finite here")
        weak = solver.kkt.weakly_active(self._local.point, _WEAK)
        if system.is_regular and not bool(weak.any()):
            if self._has_kink():
                return Stationarity(curvature=curvature, untested=_NOT_CURVED, is_unique=True)
            return self._smooth(system, curvature)
        return self._degenerate(solver, system, curvature, weak)

    # ------------------------------------------------------------------ where y*(x) is smooth

    def _smooth(self, system: KKTSystem | None, curvature: float | None) -> Stationarity:
        assumptions: list[str] = []
        if system is None:
            assumptions.append(
                f"the lower Hessian is positive definite (not tested above {DENSE} variables)"
            )
        pulled = self._reduced(system, self._upper_x, self._upper_y)
        held, equal = (self._reduced_rows(system, c) for c in (self._held, self._equal))
        if pulled is None or held is None or equal is None:
            return Stationarity(untested="the linear system of the lower Hessian was not solved")
        domain, x = self._oracle.problem.domain, self._x
        reach = self._units.step * math.sqrt(x.numel()) * self._units.x
        slopes = linalg.vector_norm(held, dim=1)
        near = self._held.value >= -reach * positive(slopes)
        low = high = torch.zeros_like(x, dtype=torch.bool)
        if isinstance(domain, Box):
            bounds = domain.bounds(x)
            low, high = x - bounds[0] <= reach, bounds[1] - x <= reach
        walls: list[Tensor] = []
        if bool((low | high).any()):
            identity = torch.eye(x.numel(), dtype=x.dtype, device=x.device)
            walls = [-identity[low], identity[high]]
        residual, weights, nu = pulled, held.new_zeros(held.shape[0]), equal.new_zeros(0)
        if bool(near.any()) or walls or equal.shape[0]:
            rows = torch.cat([held[near], *walls])
            fit = fit_multipliers(pulled, rows, equal)
            if not fit.is_solved:
                return Stationarity(untested="SciPy did not fit the multipliers of its constraints")
            nu = fit.equality
            residual = pulled + rows.T @ fit.inequality + equal.T @ nu
            weights[near] = fit.inequality[: int(near.sum())]
        if domain is not None and not isinstance(domain, Box) and (held.shape[0] or nu.numel()):
            assumptions.append("the domain and the upper constraints do not hold x together")
        tested = ["the upper level is stationary along the implicit derivative of y"]
        if system is not None:
            tested.insert(
                0, "the lower solution is locally unique: its Hessian is positive definite"
            )
        if system is not None and system.rows.shape[0]:
            tested.insert(
                1, "strict complementarity: each active lower constraint has a multiplier"
            )
        size = _tree.length(residual)
        problem = ""
        if size > 0.0:
            moved = x - reach * residual / size
            moved = moved if domain is None else domain(moved)
            expected = float(residual @ (x - moved))
            gain = self._lagrangian_falls(moved, weights, nu)
            if math.isnan(gain):
                why = "the lower problem has no smooth solution next to x"
                return Stationarity(curvature=curvature, untested=why, is_unique=True)
            if expected > self._noise() and gain >= 0.5 * expected:
                problem = (
                    f"x is not stationary: the hypergradient has norm {size:.3g}, and F falls by {gain:.3g} over a "
                    f"step of {_tree.length(x - moved):.3g}, as the slope {expected:.3g} says (at a minimum it would "
                    f"turn within that step, {self._units.step:.2g} of the size of x)"
                )
            elif not self._turns(moved, expected, weights, nu):
                why = "F does not fall as its hypergradient says, however small the step"
                return Stationarity(curvature=curvature, untested=why, is_unique=True)
        projected = residual
        if domain is not None and not isinstance(domain, Box):
            projected = x - domain(x - residual)
        elif isinstance(domain, Box):
            projected = x - domain(x - (pulled + held.T @ weights + equal.T @ nu))
        return Stationarity(
            _tree.length(projected),
            curvature,
            problem,
            () if problem else tuple(tested),
            tuple(assumptions),
            is_unique=True,
        )

    def _reduced(self, system: KKTSystem | None, of_x: Tensor, of_y: Tensor) -> Tensor | None:
        """The derivative in x of a function of (x, y*(x)) whose partial derivatives are given."""
        if system is None:
            linear = self._oracle.linearized(self._x, self._y)
            v = CG().solve(linear.hvp, of_y)
            size = _tree.length(of_y) or 1.0
            if not _tree.length(linear.hvp(v) - of_y) <= linear_tolerance(v.dtype) * size:
                return None
            return of_x.to(self._x) - linear.mixed_vjp(v)
        p, q, residual = system.solve(of_y)
        if not residual <= linear_tolerance(p.dtype):
            return None
        return of_x.to(self._x) - system.pull_back(p, q)

    def _reduced_rows(self, system: KKTSystem | None, held: Linearized) -> Tensor | None:
        pairs = zip(held.in_x, held.in_y, strict=True)
        rows = [self._reduced(system, of_x, of_y) for of_x, of_y in pairs]
        solved = [row for row in rows if row is not None]
        if len(solved) < len(rows):
            return None
        return torch.stack(solved) if solved else held.in_x.to(self._x)

    def _lagrangian_falls(self, x: Tensor, weights: Tensor, nu: Tensor) -> float:
        """How much `F + weights H + nu H_=` falls from the point to x, with y solved again; NaN at a kink."""
        solver = LowerSolver(self._oracle, x, self._data, self._units.y)
        solved = solver.solve(self._y)
        if solved.status is not Status.CONVERGED or not solved.is_smooth:
            return math.nan
        if self._is_overtaken(solver, solved):
            return 0.0
        gain = 0.0
        for name, held, factors in (
            ("upper_constraint", self._held, weights),
            ("upper_equality", self._equal, nu),
        ):
            if factors.numel() and bool(factors.any()):
                there = self._constraint(name, x, solved.y)
                gain += float(factors @ (held.value - there).to(factors))
        return gain + self._value - float(self._oracle.upper(x, solved.y))

    def _turns(self, x: Tensor, expected: float, weights: Tensor, nu: Tensor) -> bool:
        """Whether F first falls as the hypergradient says on the way to x, and turns later, as at a minimum."""
        part = _SHORTER
        while part * expected > self._noise():
            there = self._x + part * (x - self._x)
            if self._lagrangian_falls(there, weights, nu) >= 0.5 * part * expected:
                return True
            part *= _SHORTER
        return expected <= self._noise() or part == _SHORTER

    def _has_kink(self) -> bool:
        """Whether f around y is not curved as its Hessian there says."""
        generator = torch.Generator().manual_seed(0)  # the same direction at every call
        step = self._units.step * self._units.y * _tree.normal_like(self._y, generator)
        hvp = self._oracle.linearized(self._x, self._y).hvp
        curved = float(step @ hvp(step))
        values = [float(self._oracle.lower(self._x, self._y + t * step)) for t in (1.0, -1.0, 0.0)]
        error = abs(values[0] + values[1] - 2.0 * values[2] - curved)
        return error > max(0.5 * abs(curved), rounding(max(map(abs, values)), step.dtype))

    def _constraint(self, name: str, x: Tensor, y: Tensor) -> Tensor:
        with torch.no_grad():
            return constraint_values(self._oracle.problem, name, x, y, self._data)

    def _is_feasible(self, x: Tensor, y: Tensor) -> bool:
        """Whether the upper constraints hold there as well as at the point."""
        for name, held in (("upper_constraint", self._held), ("upper_equality", self._equal)):
            after = excess(self._constraint(name, x, y), name)
            size = linalg.vector_norm(held.in_x, dim=1) * self._units.x
            size = size + linalg.vector_norm(held.in_y, dim=1) * self._units.y
            if bool((after > excess(held.value, name) + 1e-2 * self._units.step * size).any()):
                return False
        return True

    def _is_overtaken(self, solver: LowerSolver, solved: Local) -> bool:
        """Whether another minimum of f is the lower one here, so that y would jump to it."""
        found = [solver.solve(y) for y in self._others]
        least = min(
            [other.value for other in found if other.status is Status.CONVERGED], default=math.inf
        )
        return least < solved.value - rounding(solved.value, solved.y.dtype)

    def _noise(self) -> float:
        """Changes of F below this mean nothing."""
        return 1e-8 * self._units.upper + rounding(self._value, self._x.dtype)

    # ------------------------------------------------------------------ where it is not

    def _degenerate(
        self, solver: LowerSolver, system: KKTSystem, curvature: float | None, weak: Tensor
    ) -> Stationarity:
        count = int(weak.sum())
        if count:
            why = f"{count} lower constraint(s) are weakly active, so y*(x) has a kink"
        else:
            why = "the lower Hessian is singular or indefinite here"
        if self._sign < 0.0 or self._x.numel() + self._y.numel() > _LINEAR_PROGRAM:
            reason = "for a pessimistic problem" if self._sign < 0.0 else "at this size"
            untested = f"no test by derivatives {reason}: {why}"
            return Stationarity(curvature=curvature, untested=untested)
        assumptions: list[str] = []
        if count > _BRANCHES:
            assumptions.append(
                f"the upper level is stationary on the branches that were not tried: {why}"
            )
        program = LinearProgram(
            self._oracle.problem.domain, system, self._local.point, self._x, self._units
        )
        program.upper(self._upper_x, self._upper_y, self._held, self._equal)
        chosen = [i for i in range(weak.numel()) if bool(weak[i])][:_BRANCHES]
        for active in itertools.product((True, False), repeat=len(chosen)):
            branch = dict(zip(chosen, active, strict=True))
            found = program.descend(branch, weak)
            if found is None:
                assumptions.append(
                    "the upper level is stationary on a branch of the complementarity conditions that was not "
                    f"tested, since SciPy did not solve its linear program ({why})"
                )
                continue
            dx, dy, slope = found
            expected = self._units.step * slope
            if not expected > self._noise():
                continue
            gain = self._falls(dx, dy)
            if gain >= 0.5 * expected:
                problem = (
                    f"(x, y) is not stationary along the lower solutions: F falls by {gain:.3g} over a step of "
                    f"{self._units.step:.2g} of the sizes of x and y that keeps y a lower solution ({why})"
                )
                return Stationarity(curvature=curvature, problem=problem)
            assumptions.append(
                f"F cannot be lowered along the lower solutions: the linearized problem says {slope:.2g} per unit, "
                f"but no lower solution there confirms it ({why})"
            )
        if assumptions:
            told = tuple(dict.fromkeys(assumptions))
            return Stationarity(curvature=curvature, assumptions=told, untested=why)
        tested = f"F cannot be lowered to first order along the lower solutions ({why})"
        return Stationarity(curvature=curvature, tested=(tested,))

    # ------------------------------------------------------------------ without derivatives

    def _by_directions(self, found: Stationarity) -> Stationarity:
        """The test without derivatives where that by derivatives could not be made."""
        if self._y.numel() > SMALL:
            return found
        x, domain = self._x, self._oracle.problem.domain
        optimum = OptimalValue(
            self._oracle,
            self._local,
            self._others,
            self._data,
            self._units,
            self._sign,
            self._is_feasible,
        )
        along = abs(float(self._oracle.upper(x + self._units.x, self._y)) - self._value)
        walked = Directions(
            optimum,
            (lambda u: u) if domain is None else domain,
            x,
            self._units.step * math.sqrt(x.numel()) * self._units.x,
            max(self._units.upper, along if math.isfinite(along) else 0.0),
            self._noise(),
        ).walk(self._value)
        found = replace(found, hypergradient=None)
        if walked.step > 0.0:
            problem = (
                f"the upper level is not stationary: F falls by {walked.fall:.3g} over a step of {walked.step:.3g} "
                f"in x, with the lower problem solved again there ({found.untested})"
            )
            return replace(found, problem=problem, untested="")
        if walked.untested:
            return replace(found, untested=f"{walked.untested} ({found.untested})")
        tested = (
            f"F falls along none of {walked.directions} directions of x, with the lower problem solved again along "
            f"each ({found.untested})"
        )
        return replace(found, tested=(tested,), untested="")

    def _falls(self, dx: Tensor, dy: Tensor) -> float:
        """How much F falls over a step whose end is feasible, with y solved again from there."""
        domain = self._oracle.problem.domain
        x = self._x + self._units.step * dx
        x = x if domain is None else domain(x)
        solver = LowerSolver(self._oracle, x, self._data, self._units.y)
        start = self._y + self._units.step * dy
        near = solver.solve(start)
        fallback = solver.solve(self._y)
        if near.status is not Status.CONVERGED or fallback.status is not Status.CONVERGED:
            return 0.0
        gap = near.value - fallback.value
        allowed = 1e-9 * abs(float(self._oracle.lower(x, start)) - near.value)
        if gap > allowed + rounding(near.value, x.dtype) or self._is_overtaken(solver, near):
            return 0.0
        if not self._is_feasible(x, near.y):
            return 0.0
        return self._value - float(self._oracle.upper(x, near.y))


def _rivals(local: Local, others: Sequence[Local], size: float) -> list[Tensor]:
    """The lowest of the other minima, each once."""
    chosen = [local.y]
    apart = 1e-3 * size * math.sqrt(local.y.numel())
    for other in sorted(others, key=lambda other: other.value):
        if len(chosen) <= _RIVALS and all(_tree.length(other.y - y) > apart for y in chosen):
            chosen.append(other.y)
    return chosen[1:]
