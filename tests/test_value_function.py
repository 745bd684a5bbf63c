import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from cases import lower_solution, names, reduced, slope
from torch import Tensor

import bilevel as bl
from bilevel.barriers import log_rational
from bilevel.testing.problems import ZooProblem, bda, pbgd_toy, quadratic, ridge, sine

PROBLEMS = [quadratic(3, 5), quadratic(10, 30, 100.0), ridge(1), ridge(20), sine(2), bda()]
PARAMETERS = [(1e-1, 1.0, 1e-1), (1e-3, 1e-1, 1e-2), (1e-6, 1e-2, 1e-4)]


def point(case: ZooProblem) -> Tensor:
    return case.x0 + 0.3 * torch.cos(torch.arange(case.x0.numel(), dtype=torch.float64))


def relative_error(method: bl.ValueFunction, problem: Any, x: Tensor, y: Tensor, h: float) -> float:
    """The gradient's part along one direction against central differences of phi."""
    estimate = method.estimate(problem, x, y)
    assert estimate.status is bl.Status.CONVERGED
    direction = torch.sin(1.0 + torch.arange(x.numel(), dtype=torch.float64))
    direction = direction / direction.norm()
    measured = slope(lambda u: method.estimate(problem, u, y).value, x, direction, h)
    return abs(float(estimate.grad @ direction) / measured - 1.0)


@pytest.mark.parametrize("theta", [None, 0.05])
@pytest.mark.parametrize(("mu", "sigma", "epsilon"), PARAMETERS)
@pytest.mark.parametrize("case", PROBLEMS, ids=names(PROBLEMS))
def test_gradient_is_that_of_phi(
    case: ZooProblem, mu: float, sigma: float, epsilon: float, theta: float | None
) -> None:
    method = bl.ValueFunction(mu=mu, sigma=sigma, epsilon=epsilon, theta=theta)
    assert relative_error(method, case.problem, point(case), case.y0, h=1e-3) < 1e-6


@pytest.mark.parametrize("kappa", [1e-3, 0.1, 10.0])
def test_gradient_is_that_of_phi_on_either_branch_of_the_barrier(kappa: float) -> None:
    case = quadratic(3, 5)
    method = bl.ValueFunction(mu=1e-3, sigma=0.1, epsilon=0.1, barrier=log_rational(kappa))
    assert relative_error(method, case.problem, point(case), case.y0, h=1e-3) < 1e-6


@pytest.mark.parametrize("theta", [None, 0.05])
@pytest.mark.parametrize("case", PROBLEMS[:3], ids=names(PROBLEMS[:3]))
def test_pessimistic_gradient_is_that_of_phi(case: ZooProblem, theta: float | None) -> None:
    upper = case.problem.upper  # concave in y, so that its maximum over y is one
    problem = replace(case.problem, upper=lambda x, y, data: (x**2).sum() - upper(x, y, data))
    method = bl.ValueFunction(mu=1e-3, sigma=0.1, epsilon=1e-2, theta=theta, pessimistic=True)
    assert relative_error(method, problem, point(case), case.y0, h=1e-3) < 1e-6


FLAT = bl.BilevelProblem(  # S(x) = {(x, t)}, on which F is bounded both ways
    lambda x, y, data: x[0] * y[0] + torch.cos(y[1]),
    lambda x, y, data: 0.5 * (y[0] - x[0]) ** 2,
)


def flat_phi(pessimistic: bool, y: list[float], mu: float = 1e-10) -> float:
    x = torch.tensor([0.7]).double()
    method = bl.ValueFunction(mu=mu, epsilon=1e-8, sigma=1e-6, pessimistic=pessimistic)
    return method.estimate(FLAT, x, torch.tensor(y).double()).value


def test_phi_is_the_least_and_the_pessimistic_one_the_most_over_the_lower_solutions() -> None:
    assert flat_phi(False, [0.7, 1.0]) == pytest.approx(0.49 - 1.0, abs=1e-4)
    assert flat_phi(True, [0.7, 1.0]) == pytest.approx(0.49 + 1.0, abs=1e-4)


@pytest.mark.parametrize("mu", [1e-14, 1e-12, 1e-10])
def test_phase_one_keeps_the_flat_directions(mu: float) -> None:
    assert flat_phi(False, [0.0, 1.0], mu) == pytest.approx(0.49 - 1.0, abs=1e-4)


def spread(case: ZooProblem, x: Tensor) -> float:
    """c = |grad F|^2 / 2 in the metric of the inverse Hessian of f, at the lower solution."""
    y = lower_solution(case.problem, case.y0)(x)
    hessian = torch.func.hessian(lambda v: case.problem.lower(x, v, None))(y)
    pull = torch.func.grad(lambda v: case.problem.upper(x, v, None))(y)
    return 0.5 * float(pull @ torch.linalg.solve(hessian, pull))


@pytest.mark.parametrize("case", [quadratic(3, 5), quadratic(), ridge()], ids=lambda c: c.name)
def test_multiplier_is_the_root_of_its_quadratic(case: ZooProblem) -> None:
    x = point(case)
    c = spread(case, x)
    seen = []
    for m, sigma in itertools.product((1e-3, 1e-4, 1e-6, 1e-8), (1e-1, 1e-3)):
        method = bl.ValueFunction(mu=1e-14, epsilon=m, sigma=sigma, theta=0.0)
        found = method.estimate(case.problem, x, case.y0).info["multiplier"]
        predicted = (sigma + math.sqrt(sigma**2 + 4.0 * m * c)) / (2.0 * m)
        if (
            found > 100.0
        ):  # the formula is a leading order in |F_yy| / (lambda |f_yy|), here 10 / lambda
            seen.append(found)
            assert found == pytest.approx(predicted, rel=0.01 if found >= 300.0 else 0.06)
    assert min(seen) < 1e3
    assert max(seen) > 1e4


@pytest.mark.parametrize("case", [quadratic(4, 8), quadratic(), ridge(20)], ids=lambda c: c.name)
def test_bias_falls_as_one_over_lambda(case: ZooProblem) -> None:
    x = point(case)
    exact = torch.func.grad(reduced(case.problem, case.y0))(x)
    products = []
    for k in range(4):
        method = bl.ValueFunction(mu=1e-3 * 0.04**k, epsilon=1e-3 * 0.04**k, sigma=0.1 * 0.2**k)
        estimate = method.estimate(case.problem, x, case.y0)
        error = float((estimate.grad - exact).norm())
        products.append(error * estimate.info["multiplier"])
    assert max(products) < 2.0 * min(products)


def test_theta_of_lambda_mu_removes_the_bias_of_mu() -> None:
    case = quadratic(4, 8)
    x = point(case)
    exact = torch.func.grad(reduced(case.problem, case.y0))(x)
    errors = []
    for theta in (None, 0.0):
        method = bl.ValueFunction(mu=1e-4, epsilon=1e-6, sigma=0.1, theta=theta)
        errors.append(float((method.estimate(case.problem, x, case.y0).grad - exact).norm()))
    assert errors[0] < 0.2 * errors[1]


def test_zero_that_solves_the_lower_problem_is_infeasible_without_slack() -> None:
    case = bda()
    x, y = torch.zeros(1).double(), torch.zeros(2).double()
    estimate = bl.ValueFunction(epsilon=0.0, theta=0.1).estimate(case.problem, x, y)
    assert estimate.status is bl.Status.INFEASIBLE
    estimate = bl.ValueFunction(epsilon=1e-6, theta=0.1).estimate(case.problem, x, y)
    assert estimate.status is bl.Status.CONVERGED


def test_y_keeps_its_basin_when_it_has_to_become_feasible() -> None:
    problem = sine(
        1
    ).problem  # basins 2 pi apart: phase I descends f from y, a restart would be at z
    x, y = torch.tensor([2.0]).double(), torch.tensor([5.5]).double()
    z = torch.tensor([-1.5]).double()
    estimate = bl.ValueFunction(epsilon=1e-4).estimate(problem, x, y, None, {"z": z})
    assert float(estimate.y) == pytest.approx(1.5 * math.pi, abs=0.1)


def test_a_deeper_basin_found_by_y_becomes_that_of_z() -> None:
    def lower(x: Tensor, y: Tensor, data: Any) -> Tensor:  # minima near -1 and, deeper, near 1
        return ((y**2 - 1.0) ** 2 - 0.3 * y).sum() + 0.0 * x.sum()

    problem = bl.BilevelProblem(lambda x, y, data: ((y - 1.0) ** 2 + x**2).sum(), lower)
    start = torch.tensor([1.1]).double()
    estimate = bl.ValueFunction(epsilon=1e-3).estimate(
        problem, torch.zeros(1).double(), start, None, {"z": -start}
    )
    assert float(estimate.memory["z"]) > 0.9
    assert estimate.info["value_gap"] >= -1e-12


def test_pbgd_gradient_at_its_optimum_vanishes_with_the_slack() -> None:
    case = pbgd_toy()
    sizes = [
        abs(
            float(
                bl.ValueFunction(epsilon=e, sigma=e**0.5)
                .estimate(case.problem, case.x_star, case.y_star)
                .grad
            )
        )
        for e in (1e-4, 1e-6, 1e-8)
    ]
    assert sizes[2] < 0.2 * sizes[1] < 0.04 * sizes[0] * 1.5
    assert sizes[2] < 1e-2


def test_memory_that_runs_out_in_the_bound_is_no_missing_derivative(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def out(*_: Any, **__: Any) -> float:
        raise torch.OutOfMemoryError("no memory left")

    monkeypatch.setattr("bilevel.estimators.value_function.error_bound", out)
    case = quadratic()
    with pytest.raises(torch.OutOfMemoryError):
        bl.ValueFunction(error_bound=True).estimate(case.problem, case.x0, case.y0)
