import math
from typing import Any

import pytest
import torch
from cases import reduced, sgd, slope
from torch import Tensor

import bilevel as bl
from bilevel.fixed_points import prox_gradient, prox_l1
from bilevel.testing import check_hypergradient_estimator, check_solver
from bilevel.testing._contract import counted, halves, whole
from bilevel.testing.problems import quadratic


def data(n: int = 60, d: int = 12, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(2 * n, d, dtype=torch.float64, generator=generator)
    truth = torch.zeros(d).double()
    truth[:4] = torch.tensor([3.0, -2.0, 1.5, 0.5]).double()
    noise = torch.randn(2 * n, dtype=torch.float64, generator=generator)
    targets = inputs @ truth + 0.5 * noise
    return {"X": inputs[:n], "t": targets[:n], "Xv": inputs[n:], "tv": targets[n:]}


D = data()


def smooth(x: Tensor, y: Tensor, data: Any) -> Tensor:
    return 0.5 * ((D["X"] @ y - D["t"]) ** 2).mean()


def upper(x: Tensor, y: Tensor, data: Any) -> Tensor:
    return 0.5 * ((D["Xv"] @ y - D["tv"]) ** 2).mean() + 0.01 * (x**2).sum()


LASSO = bl.BilevelProblem(upper, lambda x, y, data: smooth(x, y, data) + (x.exp() * y.abs()).sum())
STEP = 1.0 / float(torch.linalg.eigvalsh(D["X"].T @ D["X"] / 60)[-1])
MAP = prox_gradient(smooth, lambda x, v, lr: prox_l1(v, lr * x.exp()), STEP)
METHOD = bl.Implicit(condition=bl.FixedPoint(MAP))


def on_the_active_set(x: Tensor, y: Tensor) -> Tensor:
    """The hypergradient with the support and the signs held: (X_A' X_A / n) y_A = X_A' t / n - e^x s_A."""
    u = x.clone().requires_grad_()
    active = y != 0
    X, sign = D["X"][:, active], torch.sign(y[active])
    weights = u.exp().expand(y.shape)[active]
    y_active = torch.linalg.solve(X.T @ X / 60, X.T @ D["t"] / 60 - weights * sign)
    loss = 0.5 * ((D["Xv"][:, active] @ y_active - D["tv"]) ** 2).mean() + 0.01 * (u**2).sum()
    return torch.autograd.grad(loss, u)[0]


def coordinate_descent(x: Tensor) -> Tensor:
    """The Lasso by another algorithm, to rounding."""
    X, t, n = D["X"], D["t"], 60
    y = torch.zeros(12).double()
    threshold = x.exp().expand(12)
    for _ in range(2000):
        before = y.clone()
        for j in range(12):
            rest = t - X @ y + X[:, j] * y[j]
            rho, norm = float(X[:, j] @ rest / n), float(X[:, j] @ X[:, j] / n)
            y[j] = math.copysign(max(abs(rho) - float(threshold[j]), 0.0), rho) / norm
        if float((y - before).norm()) < 1e-15:
            break
    return y


@pytest.mark.parametrize("start", [-3.0, -1.0, 0.0, 1.0])
@pytest.mark.parametrize("weights", [1, 12])
def test_lasso_is_the_closed_form_on_its_active_set(start: float, weights: int) -> None:
    x = torch.full((weights,), start).double()
    estimate = bl.hypergradient(LASSO, x, torch.zeros(12).double(), METHOD)
    assert estimate.status is bl.Status.CONVERGED
    y = coordinate_descent(x)
    torch.testing.assert_close(estimate.y, y, rtol=1e-9, atol=1e-10)
    assert torch.equal(estimate.y == 0, y == 0)
    assert 0 < int((y != 0).sum()) <= 12
    torch.testing.assert_close(estimate.grad, on_the_active_set(x, y), rtol=1e-8, atol=1e-10)


def test_lasso_agrees_with_central_differences() -> None:
    x, y = torch.tensor([-1.0]).double(), torch.zeros(12).double()
    found = float(METHOD.estimate(LASSO, x, y).grad)
    by_itself = slope(lambda u: METHOD.estimate(LASSO, u, y).value, x, torch.ones(1).double(), 1e-4)
    other = slope(
        lambda u: float(upper(u, coordinate_descent(u), None)), x, torch.ones(1).double(), 1e-4
    )
    assert found == pytest.approx(by_itself, rel=1e-7)
    assert found == pytest.approx(other, rel=1e-7)


def test_best_weight_of_the_lasso_is_that_of_a_grid() -> None:
    solver = bl.HypergradientDescent(METHOD)
    x0, y0 = torch.tensor(-1.0).double(), torch.zeros(12).double()  # 0-d: a tree that is no vector
    solution = bl.solve(LASSO, solver, x0, y0, max_steps=50)
    assert solution.x.shape == ()
    grid = torch.linspace(-4.0, 0.0, 81).double()
    values = [float(upper(u, coordinate_descent(u), None)) for u in grid[:, None]]
    assert solution.upper <= min(values) + 1e-6


@pytest.mark.parametrize("linear", [bl.linear.GMRES(), bl.linear.Dense(), None], ids=str)
def test_smooth_problem_as_a_fixed_point_is_the_closed_form(linear: Any) -> None:
    case = quadratic()
    step = prox_gradient(case.problem.lower, lambda x, v, lr: v, 0.1)
    method = bl.Implicit(linear, condition=bl.FixedPoint(step))
    x = case.x0 + 0.3
    estimate = method.estimate(case.problem, x, case.y0)
    exact = torch.func.grad(reduced(case.problem, case.y0))(x)
    torch.testing.assert_close(estimate.grad, exact, rtol=1e-9, atol=1e-9)


def step_of_the_quadratic(x: Any, y: Any, data: Any) -> Any:
    """A gradient step on the lower objective of `quadratic()`, over what the contract's checks put in place of y."""
    if isinstance(y, dict):
        return halves(step_of_the_quadratic(whole(x), whole(y), data))
    plain = prox_gradient(quadratic().problem.lower, lambda x, v, lr: v, 0.15)
    return plain(x.double(), y.double(), data).to(y.dtype)


def test_fixed_point_keeps_the_contract_of_estimators_and_of_solvers() -> None:
    method = bl.Implicit(condition=bl.FixedPoint(step_of_the_quadratic))
    check_hypergradient_estimator(method, rtol=1e-8, problems=[quadratic()])
    check_solver(bl.HypergradientDescent(method), problems=[quadratic()])


def test_trees_data_and_batches() -> None:
    def lower(x: Any, y: Any, data: Any) -> Tensor:
        return 0.5 * ((y["a"] - data * x["b"]) ** 2).sum() + x["w"] * y["a"].abs().sum()

    def step(x: Any, y: Any, data: Any) -> Any:
        return {"a": prox_l1(0.5 * y["a"] + 0.5 * data * x["b"], 0.5 * x["w"])}

    problem = bl.BilevelProblem(lambda x, y, data: (y["a"] ** 2).sum() * data, lower)
    x = {"b": torch.tensor([[2.0, 0.1]]).double(), "w": torch.tensor(0.5).double()}
    y = {"a": torch.zeros(1, 2).double()}
    method = bl.Implicit(condition=bl.FixedPoint(step))
    found = bl.hypergradient(problem, x, y, method, bl.Batch(upper=1.0, lower=3.0))
    # y = (3 * 2 - 0.5, 0): F = (3 b - w)^2
    assert found.y["a"].tolist()[0] == pytest.approx([5.5, 0.0])
    assert found.grad["b"].tolist()[0] == pytest.approx([2 * 5.5 * 3.0, 0.0])
    assert float(found.grad["w"]) == pytest.approx(-2 * 5.5)


def test_evaluations_are_counted() -> None:
    calls, maps = {"upper": 0, "lower": 0}, 0

    def step(x: Tensor, y: Tensor, data: Any) -> Tensor:
        nonlocal maps
        maps += 1
        return MAP(x, y, data)

    method = bl.Implicit(condition=bl.FixedPoint(step))
    x, y = torch.tensor([-1.0]).double(), torch.zeros(12).double()
    count = method.estimate(counted(LASSO, calls), x, y).evaluations
    assert (count.upper, count.lower) == (calls["upper"], calls["lower"]) == (1, 1)
    assert count.lower_grad == maps


def test_acceleration_pays_and_the_plain_iteration_gives_the_same() -> None:
    x, y = torch.tensor([-2.0]).double(), torch.zeros(12).double()
    plain = bl.Implicit(condition=bl.FixedPoint(MAP, window=0)).estimate(LASSO, x, y)
    fast = METHOD.estimate(LASSO, x, y)
    torch.testing.assert_close(plain.grad, fast.grad, rtol=1e-8, atol=0.0)
    assert fast.evaluations.lower_grad < 0.7 * plain.evaluations.lower_grad


def test_unsolved_singular_and_broken_fixed_points_are_said() -> None:
    x, y = torch.tensor([-2.0]).double(), torch.zeros(12).double()
    few = bl.Implicit(condition=bl.FixedPoint(MAP, max_steps=3)).estimate(LASSO, x, y)
    assert few.status is bl.Status.LOWER_UNSOLVED
    assert few.info["lower_residual"] > 1e-6

    def estimate(step: Any) -> bl.Estimate:
        return bl.Implicit(condition=bl.FixedPoint(step, max_steps=500)).estimate(LASSO, x, y)

    assert estimate(lambda x, y, data: y * x[0]).status is bl.Status.CONVERGED  # to zero
    assert estimate(lambda x, y, data: y + 0.0 * x[0]).status is bl.Status.LINEAR_UNSOLVED
    assert estimate(lambda x, y, data: y * math.nan).status is bl.Status.NONFINITE
    grows = estimate(lambda x, y, data: y.exp() * 3.0)
    assert grows.status in (bl.Status.NONFINITE, bl.Status.LOWER_UNSOLVED)
    with pytest.raises(bl.StructureError, match=r"FixedPoint\(map=...\)\(x, y, data\)"):
        estimate(lambda x, y, data: y[:3])


def test_float32_reaches_its_rounding() -> None:
    def smooth32(x: Tensor, y: Tensor, data: Any) -> Tensor:
        return 0.5 * ((D["X"].float() @ y - D["t"].float()) ** 2).mean()

    problem = bl.BilevelProblem(
        lambda x, y, data: (
            0.5 * ((D["Xv"].float() @ y - D["tv"].float()) ** 2).mean() + 0.01 * (x**2).sum()
        ),
        lambda x, y, data: smooth32(x, y, data) + (x.exp() * y.abs()).sum(),
    )
    step = prox_gradient(smooth32, lambda x, v, lr: prox_l1(v, lr * x.exp()), STEP)
    x, y = torch.tensor([-1.0]), torch.zeros(12)
    found = bl.Implicit(condition=bl.FixedPoint(step)).estimate(problem, x, y)
    exact = METHOD.estimate(LASSO, x.double(), y.double()).grad
    assert found.status is bl.Status.CONVERGED
    assert found.grad.dtype == torch.float32
    torch.testing.assert_close(found.grad.double(), exact, rtol=1e-3, atol=0.0)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: bl.FixedPoint(3), TypeError, "`FixedPoint(map=...)` must be callable. Got int"),  # pyright: ignore[reportArgumentType]
        (
            lambda: bl.FixedPoint(MAP, max_steps=0),
            ValueError,
            "Got max_steps=0. Raise it, e.g. to 10.",
        ),
        (lambda: bl.FixedPoint(MAP, window=-1), ValueError, "Got window=-1. Raise it, e.g. to 10."),
        (lambda: prox_gradient(smooth, lambda x, v, lr: v, 0.0), ValueError, "Got lr=0.0"),
        (lambda: bl.Implicit(condition=MAP), TypeError, "must be an instance of `FixedPoint`"),  # pyright: ignore[reportArgumentType]
        (
            lambda: bl.Implicit(minimizer=sgd(0.1), condition=bl.FixedPoint(MAP)),
            ValueError,
            "`Implicit(minimizer=...)` must be left out where a condition is given",
        ),
    ],
)
def test_mistake_is_named(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error) as caught:
        make()
    assert message in str(caught.value)


def test_any_minimizer_beside_a_condition_is_refused_the_default_one_too() -> None:
    with pytest.raises(ValueError, match="must be left out where a condition is given"):
        bl.Implicit(minimizer=bl.optim.Newton(), condition=bl.FixedPoint(MAP))


@pytest.mark.parametrize(("share", "status"), [(1.99, "CONVERGED"), (2.0, "MAX_STEPS")])
def test_prox_gradient_contracts_below_two_over_the_curvature_and_not_at_it(
    share: float, status: str
) -> None:
    curvature = torch.tensor([1.0, 4.0]).double()
    step = prox_gradient(
        lambda x, y, data: 0.5 * (curvature * (y - x) ** 2).sum(), lambda x, v, lr: v, share / 4.0
    )
    plain = bl.FixedPoint(step, window=0)
    reached = plain.solve(
        lambda y: step(torch.ones(2).double(), y, None), torch.zeros(2).double(), 1e-10
    )
    assert reached.status.name == status
