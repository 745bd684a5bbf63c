"""What other libraries get wrong, measured on them, and what therefore is a test here."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from cases import ESTIMATORS, reduced, sgd
from torch import Tensor

import bilevel as bl
from bilevel.linear import CG, GMRES, MINRES, Dense, LinearSolver, Nystrom
from bilevel.testing.problems import quadratic, ridge


def spd(n: int, condition: float, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """A matrix, a solution, and the right-hand side that belongs to it."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64, generator=generator))[0]
    spectrum = torch.logspace(0, math.log10(condition), n, dtype=torch.float64)
    A = (basis * spectrum) @ basis.T
    exact = torch.randn(n, dtype=torch.float64, generator=generator)
    return A, exact, A @ exact


# Conjugate gradients that return the iterate before the last stay at 6e-5, at condition 10.


@pytest.mark.parametrize("solver", [CG(), MINRES(), GMRES(), Nystrom(rank=5), Dense()], ids=str)
@pytest.mark.parametrize("condition", [10.0, 1e3])
def test_linear_solvers_are_accurate_to_1e12(solver: LinearSolver, condition: float) -> None:
    for seed in range(5):
        A, exact, b = spd(30, condition, seed)
        v = solver.solve(lambda u, A=A: A @ u, b)
        assert float((v - exact).norm() / exact.norm()) < 1e-12


@pytest.mark.parametrize("n", [1, 2, 5, 12])
def test_cg_ends_with_its_last_iterate(n: int) -> None:
    """n products are enough for n unknowns; one iterate earlier the error is not small."""
    A, exact, b = spd(n, 10.0, 0)
    errors = [
        float((CG(max_steps=k).solve(lambda u: A @ u, b) - exact).norm())
        for k in (n, max(1, n - 1))
    ]
    assert errors[0] < 1e-9
    assert n == 1 or errors[1] > 1e-6


# Relative errors of 34 and 12 where the step of conjugate gradients is scaled by a number other than one: b is scaled.


@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e8])
@pytest.mark.parametrize("solver", [CG(), MINRES(), GMRES(), Nystrom(rank=5)], ids=str)
def test_linear_solvers_are_homogeneous(solver: LinearSolver, scale: float) -> None:
    A, exact, b = spd(20, 10.0, 1)
    v = solver.solve(lambda u: scale * (A @ u), b)
    assert float((scale * v - exact).norm() / exact.norm()) < 1e-12


# A "barrier" whose slack is f* and not the gap: adding -5 to f turns the direction round (cosine -0.72), then NaN.


@pytest.mark.parametrize("name", list(ESTIMATORS))
@pytest.mark.parametrize(("upper", "lower"), [(0.0, -5.0), (0.0, 100.0), (-7.0, 3.0)])
def test_constants_leave_every_hypergradient_as_it_is(
    name: str, upper: float, lower: float
) -> None:
    method, _ = ESTIMATORS[name]
    case = quadratic()
    x = case.x0 + 0.3
    shifted = replace(
        case.problem,
        upper=lambda x, y, data: case.problem.upper(x, y, data) + upper,
        lower=lambda x, y, data: case.problem.lower(x, y, data) + lower,
    )
    plain = method.estimate(case.problem, x, case.y0)
    moved = method.estimate(shifted, x, case.y0)
    assert moved.status is bl.Status.CONVERGED
    torch.testing.assert_close(moved.grad, plain.grad, rtol=1e-6, atol=1e-9)


def test_constants_leave_the_iterates_of_asblo_as_they_are() -> None:
    case = ridge()
    ends: list[float] = []
    for constant in (0.0, -5.0, 50.0):
        problem = replace(
            case.problem,
            lower=lambda x, y, data, c=constant: case.problem.lower(x, y, data) + c,
        )
        ends.append(float(bl.solve(problem, bl.ASBLO(), case.x0, case.y0, max_steps=200).x))
    assert ends == pytest.approx([ends[0]] * 3, rel=1e-5)


# NaN gradients replaced by zero: the run goes on and ends in success.


@pytest.mark.parametrize("name", list(ESTIMATORS))
@pytest.mark.parametrize("level", ["upper", "lower"])
def test_nan_is_a_status_and_no_zero(name: str, level: str) -> None:
    method, _ = ESTIMATORS[name]
    case = quadratic()

    def poisoned(x: Tensor, y: Tensor, data: Any) -> Tensor:
        # zero, but the derivative of the root at zero is infinity times zero: NaN in x, also of the gradient in y
        root = torch.sqrt((x - x.detach()) ** 2).sum()
        return getattr(case.problem, level)(x, y, data) + root * y.sum()

    problem = replace(case.problem, **{level: poisoned})
    estimate = method.estimate(problem, case.x0 + 0.3, case.y0)
    assert estimate.status is bl.Status.NONFINITE
    assert bool(estimate.grad.isnan().any())


@pytest.mark.parametrize("method", [bl.OneStep(), bl.OneStep(radius=0.01)], ids=str)
def test_nan_in_one_step_is_a_status_and_no_zero(method: bl.Estimator) -> None:
    case = quadratic()
    problem = replace(
        case.problem, lower=lambda x, y, data: case.problem.lower(x, y, data) * math.nan
    )
    estimate = method.estimate(problem, case.x0, case.y0)
    assert estimate.status is bl.Status.NONFINITE
    assert bool(estimate.grad.isnan().all())


# SciPy's L-BFGS-B reports success on a NaN objective.


@pytest.mark.parametrize(
    "solver", [bl.ASBLO(), bl.HypergradientDescent(bl.Implicit())], ids=["ASBLO", "descent"]
)
def test_nan_objective_is_no_success(solver: bl.Solver) -> None:
    case = quadratic()
    problem = replace(
        case.problem, upper=lambda x, y, data: case.problem.upper(x, y, data) * math.nan
    )
    solution = bl.solve(problem, solver, case.x0, case.y0, max_steps=20, throw=False)
    assert solution.status is bl.Status.NONFINITE


# An unsolved inner problem is differentiated silently: 3, 10 and 30 steps give errors of 1.36, 0.63 and 0.054.


@pytest.mark.parametrize("steps", [1, 3, 10])
@pytest.mark.parametrize(
    "make",
    [
        lambda steps: bl.Unrolled(steps, lr=0.1),
        lambda steps: bl.Unrolled(steps, lr=0.1, mode="forward"),
        lambda steps: bl.Implicit(minimizer=sgd(0.1, max_steps=steps)),
        lambda steps: bl.ValueFunction(minimizer=sgd(1e-6, max_steps=steps)),
        lambda steps: bl.TwoSided(1e2, minimizer=sgd(0.1, max_steps=steps)),
    ],
    ids=["Unrolled", "Unrolled(forward)", "Implicit", "ValueFunction", "TwoSided"],
)
def test_unsolved_lower_problem_is_said(make: Any, steps: int) -> None:
    case = quadratic()
    x = case.x0 + 0.3
    estimate = make(steps).estimate(case.problem, x, case.y0 + 1.0)
    exact = torch.func.grad(reduced(case.problem, case.y0))(x)
    assert float((estimate.grad - exact).norm() / exact.norm()) > 1e-2  # it is wrong indeed
    assert estimate.status is bl.Status.LOWER_UNSOLVED
    assert estimate.info["lower_residual"] > 1e-3


def test_error_of_an_unrolled_hypergradient_follows_its_residual() -> None:
    case = quadratic()
    x = case.x0 + 0.3
    exact = torch.func.grad(reduced(case.problem, case.y0))(x)
    found = [bl.Unrolled(k, lr=0.1).estimate(case.problem, x, case.y0) for k in (30, 60, 120)]
    errors = [float((e.grad - exact).norm() / exact.norm()) for e in found]
    residuals = [e.info["lower_residual"] for e in found]
    assert errors[2] < 1e-2 * errors[1] < 1e-3 * errors[0]
    assert residuals[2] < 1e-1 * residuals[1] < 1e-2 * residuals[0]
