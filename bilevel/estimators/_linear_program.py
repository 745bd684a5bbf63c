"""The bilevel problem linearized around a point where y*(x) is not smooth: one linear program a branch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bilevel import _tree
from bilevel._box import Box
from bilevel._types import Projection
from bilevel.estimators._constraints import Linearized, positive
from bilevel.estimators._kkt_point import KKTPoint
from bilevel.estimators._kkt_system import KKTSystem
from bilevel.estimators._numpy import to_numpy

linalg: Any = torch.linalg  # its stubs are untyped


@dataclass(frozen=True)
class Units:
    """Sizes that make the tolerances relative.

    Attributes:
        x: The unit of x.
        y: The unit of y.
        upper: How much F changes within one unit of y.
        step: The step of the test, in units of x and y.
    """

    x: float
    y: float
    upper: float
    step: float


class LinearProgram:
    """The problem linearized in x, y and the multipliers, on one branch of complementarity.

    The variables are in units: x and y in theirs, each multiplier in that of its constraint.
    """

    def __init__(
        self,
        domain: Projection | None,
        system: KKTSystem,
        point: KKTPoint,
        x: Tensor,
        units: Units,
    ) -> None:
        self._x, self._units, self._point, self._domain = x, units, point, domain
        self._h, self._e = system.model.inequality, system.model.equality
        n = point.y.numel()
        identity = torch.eye(n, dtype=point.y.dtype, device=x.device)
        mixed = torch.stack([system.model.lagrangian.mixed_vjp(row) for row in identity])  # (n, m)
        force = torch.cat([self._h.in_y, self._e.in_y]).T  # (n, k + l)
        self._force_size = positive(linalg.vector_norm(force, dim=0))
        self._stationary = torch.cat(
            [mixed * units.x, system.hessian * units.y, force / self._force_size], 1
        )

    def upper(self, of_x: Tensor, of_y: Tensor, held: Linearized, equal: Linearized) -> None:
        """Take F and the upper constraints."""
        k = self._force_size.numel()
        self._cost = torch.cat([of_x * self._units.x, of_y * self._units.y, of_x.new_zeros(k)])
        self._upper = self._rows(held), -held.value.clamp(max=0.0) / self._units.step
        self._upper_equal = self._rows(equal)

    def _rows(self, constraint: Linearized) -> Tensor:
        zeros = constraint.in_x.new_zeros((constraint.value.numel(), self._force_size.numel()))
        in_x, in_y = constraint.in_x * self._units.x, constraint.in_y * self._units.y
        return torch.cat([in_x, in_y, zeros], 1)

    def descend(self, branch: dict[int, bool], weak: Tensor) -> tuple[Tensor, Tensor, float] | None:
        """The steepest direction in x and y, and the slope of F along it; None where SciPy finds none.

        No step at all is feasible, so that the program has a solution: without one, nothing is known.
        """
        import scipy.optimize  # pyright: ignore[reportMissingTypeStubs]

        optimize: Any = scipy.optimize
        m, n, k = self._x.numel(), self._point.y.numel(), self._h.value.numel()
        strong = self._point.active & ~weak
        held = strong.clone()
        for index, active in branch.items():
            held[index] = active
        h_rows = self._rows(self._h)
        slack = -self._h.value.clamp(max=0.0) / self._units.step
        slack = torch.where(weak, torch.zeros_like(slack), slack)
        equalities = torch.cat(
            [self._stationary, h_rows[held], self._rows(self._e), self._upper_equal]
        )
        inequalities = torch.cat([h_rows[~held], self._upper[0]])
        limits = torch.cat([slack[~held], self._upper[1]])
        bounds: list[tuple[float | None, float | None]] = self._x_bounds() + [(-1.0, 1.0)] * n
        for i in range(self._force_size.numel()):
            if i >= k or strong[i]:
                bounds.append((None, None))
            else:
                bounds.append((0.0, None) if held[i] else (0.0, 0.0))
        rows, right = _scaled(equalities, torch.zeros_like(equalities[:, 0]))
        rows_ub, right_ub = _scaled(inequalities, limits)
        if not all(map(_tree.is_finite, (self._cost, rows, rows_ub, right_ub))):
            return None
        size = float(self._cost.abs().max()) or 1.0
        result = optimize.linprog(
            to_numpy(self._cost / size),
            A_ub=to_numpy(rows_ub) if rows_ub.shape[0] else None,
            b_ub=to_numpy(right_ub) if rows_ub.shape[0] else None,
            A_eq=to_numpy(rows) if rows.shape[0] else None,
            b_eq=to_numpy(right) if rows.shape[0] else None,
            bounds=bounds,
            method="highs",
        )
        if result.status != 0:
            return None
        step = torch.as_tensor(result.x)
        dx, dy = (
            (step[:m] * self._units.x).to(self._x),
            (step[m : m + n] * self._units.y).to(self._point.y),
        )
        return dx, dy, -float(result.fun) * size

    def _x_bounds(self) -> list[tuple[float | None, float | None]]:
        m = self._x.numel()
        if not isinstance(self._domain, Box):
            return [(-1.0, 1.0)] * m
        low, high = self._domain.bounds(self._x)
        per_step = self._units.step * self._units.x
        down = ((low - self._x) / per_step).clamp(-1.0, 0.0).tolist()
        up = ((high - self._x) / per_step).clamp(0.0, 1.0).tolist()
        return list(zip(down, up, strict=True))


def _scaled(rows: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of length one: the linear program's tolerances are absolute."""
    norms = positive(linalg.vector_norm(rows, dim=1))
    return rows / norms[:, None], right / norms
