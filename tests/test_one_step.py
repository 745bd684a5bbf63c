import math
import re
from typing import Any

import pytest
import torch
from cases import sgd, slope
from torch import Tensor

import bilevel as bl
from bilevel.testing import ContractError, check_hypergradient_estimator, problems
from bilevel.testing._contract import breaking, counted, halves, in_float32, over_halves, whole

METHODS = [bl.OneStep(lr=0.1), bl.OneStep(lr=0.1, radius=0.01)]


@pytest.mark.parametrize("radius", [None, 0.01, 1.0])
def test_formula_by_hand(radius: float | None) -> None:
    """f = a (y - x^2)^2 / 2, F = (y - 1)^2 / 2 + 5 x: y' = y - lr a (y - x^2), dy'/dx = 2 lr a x."""
    a, lr, x, y = 3.0, 0.2, 1.5, -0.5
    problem = bl.BilevelProblem(
        lambda x, y, data: 0.5 * ((y - 1.0) ** 2).sum() + 5.0 * x.sum(),
        lambda x, y, data: 0.5 * a * ((y - x**2) ** 2).sum(),
    )
    one = torch.ones(1).double()
    estimate = bl.OneStep(lr, radius).estimate(problem, x * one, y * one)
    y_new = y - lr * a * (y - x**2)
    assert float(estimate.y) == pytest.approx(y_new, rel=1e-14)
    # the mixed derivative -2 a x does not depend on y: the central difference is exact
    assert float(estimate.grad) == pytest.approx(5.0 + 2.0 * lr * a * x * (y_new - 1.0), rel=1e-12)
    assert estimate.value == pytest.approx(0.5 * (y_new - 1.0) ** 2 + 5.0 * x, rel=1e-14)
    assert estimate.info["lower_residual"] == pytest.approx(a * abs(y_new - x**2), rel=1e-12)


def lower(x: Tensor, y: Tensor, data: Any) -> Tensor:
    return (x * torch.sin(y)).sum() + (y**4).sum() + y[0] * y[1] * x[1]


WAVY = bl.BilevelProblem(lambda x, y, data: ((y - x) ** 2).sum(), lower)
X, Y = torch.tensor([0.5, -0.4]).double(), torch.tensor([0.3, 0.9]).double()


def test_it_is_the_gradient_of_its_value() -> None:
    method, direction = bl.OneStep(lr=0.1), torch.tensor([0.6, -0.8]).double()
    found = float(method.estimate(WAVY, X, Y).grad @ direction)
    measured = slope(lambda x: method.estimate(WAVY, x, Y).value, X, direction, 1e-3)
    assert found == pytest.approx(measured, rel=1e-9)


def test_difference_of_darts_converges_to_the_product_quadratically() -> None:
    exact = bl.OneStep(lr=0.1).estimate(WAVY, X, Y).grad
    errors = [
        float((bl.OneStep(lr=0.1, radius=r).estimate(WAVY, X, Y).grad - exact).norm())
        for r in (1e-1, 1e-2)
    ]
    assert errors[1] == pytest.approx(1e-2 * errors[0], rel=1e-2)
    assert errors[1] > 0.0


def test_its_bias_at_the_solution_is_that_of_the_step() -> None:
    """f = h (y - x)^2 / 2: lr h stands for 1, the product of the mixed derivative and the inverse Hessian."""
    x = torch.ones(1).double()
    for h in (0.5, 5.0, 10.0):
        problem = bl.BilevelProblem(
            lambda x, y, data: (y**2).sum(),
            lambda x, y, data, h=h: 0.5 * h * ((y - x) ** 2).sum(),
        )
        estimate = bl.OneStep(lr=0.1).estimate(problem, x, x)
        assert float(estimate.grad) == pytest.approx(0.1 * h * 2.0, rel=1e-13)
        assert estimate.status is bl.Status.CONVERGED


@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.xfail(
    raises=ContractError,
    strict=True,
    reason="one step does not solve the lower problem: biased by design",
)
def test_closed_form_of_the_contract(method: bl.Estimator) -> None:
    check_hypergradient_estimator(method)


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_the_rest_of_the_contract(method: bl.Estimator) -> None:
    case = problems.quadratic()
    x, y = case.x0 + 0.3, case.y0 + 0.1
    calls = {"upper": 0, "lower": 0}
    before = x.clone(), y.clone(), torch.random.get_rng_state()
    found = method.estimate(counted(case.problem, calls), x, y)
    assert (found.evaluations.upper, found.evaluations.lower) == (calls["upper"], calls["lower"])
    assert found.evaluations.upper_grad == 1
    assert found.evaluations.lower_grad + found.evaluations.hvp <= 4
    now = x, y, torch.random.get_rng_state()
    assert all(torch.equal(a, b) for a, b in zip(before, now, strict=True))
    nested = bl.hypergradient(over_halves(case.problem), halves(x), halves(y), method)
    torch.testing.assert_close(whole(nested.grad), found.grad)
    single = method.estimate(in_float32(case.problem), x.float(), y.float())
    assert single.grad.dtype == torch.float32
    torch.testing.assert_close(single.grad.double(), found.grad, rtol=1e-2, atol=1e-2)
    assert (
        found.status is bl.Status.MAX_STEPS
    )  # one step is not a solved problem, and not a failure
    for level in ("upper", "lower"):
        assert method.estimate(breaking(case.problem, level, 0), x, y).status.is_failure


def test_single_loop_settles_where_the_gradient_vanishes_and_not_at_the_optimum() -> None:
    case = problems.quadratic()
    solver = bl.HypergradientDescent(bl.OneStep(lr=0.15), sgd(0.03))
    *_, last = bl.iterate(case.problem, solver, case.x0, case.y0, [None] * 1500)
    assert float(last.metrics["hypergradient"]) < 1e-8
    assert float(last.metrics["lower_residual"]) < 1e-8
    assert case.error(last.x) > 1e-2
    assert not last.status.is_failure


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": 0.0}, "`OneStep(lr=...)` must be a finite number > 0. Got lr=0.0"),
        ({"radius": math.inf}, "`OneStep(radius=...)` must be a finite number > 0. Got radius=inf"),
    ],
)
def test_bad_parameter_is_named(options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        bl.OneStep(**options)


def test_difference_along_no_direction_is_zero() -> None:
    """F does not look at y, so that its hypergradient 2 x is exact however the step."""
    problem = bl.BilevelProblem(
        lambda x, y, data: (x**2).sum() + 0.0 * y.sum(), lambda x, y, data: ((y - x) ** 2).sum()
    )
    x, y = torch.tensor([1.5]).double(), torch.tensor([3.0]).double()
    found = bl.OneStep(lr=0.1, radius=0.01).estimate(problem, x, y)
    assert torch.equal(found.grad, 2.0 * x)
