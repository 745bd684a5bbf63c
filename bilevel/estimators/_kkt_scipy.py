"""SciPy on the constrained lower problem at a fixed x: to where Newton's method on the KKT equations takes over."""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from torch import Tensor

from bilevel import _tree
from bilevel._oracle import Oracle
from bilevel._problem import BilevelProblem
from bilevel._solution import Status
from bilevel.estimators._constraints import linearize
from bilevel.estimators._kkt_point import reach
from bilevel.estimators._numpy import clipped, to_numpy

_OPTIONS = {"SLSQP": {"ftol": 1e-14}, "trust-constr": {"gtol": 1e-10}}
METHODS = tuple(_OPTIONS)
_FAR = 1e8  # growth of |y| at which a minimum is not believed to exist


class ScipyLower:
    """`min f(x, .)` under h <= 0 and h_= = 0 as SciPy wants it, `size` being the unit of y."""

    def __init__(self, oracle: Oracle, x: Tensor, data: Any, size: float) -> None:
        self._oracle, self._x, self._data, self._size = oracle, x, data, size

    def minimize(self, y: Tensor, method: str) -> tuple[Tensor, Status]:
        """Where `method` ends from y, LOWER_UNSOLVED until measured; or why there is nothing to measure."""
        import scipy.optimize  # pyright: ignore[reportMissingTypeStubs]

        optimize: Any = scipy.optimize
        value, grad = self._oracle.lower_grad_y(self._x, y)
        # the start may be stationary
        near = y + self._size * torch.cos(torch.arange(y.numel())).to(y)
        scale = max(_tree.length(grad), _tree.length(self._oracle.lower_grad_y(self._x, near)[1]))
        if not (math.isfinite(float(value)) and math.isfinite(scale)):
            return y, Status.NONFINITE
        objective = _Objective(
            self._oracle,
            self._x,
            y,
            float(value),
            scale or 1.0,
            far=_FAR * (self._size + _tree.length(y)),
        )
        conditions = self._conditions(optimize, method, y)
        try:
            with warnings.catch_warnings():  # of steps that SciPy then rejects
                warnings.simplefilter("ignore", RuntimeWarning)
                warnings.simplefilter("ignore", UserWarning)
                result = optimize.minimize(
                    objective,
                    to_numpy(y),
                    jac=True,
                    method=method,
                    constraints=conditions,
                    options={"maxiter": 300, **_OPTIONS[method]},
                )
        except _FarAwayError:
            return objective.last, Status.LOWER_UNBOUNDED
        return torch.as_tensor(result.x).to(y), Status.LOWER_UNSOLVED

    def _conditions(self, optimize: Any, method: str, y: Tensor) -> list[Any]:
        """The constraints as the method wants them, each entry in units of its change over one unit of y."""
        found: list[Any] = []
        for kind, name in (("ineq", "lower_constraint"), ("eq", "lower_equality")):
            if getattr(self._oracle.problem, name) is None:
                continue
            entry = _Entry(self._oracle.problem, name, self._x, y, self._data, self._size)
            if method == "SLSQP":
                found.append({"type": kind, "fun": entry.minus_value, "jac": entry.minus_slope})
            else:
                low = -math.inf if kind == "ineq" else 0.0
                found.append(optimize.NonlinearConstraint(entry.value, low, 0.0, jac=entry.slope))
        return found


class _Objective:
    """f less its value at the start y, in units of `scale`; `last` is the last point at which it was finite."""

    def __init__(
        self, oracle: Oracle, x: Tensor, y: Tensor, offset: float, scale: float, *, far: float
    ) -> None:
        self._oracle, self._x, self.last = oracle, x, y
        self._offset, self._scale, self._far = offset, scale, far

    def __call__(self, vector: Any) -> tuple[float, Any]:
        point = torch.as_tensor(vector).to(self.last)
        value, grad = self._oracle.lower_grad_y(self._x, point)
        if not (math.isfinite(float(value)) and _tree.is_finite(grad)):
            return 1e300, clipped(grad)
        self.last = point
        if _tree.length(point) > self._far:
            raise _FarAwayError
        return (float(value) - self._offset) / self._scale, to_numpy(grad / self._scale)


class _Entry:
    """A constraint as SciPy calls it: first the value at a point, then its slope there."""

    def __init__(
        self, problem: BilevelProblem, name: str, x: Tensor, y: Tensor, data: Any, size: float
    ) -> None:
        self._problem, self._name, self._x, self._y, self._data = problem, name, x, y, data
        self._reach = reach(linearize(problem, name, x, y, data), size)
        self._key, self._last = b"", (None, None)

    def _at(self, vector: Any) -> tuple[Any, Any]:
        if vector.tobytes() != self._key:
            y = torch.as_tensor(vector).to(self._y)
            here = linearize(self._problem, self._name, self._x, y, self._data)
            value, in_y = here.value / self._reach, here.in_y / self._reach[:, None]
            bad = torch.full_like(value, math.inf)  # a constraint that is NaN is violated
            self._key = vector.tobytes()
            self._last = clipped(torch.where(value.isnan(), bad, value)), clipped(in_y)
        return self._last

    def value(self, vector: Any) -> Any:
        return self._at(vector)[0]

    def slope(self, vector: Any) -> Any:
        return self._at(vector)[1]

    def minus_value(self, vector: Any) -> Any:
        return -self._at(vector)[0]

    def minus_slope(self, vector: Any) -> Any:
        return -self._at(vector)[1]


class _FarAwayError(Exception):
    """Ends SciPy's run where f falls without bound."""
