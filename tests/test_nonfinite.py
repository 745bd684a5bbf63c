"""A run ends where its numbers do: in that step, with the right status and the last finite variables."""

import math
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import bilevel as bl

X0, Y0 = torch.tensor([0.7, 0.3]).double(), torch.tensor([0.1, -0.4]).double()
ADAM = bl.optim.Torch(torch.optim.Adam, lr=1e-2)


def plus(data: Any) -> float:
    return 0.0 if data is None else data


def infinite(level: str) -> bl.BilevelProblem:
    """The data are added to one level: infinite ones leave the gradients finite."""
    added = {"upper": 0.0, "lower": 0.0, level: 1.0}

    def shift(name: str, data: Any) -> float:
        return plus(data) if added[name] else 0.0

    return bl.BilevelProblem(
        lambda x, y, data: ((y - 1.0) ** 2).sum() + 0.1 * (x**2).sum() + shift("upper", data),
        lambda x, y, data: ((y - 2.0 * x) ** 2).sum() + shift("lower", data),
    )


def descent(estimator: bl.Estimator) -> bl.Solver:
    return bl.HypergradientDescent(estimator, upper_optimizer=ADAM)


SOLVERS = [
    bl.ASBLO(),
    bl.F2SA(),
    bl.SOBA(),
    bl.BOME(),
    bl.MEHA(),
    bl.VPBGD(),
    bl.AmIGO(),
    bl.StocBiO(),
    descent(bl.Implicit()),
    descent(bl.Unrolled(max_steps=5)),
    descent(bl.OneStep()),
]


@pytest.mark.parametrize("level", ["upper", "lower"])
@pytest.mark.parametrize("value", [math.inf, -math.inf])
@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
@pytest.mark.filterwarnings("ignore::bilevel.BilevelWarning")
def test_infinite_value_with_a_finite_gradient_ends_the_run(
    solver: bl.Solver, value: float, level: str
) -> None:
    states = list(bl.iterate(infinite(level), solver, X0, Y0, [0.0, 0.0, value, 0.0]))
    assert [state.status.name for state in states] == ["RUNNING", "RUNNING", "NONFINITE"]
    assert torch.equal(states[2].x, states[1].x)
    assert torch.equal(states[2].y, states[1].y)


def test_full_batch_asblo_calls_an_infinite_upper_value_nonfinite_not_infeasible() -> None:
    level = {"value": 0.0}
    problem = bl.BilevelProblem(
        lambda x, y, data: ((y - 1.0) ** 2).sum() + 0.1 * (x**2).sum() + level["value"],
        lambda x, y, data: ((y - 2.0 * x) ** 2).sum(),
    )
    states = bl.iterate(problem, bl.ASBLO(), X0, Y0)
    before = list(islice(states, 3))[-1]
    level["value"] = math.inf
    state = list(states)[-1]
    assert state.status is bl.Status.NONFINITE
    assert torch.equal(state.x, before.x)


def test_products_that_are_nan_are_nonfinite_not_an_unsolved_system() -> None:
    def lower(x: Tensor, y: Tensor, data: Any) -> Tensor:
        still = y - y.detach()  # |v|^1.5 has a slope at zero, and no curvature
        return ((y - 2.0 * x) ** 2).sum() + still.abs().pow(1.5).sum()

    problem = bl.BilevelProblem(lambda x, y, data: ((y - 1.0) ** 2).sum(), lower)
    estimate = bl.hypergradient(problem, X0, 2.0 * X0, bl.Implicit())
    assert estimate.status is bl.Status.NONFINITE


FAR = bl.optim.Torch(torch.optim.Adam, lr=1e308)
FAST = bl.optim.Torch(torch.optim.SGD, lr=1e308)


@pytest.mark.parametrize(
    "solver",
    [
        bl.ASBLO(upper_optimizer=FAR),
        bl.ASBLO(value_optimizer=FAST),
        bl.HypergradientDescent(bl.Implicit(), upper_optimizer=FAR),
    ],
    ids=["x of ASBLO", "z of ASBLO", "x of descent"],
)
def test_step_that_overflows_is_none(solver: bl.Solver) -> None:
    (state,) = bl.iterate(infinite("upper"), solver, X0, Y0, [0.0, 0.0])
    assert state.status is bl.Status.NONFINITE
    assert torch.equal(state.x, X0)
    assert torch.equal(state.y, Y0)


@pytest.mark.parametrize("solver", [bl.F2SA(), bl.BOME(), bl.VPBGD()], ids=repr)
def test_unbounded_lower_problem_is_found_where_z_alone_runs_away(solver: bl.Solver) -> None:
    problem = bl.BilevelProblem(
        lambda x, y, data: ((y - 1.0) ** 2).sum() + 0.1 * (x**2).sum(),
        lambda x, y, data: -((y - x) ** 2).sum(),
    )
    solution = bl.solve(problem, solver, X0, Y0, max_steps=500, throw=False)
    assert solution.status is bl.Status.LOWER_UNBOUNDED


def with_a_border(beyond: float) -> bl.BilevelProblem:
    """F is log y + 0.1 / y, least at y = 0.1, and `beyond` where y is negative."""

    def upper(x: Tensor, y: Tensor, data: Any) -> Tensor:
        inside = y.clamp(min=1e-300)
        value = inside.log() + 0.1 / inside
        return torch.where(y > 0.0, value, torch.full_like(y, beyond)).sum()

    return bl.BilevelProblem(upper, lambda x, y, data: ((y - x) ** 2).sum())


@pytest.mark.parametrize("beyond", [math.nan, math.inf])
def test_line_search_comes_back_from_beyond_the_domain_and_counts_it(
    beyond: float, tmp_path: Path
) -> None:
    start = torch.tensor([3.0]).double()
    solver = bl.HypergradientDescent(bl.Implicit())
    solution = bl.solve(with_a_border(beyond), solver, start, start, max_steps=100)
    assert solution.status is bl.Status.CONVERGED
    assert solution.x.item() == pytest.approx(0.1, rel=1e-6)
    assert solution.recoveries > 0
    assert f"{solution.recoveries}, from points without finite numbers" in str(solution)
    bl.save_state(tmp_path / "state", solution.state)
    assert bl.load_state(tmp_path / "state").recoveries == solution.recoveries


def test_solution_without_recoveries_does_not_speak_of_them() -> None:
    solution = bl.solve(infinite("upper"), bl.ASBLO(), X0, Y0, max_steps=200)
    assert solution.recoveries == 0
    assert "recoveries" not in str(solution)


@pytest.mark.parametrize("solver", [bl.ASBLO(), bl.HypergradientDescent(bl.Implicit()), bl.F2SA()])
@pytest.mark.parametrize(("level", "name"), [("upper", "F"), ("lower", "f")])
def test_nan_in_the_data_is_said_of_its_level(solver: bl.Solver, level: str, name: str) -> None:
    target = {"upper": torch.ones(2).double(), "lower": torch.ones(2).double()}
    target[level][1] = math.nan
    problem = bl.BilevelProblem(
        lambda x, y, data: ((y - target["upper"]) ** 2).sum() + (x**2).sum(),
        lambda x, y, data: ((y - x * target["lower"]) ** 2).sum(),
    )
    with pytest.raises(bl.NonFiniteError, match=rf"not finite: {name}\(x0, y0\)\. .*the data"):
        bl.solve(problem, solver, X0, Y0, max_steps=3)
