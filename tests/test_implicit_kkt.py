import numpy as np
import pytest
import torch
from torch import Tensor

import bilevel as bl
from bilevel.testing import check_hypergradient_estimator

KKT = bl.ImplicitKKT()


def vector(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def projection(**constraints: object) -> bl.BilevelProblem:
    """y is the point nearest to x that the constraints allow; F weighs its entries."""
    weights = vector(1.0, -2.0, 3.0)
    return bl.BilevelProblem(
        lambda x, y, data: weights @ y + 0.0 * x.sum(),
        lambda x, y, data: 0.5 * ((y - x) ** 2).sum(),
        **constraints,  # pyright: ignore[reportArgumentType]
    )


WEIGHTS = vector(1.0, -2.0, 3.0)
CENTER = torch.full((3,), 1.0 / 3.0, dtype=torch.float64)


def test_projection_onto_a_simplex() -> None:
    problem = projection(
        lower_constraint=lambda x, y, data: -y, lower_equality=lambda x, y, data: y.sum() - 1.0
    )
    found = bl.hypergradient(problem, vector(0.9, 0.5, -0.7), CENTER, KKT)
    # the support is {0, 1}: y_i = x_i - mean over it + 1/2, and y_2 = 0
    torch.testing.assert_close(found.y, vector(0.7, 0.3, 0.0), atol=1e-10, rtol=0.0)
    torch.testing.assert_close(found.grad, vector(1.5, -1.5, 0.0), atol=1e-10, rtol=0.0)
    assert found.status is bl.Status.CONVERGED
    assert found.info["lower_residual"] < 1e-10
    assert found.info["active"] == 1.0


def test_projection_onto_a_box() -> None:
    box = projection(lower_constraint=lambda x, y, data: torch.cat([y - 1.0, -y]))
    found = bl.hypergradient(box, vector(2.0, 0.4, -0.3), CENTER, KKT)
    torch.testing.assert_close(found.y, vector(1.0, 0.4, 0.0), atol=1e-10, rtol=0.0)
    torch.testing.assert_close(found.grad, vector(0.0, -2.0, 0.0), atol=1e-10, rtol=0.0)


def test_projection_onto_a_halfspace() -> None:
    normal = vector(1.0, 2.0, 2.0)
    half = projection(lower_constraint=lambda x, y, data: normal @ y - 1.0)
    found = bl.hypergradient(half, vector(1.0, 1.0, 1.0), CENTER, KKT)
    expected = WEIGHTS - normal * (normal @ WEIGHTS) / 9.0
    torch.testing.assert_close(found.grad, expected, atol=1e-10, rtol=0.0)
    inside = bl.hypergradient(half, vector(0.1, -0.2, 0.1), CENTER, KKT)
    torch.testing.assert_close(inside.grad, WEIGHTS, atol=1e-10, rtol=0.0)


def test_quadratic_program_with_constraints_that_move_with_x() -> None:
    rng = np.random.default_rng(0)
    n, m, k = 8, 4, 3
    root = torch.as_tensor(rng.normal(size=(n, n)))
    H, J = root @ root.T + torch.eye(n), torch.as_tensor(rng.normal(size=(n, m)))
    A, B = torch.as_tensor(rng.normal(size=(k, n))), torch.as_tensor(rng.normal(size=(k, m)))
    x, d = torch.as_tensor(rng.normal(size=m)), torch.as_tensor(rng.normal(size=n))
    problem = bl.BilevelProblem(
        lambda x, y, data: 0.5 * ((y - d) ** 2).sum() + 0.5 * (x**2).sum(),
        lambda x, y, data: 0.5 * y @ H @ y - y @ J @ x,
        lower_equality=lambda x, y, data: A @ y - B @ x - 1.0,
    )
    found = bl.hypergradient(problem, x, torch.zeros(n).double(), KKT)
    zero = torch.zeros(k, k, dtype=torch.float64)
    matrix = torch.cat([torch.cat([H, A.T], 1), torch.cat([A, zero], 1)])
    dy = torch.linalg.solve(matrix, torch.cat([J, B]))[:n]
    y = torch.linalg.solve(matrix, torch.cat([J @ x, B @ x + 1.0]))[:n]
    torch.testing.assert_close(found.y, y, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(found.grad, x + dy.T @ (y - d), rtol=1e-8, atol=1e-9)


def curved() -> bl.BilevelProblem:
    return bl.BilevelProblem(
        lambda x, y, data: (y * vector(1.0, 2.0)).sum() + (x**2).sum(),
        lambda x, y, data: ((y - 2.0 * x) ** 2).sum() + 0.1 * (y**4).sum() + y[0] * y[1],
        lower_constraint=lambda x, y, data: torch.stack(
            [(y**2).sum() - x[0] ** 2, y[0] - x[1] - 3.0]
        ),
    )


@pytest.mark.parametrize("x", [vector(0.8, 0.9), vector(1.3, -0.4)])
def test_curved_constraint_agrees_with_central_differences(x: Tensor) -> None:
    found = bl.hypergradient(curved(), x, vector(0.1, 0.1), KKT)
    assert found.info["active"] == 1.0
    for i, h in enumerate(1e-4 * torch.eye(2, dtype=torch.float64)):
        ends = [bl.hypergradient(curved(), x + s * h, found.y, KKT).value for s in (1.0, -1.0)]
        assert float(found.grad[i]) == pytest.approx((ends[0] - ends[1]) / 2e-4, rel=1e-6)


def test_linear_program_is_held_by_its_vertex() -> None:
    vertex = bl.BilevelProblem(
        lambda x, y, data: y[0] + 3.0 * y[1],
        lambda x, y, data: -y.sum(),
        lower_constraint=lambda x, y, data: torch.stack(
            [2.0 * y[0] + y[1] - x[0], y[0] + 3.0 * y[1] - 2.0 * x[0], -y[0], -y[1]]
        ),
    )
    found = bl.hypergradient(vertex, vector(1.0), vector(0.1, 0.1), KKT)
    torch.testing.assert_close(found.y, vector(0.2, 0.6), atol=1e-9, rtol=0.0)
    torch.testing.assert_close(found.grad, vector(2.0), atol=1e-9, rtol=0.0)
    assert found.status is bl.Status.CONVERGED


def test_weakly_active_constraint_is_reported() -> None:
    box = projection(lower_constraint=lambda x, y, data: y - 1.0)
    found = bl.hypergradient(box, vector(1.0, 0.2, 0.3), CENTER, KKT)
    assert found.status is bl.Status.WEAKLY_ACTIVE
    assert found.info["weakly_active"] == 1.0
    assert "move x off the kink" in found.status.cure.lower()


def test_infeasible_and_unbounded_lower_problems_are_said() -> None:
    empty = projection(lower_constraint=lambda x, y, data: torch.cat([y + 1.0, 1.0 - y]))
    assert bl.hypergradient(empty, CENTER, CENTER, KKT).status is bl.Status.INFEASIBLE
    falling = bl.BilevelProblem(
        lambda x, y, data: y.sum(),
        lambda x, y, data: (y * x).sum(),
        lower_constraint=lambda x, y, data: y - 1.0,
    )
    found = bl.hypergradient(falling, vector(1.0), vector(0.0), KKT)
    assert found.status.is_failure


def test_redundant_constraint_does_no_harm() -> None:
    twice = projection(lower_constraint=lambda x, y, data: torch.cat([y[:1] - 1.0, y[:1] - 1.0]))
    found = bl.hypergradient(twice, vector(2.0, 0.4, -0.3), CENTER, KKT)
    torch.testing.assert_close(found.grad, vector(0.0, -2.0, 3.0), atol=1e-9, rtol=0.0)


def test_contract_of_estimators_holds() -> None:
    check_hypergradient_estimator(KKT)


def test_descent_solves_a_constrained_problem() -> None:
    problem = bl.BilevelProblem(
        lambda x, y, data: ((y - vector(0.8, 0.2)) ** 2).sum() + 0.01 * (x**2).sum(),
        lambda x, y, data: ((y - x) ** 2).sum(),
        lower_equality=lambda x, y, data: y.sum() - 1.0,
        lower_constraint=lambda x, y, data: -y,
    )
    x0 = vector(0.5, 0.5)
    found = bl.solve(problem, bl.HypergradientDescent(KKT), x0, x0, max_steps=60)
    # with x = (t, -t): y = (1/2 + t, 1/2 - t), and 2 (0.3 - t)^2 + 0.02 t^2 is least at t = 0.3 / 1.01
    t = 0.3 / 1.01
    torch.testing.assert_close(found.x, vector(t, -t), atol=1e-6, rtol=0.0)
    assert found.certificate is not None
    assert found.certificate.problems == ()


def test_upper_constraints_are_refused_by_the_descent_alone() -> None:
    problem = projection(upper_constraint=lambda x, y, data: x - 1.0)
    torch.testing.assert_close(bl.hypergradient(problem, CENTER, CENTER, KKT).grad, WEIGHTS)
    with pytest.raises(ValueError, match="upper_constraint"):
        bl.solve(problem, bl.HypergradientDescent(KKT), CENTER, CENTER, max_steps=5)


def test_negative_tolerance_is_refused() -> None:
    with pytest.raises(ValueError, match=r"ImplicitKKT\(atol=...\)` must be a finite number >= 0"):
        bl.ImplicitKKT(atol=-1.0)


@pytest.mark.parametrize("x_first", [True, False])
def test_x_and_y_of_different_dtypes(x_first: bool) -> None:
    x, y = vector(0.8, 0.9), vector(0.1, 0.1)
    expected = bl.hypergradient(curved(), x, y, KKT)
    x, y = (x.float(), y) if x_first else (x, y.float())
    found = bl.hypergradient(curved(), x, y, KKT)
    assert found.status is bl.Status.CONVERGED
    assert (found.grad.dtype, found.y.dtype) == (x.dtype, y.dtype)
    torch.testing.assert_close(found.grad.double(), expected.grad, rtol=1e-5, atol=1e-6)


def test_constraint_that_is_nan_beyond_its_domain() -> None:
    """y = max(x, 1): log y >= 0, which is NaN for a negative y."""
    logarithm = projection(lower_constraint=lambda x, y, data: -y.log())
    for start in (4.0, 1.5):
        found = bl.hypergradient(logarithm, vector(-2.0, -1.0, 2.0), start + 0.0 * CENTER, KKT)
        assert found.status is bl.Status.CONVERGED
        torch.testing.assert_close(found.y, vector(1.0, 1.0, 2.0), atol=1e-8, rtol=0.0)
    outside = bl.hypergradient(logarithm, vector(-2.0, -1.0, 2.0), -CENTER, KKT)
    assert outside.status.is_failure


def test_upper_value_that_is_not_finite_is_said() -> None:
    problem = bl.BilevelProblem(
        lambda x, y, data: (y + (x - 2.0).sqrt()).sum(),
        lambda x, y, data: ((y - x) ** 2).sum(),
        lower_constraint=lambda x, y, data: y - 10.0,
    )
    found = KKT.estimate(problem, vector(1.0), vector(0.3))
    assert found.status is bl.Status.NONFINITE


def test_kink_of_f_is_not_called_a_lower_solution() -> None:
    """The slope of 2 |y - x| + y does not vanish at its minimum, so the KKT equations hold nowhere."""
    problem = bl.BilevelProblem(
        lambda x, y, data: ((y - 1.0) ** 2).sum(),
        lambda x, y, data: (2.0 * (y - x).abs() + y).sum(),
        lower_constraint=lambda x, y, data: y - 10.0,
    )
    found = KKT.estimate(problem, vector(1.0), vector(0.3))
    assert found.status is bl.Status.LOWER_UNSOLVED
    assert found.info["lower_residual"] > 0.1


def test_lower_objective_that_is_nan_beyond_its_domain() -> None:
    """y* = 1 / x; the first step of SLSQP from y = 0.9 leaves y > 0. F = y^2 / 2 has the slope -1 / x^3."""
    problem = bl.BilevelProblem(
        lambda x, y, data: 0.5 * (y**2).sum(),
        lambda x, y, data: (x * y - torch.log(y)).sum(),
        lower_constraint=lambda x, y, data: y - 10.0,
    )
    found = KKT.estimate(problem, vector(50.0), vector(0.9))
    assert found.status is bl.Status.CONVERGED
    torch.testing.assert_close(found.y, vector(0.02))
    torch.testing.assert_close(found.grad, vector(-(50.0**-3)))


class InNumPy(torch.autograd.Function):
    """2 y, with a derivative that NumPy computes, one row at a time."""

    @staticmethod
    def forward(ctx: object, y: Tensor) -> Tensor:
        return 2.0 * y

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> Tensor:
        return torch.from_numpy(2.0 * grad.detach().numpy())


def test_constraint_whose_derivative_numpy_computes() -> None:
    """y1 + y2 = 1 and y1 - y2 = x1 leave y1 = (1 + x1) / 2."""
    problem = bl.BilevelProblem(
        lambda x, y, data: y[0] ** 2 + 0.0 * y[1],
        lambda x, y, data: ((y - x) ** 2).sum(),
        lower_equality=lambda x, y, data: (
            InNumPy.apply(torch.stack([y.sum(), y[0] - y[1]]))
            - 2.0 * torch.stack([1.0 + 0.0 * x[1], x[0]])
        ),
    )
    found = KKT.estimate(problem, vector(0.6, 0.4), vector(1.0, 0.4))
    assert found.status is bl.Status.CONVERGED
    torch.testing.assert_close(found.y, vector(0.8, 0.2))
    torch.testing.assert_close(found.grad, vector(0.8, 0.0))  # 2 y1 / 2
