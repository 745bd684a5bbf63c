"""The answers of the zoo, found again by means that share nothing with the closed forms."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy.optimize import brentq
from torch import Tensor

from bilevel.testing import problems
from bilevel.testing.problems import ZooProblem, bda, pbgd_toy, quadratic, ridge, sine, zoo

QUADRATICS = [quadratic(5, 10, 10.0), quadratic(20, 40, 1e3), quadratic(3, 7, 100.0, seed=5)]
ALL = [*QUADRATICS, ridge(1), ridge(20), bda(), sine(1), sine(10), pbgd_toy()]


def gradient(fun: Callable[[Tensor], Tensor], at: Tensor, step: float = 1e-5) -> Tensor:
    """Central differences."""
    steps = step * torch.eye(at.numel(), dtype=at.dtype)
    return torch.stack([(fun(at + h) - fun(at - h)) / (2 * step) for h in steps])


@pytest.mark.parametrize("case", ALL, ids=lambda case: case.name)
def test_values_and_stationarity_at_the_answer(case: ZooProblem) -> None:
    x, y = case.x_star, case.y_star
    assert float(case.problem.upper(x, y, None)) == pytest.approx(case.upper_star, abs=1e-12)
    assert float(case.problem.lower(x, y, None)) == pytest.approx(case.lower_star, abs=1e-12)
    slope = gradient(lambda v: case.problem.lower(x, v, None), y)
    assert float(slope.norm()) < 1e-6 * max(1.0, abs(case.lower_star))
    assert case.error(x) == 0.0
    for tensor in (x, y, case.x0, case.y0):
        assert tensor.dtype == torch.float64


@pytest.mark.parametrize("case", ALL, ids=lambda case: case.name)
def test_answer_solves_the_lower_problem_better_than_its_neighbors(case: ZooProblem) -> None:
    generator = torch.Generator().manual_seed(3)
    for scale in (1e-3, 1e-1, 1.0):
        noise = torch.randn(case.y_star.shape, dtype=torch.float64, generator=generator)
        value = case.problem.lower(case.x_star, case.y_star + scale * noise, None)
        assert float(value) >= case.lower_star - 1e-12


@pytest.mark.parametrize("case", QUADRATICS, ids=lambda case: case.name)
def test_quadratic_reduced_gradient_vanishes_at_the_closed_form(case: ZooProblem) -> None:
    def solved(x: Tensor) -> Tensor:  # one Newton step is exact, from any y
        hessian = torch.autograd.functional.hessian(
            lambda v: case.problem.lower(x, v, None), torch.zeros_like(case.y_star)
        )
        y = torch.zeros_like(case.y_star, requires_grad=True)
        (slope,) = torch.autograd.grad(case.problem.lower(x, y, None), y)
        return -torch.linalg.solve(hessian, slope)

    torch.testing.assert_close(solved(case.x_star), case.y_star, rtol=1e-10, atol=1e-10)
    slope = gradient(lambda x: case.problem.upper(x, solved(x), None), case.x_star, 1e-4)
    assert float(slope.norm()) < 1e-7


def test_quadratic_has_the_condition_it_says() -> None:
    for condition in (10.0, 1e3):
        case = quadratic(5, 10, condition)
        hessian = torch.autograd.functional.hessian(
            lambda y, case=case: case.problem.lower(case.x0, y, None), case.y0
        )
        assert float(torch.linalg.cond(hessian)) == pytest.approx(condition, rel=1e-6)


@pytest.mark.parametrize("n_weights", [1, 20])
def test_ridge_answer_is_the_minimum_of_an_analytic_reduced_problem(n_weights: int) -> None:
    case = ridge(n_weights)
    d, zero = 20, torch.zeros(n_weights, dtype=torch.float64)

    def value(x: Tensor) -> float:  # the lower solution from the normal equations of f itself
        def lower(y: Tensor) -> Tensor:
            return case.problem.lower(x, y, None)

        y0 = torch.zeros(d, dtype=torch.float64)
        hessian = torch.autograd.functional.hessian(lower, y0)
        slope = torch.autograd.functional.jacobian(lower, y0)
        return float(case.problem.upper(x, -torch.linalg.solve(hessian, slope), None))

    slope = gradient(lambda x: torch.tensor(value(x)).double(), case.x_star, 1e-4)
    assert float(slope.norm()) < 1e-8
    assert value(case.x_star) == pytest.approx(case.upper_star, rel=1e-12)
    assert value(zero) > case.upper_star + 1e-3
    for step in (-0.1, 0.1):
        assert value(case.x_star + step) > case.upper_star


def test_ridge_curvature_is_what_the_tolerance_says() -> None:
    for case, curvature in ((ridge(1), 0.10), (ridge(20), 0.009)):

        def reduced(x: Tensor, case: ZooProblem = case) -> Tensor:
            def lower(y: Tensor) -> Tensor:
                return case.problem.lower(x, y, None)

            hessian = torch.func.hessian(lower)(case.y0)
            slope = torch.func.grad(lower)(case.y0)
            return case.problem.upper(x, -torch.linalg.solve(hessian, slope), None)

        least = torch.linalg.eigvalsh(torch.func.hessian(reduced)(case.x_star)).min()
        assert float(least) == pytest.approx(curvature, rel=0.05)


def test_ridge_of_another_number_of_weights_says_the_rule() -> None:
    with pytest.raises(ValueError, match=r"must be 1 or 20\. Got n_weights=7"):
        ridge(7)


@pytest.mark.parametrize("n", [1, 2, 10, 50, 200])
def test_sine_answer_is_the_best_of_all_basins(n: int) -> None:
    case = sine(n)
    best = math.inf
    for k in range(-4, 5):  # on one basin y_i = K + 2 - x, so F is a parabola in x
        K = -math.pi / 2 + 2 * math.pi * k
        x = np.linspace(-30.0, 30.0, 60001)
        best = min(best, ((x - 2) ** 2 + n * (K - x - 2) ** 2).min())
    assert case.upper_star == pytest.approx(best, abs=1e-6 * n + 1e-6)
    table = {1: (2.356194, 0.253749), 2: (2.474926, 0.338332), 10: (2.647626, 0.461362)}
    table |= {50: (2.698421, 0.497547), 200: (2.708845, 0.504973)}
    assert float(case.x_star) == pytest.approx(table[n][0], abs=1e-6)
    assert case.upper_star == pytest.approx(table[n][1], abs=1e-6)


def test_sine_optima_of_other_basins_are_beyond_the_tolerance() -> None:
    for n in (1, 2, 10, 50):
        for k in (-2, -1, 0, 2, 3):
            K = -math.pi / 2 + 2 * math.pi * k
            other = torch.tensor([((1 - n) * 2 + n * K) / (1 + n)], dtype=torch.float64)
            assert sine(n).error(other) > 3.0


def test_bda_answer_and_what_unrolling_gives_instead() -> None:
    case = bda()
    for x0, y0 in case.starts:
        t = float(y0[1])
        x = torch.tensor([(1.0 + t) / 2.0], dtype=torch.float64)
        y = torch.stack([x[0], y0[1]])  # gradient descent on f never moves y_2
        reduced = gradient(
            lambda u, y0=y0: case.problem.upper(u, torch.stack([u[0], y0[1]]), None), x
        )
        assert float(reduced.norm()) < 1e-9
        assert float(case.problem.upper(x, y, None)) == pytest.approx((1.0 - t) ** 2 / 4.0)
        assert float(x0) in (0.0, 3.0, -5.0)


def test_pbgd_optima_are_those_of_a_grid_refined() -> None:
    case = pbgd_toy()

    def reduced(x: np.ndarray) -> np.ndarray:
        wave = np.cos(2.0 - 4.0 * x) / (1.0 + np.exp(2.0 - 4.0 * x))
        return wave + 0.5 * np.log((4.0 * x - 2.0) ** 2 + 1.0)

    def slope(x: float) -> float:
        return float(reduced(np.array(x + 1e-6)) - reduced(np.array(x - 1e-6))) / 2e-6

    grid = np.arange(0.0, 3.0 + 1e-9, 1e-4)
    values = reduced(grid)
    inside = np.flatnonzero((values[1:-1] < values[:-2]) & (values[1:-1] < values[2:])) + 1
    found = [brentq(slope, grid[i] - 1e-3, grid[i] + 1e-3) for i in inside]
    listed = sorted(float(x) for x in (case.x_star, *case.local_optima))
    assert found == pytest.approx(listed, abs=1e-6)
    assert values[0] > values[1]  # neither end of [0, 3] is an optimum
    assert values[-1] > values[-2]
    assert case.upper_star == pytest.approx(values.min(), abs=1e-7)


def test_pbgd_lower_problem_is_solved_by_minus_x_alone() -> None:
    case = pbgd_toy()
    for x in (0.0, 0.7, 3.0):
        y = torch.linspace(-8.0, 8.0, 4001, dtype=torch.float64)
        values = torch.stack([case.problem.lower(torch.tensor([x]), v[None], None) for v in y])
        assert float(y[values.argmin()]) == pytest.approx(-x, abs=5e-3)


def test_zoo_lists_each_problem_size_and_start_once() -> None:
    cases = zoo()
    names = [case.name for case in cases]
    assert len(set(names)) == len(names) == 4 + 2 + 3 + 4 * 6 + 4
    assert all(len(case.starts) == 1 for case in cases)
    assert "sine 2 from x = 8, y = -3" in names
    assert set(problems.__all__) == {
        *("ZooProblem", "bda", "pbgd_toy", "quadratic", "ridge", "sine", "zoo")
    }


def test_building_the_zoo_leaves_the_global_generator_alone() -> None:
    before = torch.random.get_rng_state()
    first = zoo()
    assert torch.equal(torch.random.get_rng_state(), before)
    for one, other in zip(first, zoo(), strict=True):
        assert torch.equal(one.x_star, other.x_star)


def test_error_is_relative_where_said_and_takes_the_nearest_optimum() -> None:
    case = quadratic()
    assert case.error(1.01 * case.x_star) == pytest.approx(0.01)
    toy = pbgd_toy()
    assert toy.error(torch.tensor([2.83]).double()) == pytest.approx(2.83 - 2.829642, abs=1e-6)
