"""Descent along any hypergradient estimate."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from bilevel import _tree
from bilevel._errors import BilevelWarning, check_kind, check_number
from bilevel._problem import BilevelProblem, projected_by, ravel
from bilevel._solution import Evaluations, State, Status
from bilevel._types import Tree
from bilevel.estimators import Estimate, Estimator, refuse_constraints
from bilevel.optim import Point, QuasiNewton, Torch
from bilevel.solvers._base import Solver

_FAR = 1e10  # growth of |x| at which a minimum is not believed to exist


@dataclass(frozen=True)
class HypergradientDescent(Solver):
    r"""Minimize $F(x, y^*(x))$ along the hypergradient of any estimator.

    On the full batch the default takes quasi-Newton steps and ends when the next one is shorter than `rtol`.
    On batches, or with a `torch.optim` optimizer, each step is one estimate and one step of the optimizer,
    and the run ends with the steps.

    Attributes:
        estimator: Estimates the hypergradient, e.g. `Implicit()`.
        upper_optimizer: Moves x: `QuasiNewton()` (full batch only), or a `Torch`.
        rtol: Length of the next step, relative to x, at which a quasi-Newton run has converged, > 0.

    Raises:
        ValueError: `rtol` is out of its range, or batches are given to `QuasiNewton`.

    Example:
        >>> import torch, bilevel as bl
        >>> problem = bl.BilevelProblem(
        ...     upper=lambda x, y, data: ((y - 1.0) ** 2).sum(),
        ...     lower=lambda x, y, data: ((y - 2.0 * x) ** 2).sum(),
        ... )
        >>> x0, y0 = torch.zeros(1).double(), torch.zeros(1).double()
        >>> bl.solve(problem, bl.HypergradientDescent(bl.Implicit()), x0, y0, max_steps=50).x
        tensor([0.5000], dtype=torch.float64)
    """

    estimator: Estimator
    upper_optimizer: QuasiNewton | Torch = field(default_factory=QuasiNewton)
    rtol: float = 1e-7

    def __post_init__(self) -> None:
        name = "HypergradientDescent(estimator=...)"
        check_kind(name, self.estimator, Estimator, "Pass e.g. `Implicit()`.")
        check_kind(
            "HypergradientDescent(upper_optimizer=...)",
            self.upper_optimizer,
            (QuasiNewton, Torch),
            "Wrap an optimizer of torch, e.g. `Torch(torch.optim.Adam, lr=1e-2)`.",
        )
        check_number("HypergradientDescent", "rtol", self.rtol, "Use e.g. 1e-7.")

    @property
    def pessimistic(self) -> bool:
        """That of the estimator."""
        return self.estimator.pessimistic

    def init(
        self, problem: BilevelProblem, x0: Tree, y0: Tree, data: Any, *, full_batch: bool
    ) -> State:
        """See `Solver.init`."""
        lower = tuple(c for c in self.estimator.constraints if c.startswith("lower"))
        refuse_constraints(problem, "HypergradientDescent", lower)
        x, y = projected_by(problem.domain, _tree.detach(x0)), _tree.detach(y0)
        if not (full_batch or isinstance(self.upper_optimizer, Torch)):
            raise ValueError(
                "`HypergradientDescent(upper_optimizer=...)` must be a `Torch` where batches are given: a line search "
                "cannot compare values of different batches. Got QuasiNewton. "
                "Use e.g. `bilevel.optim.Torch(torch.optim.Adam, lr=1e-2)`."
            )
        if isinstance(self.upper_optimizer, Torch):
            optimizer = self.upper_optimizer.init(_tree.leaves(x))
        else:
            optimizer = self.upper_optimizer.init(_tree.ravel(x)[0])
        memory = {"optimizer": optimizer, "warm": {}, "reach": 1.0 + _tree.length(x)}
        return State(x, y, memory=memory)

    def step(self, problem: BilevelProblem, state: State, data: Any) -> State:
        """See `Solver.step`."""
        if isinstance(self.upper_optimizer, Torch):
            return self._first_order(self.upper_optimizer, problem, state, data)
        return self._quasi_newton(self.upper_optimizer, problem, state, data)

    def _first_order(
        self, optimizer: Torch, problem: BilevelProblem, state: State, data: Any
    ) -> State:
        flat, (x, y), unravel_x, unravel_y = ravel(problem, state.x, state.y)
        estimate = self.estimator.estimate(flat, x, y, data, state.memory["warm"])
        if _is_fatal(estimate):
            return _ended(state, estimate, unravel_y)
        if estimate.status.is_failure:
            warnings.warn(
                f"The hypergradient is not to be trusted: {estimate.status.value}. {estimate.status.cure}",
                BilevelWarning,
                stacklevel=2,
            )
        grad = _tree.leaves(unravel_x(estimate.grad))
        moved, memory = optimizer.step(_tree.leaves(state.x), grad, state.memory["optimizer"])
        x_new = projected_by(problem.domain, _tree.unflatten_like(state.x, moved))
        if not _tree.is_finite(x_new):  # an optimizer may overflow where its gradient did not
            return _ended(state, replace(estimate, status=Status.NONFINITE), unravel_y)
        return State(
            x=x_new,
            y=unravel_y(estimate.y),
            step=state.step + 1,
            metrics=_metrics(estimate),
            memory={**state.memory, "optimizer": memory, "warm": estimate.memory},
            evaluations=state.evaluations + estimate.evaluations,
        )

    def _quasi_newton(
        self, optimizer: QuasiNewton, problem: BilevelProblem, state: State, data: Any
    ) -> State:
        flat, (x, y), unravel_x, unravel_y = ravel(problem, state.x, state.y)
        memory, warm = dict(state.memory), state.memory["warm"]
        spent, recoveries = Evaluations(), state.recoveries

        def evaluate(u: Tensor) -> Point:
            nonlocal spent, recoveries
            estimate = self.estimator.estimate(flat, u, y, data, warm)
            spent = spent + estimate.evaluations
            recoveries += estimate.status is Status.NONFINITE
            return Point(
                u,
                math.inf if _is_fatal(estimate) else estimate.value,
                estimate.grad,
                estimate.noise,
                estimate,
            )

        if "estimate" in memory:
            estimate = Estimate.recalled(memory["estimate"], y, warm)
            point = Point(x, estimate.value, estimate.grad, estimate.noise, estimate)
        else:
            point = evaluate(x)
            if _is_fatal(point.extra):
                return _ended(state, point.extra, unravel_y)
            warm, y = point.extra.memory, point.extra.y
        before = memory["optimizer"]
        new, memory["optimizer"] = optimizer.step(evaluate, point, before, flat.domain)
        point = new or point
        estimate = point.extra
        memory["warm"] = estimate.memory
        memory["estimate"] = estimate.kept()
        status, message = Status.RUNNING, ""
        left = _tree.length(optimizer.direction(point, memory["optimizer"], flat.domain))
        size = max(_tree.length(point.y), 1e-3 * math.sqrt(x.numel()))
        if new is not None and memory["optimizer"]["steps"].shape[0] and left <= self.rtol * size:
            status, message = Status.CONVERGED, f"the next step is {left / size:.2g} of |x|"
        elif new is None and before["steps"].shape[0] == 0:  # not even along the gradient
            slope = 0.5 * left * _tree.length(estimate.grad)
            solved = slope <= max(1e-10 * abs(estimate.value), 100.0 * estimate.noise)
            status = Status.CONVERGED if solved or left == 0.0 else Status.STALLED
            message = "no step decreases F any more"
        elif _tree.length(point.y) > _FAR * memory["reach"]:
            status, message = Status.UPPER_UNBOUNDED, Status.UPPER_UNBOUNDED.value
        elif new is None:  # the value may be of another start of the lower solve: measure it again
            del memory["estimate"]
        if status is Status.CONVERGED and estimate.status is not Status.CONVERGED:
            status, message = estimate.status, estimate.status.value
        return State(
            x=unravel_x(point.y),
            y=unravel_y(estimate.y),
            step=state.step + 1,
            status=status,
            message=message,
            metrics=_metrics(estimate),
            memory=memory,
            evaluations=state.evaluations + spent,
            recoveries=recoveries,
        )


def _is_fatal(estimate: Estimate) -> bool:
    """Whether the numbers cannot be used at all; an inexact hypergradient may still descend."""
    return estimate.status in (Status.NONFINITE, Status.LOWER_UNBOUNDED, Status.INFEASIBLE)


def _ended(state: State, estimate: Estimate, unravel_y: Callable[[Tensor], Tree]) -> State:
    """The state of a run that cannot go on; where no y is feasible, with that which comes nearest."""
    message = f"{estimate.status.value} (at step {state.step + 1})"
    return replace(
        state,
        y=unravel_y(estimate.y) if estimate.status is Status.INFEASIBLE else state.y,
        status=estimate.status,
        message=message,
        evaluations=state.evaluations + estimate.evaluations,
    )


def _metrics(estimate: Estimate) -> dict[str, Any]:
    return {**estimate.info, "hypergradient": _tree.length(estimate.grad)}
