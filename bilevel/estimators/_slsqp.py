"""SciPy's SLSQP on functions of torch vectors: small problems with constraints, to high accuracy."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bilevel import _autodiff
from bilevel.estimators._numpy import clipped, to_numpy

_FAR = 1e8  # growth at which its answer is no longer one
_DEPENDENT = (2, 6)  # what it says of more equalities than variables, and of dependent ones
_RANK = (
    1e-10  # relative size of what a row adds to those before it, where it is independent of them
)


@dataclass(frozen=True)
class Answer:
    """Where SLSQP ended.

    Attributes:
        vectors: The variables.
        value: The objective there.
        ran_away: Whether they are not finite, and then those of the start, or grew without bound.
        values: Evaluations of the functions.
        jacobians: Evaluations of their derivatives.
    """

    vectors: list[Tensor]
    value: float
    ran_away: bool
    values: int
    jacobians: int


def minimize(
    outputs: Callable[..., Tensor],
    start: Sequence[Tensor],
    equalities: int,
    *,
    slack: Sequence[float] = (),
    bounds: Sequence[tuple[float | None, float | None]] | None = None,
    max_steps: int = 100,
    ftol: float = 1e-10,
) -> Answer:
    """Minimize `outputs(*vectors)[0]`.

    Args:
        outputs: Returns the objective, then the `equalities`, which are to be zero, then the inequalities, which
            are to be at least zero: a vector.
        start: Where to start: vectors.
        equalities: Number of equalities.
        slack: Added to the inequalities.
        bounds: Of each entry of the vectors, the lower and the upper one.
        max_steps: Steps at most.
        ftol: Accuracy of the objective, in its own unit.
    """
    import scipy.optimize  # pyright: ignore[reportMissingTypeStubs]

    optimize: Any = scipy.optimize
    program = _Program(outputs, start)
    equal, over = slice(1, 1 + equalities), slice(1 + equalities, None)
    first = program.joined(start)
    raised: Any = torch.tensor(slack, dtype=torch.float64).numpy() if slack else 0.0
    rest = len(program.values(first)) - 1 - equalities
    objective = program.rows(0)

    def attempt(equal: Any, begin: Any) -> Any:
        constraints: list[Any] = []
        if equalities:
            constraints.append({"type": "eq", **program.rows(equal)})
        if rest:
            constraints.append({"type": "ineq", **program.rows(over, raised)})
        return optimize.minimize(
            objective["fun"],
            begin,
            jac=objective["jac"],
            method="SLSQP",
            bounds=bounds,
            constraints=constraints,
            options={"maxiter": max_steps, "ftol": ftol},
        )

    found = attempt(equal, first)
    if found.status in _DEPENDENT and equalities:
        rows = _independent(program.slopes(found.x)[equal])
        if len(rows) < equalities:
            found = attempt(1 + rows, found.x)
    length = float(abs(found.x).max())
    far = not length <= _FAR * (1.0 + abs(first).max())  # also where it is NaN
    vectors = program.split(found.x) if math.isfinite(length) else list(start)
    return Answer(vectors, float(found.fun), far, program.value_count, program.slope_count)


def _independent(rows: Any) -> Any:
    """The numbers of the most independent rows of a matrix, the others being combinations of them."""
    import scipy.linalg  # pyright: ignore[reportMissingTypeStubs]

    linalg: Any = scipy.linalg
    triangle, order = linalg.qr(rows.T, mode="r", pivoting=True)
    sizes = abs(triangle.diagonal())
    rank = int((sizes > _RANK * sizes.max()).sum())
    return order[:rank]


class _Program:
    """The outputs at the last point that SLSQP asked for, and how many points there were."""

    def __init__(self, outputs: Callable[..., Tensor], like: Sequence[Tensor]) -> None:
        self._outputs, self._like = outputs, like
        self._key = b""
        self._map: Any = None
        self._slopes: Any = None
        self.value_count = self.slope_count = 0

    def joined(self, vectors: Sequence[Tensor]) -> Any:
        return to_numpy(torch.cat(list(vectors)))

    def split(self, w: Any) -> list[Tensor]:
        parts = torch.split(torch.as_tensor(w), [part.numel() for part in self._like])
        return [part.to(like) for part, like in zip(parts, self._like, strict=True)]

    def _at(self, w: Any) -> None:
        if w.tobytes() != self._key:
            self._key, self._slopes = w.tobytes(), None
            self._map = _autodiff.LinearizedMap(self._outputs, *self.split(w))
            self.value_count += 1

    def values(self, w: Any) -> Any:
        self._at(w)
        value: Tensor = self._map.value
        bad = torch.full_like(value, -math.inf)  # a constraint that is NaN is violated
        bad[0] = math.inf
        return clipped(torch.where(value.isnan(), bad, value))

    def rows(self, rows: Any, plus: Any = 0.0) -> dict[str, Callable[[Any], Any]]:
        """Some of the outputs, and their derivatives, as SLSQP wants them."""

        def fun(w: Any) -> Any:
            return self.values(w)[rows] + plus

        def jac(w: Any) -> Any:
            return self.slopes(w)[rows]

        return {"fun": fun, "jac": jac}

    def slopes(self, w: Any) -> Any:
        self._at(w)
        if self._slopes is None:
            self._slopes = clipped(torch.cat(self._map.jacobian(), 1))
            self.slope_count += 1
        return self._slopes
