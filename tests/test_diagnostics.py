import pytest
import torch

import bilevel as bl

X = torch.tensor([0.3, -0.2], dtype=torch.float64)
Y = torch.zeros(2, dtype=torch.float64)
PROBLEM = bl.BilevelProblem(
    lambda x, y, data: ((y - 1.0) ** 2).sum(), lambda x, y, data: ((y - x.exp()) ** 2).sum()
)


def test_right_hypergradient_is_trusted_to_the_noise_floor() -> None:
    report = bl.check_hypergradient(PROBLEM, X, Y, bl.Implicit())
    expected = 2.0 * (X.exp() - 1.0) * X.exp()
    torch.testing.assert_close(
        torch.tensor(report.measured).double(), expected, rtol=1e-7, atol=0.0
    )
    assert report.is_trusted
    assert report.error < 1e-7
    assert report.noise < 1e-7
    assert report.verdict.startswith("trusted")


def test_hypergradient_of_an_unsolved_lower_problem_is_not_trusted() -> None:
    report = bl.check_hypergradient(PROBLEM, X, Y, bl.Unrolled(max_steps=2, lr=0.1))
    assert not report.is_trusted
    assert report.error > 0.1
    assert report.verdict.startswith("not to be trusted")


def test_bias_of_a_value_function_is_measured() -> None:
    rough = bl.check_hypergradient(PROBLEM, X, Y, bl.ValueFunction(epsilon=1e-1, sigma=1.0))
    fine = bl.check_hypergradient(PROBLEM, X, Y, bl.ValueFunction(epsilon=1e-6, sigma=1e-2))
    assert rough.error > 1e-2
    assert fine.error < 1e-3
    assert fine.is_trusted
    assert not rough.is_trusted


def test_kink_leaves_no_verdict() -> None:
    kink = bl.BilevelProblem(
        lambda x, y, data: (y.abs().sqrt()).sum(), lambda x, y, data: ((y - x) ** 2).sum()
    )
    report = bl.check_hypergradient(kink, torch.full((1,), 1e-9).double(), Y[:1], bl.Implicit())
    assert not report.is_trusted


def test_unbounded_lower_problem_leaves_nothing_to_compare() -> None:
    concave = bl.BilevelProblem(
        lambda x, y, data: (y**2).sum(), lambda x, y, data: -((y - x) ** 2).sum()
    )
    report = bl.check_hypergradient(concave, X, Y, bl.Implicit())
    assert not report.is_trusted
    assert "no finite solution" in report.verdict


def test_many_variables_are_tested_along_random_directions() -> None:
    x = torch.linspace(-1.0, 1.0, 30, dtype=torch.float64)
    report = bl.check_hypergradient(PROBLEM, x, torch.zeros_like(x), bl.Implicit())
    assert len(report.measured) == 10
    assert report.is_trusted


@pytest.mark.parametrize("part", ["verdict", "relative error", "noise floor"])
def test_report_prints(part: str) -> None:
    assert part in str(bl.check_hypergradient(PROBLEM, X, Y, bl.Implicit()))


def test_plateau_is_wide_where_the_problem_is_smooth() -> None:
    report = bl.check_hypergradient(PROBLEM, X, Y, bl.Implicit())
    assert all(count >= 5 for count in report.plateaus)
    assert len(report.plateaus) == len(report.steps) == 2
    assert report.kink < 1e-4
    assert "of 7 steps" in str(report)


def test_constrained_lower_problem_is_solved_with_its_constraints() -> None:
    held = bl.BilevelProblem(
        PROBLEM.upper,
        PROBLEM.lower,
        lower_equality=lambda x, y, data: y.sum() - 1.0,
        lower_constraint=lambda x, y, data: -y,
    )
    report = bl.check_hypergradient(held, X, Y + 0.5, bl.ImplicitKKT())
    assert report.is_trusted
    assert report.error < 1e-6
    with pytest.raises(ValueError, match=r"check_hypergradient.*lower_constraint"):
        bl.check_hypergradient(held, X, Y + 0.5, bl.Implicit())


def test_kink_of_an_active_constraint_leaves_no_verdict() -> None:
    kinked = bl.BilevelProblem(  # y = max(x, 0), at x = 0
        lambda x, y, data: (2.0 * y).sum() + 0.3 * x.sum(),
        lambda x, y, data: ((y - x) ** 2).sum(),
        lower_constraint=lambda x, y, data: -y,
    )
    report = bl.check_hypergradient(kinked, 0.0 * X[:1], Y[:1], bl.ImplicitKKT())
    assert not report.is_trusted
    assert "kink" in report.verdict


def test_value_that_is_not_finite_at_the_point_itself_has_no_check() -> None:
    holed = bl.BilevelProblem(
        lambda x, y, data: PROBLEM.upper(x, y, data) + 0.0 / ((x - X) ** 2).sum(),
        PROBLEM.lower,
    )
    report = bl.check_hypergradient(holed, X, Y, bl.Implicit())
    assert not report.is_trusted
    assert report.verdict == "no check: F(x, y*(x)) is not finite here"


B = torch.tensor([3.0, 1.0, 0.2], dtype=torch.float64)
#: The Lasso with a unit matrix: y is B by soft thresholding at e^x.
LASSO = bl.BilevelProblem(
    lambda x, y, data: 0.5 * ((y - 0.5 * B) ** 2).sum(),
    lambda x, y, data: 0.5 * ((y - B) ** 2).sum() + x.exp() * y.abs().sum(),
)


def lasso_condition(max_steps: int = 1000) -> bl.FixedPoint:
    step = bl.fixed_points.prox_gradient(
        lambda x, y, data: 0.5 * ((y - B) ** 2).sum(),
        lambda x, v, lr: bl.fixed_points.prox_l1(v, lr * x.exp()),
        lr=0.5,
    )
    return bl.FixedPoint(step, max_steps=max_steps)


@pytest.mark.parametrize("start", [0.0, 1.0])
def test_exact_hypergradient_of_a_lasso_was_called_wrong(start: float) -> None:
    x = torch.tensor([-0.5], dtype=torch.float64)
    method = bl.Implicit(condition=lasso_condition())
    report = bl.check_hypergradient(LASSO, x, torch.full_like(B, start), method)
    assert report.is_trusted
    penalty = float(x.exp())  # y = (3 - p, 1 - p, 0), so that dF = -p ((1.5 - p) + (0.5 - p)) dx
    assert report.measured[0] == pytest.approx(-penalty * (2.0 - 2.0 * penalty), rel=1e-6)


@pytest.mark.parametrize(
    "method",
    [bl.Implicit(), bl.Unrolled(max_steps=50, lr=0.5), bl.Implicit(condition=lasso_condition(2))],
)
def test_unsolved_lower_problem_is_not_the_estimate_s_fault(method: bl.Estimator) -> None:
    x = torch.tensor([-0.5], dtype=torch.float64)
    report = bl.check_hypergradient(LASSO, x, torch.zeros_like(B), method)
    assert report.verdict.startswith("no check: the lower problem was not solved here")
    assert not report.is_trusted


def test_kink_that_only_the_neighbors_show_leaves_no_check() -> None:
    """Torch's gradient of |y - x| is zero at y = x, which so looks solved, and is not for x + h."""
    kinked = bl.BilevelProblem(
        lambda x, y, data: (y**2).sum(), lambda x, y, data: (y - x).abs().sum()
    )
    report = bl.check_hypergradient(kinked, X, X.clone(), bl.Implicit(bl.linear.Dense()))
    assert report.verdict.startswith("no check: the lower problem was not solved next to x")
    assert not report.is_trusted


def test_estimate_that_agrees_by_chance_is_told_from_a_trusted_one() -> None:
    """F does not look at y: one step of the lower problem, unsolved, does no harm to its gradient."""
    problem = bl.BilevelProblem(
        lambda x, y, data: (x**2).sum() + 0.0 * y.sum(), lambda x, y, data: ((y - x) ** 2).sum()
    )
    report = bl.check_hypergradient(problem, X, Y + 3.0, bl.OneStep(lr=0.1))
    assert report.error < 1e-6
    assert not report.is_trusted
    assert "but the estimate itself says MAX_STEPS" in report.verdict
