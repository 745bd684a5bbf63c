import itertools
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import SMALL_ZOO, names, reduced
from scipy.optimize import brentq, minimize
from torch import Tensor

import bilevel as bl
from bilevel.testing import _contract
from bilevel.testing.problems import ZooProblem, bda, pbgd_toy, quadratic, ridge, sine, zoo


def run(problem: bl.BilevelProblem, case: ZooProblem, solver: Any = None) -> list[bl.State]:
    states = bl.iterate(problem, solver or bl.ASBLO(), case.x0, case.y0)
    return list(itertools.islice(states, 300))


def solved(problem: bl.BilevelProblem, x0: Any, y0: Any, solver: Any = None) -> bl.Solution:
    return bl.solve(problem, solver or bl.ASBLO(), x0, y0, max_steps=300)


ZOO = zoo()


@pytest.mark.parametrize("case", ZOO, ids=names(ZOO))
def test_zoo_is_solved_at_the_defaults(case: ZooProblem) -> None:
    solution = solved(case.problem, case.x0, case.y0)
    assert solution.status is bl.Status.CONVERGED
    assert case.error(solution.x) <= case.tolerance
    assert solution.certificate is not None
    assert 0.0 <= solution.certificate.value_gap <= 1e-6 * max(1.0, abs(solution.lower))
    if not case.local_optima:
        assert solution.upper == pytest.approx(case.upper_star, rel=1e-3, abs=1e-3)
        torch.testing.assert_close(solution.y, case.y_star, rtol=1e-2, atol=1e-2)


def scaled(problem: bl.BilevelProblem, a: float, b: float, c: float = 0.0, d: float = 0.0) -> Any:
    upper, lower = problem.upper, problem.lower
    return replace(
        problem,
        upper=lambda x, y, data: a * upper(x, y, data) + c,
        lower=lambda x, y, data: b * lower(x, y, data) + d,
    )


INVARIANT = [pytest.param(case, id=case.name) for case in SMALL_ZOO]


@pytest.mark.parametrize("case", INVARIANT)
def test_constant_added_to_an_objective_changes_no_iterate(case: ZooProblem) -> None:
    # The constant costs f and F three digits. The slack of the last stage has 1e-6 to 1e-8 of the scale of f,
    # so that the iterates agree to 1e-13 / 1e-8 at worst; the answer itself is meant to 1e-5.
    expected = run(case.problem, case)
    for c, d in ((1e3, 0.0), (-1e3, 0.0), (0.0, 1e3), (0.0, -1e3)):
        states = run(scaled(case.problem, 1.0, 1.0, c, d), case)
        assert len(states) == len(expected)
        for state, other in zip(states, expected, strict=True):
            torch.testing.assert_close(state.x, other.x, rtol=1e-6, atol=1e-6)
        assert states[-1].status is expected[-1].status


@pytest.mark.parametrize("case", INVARIANT)
def test_factor_of_an_objective_makes_no_error_larger(case: ZooProblem) -> None:
    """Smaller it may be: rounding decides whether a last stage counts as solved, or other solvers go on from it."""
    error = case.error(run(case.problem, case)[-1].x)
    for a, b in itertools.product((1e-3, 1.0, 1e3), repeat=2):
        assert case.error(run(scaled(case.problem, a, b), case)[-1].x) <= 1.01 * error


def test_degenerate_start_where_zero_solves_the_lower_problem() -> None:
    case = bda().cases()[0]
    assert float(case.x0) == 0.0
    assert not bool(case.y0.any())
    assert case.error(solved(case.problem, case.x0, case.y0).x) < 1e-4


@pytest.mark.parametrize(
    "y0",
    [
        0.5,
        pytest.param(
            -0.5,
            marks=pytest.mark.xfail(
                reason="y = -1 is a maximizer too, and the slack around y0 is too narrow to leave it",
                strict=True,
            ),
        ),
    ],
)
def test_pessimistic_answer_is_the_worst_of_the_lower_solutions(y0: float) -> None:
    # S = {-1, 1}: max over y of (x - 2)^2 + x y is (x - 2)^2 + |x|, least at x = 3/2; min gives x = 5/2
    problem = bl.BilevelProblem(
        lambda x, y, data: ((x - 2.0) ** 2 + x * y).sum(),
        lambda x, y, data: ((y**2 - 1.0) ** 2).sum() + 0.0 * x.sum(),
    )
    x, y = torch.tensor([1.0]).double(), torch.tensor([y0]).double()
    assert float(solved(problem, x, y).x) == pytest.approx(2.5, abs=1e-4)
    found = solved(problem, x, y, bl.ASBLO(pessimistic=True))
    assert float(found.x) == pytest.approx(1.5, abs=1e-4)
    assert float(found.y) == pytest.approx(1.0, abs=1e-3)


def test_pessimistic_equals_optimistic_where_the_lower_solution_is_one() -> None:
    case = quadratic(2, 3)
    upper = case.problem.upper

    def saddle(x: Tensor, y: Tensor, data: Any) -> Tensor:  # concave in y, convex along y*(x)
        return 20.0 * ((x - 1.0) ** 2).sum() - 0.1 * upper(x, y, data)

    problem = replace(case.problem, upper=saddle)
    phi = reduced(problem, case.y0)
    best = -torch.linalg.solve(
        torch.func.hessian(phi)(case.x0), torch.func.grad(phi)(case.x0)
    )  # from x0 = 0
    found = solved(problem, case.x0, case.y0, bl.ASBLO(pessimistic=True))
    torch.testing.assert_close(found.x, best, rtol=1e-4, atol=1e-4)


def test_box_that_cuts_the_answer_off_is_kept() -> None:
    case = quadratic()
    high = 0.5 * case.x_star.abs()
    phi = reduced(case.problem, case.y0)
    gradient = torch.func.grad(phi)
    exact = minimize(
        lambda x: float(phi(torch.as_tensor(x))),
        case.x0.numpy(),
        jac=lambda x: gradient(torch.as_tensor(x)).numpy(),
        bounds=[(-float(h), float(h)) for h in high],
        method="L-BFGS-B",
        options={"ftol": 1e-15, "gtol": 1e-12},
    ).x
    problem = replace(case.problem, domain=bl.Box(-high, high))
    states = run(problem, case)
    for state in states:
        assert bool((state.x.abs() <= high).all())
    torch.testing.assert_close(states[-1].x, torch.as_tensor(exact), rtol=1e-4, atol=1e-4)
    assert states[-1].status is bl.Status.CONVERGED


def to_ball(radius: float) -> Any:
    def project(x: Tensor) -> Tensor:
        return x * (radius / x.norm()).clamp(max=1.0)

    return project


def test_any_projection_is_a_domain() -> None:
    case = quadratic()
    radius = 0.5 * float(case.x_star.norm())
    phi = reduced(case.problem, case.y0)
    Q, b = torch.func.hessian(phi)(case.x0), torch.func.grad(phi)(case.x0)
    eye = torch.eye(5, dtype=torch.float64)

    def excess(nu: float) -> float:
        return float(torch.linalg.solve(Q + nu * eye, b).norm()) - radius

    exact = -torch.linalg.solve(Q + brentq(excess, 0.0, 1e4, xtol=1e-12) * eye, b)
    states = run(replace(case.problem, domain=to_ball(radius)), case)
    assert all(float(state.x.norm()) <= radius * (1.0 + 1e-12) for state in states)
    torch.testing.assert_close(states[-1].x, exact, rtol=1e-3, atol=1e-3)
    assert not states[-1].status.is_failure


def test_x0_outside_its_domain_is_projected() -> None:
    case = pbgd_toy().cases()[0]
    x0 = torch.tensor([-7.0]).double()
    for state in itertools.islice(bl.iterate(case.problem, bl.ASBLO(), x0, case.y0), 3):
        assert 0.0 <= float(state.x) <= 3.0


def test_tensor_list_and_dictionary_give_the_same_iterates() -> None:
    case = quadratic()
    expected = run(case.problem, case)
    upper, lower = case.problem.upper, case.problem.lower

    def as_list(x: Tensor) -> Any:
        return [x[:2].clone(), (x[2:3].clone(), x[3:].clone())]

    def as_dict(x: Tensor) -> Any:
        return {"a": x[:2].clone(), "b": {"w": x[2:].clone()[None]}}

    def flat(tree: Any) -> Tensor:
        if isinstance(tree, dict):
            return torch.cat([tree["a"], tree["b"]["w"][0]])
        return torch.cat([tree[0], *tree[1]])

    for wrap in (as_list, as_dict):
        problem = bl.BilevelProblem(
            lambda x, y, data: upper(flat(x), flat(y), data),
            lambda x, y, data: lower(flat(x), flat(y), data),
        )
        states = list(bl.iterate(problem, bl.ASBLO(), wrap(case.x0), wrap(case.y0)))
        assert len(states) == len(expected)
        for state, other in zip(states, expected, strict=True):
            assert type(state.x) is type(wrap(case.x0))
            torch.testing.assert_close(flat(state.x), other.x, rtol=1e-9, atol=1e-9)
            torch.testing.assert_close(flat(state.y), other.y, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("case", SMALL_ZOO, ids=names(SMALL_ZOO))
def test_every_step_goes_on_from_disk_bit_for_bit(case: ZooProblem, tmp_path: Path) -> None:
    states = run(case.problem, case)
    stages = {state.metrics["stage"] for state in states}
    assert len(stages) > 3  # beginnings and ends of stages are among the steps
    for state, expected in itertools.pairwise(states):
        bl.save_state(tmp_path / "state", state)
        loaded = bl.load_state(tmp_path / "state")
        found = next(bl.iterate(case.problem, bl.ASBLO(), state=loaded))
        assert _contract.different_fields(found, expected) == []


@pytest.mark.parametrize("case", [quadratic(), bda().cases()[0], ridge()], ids=lambda c: c.name)
def test_float32_ends_within_its_digits(case: ZooProblem) -> None:
    problem = _contract.in_float32(case.problem)
    found = solved(problem, case.x0.float(), case.y0.float())
    assert found.x.dtype == found.y.dtype == torch.float32
    assert found.status is bl.Status.CONVERGED
    assert case.error(found.x.double()) < 1e-2


@pytest.mark.parametrize("call", [2, 3, 6, 20, 60, 150])
@pytest.mark.parametrize("level", ["upper", "lower"])
def test_nan_at_any_call_is_nonfinite_with_the_last_finite_variables(level: str, call: int) -> None:
    case = quadratic()
    states = run(_contract.breaking(case.problem, level, call - 1), case)
    assert states[-1].status is bl.Status.NONFINITE
    assert bl.Status.NONFINITE.value in states[-1].message
    assert bool(torch.isfinite(states[-1].x).all())
    assert bool(torch.isfinite(states[-1].y).all())


FAILURES = {
    "unbounded": (lambda x, y: -(y**2).sum() + (x * y).sum(), {}, bl.Status.LOWER_UNBOUNDED),
    "infeasible": (
        lambda x, y: (
            (1.0 + x**2) * y**2
        ).sum(),  # y = 0 solves it everywhere: no slack without epsilon
        {"epsilon": lambda k: 0.0, "theta": lambda k: 1e-3 * 0.5**k},
        bl.Status.INFEASIBLE,
    ),
    "NaN": (lambda x, y: ((y - x) ** 2).sum() * math.nan, {}, bl.Status.NONFINITE),
}
ERRORS = {
    bl.Status.LOWER_UNBOUNDED: bl.UnboundedError,
    bl.Status.INFEASIBLE: bl.InfeasibleError,
    bl.Status.NONFINITE: bl.NonFiniteError,
}


@pytest.mark.parametrize("name", list(FAILURES))
def test_failure_is_a_status_with_a_message_and_an_error_on_demand(name: str) -> None:
    lower, options, status = FAILURES[name]
    problem = bl.BilevelProblem(
        lambda x, y, data: ((y - 1.0) ** 2).sum() + (x**2).sum(),
        lambda x, y, data: lower(x, y),
        domain=bl.Box(-1.0, 1.0),
    )
    x, y = torch.ones(2).double(), torch.ones(2).double()
    solver = bl.ASBLO(**options)
    solution = bl.solve(problem, solver, x, y, max_steps=50, throw=False)
    assert solution.status is status
    assert status.value in solution.message
    assert bool(torch.isfinite(solution.x).all())
    with pytest.raises(ERRORS[status], match=r"ASBLO stopped at step \d+: "):
        bl.solve(problem, solver, x, y, max_steps=50)


def test_evaluations_are_those_that_happened() -> None:
    for case in (quadratic(), sine(2).cases()[0]):
        calls = {"upper": 0, "lower": 0}
        states = run(_contract.counted(case.problem, calls), case)
        count = states[-1].evaluations
        assert (count.upper, count.lower) == (calls["upper"], calls["lower"])


def test_zoo_costs_less_than_the_prototype() -> None:
    # gradients and Hessians of the prototype on quadratic 5x10: 4010 and 1311 (13110 products)
    case = quadratic()
    count = run(case.problem, case)[-1].evaluations
    assert count.gradients < 800
    assert count.hvp < 1000


def test_stages_are_estimators_in_the_units_of_the_problem() -> None:
    first, second = (bl.ASBLO().stage(k, lower=2.0, upper=3.0, square=4.0) for k in (0, 1))
    assert first.epsilon == 2.0 * 2.0
    assert first.sigma == 3.0
    assert first.mu == 2e-2 * 2.0 / 4.0
    assert first.theta is None
    assert second.epsilon < first.epsilon
    assert second.sigma < first.sigma
    given = bl.ASBLO(theta=bl.schedules.constant(0.5)).stage(0, upper=3.0, square=4.0)
    assert given.theta == 0.5 * 3.0 / 4.0


def test_y_is_exact_where_x_is_held_by_a_bound() -> None:
    """x stands still from stage to stage, so that its movement says nothing of how far y has come."""
    for bound, slope, target in ((1.0, 1.0, 1.02), (0.4, 2.0, 1.0)):
        problem = bl.BilevelProblem(
            lambda x, y, data, target=target: ((y - target) ** 2).sum(),
            lambda x, y, data, slope=slope: ((y - slope * x) ** 2).sum(),
            domain=bl.Box(0.3, bound),
        )
        for x0 in (-3.0, 0.35, 9.0):  # two of them outside
            found = solved(problem, torch.tensor([x0]).double(), torch.zeros(1).double())
            assert found.x.item() == bound
            assert found.y.item() == pytest.approx(slope * bound, abs=1e-9)


@pytest.mark.parametrize("unit", [1e-6, 1e-3, 1e3, 1e6])
@pytest.mark.parametrize("level", ["x", "y"])
def test_units_of_the_variables_do_not_matter(level: str, unit: float) -> None:
    a, b = (unit, 1.0) if level == "x" else (1.0, unit)
    problem = bl.BilevelProblem(
        lambda x, y, data: ((x / a - 3.0) ** 2 + (y / b - 2.0) ** 2).sum(),
        lambda x, y, data: ((y / b - x / a) ** 2).sum(),
    )
    found = solved(problem, torch.zeros(1).double(), torch.zeros(1).double())
    assert found.x.item() / a == pytest.approx(2.5, rel=1e-4)
    assert found.y.item() / b == pytest.approx(2.5, rel=1e-4)
    assert found.upper == pytest.approx(0.5, rel=1e-6)


def test_kink_of_the_upper_objective_does_not_hold_up_the_path() -> None:
    problem = bl.BilevelProblem(
        lambda x, y, data: torch.maximum((y - 1.0) ** 2, (x - 2.0) ** 2).sum(),
        lambda x, y, data: ((y - x) ** 2).sum(),
    )
    found = solved(problem, torch.zeros(1).double(), torch.zeros(1).double())
    assert found.x.item() == pytest.approx(1.5, abs=1e-6)
    assert found.evaluations.gradients < 60_000


def test_pessimistic_form_refuses_lower_constraints() -> None:
    problem = bl.BilevelProblem(
        lambda x, y, data: (x + y).sum(),
        lambda x, y, data: (0.0 * x * y).sum(),
        lower_constraint=lambda x, y, data: y - 1.0,
    )
    with pytest.raises(ValueError, match="must have a lower level without constraints"):
        solved(
            problem, torch.zeros(1).double(), torch.zeros(1).double(), bl.ASBLO(pessimistic=True)
        )


def test_upper_level_that_draws_y_out_of_the_domain_of_f_is_nonfinite() -> None:
    """F wants y = -1, where f has no logarithm; x and y stay where they were given."""
    problem = bl.BilevelProblem(
        lambda x, y, data: ((y + 1.0) ** 2 + x**2).sum(),
        lambda x, y, data: (y - x * torch.log(y)).sum(),
    )
    one = torch.ones(1).double()
    found = bl.solve(problem, bl.ASBLO(), one, one, max_steps=50, throw=False)
    assert found.status is bl.Status.NONFINITE
    assert torch.equal(found.x, one)
    assert torch.equal(found.y, one)
    assert math.isfinite(found.upper)


def test_losses_by_sample_are_those_of_their_mean() -> None:
    """y = mean of (x, 2 x, 3 x), so that F = (2 x - 1)^2."""
    factors = torch.tensor([1.0, 2.0, 3.0]).double()
    problem = bl.BilevelProblem(
        lambda x, y, data: ((y - 1.0) ** 2).sum(),
        lambda x, y, data: (y - x * factors) ** 2,
        per_sample=True,
    )
    zero = torch.zeros(1).double()
    found = bl.solve(problem, bl.ASBLO(), zero, zero, max_steps=300)
    assert float(found.x) == pytest.approx(0.5, abs=1e-5)
    assert float(found.y) == pytest.approx(1.0, abs=1e-5)
