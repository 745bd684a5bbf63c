"""The true error stays below the bound, which is not ten times too large."""

import math
import statistics
from typing import Any

import pytest
import torch
from cases import reduced, sgd, slope
from torch import Tensor

import bilevel as bl
from bilevel.linear import CG, MINRES, Neumann
from bilevel.testing._contract import counted
from bilevel.testing.problems import bda, quadratic


def draw(seed: int) -> tuple[Any, Tensor, Tensor, Tensor]:
    """A random strongly convex quadratic, a point, and the closed form of its hypergradient."""
    generator = torch.Generator().manual_seed(1000 + seed)
    nx, ny = (int(torch.randint(2, 30, (), generator=generator)) for _ in range(2))
    condition = 10.0 ** float(3.0 * torch.rand((), generator=generator))
    case = quadratic(nx, ny, condition, seed)
    x, y = (torch.randn(n, dtype=torch.float64, generator=generator) for n in (nx, ny))
    return case, x, y, torch.func.grad(reduced(case.problem, case.y0))(x)


METHODS: dict[str, Any] = {
    "few lower steps": lambda L, k: bl.Implicit(
        CG(), minimizer=sgd(1.0 / L, max_steps=k), error_bound=True
    ),
    "few products": lambda L, k: bl.Implicit(CG(max_steps=1 + k // 10), error_bound=True),
    "both": lambda L, k: bl.Implicit(
        MINRES(max_steps=2 + k // 10), minimizer=sgd(1.0 / L, max_steps=k), error_bound=True
    ),
    "both, by a series": lambda L, k: bl.Implicit(
        Neumann(k), minimizer=sgd(1.0 / L, max_steps=2 * k), error_bound=True
    ),
    "loose tolerances": lambda L, k: bl.Implicit(
        CG(rtol=10.0 ** (-k / 10)),
        minimizer=sgd(1.0 / L, max_steps=10 * k),
        tol=1e-4,
        error_bound=True,
    ),
    "value function": lambda L, k: bl.ValueFunction(
        epsilon=10.0 ** (-2 - k / 10), error_bound=True
    ),
    "value function, inexact": lambda L, k: bl.ValueFunction(
        epsilon=10.0 ** (-2 - k / 10), tol=0.03, error_bound=True
    ),
}


@pytest.mark.parametrize("name", list(METHODS))
def test_true_error_is_below_the_bound_and_within_a_factor_of_ten(name: str) -> None:
    below, ratios = 0, []
    for seed in range(100):
        case, x, y, exact = draw(seed)
        hessian = torch.func.hessian(lambda v, c=case, u=x: c.problem.lower(u, v, None))(y)
        method = METHODS[name](float(torch.linalg.eigvalsh(hessian)[-1]), 2 + seed % 40)
        estimate = method.estimate(case.problem, x, y)
        error, bound = float((estimate.grad - exact).norm()), estimate.info["error_bound"]
        below += error <= bound
        ratios.append(bound / error if error > 0.0 else 1.0)
    assert below >= 95
    assert statistics.median(ratios) <= 10.0


@pytest.mark.parametrize("size", [10, 300])  # the Hessian at hand, and by products
def test_solved_problem_has_a_bound_near_rounding_that_holds(size: int) -> None:
    case = quadratic(5, size, 100.0)
    x = case.x0 + 0.3
    exact = torch.func.grad(reduced(case.problem, case.y0))(x)
    estimate = bl.Implicit(error_bound=True).estimate(case.problem, x, case.y0)
    error = float((estimate.grad - exact).norm())
    assert error <= estimate.info["error_bound"] <= 1e-8 * float(exact.norm())


def curved(x: Tensor, y: Tensor, data: Any) -> Tensor:
    return torch.cosh(y - x).sum() + 0.1 * (y**4).sum() + 0.3 * y[0] * y[1]


CURVED = bl.BilevelProblem(
    lambda x, y, data: torch.exp(0.3 * y).sum() * x[0] + (x**2).sum(), curved
)
X, Y = torch.tensor([0.7, -0.4]).double(), torch.zeros(2).double()


@pytest.mark.parametrize("steps", [3, 5, 8, 12, 20])
def test_bound_holds_to_first_order_where_f_is_no_quadratic(steps: int) -> None:
    """Third derivatives of f enter the error; central differences of the solved problem are the oracle."""
    tight = bl.Implicit(tol=0.0)
    axes = torch.eye(2).double()
    exact = torch.tensor(
        [slope(lambda u: tight.estimate(CURVED, u, Y).value, X, e, 1e-3) for e in axes]
    )
    method = bl.Implicit(minimizer=sgd(0.2, max_steps=steps), error_bound=True)
    rough = method.estimate(CURVED, X, Y)
    error = float((rough.grad - exact.double()).norm())
    assert error <= rough.info["error_bound"] <= 10.0 * error


def test_bound_of_the_value_function_covers_its_bias() -> None:
    case = quadratic()
    x = case.x0 + 0.3
    exact = torch.func.grad(reduced(case.problem, case.y0))(x)
    for epsilon in (1e-2, 1e-4, 1e-6):
        estimate = bl.ValueFunction(epsilon=epsilon, error_bound=True).estimate(
            case.problem, x, case.y0
        )
        error = float((estimate.grad - exact).norm())
        assert error <= estimate.info["error_bound"] <= 3.0 * error


def exact_gradient(problem: bl.BilevelProblem, x: Tensor, y: Tensor) -> Tensor:
    """By Newton's method with a Hessian at every step, and one dense solve."""
    F, f = (lambda u, v, g=g: g(u, v, None) for g in (problem.upper, problem.lower))
    for _ in range(50):
        H = torch.func.hessian(f, 1)(x, y)
        y = y - torch.linalg.solve(H, torch.func.grad(f, 1)(x, y))
    H = torch.func.hessian(f, 1)(x, y)
    v = torch.linalg.solve(H, torch.func.grad(F, 1)(x, y))
    mixed = torch.func.jacrev(torch.func.grad(f, 1), 0)(x, y)  # rows y, columns x
    return torch.func.grad(F, 0)(x, y) - mixed.T @ v


@pytest.mark.parametrize("size", [2, 300])  # the Hessian kept by Newton's method, and by products
@pytest.mark.parametrize("epsilon", [1e-2, 1e-4, 1e-6])
def test_bound_of_the_value_function_holds_where_f_is_no_quadratic(
    epsilon: float, size: int
) -> None:
    """The Hessian that Newton's method kept is of a point on its way: alone it was off by five digits."""
    x = torch.linspace(-0.4, 0.7, size).double()
    y = x + 0.5
    exact = exact_gradient(CURVED, x, y)
    method = bl.ValueFunction(epsilon=epsilon, error_bound=True)
    estimate = method.estimate(CURVED, x, y)
    error = float((estimate.grad - exact).norm())
    assert error <= estimate.info["error_bound"] <= 10.0 * error


@pytest.mark.parametrize("method", [bl.Implicit(), bl.ValueFunction()], ids=["Implicit", "VF"])
def test_descent_does_not_pay_for_a_bound(method: bl.Estimator) -> None:
    case = quadratic()
    state = next(bl.iterate(case.problem, bl.HypergradientDescent(method), case.x0, case.y0))
    assert "error_bound" not in state.metrics


@pytest.mark.parametrize("make", [bl.Implicit, bl.ValueFunction])
def test_singular_hessian_has_no_finite_bound(make: Any) -> None:
    method = make(error_bound=True)
    x, y = torch.tensor([0.5]).double(), torch.tensor([0.0, 3.0]).double()
    assert method.estimate(bda().problem, x, y).info["error_bound"] == math.inf


@pytest.mark.parametrize("make", [bl.Implicit, bl.ValueFunction])
def test_bound_is_counted_and_has_to_be_asked_for(make: Any) -> None:
    case = quadratic()
    calls = {"upper": 0, "lower": 0}
    dear = make(error_bound=True).estimate(counted(case.problem, calls), case.x0, case.y0)
    assert (dear.evaluations.upper, dear.evaluations.lower) == (calls["upper"], calls["lower"])
    cheap = make().estimate(case.problem, case.x0, case.y0)
    assert "error_bound" not in cheap.info
    assert torch.equal(cheap.grad, dear.grad)
    assert cheap.evaluations.upper < dear.evaluations.upper


class Once(torch.autograd.Function):
    """y^2 / 2, whose gradient has no derivative."""

    @staticmethod
    def forward(ctx: Any, y: Tensor) -> Tensor:
        ctx.save_for_backward(y)
        return 0.5 * y**2

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * ctx.saved_tensors[0]


class InNumPy(torch.autograd.Function):
    """The same, whose gradient torch cannot follow: it raises where it is to be differentiated."""

    @staticmethod
    def forward(ctx: Any, y: Tensor) -> Tensor:
        ctx.save_for_backward(y)
        return 0.5 * y**2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return torch.from_numpy(grad.numpy() * ctx.saved_tensors[0].numpy())


@pytest.mark.parametrize("half_square", [Once, InNumPy])
def test_value_function_of_what_is_differentiable_once_has_no_finite_bound(
    half_square: Any,
) -> None:
    problem = bl.BilevelProblem(
        lambda x, y, data: ((y - 1.0) ** 2).sum(),
        lambda x, y, data: half_square.apply(y - 3.0 * x).sum(),
    )
    method = bl.ValueFunction(
        epsilon=1e-2, tol=1e-3, minimizer=sgd(0.1, max_steps=200), error_bound=True
    )
    estimate = method.estimate(problem, torch.ones(1).double(), torch.ones(1).double())
    assert torch.isfinite(estimate.grad).all()
    assert estimate.info["error_bound"] == math.inf
