import math
from typing import Any

import pytest
import torch
from cases import reduced, sgd
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import bilevel as bl
from bilevel.linear import CG, GMRES, MINRES, Dense, LinearSolver, Neumann
from bilevel.testing.problems import bda, quadratic


def error_on_quadratic(
    method: bl.Estimator, nx: int, ny: int, condition: float, seed: int
) -> float:
    case = quadratic(nx, ny, condition, seed)
    generator = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(n, dtype=torch.float64, generator=generator) for n in (nx, ny))
    exact = torch.func.grad(reduced(case.problem, case.y0))(x)
    estimate = method.estimate(case.problem, x, y)
    assert estimate.status is bl.Status.CONVERGED
    return float((estimate.grad - exact).norm() / exact.norm())


SIZES = {"nx": st.integers(1, 50), "ny": st.integers(1, 50), "seed": st.integers(0, 10**6)}


@given(condition=st.floats(1.0, 1e3), **SIZES)
def test_dense_is_the_closed_form(nx: int, ny: int, condition: float, seed: int) -> None:
    method = bl.Implicit(Dense())
    assert error_on_quadratic(method, nx, ny, condition, seed) < 1e-10


@given(condition=st.floats(1.0, 1e3), **SIZES)
def test_cg_is_the_closed_form(nx: int, ny: int, condition: float, seed: int) -> None:
    assert error_on_quadratic(bl.Implicit(CG()), nx, ny, condition, seed) < 1e-8


@pytest.mark.parametrize(("linear", "bound"), [(Dense(), 1e-10), (CG(), 1e-8)], ids=str)
def test_largest_quadratic_of_the_contract(linear: LinearSolver, bound: float) -> None:
    for seed in range(3):
        assert error_on_quadratic(bl.Implicit(linear), 50, 50, 1e3, seed) < bound


@pytest.mark.parametrize("condition", [1.0, 10.0])
def test_neumann_is_the_closed_form_where_the_condition_is_low(condition: float) -> None:
    method = bl.Implicit(Neumann(1000))
    assert error_on_quadratic(method, 5, 10, condition, 0) < 1e-9


def test_truncated_neumann_says_that_the_system_is_not_solved() -> None:
    case = quadratic(5, 10, 1e3)
    estimate = bl.Implicit(Neumann(5)).estimate(case.problem, case.x0, case.y0)
    assert estimate.status is bl.Status.LINEAR_UNSOLVED
    assert estimate.info["linear_residual"] > 1e-3


@pytest.mark.parametrize("linear", [Neumann(3), CG(max_steps=2), MINRES(max_steps=2)], ids=str)
def test_short_linear_solver_goes_on_from_the_last_estimate(linear: LinearSolver) -> None:
    case = quadratic(3, 6, 10.0)
    method = bl.Implicit(linear)
    first = method.estimate(case.problem, case.x0, case.y0)
    again = method.estimate(case.problem, case.x0, case.y0, memory=first.memory)
    assert again.info["linear_residual"] < 0.9 * first.info["linear_residual"]


def test_conjugate_gradients_for_few_unknowns_start_anew() -> None:
    case = quadratic(3, 2, 10.0)
    method = bl.Implicit(CG(rtol=1e-6))
    first = method.estimate(case.problem, case.x0, case.y0)
    v = first.memory["v"]
    again = method.estimate(case.problem, case.x0, case.y0, memory={**first.memory, "v": v + 1.0})
    torch.testing.assert_close(again.grad, first.grad, rtol=1e-9, atol=0.0)
    assert again.evaluations.hvp <= first.evaluations.hvp


def test_unsolved_lower_problem_is_said_with_its_residual() -> None:
    case = quadratic()
    method = bl.Implicit(minimizer=sgd(1e-3, max_steps=3))
    estimate = method.estimate(case.problem, case.x0, case.y0)
    assert estimate.status is bl.Status.LOWER_UNSOLVED
    gradient = torch.func.grad(lambda y: case.problem.lower(case.x0, y, None))(estimate.y)
    assert estimate.info["lower_residual"] == pytest.approx(float(gradient.norm()), rel=1e-12)


@pytest.mark.parametrize("linear", [Dense(), CG(), Neumann()], ids=str)
def test_singular_hessian_is_said(linear: LinearSolver) -> None:
    problem = bda().problem  # f ignores y_2, F does not
    x, y = torch.tensor([0.5]).double(), torch.tensor([0.0, 3.0]).double()
    assert bl.Implicit(linear).estimate(problem, x, y).status is bl.Status.LINEAR_UNSOLVED


def scalar_problem(lower: Any, upper: Any = None) -> bl.BilevelProblem:
    return bl.BilevelProblem(upper or (lambda x, y, data: ((y - x) ** 2).sum()), lower)


ONE = torch.ones(1, dtype=torch.float64)
ROOT = scalar_problem(lambda x, y, data: (y - x).sqrt().sum())  # NaN at y < x
FAILURES = [
    (scalar_problem(lambda x, y, data: (x * y).sum()), bl.Status.LOWER_UNBOUNDED),
    (scalar_problem(lambda x, y, data: -(y**2).sum() * x.sum()), bl.Status.LOWER_UNBOUNDED),
    (scalar_problem(lambda x, y, data: ((y - x) ** 2).sum() * math.nan), bl.Status.NONFINITE),
    (ROOT, bl.Status.NONFINITE),
    (
        scalar_problem(
            lambda x, y, data: ((y - x) ** 2).sum(),
            lambda x, y, data: (y - 9.0).sqrt().sum() * x[0],
        ),
        bl.Status.NONFINITE,
    ),
]


@pytest.mark.parametrize("method", [bl.Implicit(), bl.Implicit(Dense())], ids=["CG", "Dense"])
@pytest.mark.parametrize(
    ("problem", "status"), FAILURES, ids=["linear", "concave", "f", "root", "F"]
)
def test_failure_is_a_status(problem: Any, status: bl.Status, method: bl.Estimator) -> None:
    estimate = method.estimate(problem, ONE, 0.5 * ONE)
    assert estimate.status is status
    assert "lower_residual" in estimate.info


@pytest.mark.parametrize("steps", [1, 2, 7, 50])
def test_unrolled_is_the_closed_form_of_its_steps(steps: int) -> None:
    a, x, y0 = 0.3, 1.7, -0.4  # y_T = 3 x + (1 - a)^T (y0 - 3 x) for f = (y - 3 x)^2 / 2
    problem = scalar_problem(
        lambda x, y, data: 0.5 * ((y - 3.0 * x) ** 2).sum(),
        lambda x, y, data: 0.5 * ((y - 1.0) ** 2).sum() + (x**2).sum(),
    )
    estimate = bl.Unrolled(steps, lr=a).estimate(problem, x * ONE, y0 * ONE)
    left = (1.0 - a) ** steps
    y = 3.0 * x + left * (y0 - 3.0 * x)
    assert float(estimate.y) == pytest.approx(y, rel=1e-14)
    assert float(estimate.grad) == pytest.approx(
        (y - 1.0) * 3.0 * (1.0 - left) + 2.0 * x, rel=1e-13
    )
    assert estimate.value == pytest.approx(0.5 * (y - 1.0) ** 2 + x**2, rel=1e-14)
    assert estimate.info["lower_residual"] == pytest.approx(abs(left * (y0 - 3.0 * x)), rel=1e-9)


def test_unrolled_is_torch_through_its_own_loop() -> None:
    def lower(x: Tensor, y: Tensor, data: Any) -> Tensor:
        return (torch.sin(y) * x).sum() + 0.5 * (y**2).sum() + y[0] * y[1] * x[0]

    def upper(x: Tensor, y: Tensor, data: Any) -> Tensor:
        return (y**3).sum() + (x * y).sum()

    x = torch.tensor([0.5, -1.2], dtype=torch.float64, requires_grad=True)
    y = torch.tensor([0.3, 0.9], dtype=torch.float64, requires_grad=True)
    v: Tensor = y
    for _ in range(5):
        (grad,) = torch.autograd.grad(lower(x, v, None), v, create_graph=True)
        v = v - 0.2 * grad
    (exact,) = torch.autograd.grad(upper(x, v, None), x)
    problem = bl.BilevelProblem(upper, lower)
    estimate = bl.Unrolled(5, lr=0.2).estimate(problem, x.detach(), y.detach())
    torch.testing.assert_close(estimate.grad, exact, rtol=1e-13, atol=1e-13)


def test_unrolled_that_diverges_is_nonfinite() -> None:
    case = quadratic()
    estimate = bl.Unrolled(2000, lr=1.0).estimate(case.problem, case.x0, case.y0)
    assert estimate.status is bl.Status.NONFINITE


@pytest.mark.parametrize(("steps", "products"), [(1, 2), (5, 10)])
def test_unrolled_costs_two_products_a_step(steps: int, products: int) -> None:
    case = quadratic()
    count = bl.Unrolled(steps).estimate(case.problem, case.x0, case.y0).evaluations
    assert (count.upper_grad, count.hvp) == (1, products)
    assert count.lower_grad == steps + 1  # down, with small graphs that are kept, and the residual


def test_implicit_from_its_memory_at_the_same_point_solves_nothing_again() -> None:
    case = quadratic()
    method = bl.Implicit(Dense())
    first = method.estimate(case.problem, case.x0, case.y0)
    again = method.estimate(case.problem, case.x0, first.y, None, first.memory)
    assert again.evaluations.lower_grad == 1  # is it solved, whose graph serves the linear system
    torch.testing.assert_close(again.grad, first.grad, rtol=1e-10, atol=0.0)


@pytest.mark.parametrize("linear", [MINRES(), GMRES(), Dense()], ids=str)
def test_indefinite_hessian_at_a_stationary_point(linear: LinearSolver) -> None:
    """f = x y_1 y_2 - y_1 - 2 y_2 has one stationary point, a saddle: y = (2, 1) / x."""
    problem = bl.BilevelProblem(
        lambda x, y, data: y[0] ** 2 + 3.0 * y[1] + y[0] * y[1],
        lambda x, y, data: x[0] * y[0] * y[1] - y[0] - 2.0 * y[1],
    )
    x, y = torch.tensor([2.0]).double(), torch.tensor([1.0, 0.5]).double()
    stays = sgd(1e-30, max_steps=1)  # Newton would leave the saddle, as it should
    # F(y(x)) = 4 / x^2 + 3 / x + 2 / x^2
    exact = -12.0 / 8.0 - 3.0 / 4.0
    estimate = bl.Implicit(linear, minimizer=stays).estimate(problem, x, y)
    assert estimate.status is bl.Status.CONVERGED
    assert float(estimate.grad) == pytest.approx(exact, rel=1e-12)
    honest = bl.Implicit(CG(), minimizer=stays).estimate(problem, x, y)
    assert honest.status is bl.Status.LINEAR_UNSOLVED


def test_columns_at_once_and_one_by_one_cost_the_same_products(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    case = quadratic()
    method = bl.Implicit(Dense())
    at_once = method.estimate(case.problem, case.x0, case.y0)
    monkeypatch.setattr("bilevel.estimators.implicit._AT_ONCE", 0)
    one_by_one = method.estimate(case.problem, case.x0, case.y0)
    assert at_once.evaluations == one_by_one.evaluations
    torch.testing.assert_close(at_once.grad, one_by_one.grad, rtol=1e-12, atol=1e-12)


def test_problem_is_checked_at_the_first_hypergradient_of_such_trees_alone() -> None:
    calls = 0

    def upper(x: torch.Tensor, y: torch.Tensor, data: object) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return ((y - 1.0) ** 2).sum()

    problem = bl.BilevelProblem(upper, lambda x, y, data: ((y - x) ** 2).sum())
    one = torch.ones(2).double()
    counts: list[int] = []
    for x in (one, 2.0 * one, one.float(), one.float()):
        calls = 0
        bl.hypergradient(problem, x, x, bl.Implicit())
        counts.append(calls)
    assert counts == [2, 1, 2, 1]


def test_problem_that_was_only_certified_is_checked_by_its_first_hypergradient() -> None:
    problem = bl.BilevelProblem(
        lambda x, y, data: ((y["a"] - 1.0) ** 2).sum(),
        lambda x, y, data: ((y["a"] - x) ** 2).sum(),
    )
    x = torch.ones(2).double()
    y = {"a": x, "b": x}
    bl.certify(problem, x, y)
    with pytest.raises(bl.ObjectiveError, match="no dependence on `y0\\['b'\\]`"):
        bl.hypergradient(problem, x, y, bl.Unrolled(3))


@pytest.mark.parametrize("unit", [1e-30, 1e-20, 1.0, 1e20, 1e30])
def test_hypergradient_in_float32_knows_no_unit(unit: float) -> None:
    problem = bl.BilevelProblem(
        upper=lambda x, y, data: unit * ((y - 1.0) ** 2).sum(),
        lower=lambda x, y, data: unit * ((y - 2.0 * x) ** 2).sum(),
    )
    found = bl.hypergradient(problem, torch.ones(3), torch.zeros(3), bl.Implicit())
    assert found.status is bl.Status.CONVERGED
    torch.testing.assert_close(found.grad / unit, torch.full((3,), 4.0))


def test_linear_solution_of_another_shape_says_the_rule() -> None:
    class Twice(LinearSolver):
        def solve(self, matvec: Any, b: Any, v0: Any = None) -> Any:
            return torch.stack([b, b])

    case = quadratic()
    with pytest.raises(bl.StructureError, match=r"linear\.solve"):
        bl.Implicit(Twice()).estimate(case.problem, case.x0, case.y0)
