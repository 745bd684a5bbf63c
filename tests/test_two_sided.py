from typing import Any

import pytest
import torch
from cases import reduced, sgd, slope
from torch import Tensor

import bilevel as bl
from bilevel.testing.problems import quadratic, ridge


@pytest.mark.parametrize(
    "case", [quadratic(), quadratic(3, 6, 100.0, 4), ridge(20)], ids=lambda case: case.name
)
def test_bias_falls_a_hundredfold_where_the_multiplier_grows_tenfold(case: Any) -> None:
    x = case.x0 + 0.3
    exact = torch.func.grad(reduced(case.problem, case.y0))(x)
    errors = [
        float((bl.TwoSided(m).estimate(case.problem, x, case.y0).grad - exact).norm())
        for m in (1e2, 1e3, 1e4)
    ]
    assert 90.0 < errors[0] / errors[1] < 110.0
    assert 90.0 < errors[1] / errors[2] < 110.0


def curved(x: Tensor, y: Tensor, data: Any) -> Tensor:
    return torch.cosh(y - x).sum() + 0.1 * (y**4).sum()


CURVED = bl.BilevelProblem(lambda x, y, data: torch.exp(0.3 * y).sum() + (x**2).sum(), curved)
X, Y = torch.tensor([0.7, -0.4]).double(), torch.zeros(2).double()


def test_bias_is_quadratic_where_the_lower_problem_is_no_quadratic() -> None:
    direction = torch.tensor([0.6, 0.8]).double()

    def solved(x: Tensor) -> float:  # Newton's method by hand
        y = Y
        for _ in range(30):
            grad = torch.func.grad(curved, argnums=1)(x, y, None)
            y = y - torch.linalg.solve(torch.func.hessian(curved, argnums=1)(x, y, None), grad)
        return float(CURVED.upper(x, y, None))

    exact = slope(solved, X, direction, 1e-3)
    found = [bl.TwoSided(m).estimate(CURVED, X, Y) for m in (1e1, 1e2)]
    errors = [abs(float(e.grad @ direction) - exact) for e in found]
    assert 80.0 < errors[0] / errors[1] < 125.0
    off = [abs(e.value - solved(X)) for e in found]
    assert 80.0 < off[0] / off[1] < 125.0


def test_constants_added_to_either_level_leave_the_gradient() -> None:
    shifted = bl.BilevelProblem(
        lambda x, y, data: CURVED.upper(x, y, data) - 7.0,
        lambda x, y, data: CURVED.lower(x, y, data) - 5.0,
    )
    plain, moved = (bl.TwoSided(1e3).estimate(p, X, Y).grad for p in (CURVED, shifted))
    torch.testing.assert_close(moved, plain, rtol=1e-8, atol=0.0)


def test_first_order_minimizer_needs_no_second_derivative() -> None:
    case = quadratic()
    method = bl.TwoSided(1e2, tol=1e-6, minimizer=sgd(0.15, max_steps=500))
    estimate = method.estimate(case.problem, case.x0, case.y0)
    exact = torch.func.grad(reduced(case.problem, case.y0))(case.x0)
    assert estimate.status is bl.Status.CONVERGED
    assert estimate.evaluations.hvp == 0
    assert float((estimate.grad - exact).norm() / exact.norm()) < 5e-3  # 20 / lambda^2


def test_multiplier_that_leaves_no_minimum_is_said() -> None:
    case = quadratic()  # curvature of F up to 10, of f from 1
    estimate = bl.TwoSided(0.5).estimate(case.problem, case.x0, case.y0)
    assert estimate.status is bl.Status.LOWER_UNBOUNDED
    short = bl.TwoSided(1e2, minimizer=sgd(0.01, max_steps=3))
    assert short.estimate(case.problem, case.x0, case.y0).status is bl.Status.LOWER_UNSOLVED


@pytest.mark.parametrize(("name", "value"), [("multiplier", 0.0), ("tol", -1.0)])
def test_bad_parameter_is_named(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"`TwoSided\({name}=...\)` must be .* Got {name}="):
        bl.TwoSided(**{name: value})


def test_above_the_limit_of_dense_hessians_products_serve() -> None:
    """y = x, so that F = |x - 1|^2 summed over 300 entries has the slope 600 (x - 1)."""
    problem = bl.BilevelProblem(
        lambda x, y, data: ((y - 1.0) ** 2).sum(), lambda x, y, data: ((y - x) ** 2).sum()
    )
    x = torch.tensor([3.0]).double()
    found = bl.TwoSided().estimate(problem, x, torch.zeros(300).double())
    assert found.status is bl.Status.CONVERGED
    torch.testing.assert_close(found.grad, 600.0 * (x - 1.0), rtol=1e-6, atol=0.0)
    assert 0 < found.evaluations.hvp < 300
