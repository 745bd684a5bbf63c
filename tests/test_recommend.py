from typing import Any

import pytest
import torch
from torch import Tensor

import bilevel as bl
from bilevel import _implicit_for
from bilevel.estimators import _newton_steps
from bilevel.testing import problems


def vector(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def names(found: bl.Recommendation) -> list[str]:
    return [name for name, _ in found.refused]


def test_strongly_convex_lower_problem_gets_the_implicit_hypergradient() -> None:
    case = problems.quadratic()
    found = bl.recommend(case.problem, case.x0, case.y0)
    assert isinstance(found.method, bl.HypergradientDescent)
    assert isinstance(found.method.estimator, bl.Implicit)
    assert any("lower curvature is from 1 to 10" in reason for reason in found.reasons)
    solution = bl.solve(case.problem, found.method, case.x0, case.y0, max_steps=200)
    assert case.error(solution.x) < 1e-4


@pytest.mark.parametrize("case", [problems.bda(), problems.sine(2)], ids=lambda case: case.name)
def test_many_lower_solutions_get_asblo(case: problems.ZooProblem) -> None:
    found = bl.recommend(case.problem, case.x0 + 0.1, case.y0)
    assert isinstance(found.method, bl.ASBLO)
    assert names(found) == ["Implicit", "Unrolled"]
    assert "not known to be a smooth function" in str(found)


def test_lower_constraints_get_the_kkt_system() -> None:
    problem = bl.BilevelProblem(
        lambda x, y, data: ((y - 0.7) ** 2).sum(),
        lambda x, y, data: ((y - x) ** 2).sum(),
        lower_constraint=lambda x, y, data: y - 1.0,
    )
    found = bl.recommend(problem, vector(0.2), vector(0.0))
    assert isinstance(found.method, bl.HypergradientDescent)
    assert isinstance(found.method.estimator, bl.ImplicitKKT)
    assert names(found) == ["Implicit", "Unrolled"]
    assert "ignore lower_constraint" in str(found)
    kink = bl.recommend(problem, vector(1.0), vector(0.0))
    assert "ImplicitKKT" in names(kink)


def test_objective_without_second_derivatives_gets_asblo() -> None:
    class Square(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, y: Tensor) -> Tensor:
            ctx.save_for_backward(y)  # pyright: ignore[reportAttributeAccessIssue]
            return (y**2).sum()

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx: object, cotangent: Tensor) -> Tensor:
            (y,) = ctx.saved_tensors  # pyright: ignore[reportAttributeAccessIssue]
            return 2.0 * y * cotangent

    problem = bl.BilevelProblem(
        lambda x, y, data: ((y - 1.0) ** 2).sum(), lambda x, y, data: Square.apply(y - x)
    )
    found = bl.recommend(problem, vector(0.2), vector(0.0))
    assert "Implicit" in names(found)
    assert any("no second derivatives" in reason for reason in found.reasons)


def test_unbounded_lower_problem_is_refused_by_all() -> None:
    concave = bl.BilevelProblem(
        lambda x, y, data: (y**2).sum(), lambda x, y, data: -((y - x) ** 2).sum()
    )
    found = bl.recommend(concave, vector(0.2), vector(0.0))
    assert found.method is None
    assert len(found.refused) == 4
    assert "decreases without bound" in str(found)


def test_large_lower_problem_is_probed_by_lanczos() -> None:
    scale = torch.linspace(2.0, 50.0, 500, dtype=torch.float64)
    large = bl.BilevelProblem(
        lambda x, y, data: ((y - 1.0) ** 2).sum(), lambda x, y, data: (scale * (y - x) ** 2).sum()
    )
    found = bl.recommend(large, vector(0.5), torch.zeros(500).double())
    assert isinstance(found.method, bl.HypergradientDescent)
    assert found.method.estimator == bl.Implicit(bl.linear.CG())
    (sentence,) = [reason for reason in found.reasons if "Lanczos" in reason]
    low, high = (float(word) for word in sentence.split() if word[0].isdigit())
    assert 4.0 <= low < 6.0  # the ends are 4 and 100
    assert 98.0 < high <= 100.0
    assert "seems" in sentence
    assert "the lower solution seems locally unique" in str(found)


def test_large_lower_problem_with_constraints_is_not_probed_by_the_hessian_alone() -> None:
    large = bl.BilevelProblem(
        lambda x, y, data: ((y - 0.7) ** 2).sum(),
        lambda x, y, data: ((y - x) ** 2).sum(),
        lower_constraint=lambda x, y, data: y.sum() - 1e3,
    )
    found = bl.recommend(large, vector(0.2), torch.full((257,), 0.2).double())
    assert isinstance(found.method, bl.ASBLO)
    assert names(found) == ["ImplicitKKT", "Unrolled"]
    assert "not probed" in str(found)
    assert "Lanczos" not in str(found)


def test_objectives_that_need_data_and_variables_with_a_graph_are_probed() -> None:
    """Two lower solutions, so that ASBLO is reached; its full batch was started without the data."""
    case = problems.bda()
    problem = bl.BilevelProblem(
        lambda x, y, data: data * case.problem.upper(x, y, None),
        lambda x, y, data: data * case.problem.lower(x, y, None),
    )
    x, y = (v.clone().requires_grad_() for v in (case.x0 + 0.1, case.y0))
    found = bl.recommend(problem, x, y, vector(2.0).squeeze())
    assert isinstance(found.method, bl.ASBLO)
    assert names(found) == ["Implicit", "Unrolled"]


def test_constraints_with_data_are_for_the_full_batch_of_asblo() -> None:
    problem = bl.BilevelProblem(
        lambda x, y, data: ((y - data) ** 2).sum(),
        lambda x, y, data: ((y - x) ** 2).sum(),
        upper_constraint=lambda x, y, data: x - 1.0,
    )
    found = bl.recommend(problem, vector(0.2), vector(0.0), vector(0.7))
    assert isinstance(found.method, bl.ASBLO)
    assert names(found) == ["HypergradientDescent", "ASBLO on batches"]
    with pytest.raises(ValueError, match="ASBLO on batches"):
        next(bl.iterate(problem, found.method, vector(0.2), vector(0.0), [vector(0.7)]))


def test_memory_that_runs_out_is_no_missing_derivative(monkeypatch: pytest.MonkeyPatch) -> None:
    def out(*_: object, **__: object) -> object:
        raise torch.OutOfMemoryError("no memory left")

    monkeypatch.setattr("bilevel._probe.Oracle.linearized", out)
    case = problems.quadratic()
    with pytest.raises(torch.OutOfMemoryError):
        bl.recommend(case.problem, case.x0, case.y0)


def design() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    A = torch.randn(20, 5, generator=generator, dtype=torch.float64)
    noise = 0.1 * torch.randn(20, generator=generator, dtype=torch.float64)
    return A, A @ vector(2.0, -1.0, 0.0, 0.0, 0.0) + noise


def lasso(x: Tensor, y: Tensor, data: object) -> Tensor:
    A, b = design()
    return 0.5 * ((A @ y - b) ** 2).mean() + x.exp().sum() * y.abs().sum()


def hinge(x: Tensor, y: Tensor, data: object) -> Tensor:
    A, b = design()
    return torch.relu(1.0 - torch.sign(b) * (A @ y)).mean() + 0.5 * x.exp().sum() * (y**2).sum()


def absolute(x: Tensor, y: Tensor, data: object) -> Tensor:
    return (y - x).abs().sum()


def upper(x: Tensor, y: Tensor, data: object) -> Tensor:
    return ((y - 1.0) ** 2).sum()


@pytest.mark.parametrize(
    ("lower", "x", "y", "term"),
    [
        (absolute, vector(0.3), vector(0.5), "prox that of the term"),
        (lasso, vector(-1.0), torch.zeros(5).double(), "fixed_points.prox_l1"),
        (lasso, vector(-1.0), torch.ones(5).double(), "fixed_points.prox_l1"),
        (hinge, vector(-2.0), torch.zeros(5).double(), "prox that of the term"),
    ],
)
def test_kink_of_the_lower_objective_gets_a_fixed_point(
    lower: Any, x: Tensor, y: Tensor, term: str
) -> None:
    found = bl.recommend(bl.BilevelProblem(upper, lower), x, y)
    assert found.method is None
    assert names(found) == ["ASBLO", "Implicit without a condition", "Unrolled"]
    assert "f has a kink along" in str(found)
    assert "Implicit(condition=FixedPoint(T))" in str(found)
    assert term in str(found)
    assert "no solution" not in str(found)


def near_kink(x: Tensor, y: Tensor, data: object) -> Tensor:
    """The curvature jumps at the minimum, and the slope elsewhere."""
    return ((y - x) ** 2).sum() + torch.relu(y - x).pow(2).sum() + torch.relu(y - x - 1.0).sum()


def steep(x: Tensor, y: Tensor, data: object) -> Tensor:
    return torch.nn.functional.softplus(50.0 * (y - x)).sum() / 50.0 + ((y - x) ** 2).sum()


@pytest.mark.parametrize("lower", [near_kink, steep])
def test_smooth_minimum_is_no_kink(lower: Any) -> None:
    found = bl.recommend(bl.BilevelProblem(upper, lower), vector(0.3), vector(0.5))
    assert found.method == bl.HypergradientDescent(bl.Implicit(bl.linear.Dense()))


def test_recommendation_for_a_tolerance_solves_no_more_than_it_must() -> None:
    case = problems.quadratic(4, 300)
    exact, rough = (
        bl.recommend(case.problem, case.x0, case.y0, rtol=rtol).method for rtol in (None, 1e-3)
    )
    assert isinstance(exact, bl.HypergradientDescent)
    assert isinstance(rough, bl.HypergradientDescent)
    truth = bl.hypergradient(case.problem, case.x0, case.y0, exact.estimator)
    found = bl.hypergradient(case.problem, case.x0, case.y0, rough.estimator)
    assert found.status is bl.Status.CONVERGED
    torch.testing.assert_close(
        found.grad, truth.grad, rtol=1e-3, atol=1e-3 * float(truth.grad.norm())
    )
    assert found.evaluations.hvp < truth.evaluations.hvp


def test_few_products_are_preferred_to_hessians_and_these_to_many() -> None:
    """Of a well conditioned problem that is no quadratic, and of an ill conditioned one that is."""
    weights = torch.linspace(1.0, 4.0, 30, dtype=torch.float64)
    mild = bl.BilevelProblem(
        lambda x, y, data: (y**2).sum(),
        lambda x, y, data: (weights * torch.cosh(y - x)).sum(),
    )
    steep = bl.BilevelProblem(
        lambda x, y, data: (y**2).sum(),
        lambda x, y, data: (weights**4 * (y - x) ** 2).sum(),
    )
    x, y = torch.ones(30).double(), torch.zeros(30).double()
    found = bl.recommend(mild, x, y, rtol=1e-3)
    assert "CG()" in str(found)
    assert "linear systems take about" in str(found)
    assert "Dense()" in str(bl.recommend(steep, x, y, rtol=1e-3))
    exact = 2.0 * x  # y* = x
    assert isinstance(found.method, bl.HypergradientDescent)
    grad = bl.hypergradient(mild, x, y, found.method.estimator).grad
    assert torch.linalg.vector_norm(grad - exact) < 1e-3 * torch.linalg.vector_norm(exact)


@pytest.mark.parametrize(("power", "steps"), [(2, 2), (4, 8)])
def test_compiled_recommendation_has_the_steps_that_are_needed(power: int, steps: int) -> None:
    """And one to spare, as x will move."""
    problem = bl.BilevelProblem(
        lambda x, y, data: (y**2).sum(),
        lambda x, y, data: ((y - x) ** power + 0.1 * (y - x) ** 2).sum(),
    )
    x, y = torch.ones(3).double(), torch.zeros(3).double()
    found = bl.recommend(problem, x, y, rtol=1e-3, compile=True)
    assert "Implicit(Dense(), compile=True)" in str(found)
    assert isinstance(found.method, bl.HypergradientDescent)
    method = found.method.estimator
    assert isinstance(method, bl.Implicit)
    assert method.compile
    assert method.minimizer == bl.optim.Newton(max_steps=steps)
    # The program itself, without the half minute that its compiling takes.
    fused, memory = method.fused.program(problem), None
    grad = fused(x, y, memory, None, None)[0]
    torch.testing.assert_close(grad, 2.0 * x, rtol=1e-3, atol=0.0)


def test_what_cannot_be_compiled_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def lower(x: Tensor, y: Tensor, data: Any) -> Tensor:
        return 0.5 * ((y - x) ** 2).sum()

    def branching(x: Tensor, y: Tensor, data: Any) -> Tensor:
        return lower(x, y, data) if float(y.detach().sum()) < 9.0 else 2.0 * lower(x, y, data)

    def slow(x: Tensor, y: Tensor, data: Any) -> Tensor:
        return lower(x, y, data) + torch.cosh(y - x).sum()

    one, many = vector(1.0), torch.zeros(300).double()
    of_many = bl.recommend(bl.BilevelProblem(upper, lower), one, many, compile=True)
    assert "not compiled: each step would form the Hessian of 300 variables" in str(of_many)
    branches = bl.recommend(bl.BilevelProblem(upper, branching), one, 0.0 * one, compile=True)
    assert "not compiled: " in str(branches)
    assert "compile=True" not in str(branches)
    needed = _newton_steps.steps_needed(lambda y: slow(one, y, None), vector(9.0), 1e-13)
    assert needed is not None
    for module in (_newton_steps, _implicit_for):
        monkeypatch.setattr(module, "MOST", needed)
    full = bl.recommend(bl.BilevelProblem(upper, slow), one, vector(9.0), compile=True)
    assert f"of {needed} Newton step(s)" in str(full)  # none to spare, where no more are allowed
    for module in (_newton_steps, _implicit_for):
        monkeypatch.setattr(module, "MOST", 3)
    many_steps = bl.recommend(bl.BilevelProblem(upper, slow), one, vector(9.0), compile=True)
    assert "not compiled: from y it takes more than 3 Newton steps" in str(many_steps)
    with pytest.raises(TypeError, match=r"recommend\(compile=.*Got int"):
        bl.recommend(bl.BilevelProblem(upper, lower), one, one, compile=1)  # pyright: ignore[reportArgumentType]


def test_rough_recommendation_still_counts_as_solved() -> None:
    case = problems.quadratic()
    found = bl.recommend(case.problem, case.x0, case.y0, rtol=0.9)
    assert isinstance(found.method, bl.HypergradientDescent)
    estimate = bl.hypergradient(case.problem, case.x0, case.y0, found.method.estimator)
    assert estimate.status is bl.Status.CONVERGED


def test_tolerance_of_a_recommendation_must_be_positive() -> None:
    case = problems.quadratic()
    with pytest.raises(ValueError, match=r"recommend\(rtol=.*> 0.*Got rtol=0"):
        bl.recommend(case.problem, case.x0, case.y0, rtol=0.0)


def test_equal_curvature_in_all_directions_is_found_by_the_first_product() -> None:
    """Above 3,000 variables f is not solved; its Hessian is the identity."""
    large = bl.BilevelProblem(
        lambda x, y, data: ((y - 1.0) ** 2).sum(), lambda x, y, data: 0.5 * ((y - x) ** 2).sum()
    )
    found = bl.recommend(large, vector(1.0), torch.zeros(4000).double())
    assert "lower curvature seems to be from 1 to 1 (by Lanczos' method" in str(found)
    assert isinstance(found.method, bl.HypergradientDescent)


def test_lower_problem_without_a_feasible_point_is_refused_by_all() -> None:
    empty = bl.BilevelProblem(
        upper, lambda x, y, data: ((y - x) ** 2).sum(), lower_constraint=lambda x, y, data: y**2 + 1
    )
    found = bl.recommend(empty, vector(1.0), vector(0.0))
    assert found.method is None
    assert len(found.refused) == 4
    assert "no lower solution was found from y (no feasible point was found)" in str(found)


@pytest.mark.parametrize("constraint", [None, lambda x, y, data: y - 1.0])
def test_infinite_curvature_at_the_lower_solution_is_no_smooth_one(constraint: Any) -> None:
    """|y - x|^1.5 has its minimum where its second derivative is infinite."""
    steep = bl.BilevelProblem(
        upper, lambda x, y, data: ((y - x).abs() ** 1.5).sum(), lower_constraint=constraint
    )
    found = bl.recommend(steep, vector(0.0), vector(0.0))
    assert isinstance(found.method, bl.ASBLO)
    assert names(found)[0] == ("Implicit" if constraint is None else "ImplicitKKT")
    assert "singular" in str(found)


class InNumPy(torch.autograd.Function):
    """2 y, with a derivative that NumPy computes, so that torch cannot follow it."""

    @staticmethod
    def forward(ctx: Any, y: Tensor) -> Tensor:
        return 2.0 * y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return torch.from_numpy(2.0 * grad.numpy())


def test_gradient_that_numpy_computes_is_no_second_derivative() -> None:
    problem = bl.BilevelProblem(upper, lambda x, y, data: (InNumPy.apply(y) - x).square().sum())
    found = bl.recommend(problem, vector(1.0), vector(0.0))
    assert names(found)[:2] == ["Implicit", "Unrolled"]
    assert "no second derivatives of f: Can't call numpy() on Tensor that requires grad" in str(
        found
    )
