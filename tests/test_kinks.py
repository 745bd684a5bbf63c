"""`certify` where f has a kink at its solution: right answers are trusted, wrong ones flagged, the rest not tested."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

import bilevel as bl
from bilevel._oracle import Oracle
from bilevel._types import Objective
from bilevel.estimators import _search
from bilevel.estimators._directions import Directions, Optimum
from bilevel.estimators._linear_program import Units
from bilevel.estimators._nonsmooth import minimize
from bilevel.estimators._optimum import OptimalValue
from bilevel.estimators._stationarity import UpperPoint


def vector(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def soft(v: Tensor, threshold: Tensor | float) -> Tensor:
    return torch.sign(v) * torch.relu(v.abs() - threshold)


def toward_one(x: Tensor, y: Tensor, data: object) -> Tensor:
    return ((y - 1.0) ** 2).sum() + 0.1 * (x**2).sum()


@dataclass(frozen=True)
class Kinked:
    """A problem whose lower solution `solution(x)` is known, and the x of its smallest F."""

    name: str
    problem: bl.BilevelProblem
    x: Tensor
    solution: Callable[[Tensor], Tensor]


def tracking(name: str, lower: Objective, n: int = 1) -> Kinked:
    """f is smallest at y = x, so that F = n ((x - 1)^2 + x^2 / 10) has its minimum at 1 / 1.1."""
    problem = bl.BilevelProblem(toward_one, lower)
    return Kinked(
        f"{name}, {n} variables", problem, torch.full((n,), 1.0 / 1.1).double(), lambda x: x
    )


TARGET = vector(3.0, 1.0, 0.2)
WANTED = vector(2.4, 0.5, 0.0)


def hinge(x: Tensor, y: Tensor, data: object) -> Tensor:
    """A support vector machine on the samples 1 and 2 of class 1: y = min(1, e^-x) from the first of them."""
    samples = vector(1.0, 2.0)
    return torch.relu(1.0 - samples * y).sum() + 0.5 * x.exp().sum() * (y**2).sum()


CASES = [
    *[
        tracking(name, lower, n)
        for n in (1, 2)
        for name, lower in (
            (
                "two relus",
                lambda x, y, data: (
                    torch.relu(y - x) + torch.relu(x - y) + 0.1 * (y - x) ** 2
                ).sum(),
            ),
            ("absolute value", lambda x, y, data: (y - x).abs().sum()),
            ("norm", lambda x, y, data: ((y - x) ** 2).sum().sqrt()),
            ("power 3", lambda x, y, data: ((y - x).abs() ** 3).sum()),
            ("power 1.5", lambda x, y, data: ((y - x).abs() ** 1.5).sum()),
            ("power 4", lambda x, y, data: ((y - x) ** 4).sum()),
        )
    ],
    Kinked(  # y = 0 for |x| < 1/2
        "maximum",
        bl.BilevelProblem(
            lambda x, y, data: ((x - 0.2) ** 2 + y**2).sum(),
            lambda x, y, data: torch.maximum((y - x) ** 2 + y, (y - x) ** 2 - y).sum(),
        ),
        vector(0.2),
        lambda x: soft(x, 0.5),
    ),
    Kinked(  # y = (3 - l, 1 - l, 0) for the penalty l between 0.2 and 1; F is smallest at l = 0.55
        "Lasso",
        bl.BilevelProblem(
            lambda x, y, data: ((y - WANTED) ** 2).sum(),
            lambda x, y, data: 0.5 * ((y - TARGET) ** 2).sum() + x.exp() * y.abs().sum(),
        ),
        vector(math.log(0.55)),
        lambda x: soft(TARGET, x.exp()),
    ),
    Kinked(  # y = 1, at the kink, for x < 0; F is smallest at x = -0.3
        "hinge",
        bl.BilevelProblem(
            lambda x, y, data: ((y - 1.2) ** 2).sum() + (x + 0.3).square().sum(), hinge
        ),
        vector(-0.3),
        lambda x: (-x).exp().clamp(max=1.0),
    ),
]
KINKED = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


@KINKED
def test_right_answer_at_a_kink_is_trusted(case: Kinked) -> None:
    found = bl.certify(case.problem, case.x, case.solution(case.x))
    assert found.verdict == "trusted"
    assert any("directions of x" in sentence for sentence in found.tested)


@KINKED
@pytest.mark.parametrize("off", [0.01, -0.1, 1.0])
def test_any_x_was_trusted_at_a_kink(case: Kinked, off: float) -> None:
    x = case.x * (1.0 + off)
    found = bl.certify(case.problem, x, case.solution(x))
    assert any("not stationary" in sentence for sentence in found.problems)
    assert found.tested == ()


@pytest.mark.parametrize("case", CASES[:3], ids=lambda case: case.name)
@pytest.mark.parametrize("off", [0.01, -0.1, 1.0])
def test_wrong_y_at_a_kink_is_flagged(case: Kinked, off: float) -> None:
    found = bl.certify(case.problem, case.x, case.solution(case.x) + off)
    assert any("the value gap is" in sentence for sentence in found.problems)


def test_kink_of_the_upper_level_is_an_answer() -> None:
    """y = max(|x| - 1/2, 0) sign x; F = 3 y - x falls up to x = 1/2 and rises from there."""
    problem = bl.BilevelProblem(
        lambda x, y, data: (3.0 * y - x).sum(),
        lambda x, y, data: torch.maximum((y - x) ** 2 + y, (y - x) ** 2 - y).sum(),
    )
    assert bl.certify(problem, vector(0.5), vector(0.0)).is_trusted
    for x in (0.4, 0.495, 0.505, 0.6):
        assert bl.certify(problem, vector(x), soft(vector(x), 0.5)).problems != ()


def test_four_upper_variables_and_a_narrow_valley_at_a_kink() -> None:
    """y = A x at the kink: F is a quadratic of condition 100 in x, smallest where A x is the target."""
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(4, 4, generator=generator, dtype=torch.float64))[0]
    A = basis @ torch.diag(vector(1.0, 2.0, 5.0, 10.0)) @ basis.T
    target = torch.randn(4, generator=generator, dtype=torch.float64)
    problem = bl.BilevelProblem(
        lambda x, y, data: ((y - target) ** 2).sum(), lambda x, y, data: (y - A @ x).abs().sum()
    )
    x = torch.linalg.solve(A, target)
    assert bl.certify(problem, x, target).is_trusted
    for column in basis.T:  # the narrow directions and the flat ones
        wrong = x + 0.02 * x.norm() * column
        assert bl.certify(problem, wrong, A @ wrong).problems != ()


def test_bound_that_holds_x_at_a_kink_is_an_answer() -> None:
    problem = bl.BilevelProblem(
        toward_one, lambda x, y, data: (y - x).abs().sum(), domain=bl.Box(0.0, 0.5)
    )
    assert bl.certify(problem, vector(0.5), vector(0.5)).is_trusted
    assert bl.certify(problem, vector(0.4), vector(0.4)).problems != ()


def test_pessimistic_answer_at_a_kink() -> None:
    case = CASES[1]  # one lower solution each: the pessimistic problem is the optimistic one
    x = case.x
    assert bl.certify(case.problem, x, x.clone(), pessimistic=True).is_trusted
    assert bl.certify(case.problem, 1.1 * x, 1.1 * x, pessimistic=True).problems != ()


# ------------------------------------------------------------------ not tested

HELD = bl.BilevelProblem(
    toward_one,
    lambda x, y, data: (y - x).abs().sum(),
    upper_equality=lambda x, y, data: x.sum() - 1.0,
)


def test_upper_constraint_that_forbids_directions_leaves_a_kink_untested() -> None:
    """F might still fall along the constraint, between the directions that were tried."""
    found = bl.certify(HELD, vector(0.5, 0.5), vector(0.5, 0.5))
    assert found.problems == ()
    assert not found.is_trusted
    assert found.verdict.startswith("not tested: whether the upper level is stationary")
    assert "an upper constraint forbids" in found.verdict
    assert "trusted" not in str(found)


def test_kink_of_a_large_y_is_not_tested() -> None:
    large = bl.BilevelProblem(
        lambda x, y, data: ((y - 1.0) ** 2).mean(), lambda x, y, data: (y - x).abs().sum()
    )
    y = torch.ones(400, dtype=torch.float64)
    found = bl.certify(large, vector(1.0), y)
    assert found.problems == ()
    assert "not curved around y as its Hessian says" in found.verdict
    assert not found.is_trusted
    assert not bl.certify(large, vector(2.0), 2.0 * y).is_trusted


def test_lower_solves_that_run_out_of_steps_are_not_nothing_wrong(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    case = CASES[1]
    monkeypatch.setattr(_search, "SMALL", 0)  # so that no method for kinks goes on
    y = case.x + 1e-9  # beside the kink, whose autograd slope at y = x itself is zero
    found = bl.certify(case.problem, case.x, y)
    assert not found.is_trusted
    assert "trusted" not in found.verdict


def test_solution_prints_what_was_not_tested() -> None:
    certificate = bl.certify(HELD, vector(0.5, 0.5), vector(0.5, 0.5))
    state = bl.State(vector(0.5, 0.5), vector(0.5, 0.5), status=bl.Status.MAX_STEPS)
    solution = bl.Solution(
        x=state.x,
        y=state.y,
        status=state.status,
        upper=0.55,
        lower=0.0,
        steps=1,
        evaluations=bl.Evaluations(),
        seconds=0.1,
        certificate=certificate,
        state=state,
    )
    assert "not tested: whether the upper level is stationary" in str(solution)
    assert "nothing wrong" not in str(solution)


def test_noisy_solves_give_no_verdict() -> None:
    """The lower problem's error, 1e-3 of F here, hides the slope of 1 over a step of 1e-4."""
    noisy = Directions(
        lambda x: Optimum(float(x.sum()), 1e-3), lambda x: x, vector(1.0), 1e-4, 1.0, 1e-12
    )
    assert "do not agree well enough" in noisy.walk(1.0).untested
    exact = Directions(
        lambda x: Optimum(float(x.sum()), 0.0), lambda x: x, vector(1.0), 1e-4, 1.0, 1e-12
    )
    assert exact.walk(1.0).fall == pytest.approx(1e-4, rel=1e-6)


def test_minimum_within_the_step_is_stationary() -> None:
    def walk(x: float) -> float:
        bowl = Directions(
            lambda u: Optimum(float(u @ u), 0.0), lambda u: u, vector(x), 1e-3, 1.0, 1e-12
        )
        return bowl.walk(x * x).step

    assert walk(0.5e-3) == 0.0
    assert walk(2e-3) == pytest.approx(1e-3)


def test_solves_from_two_starts_that_disagree_give_no_value(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    case = CASES[1]
    oracle = Oracle(case.problem)
    local = _search.LowerSolver(oracle, case.x, None, 1.0).solve(case.x)
    at = UpperPoint(oracle, case.x, local, [], None, Units(1.0, 1.0, 1.0, 1e-3), 1.0)
    value = OptimalValue(at)
    good = value(case.x)
    assert good is not None
    assert good.upper == pytest.approx(float(toward_one(case.x, case.x, None)), abs=1e-12)
    solve = _search.LowerSolver.solve

    def off(self: _search.LowerSolver, y: Tensor) -> _search.Local:
        found = solve(self, y)
        away = 0.1 * (y - case.x)
        return _search.Local(
            found.y + away, found.value + float(away.abs()), found.status, found.point
        )

    monkeypatch.setattr(_search.LowerSolver, "solve", off)
    assert value(case.x) is None


# ------------------------------------------------------------------ the method for kinks


@pytest.mark.parametrize("n", [1, 2, 5, 20])
def test_method_for_kinks_reaches_a_soft_threshold(n: int) -> None:
    """min |y - b|^2 / 2 + |y|_1: some entries end at the kink, the others beside it."""
    b = 3.0 * torch.randn(n, generator=torch.Generator().manual_seed(n), dtype=torch.float64)

    def value(y: Tensor) -> float:
        return float(0.5 * ((y - b) ** 2).sum() + y.abs().sum())

    found = minimize(
        lambda y: (value(y), y - b + torch.sign(y)), value, torch.zeros_like(b), 1.0, 5e-3
    )
    assert found.is_minimum
    torch.testing.assert_close(found.y, soft(b, 1.0), rtol=0.0, atol=1e-6)


def test_method_for_kinks_does_not_call_a_slope_of_zero_a_minimum() -> None:
    """The gradient it is given is wrong everywhere; the values alone show that f falls."""
    found = minimize(
        lambda y: (float(y.sum()), torch.zeros_like(y)),
        lambda y: float(y.sum()),
        vector(0.0, 0.0),
        1.0,
        5e-3,
    )
    assert not found.is_minimum


def test_lower_objective_that_falls_without_bound_beside_a_kink() -> None:
    problem = bl.BilevelProblem(toward_one, lambda x, y, data: (y - x).abs().sum() - 2.0 * y.sum())
    found = bl.certify(problem, vector(1.0), vector(1.0))
    assert any("without bound" in sentence for sentence in found.problems)


# ------------------------------------------------------------------ no false alarms


def quartic(x: Tensor, y: Tensor, data: object) -> Tensor:
    return ((y - x) ** 4).sum()


@pytest.mark.parametrize("off", [0.0, 1e-4, 1e-3, 5e-3])
def test_flat_lower_solution_was_called_wrong(off: float) -> None:
    problem = bl.BilevelProblem(toward_one, quartic)
    x = vector(1.0 / 1.1)
    assert bl.certify(problem, x, x + off).problems == ()
    assert bl.certify(problem, x, x + 0.1).problems != ()


@pytest.mark.parametrize("pessimistic", [False, True])
def test_gap_of_1e_9_of_a_flat_solution_at_zero_was_called_wrong(pessimistic: bool) -> None:
    problem = bl.BilevelProblem(lambda x, y, data: (y**2 + x**2).sum(), quartic)
    found = bl.certify(problem, vector(0.0), vector(5.6e-3), pessimistic=pessimistic)
    assert found.value_gap == pytest.approx(1e-9, rel=0.02)
    assert found.problems == ()


@pytest.mark.parametrize("pessimistic", [False, True])
def test_small_error_of_a_solution_at_zero_was_called_wrong(pessimistic: bool) -> None:
    problem = bl.BilevelProblem(
        lambda x, y, data: (y**2 + x**2).sum(), lambda x, y, data: ((y - x) ** 2).sum()
    )
    assert bl.certify(problem, vector(0.0), vector(2e-5), pessimistic=pessimistic).is_trusted
    assert bl.certify(problem, vector(0.0), vector(1e-3), pessimistic=pessimistic).problems != ()


def test_y_off_by_one_percent_is_still_flagged() -> None:
    problem = bl.BilevelProblem(toward_one, lambda x, y, data: ((y - x) ** 2).sum())
    x = vector(1.0 / 1.1)
    assert bl.certify(problem, x, x).is_trusted
    for off in (0.01, -0.01):
        assert bl.certify(problem, x, x * (1.0 + off)).problems != ()


def test_answer_at_a_tie_of_two_wells_was_called_local() -> None:
    """The well y = 1 is the lower one up to x = 1, where F still falls: it is smallest at the tie."""
    problem = bl.BilevelProblem(
        lambda x, y, data: ((y - 1.0) ** 2 + (x - 2.0) ** 2).sum(),
        lambda x, y, data: ((y**2 - 1.0) ** 2 + (x - 1.0) * y).sum(),
    )

    def well(x: float) -> Tensor:
        y = 1.0
        for _ in range(50):  # Newton on 4 y^3 - 4 y + x - 1
            y -= (4.0 * y**3 - 4.0 * y + x - 1.0) / (12.0 * y**2 - 4.0)
        return vector(y)

    for x in (1.0, 1.0 - 1e-6, 1.0 + 1e-6, 1.0 - 1e-4):  # the last two as near as a solver comes
        assert bl.certify(problem, vector(x), well(x)).problems == ()
    for x in (0.9, 0.98, 1.02, 1.1):
        assert bl.certify(problem, vector(x), well(x)).problems != ()


def test_method_for_kinks_stops_where_its_function_is_not_finite() -> None:
    def nan(y: Tensor) -> float:
        return math.nan

    found = minimize(lambda y: (math.nan, y), nan, vector(1.0, 2.0), 1.0, 5e-3)
    assert not found.is_minimum
    assert math.isnan(found.value)


def test_point_that_alone_is_finite_is_a_minimum() -> None:
    y = vector(1.0, 2.0)

    def value(v: Tensor) -> float:
        return 3.0 if torch.equal(v, y) else math.inf

    found = minimize(lambda v: (value(v), v), value, y, 1.0, 5e-3)
    assert found.is_minimum
    assert torch.equal(found.y, y)
    assert found.value == 3.0


def test_solves_that_do_not_agree_at_x_itself_give_no_verdict() -> None:
    walked = Directions(lambda x: None, lambda x: x, vector(1.0), 1e-4, 1.0, 1e-12).walk(1.0)
    assert walked.untested == "two solves of the lower problem do not agree"
    assert walked.step == 0.0


def test_valley_between_the_directions_is_found_by_the_steepest_one() -> None:
    """F = 1.5 |x1 - x2| - x1 - x2 falls near the diagonal alone, by sqrt(2) of each step at most."""

    def valley(x: Tensor) -> Optimum:
        return Optimum(float(1.5 * (x[0] - x[1]).abs() - x.sum()), 0.0)

    walked = Directions(valley, lambda x: x, vector(1.0, 1.0), 1e-3, 1.0, 1e-12).walk(-2.0)
    assert walked.directions == 9  # two axes, two random ones, the opposite of each, and this one
    assert walked.step == pytest.approx(1e-3)
    assert 0.0 < walked.fall <= math.sqrt(2.0) * 1e-3


def test_step_whose_middle_is_not_solved_is_made_longer() -> None:
    """F = -x; the lower problem has no solution between 0.4 and 0.6 of the first step of 1e-3."""

    def holed(x: Tensor) -> Optimum | None:
        return None if 4e-4 < float(x) < 6e-4 else Optimum(-float(x), 0.0)

    walked = Directions(holed, lambda x: x, vector(0.0), 1e-3, 1.0, 1e-12).walk(0.0)
    assert walked.step == pytest.approx(1e-2)
    assert walked.fall == pytest.approx(1e-2)


def test_wall_beside_a_kink_leaves_no_second_solve_to_compare() -> None:
    """f is infinite a hair above y = x, where the second solve would start."""

    def walled(x: Tensor, y: Tensor, data: object) -> Tensor:
        return torch.where(y > x + 3e-3, math.inf, 2.0 * (y - x).abs() + y).sum()

    found = bl.certify(bl.BilevelProblem(toward_one, walled), vector(2.0), vector(2.0))
    assert "two solves of the lower problem do not agree" in found.verdict


def test_upper_value_that_ends_within_a_step_of_x_leaves_no_verdict() -> None:
    """F = -sqrt(1 - y) with y = x is NaN above x = 1."""
    problem = bl.BilevelProblem(
        lambda x, y, data: -(1.0 - y).sqrt().sum(), lambda x, y, data: (y - x).abs().sum()
    )
    x = vector(1.0 - 1e-5)
    found = bl.certify(problem, x, x)
    assert found.problems == ()
    assert "do not agree well enough" in found.verdict


@pytest.mark.slow
def test_method_for_kinks_that_runs_away_finds_no_solution() -> None:
    problem = bl.BilevelProblem(toward_one, lambda x, y, data: -((y - x) ** 4).sum())
    solver = _search.LowerSolver(Oracle(problem), vector(1.0), None, 1.0, is_smooth=False)
    found = solver.solve(vector(2.0))
    assert found.status is bl.Status.LOWER_UNBOUNDED
    assert found.value == -math.inf
