"""Our own solvers and estimators keep the contract, and the checks catch those that do not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from cases import ESTIMATORS, SINGLE_LOOPS, SOLVERS
from torch import Tensor

import bilevel as bl
from bilevel.testing import (
    ContractError,
    check_hypergradient_estimator,
    check_solver,
    problems,
)


@pytest.mark.parametrize("name", list(ESTIMATORS))
def test_estimator_keeps_the_contract(name: str) -> None:
    estimator, rtol = ESTIMATORS[name]
    check_hypergradient_estimator(estimator, rtol=rtol)


@pytest.mark.parametrize("name", [name for name in SOLVERS if name not in SINGLE_LOOPS])
def test_solver_keeps_the_contract(name: str) -> None:
    solver, batches = SOLVERS[name]
    check_solver(solver, batches=batches, problems=[problems.quadratic()])


@pytest.mark.parametrize("name", list(SINGLE_LOOPS))
def test_single_loop_keeps_the_contract(name: str) -> None:
    (solver, batches), (tolerance, steps) = SOLVERS[name], SINGLE_LOOPS[name]
    case = replace(problems.quadratic(3, 4, condition=2.0), tolerance=tolerance)
    check_solver(solver, batches=batches, problems=[case], max_steps=steps)


@dataclass(frozen=True)
class Wrong(bl.Estimator):
    """`Implicit`, spoiled in one way."""

    how: str

    def estimate(
        self, problem: Any, x: Tensor, y: Tensor, data: Any = None, memory: Any = None
    ) -> bl.Estimate:
        found = bl.Implicit().estimate(problem, x, y, data, memory)
        if self.how == "sign":
            return replace(found, grad=-found.grad)
        if self.how == "value":
            return replace(found, value=2.0 * found.value)
        if self.how == "status":
            return replace(found, status=bl.Status.CONVERGED)
        if self.how == "residual":
            return replace(found, info={})
        if self.how == "counts":
            return replace(found, evaluations=bl.Evaluations())
        if self.how == "in place":
            y += 0.0 if memory is None else 1.0
        if self.how == "random":
            torch.rand(1)
        if self.how == "dtype":
            return replace(found, grad=found.grad.double())
        return found


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("sign", "must agree with the closed form of a quadratic problem to 1e-06. Got a relative"),
        ("value", "must return the gradient of `Estimate.value`"),
        ("status", "must not report success where the upper objective is NaN. Got CONVERGED"),
        ("residual", "must report CONVERGED and its `lower_residual`"),
        ("counts", "must report the calls of the objectives that it made"),
        ("in place", "must leave x, y, the memory and the global random state as it found them"),
        ("random", "must leave x, y, the memory and the global random state as it found them"),
        ("dtype", "`Estimate.grad` must have shape (5,) and dtype torch.float32"),
    ],
)
def test_wrong_estimator_is_caught(how: str, message: str) -> None:
    with pytest.raises(bl.BilevelError) as caught:
        check_hypergradient_estimator(Wrong(how))
    assert message in str(caught.value)


@dataclass(frozen=True)
class Spoiled(bl.Solver):
    """`HypergradientDescent`, spoiled in one way."""

    how: str
    solver: bl.Solver = field(default_factory=lambda: bl.HypergradientDescent(bl.Implicit()))
    hidden: dict[str, int] = field(default_factory=dict)

    def init(self, problem: Any, x0: Any, y0: Any, data: Any, *, full_batch: bool) -> bl.State:
        self.hidden.clear()
        return self.solver.init(problem, x0, y0, data, full_batch=full_batch)

    def step(self, problem: Any, state: bl.State, data: Any) -> bl.State:
        new = self.solver.step(problem, state, data)
        if self.how == "in place" and isinstance(state.x, Tensor):
            state.x.add_(1e-12)
        if self.how == "hidden":
            self.hidden["calls"] = self.hidden.get("calls", 0) + 1
            return replace(new, metrics={**new.metrics, "calls": self.hidden["calls"] * state.step})
        if self.how == "stops early":
            return replace(new, status=bl.Status.CONVERGED)
        if self.how == "counts":
            return replace(new, evaluations=bl.Evaluations())
        if self.how == "random":
            torch.rand(1)
        if self.how == "silent" and new.status.is_failure:
            return replace(new, status=bl.Status.STOPPED)
        if self.how == "tuple":
            return replace(new, x=(new.x,)) if isinstance(new.x, Mapping) else new
        return new


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("in place", "must leave the states that it returned before as it found them"),
        (
            "hidden",
            "must go on from a saved state as if it had never stopped. Got other metrics in",
        ),
        ("stops early", "must come within 0.0001 of the answer of quadratic 5x10, condition 10"),
        ("counts", "must report the calls of the objectives that it made"),
        ("random", "must leave the global random state as it found them"),
        ("silent", "must end with a failure and a message where the upper objective is NaN"),
    ],
)
def test_spoiled_solver_is_caught(how: str, message: str) -> None:
    with pytest.raises(ContractError) as caught:
        check_solver(Spoiled(how), problems=[problems.quadratic()])
    assert message in str(caught.value)


def test_contract_error_is_an_assertion_and_an_error_of_the_library() -> None:
    assert issubclass(ContractError, AssertionError)
    assert issubclass(ContractError, bl.BilevelError)


def test_contract_holds_in_a_domain() -> None:
    """The box holds the answer; over nested trees it has to be a projection of those."""
    case = problems.quadratic()
    wide = replace(case, problem=replace(case.problem, domain=bl.Box(-100.0, 100.0)))
    check_solver(bl.HypergradientDescent(bl.Implicit()), problems=[wide])
