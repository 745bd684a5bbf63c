"""ASBLO with constraints of both levels, against answers in closed form."""

from __future__ import annotations

import itertools
import warnings
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

import bilevel as bl
from bilevel._oracle import Oracle
from bilevel.solvers import _full_batch, _walls
from bilevel.solvers._kkt_form import KKTForm


def vector(*entries: float) -> Tensor:
    return torch.tensor(entries, dtype=torch.float64)


@dataclass(frozen=True)
class Case:
    problem: bl.BilevelProblem
    x0: Tensor
    y0: Tensor
    x: Tensor
    y: Tensor


def square(v: Tensor) -> Tensor:
    return (v**2).sum()


CASES = {
    "upper, coupled": Case(  # y = x, and the target (3, 3) lies beyond x + y = 2
        bl.BilevelProblem(
            lambda x, y, data: square(x - 3.0) + square(y - 3.0),
            lambda x, y, data: square(y - x),
            upper_constraint=lambda x, y, data: x + y - 2.0,
        ),
        vector(0.0),
        vector(0.0),
        vector(1.0),
        vector(1.0),
    ),
    "lower": Case(  # y = min(2 x, 1)
        bl.BilevelProblem(
            lambda x, y, data: square(x - 2.0) + square(y),
            lambda x, y, data: square(y - 2.0 * x),
            lower_constraint=lambda x, y, data: y - 1.0,
        ),
        vector(0.0),
        vector(0.0),
        vector(2.0),
        vector(1.0),
    ),
    "lower, linear": Case(  # y = min(x, 2 - x): a kink at the solution
        bl.BilevelProblem(
            lambda x, y, data: (-y + 0.1 * x).sum(),
            lambda x, y, data: -y.sum() + 0.0 * x.sum(),
            lower_constraint=lambda x, y, data: torch.cat([y - x, y - 2.0 + x]),
        ),
        vector(-1.0),
        vector(-2.0),
        vector(1.0),
        vector(1.0),
    ),
    "lower equality": Case(  # y = (x / 2, x / 2)
        bl.BilevelProblem(
            lambda x, y, data: (y[0] - 1.0) ** 2 + 0.5 * square(x),
            lambda x, y, data: 0.5 * square(y),
            lower_equality=lambda x, y, data: y.sum() - x,
        ),
        vector(5.0),
        vector(0.0, 1.0),
        vector(2.0 / 3.0),
        vector(1.0 / 3.0, 1.0 / 3.0),
    ),
    "upper equality": Case(
        bl.BilevelProblem(
            lambda x, y, data: square(x) + square(y),
            lambda x, y, data: square(y - x),
            upper_equality=lambda x, y, data: x + y - 2.0,
        ),
        vector(0.0),
        vector(0.0),
        vector(1.0),
        vector(1.0),
    ),
    "many lower solutions": Case(  # y1 = x, y2 anything in [-1, 1]: F chooses its bound
        bl.BilevelProblem(
            lambda x, y, data: square(x - 1.0) + (y[1] - 3.0) ** 2,
            lambda x, y, data: (y[0] - x[0]) ** 2,
            lower_constraint=lambda x, y, data: torch.stack([y[1] - 1.0, -1.0 - y[1]]),
        ),
        vector(0.0),
        vector(0.0, 0.0),
        vector(1.0),
        vector(1.0, 1.0),
    ),
    "a concave lower level in a box": Case(  # y = -1 for x > 0, y = 1 for x < 0, both at x = 0
        bl.BilevelProblem(
            lambda x, y, data: square(x - 0.5) + square(y - 1.0),
            lambda x, y, data: (-(y**2) + x * y).sum(),
            lower_constraint=lambda x, y, data: torch.cat([y - 1.0, -1.0 - y]),
        ),
        vector(0.5),
        vector(1.0),
        vector(0.0),
        vector(1.0),
    ),
    "a box of x beside them": Case(
        bl.BilevelProblem(
            lambda x, y, data: square(x - 3.0) + square(y - 3.0),
            lambda x, y, data: square(y - x),
            upper_constraint=lambda x, y, data: y - 2.0,
            domain=bl.Box(-1.0, 1.5),
        ),
        vector(0.0),
        vector(0.0),
        vector(1.5),
        vector(1.5),
    ),
}


def solved(case: Case, solver: bl.Solver | None = None) -> bl.Solution:
    return bl.solve(case.problem, solver or bl.ASBLO(), case.x0, case.y0, max_steps=200)


@pytest.mark.parametrize("name", CASES)
def test_answer_is_that_in_closed_form(name: str) -> None:
    case = CASES[name]
    solution = solved(case)
    assert solution.status is bl.Status.CONVERGED
    torch.testing.assert_close(solution.x, case.x, rtol=0.0, atol=1e-4)
    torch.testing.assert_close(solution.y, case.y, rtol=0.0, atol=1e-4)


@pytest.mark.parametrize("name", CASES)
def test_constraints_hold_in_the_answer(name: str) -> None:
    solution, problem = solved(CASES[name]), CASES[name].problem
    for kind in ("upper_constraint", "lower_constraint", "upper_equality", "lower_equality"):
        constraint = getattr(problem, kind)
        if constraint is not None:
            value = constraint(solution.x, solution.y, None)
            assert float((value.abs() if "equality" in kind else value).max()) <= 1e-6, kind


@pytest.mark.parametrize("factors", [(1e3, 1.0, 1.0), (1.0, 1e3, 1.0), (1.0, 1.0, 1e3)], ids=str)
def test_units_do_not_matter(factors: tuple[float, float, float]) -> None:
    case = CASES["lower"]
    a, b, c = factors
    plain = case.problem
    scaled = replace(
        plain,
        upper=lambda x, y, data: a * plain.upper(x, y, data) + 7.0,
        lower=lambda x, y, data: b * plain.lower(x, y, data) - 7.0,
        lower_constraint=lambda x, y, data: c * plain.lower_constraint(x, y, data),  # pyright: ignore
    )
    torch.testing.assert_close(solved(replace(case, problem=scaled)).x, case.x, rtol=0.0, atol=1e-4)


@pytest.mark.parametrize("constant", [0.0, 1e3, 1e6])
@pytest.mark.parametrize("name", ["lower", "a concave lower level in a box"])
def test_constants_in_the_objectives_do_not_matter(name: str, constant: float) -> None:
    case = CASES[name]
    plain = case.problem
    raised = replace(
        plain,
        upper=lambda x, y, data: plain.upper(x, y, data) + constant,
        lower=lambda x, y, data: plain.lower(x, y, data) - constant,
    )
    answer = solved(replace(case, problem=raised))
    torch.testing.assert_close(answer.x, case.x, rtol=0.0, atol=1e-4)
    torch.testing.assert_close(answer.y, case.y, rtol=0.0, atol=1e-4)


def test_maximum_of_an_unbounded_lower_level_is_no_answer() -> None:
    problem = bl.BilevelProblem(
        lambda x, y, data: square(x - 1.0) + square(y),
        lambda x, y, data: (-(y**2) + x * y).sum(),
        upper_constraint=lambda x, y, data: x - 2.0,
    )
    solution = bl.solve(problem, bl.ASBLO(), vector(0.0), vector(0.0), max_steps=300, throw=False)
    assert solution.status.is_failure


@pytest.mark.parametrize("name", ["lower", "upper, coupled"])
@pytest.mark.parametrize("x_first", [True, False])
def test_x_and_y_may_differ_in_dtype(name: str, x_first: bool) -> None:
    case = CASES[name]
    x0, y0 = (case.x0.float(), case.y0) if x_first else (case.x0, case.y0.float())
    solution = bl.solve(case.problem, bl.ASBLO(), x0, y0, max_steps=200)
    assert (solution.x.dtype, solution.y.dtype) == (x0.dtype, y0.dtype)
    torch.testing.assert_close(solution.x.double(), case.x, rtol=0.0, atol=1e-3)


def test_variables_may_be_trees() -> None:
    case = CASES["lower equality"]
    plain = case.problem

    def over(fun: Any) -> Any:
        return lambda x, y, data: fun(x["x"], torch.stack(y), data)

    problem = bl.BilevelProblem(
        over(plain.upper), over(plain.lower), lower_equality=over(plain.lower_equality)
    )
    y0 = list(case.y0)
    solution = bl.solve(problem, bl.ASBLO(), {"x": case.x0}, y0, max_steps=200)
    torch.testing.assert_close(solution.x["x"], case.x, rtol=0.0, atol=1e-4)


@pytest.mark.parametrize("name", ["lower", "a concave lower level in a box"])
def test_going_on_from_any_state_gives_the_same_bits(name: str) -> None:
    case = CASES[name]
    states = list(bl.iterate(case.problem, bl.ASBLO(), case.x0, case.y0))
    kinds = {"next" in state.memory for state in states}
    assert kinds == {False, True}  # along the path, and from the starts
    for state, expected in itertools.pairwise(states):
        found = next(bl.iterate(case.problem, bl.ASBLO(), state=state))
        assert torch.equal(found.x, expected.x)
        assert torch.equal(found.y, expected.y)
        assert found.status is expected.status
        assert found.evaluations == expected.evaluations


def test_all_calls_of_the_objectives_are_counted() -> None:
    case = CASES["a concave lower level in a box"]
    calls = {"upper": 0, "lower": 0}

    def counted(level: str) -> Any:
        def objective(x: Tensor, y: Tensor, data: Any) -> Tensor:
            calls[level] += 1
            return getattr(case.problem, level)(x, y, data)

        return objective

    problem = replace(case.problem, upper=counted("upper"), lower=counted("lower"))
    solver = bl.ASBLO()
    state = solver.init(problem, case.x0, case.y0, None, full_batch=True)
    while state.status is bl.Status.RUNNING:
        state = solver.step(problem, state, None)
    assert (state.evaluations.upper, state.evaluations.lower) == (calls["upper"], calls["lower"])


def test_contradicting_constraints_are_infeasible() -> None:
    problem = bl.BilevelProblem(
        lambda x, y, data: square(x) + square(y),
        lambda x, y, data: square(y - x),
        lower_constraint=lambda x, y, data: torch.cat([y + 1.0, 1.0 - y]),
    )
    solution = bl.solve(problem, bl.ASBLO(), vector(0.5), vector(0.5), max_steps=300, throw=False)
    assert solution.status is bl.Status.INFEASIBLE
    assert "infeasible: `lower_constraint`" in solution.message


def on_a_line(**fields: Any) -> bl.BilevelProblem:
    """y* = min(x, 1) or what the fields make of it."""
    return replace(
        bl.BilevelProblem(
            lambda x, y, data: square(x - 3.0) + square(y - 2.0),
            lambda x, y, data: square(y - x),
            lower_constraint=lambda x, y, data: y - 1.0,
        ),
        **fields,
    )


@pytest.mark.parametrize("factor", [1e-6, 1e3, 1e6])
def test_factor_of_f_does_not_matter_where_its_gradient_vanishes_at_the_start(
    factor: float,
) -> None:
    problem = on_a_line(lower=lambda x, y, data: factor * square(y - x))
    found = bl.solve(problem, bl.ASBLO(), vector(0.0), vector(0.0), max_steps=300)
    torch.testing.assert_close(found.x, vector(3.0))
    torch.testing.assert_close(found.y, vector(1.0))


def test_equality_may_say_the_same_twice() -> None:
    problem = on_a_line(
        lower_constraint=None,
        lower_equality=lambda x, y, data: torch.stack([y.sum() - 1.0, 2.0 * y.sum() - 2.0]),
    )
    found = bl.solve(problem, bl.ASBLO(), vector(0.0), vector(0.0, 0.0), max_steps=300)
    torch.testing.assert_close(found.x, vector(3.0))
    torch.testing.assert_close(found.y, vector(0.5, 0.5))
    assert found.certificate is not None
    assert found.certificate.is_trusted


def test_upper_value_without_bound_is_no_answer() -> None:
    problem = on_a_line(upper=lambda x, y, data: -x.sum() + square(y - 2.0))
    found = bl.solve(problem, bl.ASBLO(), vector(0.0), vector(0.0), max_steps=300, throw=False)
    assert found.status is bl.Status.UPPER_UNBOUNDED


@pytest.mark.parametrize("name", ["upper_constraint", "lower_constraint", "lower_equality"])
def test_constraint_that_is_nan_is_no_answer(name: str) -> None:
    problem = on_a_line(**{name: lambda x, y, data: x * y * float("nan")})
    found = bl.solve(problem, bl.ASBLO(), vector(0.0), vector(0.0), max_steps=300, throw=False)
    assert found.status is bl.Status.NONFINITE
    assert f"`{name}` is not finite" in found.message


def test_many_variables_follow_the_path_alone() -> None:
    n = 200  # with as many multipliers, too many for the KKT form
    problem = bl.BilevelProblem(
        lambda x, y, data: square(y - 2.0) + 0.1 * square(x),
        lambda x, y, data: square(y - x),
        lower_constraint=lambda x, y, data: y - 1.0,
    )
    x0 = torch.zeros(1, dtype=torch.float64)
    with (
        warnings.catch_warnings()
    ):  # the path alone ends beside the kink, and the certificate says so
        warnings.simplefilter("ignore", bl.BilevelWarning)
        solution = bl.solve(problem, bl.ASBLO(), x0, x0.expand(n).clone(), max_steps=300)
    assert "next" not in solution.state.memory
    torch.testing.assert_close(solution.x, torch.ones_like(x0), rtol=0.0, atol=5e-2)
    assert float(solution.y.max()) <= 1.0


def test_y_in_the_wrong_basin_is_left() -> None:
    """Two wells of f at y = 1 and y = -1, the deeper one at -x: the path ends in the other one."""
    problem = bl.BilevelProblem(
        lambda x, y, data: square(y - 1.0) + 0.1 * square(x - 1.0),
        lambda x, y, data: ((y**2 - 1.0) ** 2 + 0.5 * x * y).sum(),
    )
    solution = bl.solve(problem, bl.ASBLO(), vector(1.0), vector(1.0), max_steps=300)
    assert solution.certificate is not None
    assert solution.certificate.value_gap < 1e-5
    assert float(solution.x) <= 1e-5  # y near 1 is the deeper well for x <= 0 alone
    torch.testing.assert_close(solution.y, vector(1.0), rtol=0.0, atol=1e-2)


@pytest.mark.parametrize(("beyond", "holds"), [(0.0, True), (1e-9, False)])
def test_answer_beyond_a_constraint_at_a_pole_of_the_upper_objective_does_not_hold(
    beyond: float, holds: bool
) -> None:
    """F = 1 / x^3 has its pole where x >= 0 ends, and is -1e27 within the tolerance of a violation."""
    problem = bl.BilevelProblem(
        upper=lambda x, y, data: (x**-3 + y**2).sum(),
        lower=lambda x, y, data: ((y - x) ** 2).sum(),
        upper_constraint=lambda x, y, data: -x,
    )
    oracle = Oracle(problem)
    one = torch.ones(1, dtype=torch.float64)
    form = KKTForm(problem, _walls.measure(oracle, one, one))
    x = one if holds else -beyond * one
    answer, _ = _full_batch._judged(oracle, form, form.start(x, x), [])
    assert answer.holds is holds


def test_better_is_what_holds_and_then_what_is_lower() -> None:
    x = vector(0.0)
    good, low = (_full_batch.Answer(x, x, upper, 0.0, 0.0, 0.0, False) for upper in (1.0, 0.0))
    outside = _full_batch.Answer(x, x, -1.0, 0.0, 0.0, 1.0, False)
    assert good.is_better_than(None)
    assert low.is_better_than(good)
    assert good.is_better_than(outside)
    assert not outside.is_better_than(good)
    assert outside.is_better_than(outside._replace(gap=2.0))


def test_walls_push_in_and_vanish() -> None:
    case = CASES["lower"]
    oracle = bl._oracle.Oracle(case.problem)  # pyright: ignore[reportPrivateUsage]
    units = _walls.measure(oracle, case.x0, case.y0)
    inside, outside = vector(0.0), vector(1.5)
    rises = [
        [
            float(
                _walls.walled(case.problem, units, stage).lower(case.x0, y, None)
                - case.problem.lower(case.x0, y, None)
            )
            for y in (inside, outside)
        ]
        for stage in (0, 4, 8)
    ]
    assert all(0.0 <= within < beyond for within, beyond in rises)
    assert rises[0][0] > rises[1][0] > rises[2][0]  # within, the walls fade
    assert rises[0][1] < rises[1][1] < rises[2][1]  # beyond, they grow
