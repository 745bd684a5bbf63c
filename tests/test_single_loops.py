"""The first-order and the stochastic single loops: what they cost, where they end, and the contract."""

from __future__ import annotations

import itertools
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor

import bilevel as bl
from bilevel.optim import Torch
from bilevel.testing import check_solver, problems

FIRST_ORDER: dict[str, bl.Solver] = {
    "F2SA": bl.F2SA(),
    "F3SA": bl.F2SA(momentum=0.5),
    "VPBGD": bl.VPBGD(),
    "BOME": bl.BOME(),
    "MEHA": bl.MEHA(),
}
SECOND_ORDER: dict[str, bl.Solver] = {
    "SOBA": bl.SOBA(),
    "MA-SOBA": bl.SOBA(momentum=0.5),
    "StocBiO": bl.StocBiO(linear_steps=100, rtol=1e-5),
    "AmIGO": bl.AmIGO(),
}
ALL = FIRST_ORDER | SECOND_ORDER

#: Relative error on the quadratic of the zoo after 1,500 steps at most.
REACHED = {
    "F2SA": 5e-4,
    "F3SA": 5e-4,
    "VPBGD": 3e-2,
    "BOME": 3e-2,
    "MEHA": 3e-3,
    "SOBA": 1e-4,
    "MA-SOBA": 1e-3,
    "StocBiO": 1e-4,
    "AmIGO": 1e-4,
}

#: Gradients of F and f, and products, of one step: what the docstrings say.
COSTS = {
    "F2SA": (bl.F2SA(inner_steps=3), 4, 8, 0),
    "F3SA": (bl.F2SA(inner_steps=3, momentum=0.5), 8, 16, 0),
    "VPBGD": (bl.VPBGD(value_steps=3), 1, 5, 0),
    "BOME": (bl.BOME(value_steps=3), 1, 5, 0),
    "MEHA": (bl.MEHA(), 2, 4, 0),
    "LVHBA": (bl.LVHBA(), 2, 4, 0),
    "SOBA": (bl.SOBA(), 1, 1, 2),
    "StocBiO": (bl.StocBiO(lower_steps=3, linear_steps=4), 1, 4, 5),
    "AmIGO": (bl.AmIGO(lower_steps=3, linear_steps=4), 1, 4, 5),
}


@pytest.mark.parametrize("name", COSTS)
@pytest.mark.parametrize("batches", [None, [None] * 6], ids=["full batch", "batches"])
def test_step_costs_what_the_docstring_says(name: str, batches: list[None] | None) -> None:
    solver, upper, lower, products = COSTS[name]
    case = problems.quadratic()
    run = bl.iterate(case.problem, solver, case.x0, case.y0, batches)
    states = list(itertools.islice(run, 4))
    spent = [state.evaluations for state in states[1:]]  # F3SA has nothing to recall before
    for before, after in itertools.pairwise(spent):
        assert after.upper_grad - before.upper_grad == upper
        assert after.lower_grad - before.lower_grad == lower
        assert after.hvp - before.hvp == products


@pytest.mark.parametrize("name", ALL)
def test_strongly_convex_problem_is_solved_to_what_the_method_can(name: str) -> None:
    case = problems.quadratic()
    solution = bl.solve(case.problem, ALL[name], case.x0, case.y0, max_steps=1500)
    assert not solution.status.is_failure
    assert case.error(solution.x) <= REACHED[name]


@pytest.mark.parametrize("name", FIRST_ORDER)
@pytest.mark.parametrize("number", [0, 1])
def test_first_order_methods_choose_among_lower_solutions(name: str, number: int) -> None:
    case = problems.bda().cases()[number]  # unrolling ends at x = 0.5 and 1.5
    solution = bl.solve(case.problem, FIRST_ORDER[name], case.x0, case.y0, max_steps=500)
    assert float(solution.x) == pytest.approx(1.0, abs=2e-3)


def sgd(lr: float) -> Torch:
    return Torch(torch.optim.SGD, lr=lr)


@pytest.mark.parametrize("name", ALL)
def test_solver_keeps_the_contract(name: str) -> None:
    solver = ALL[name]
    if isinstance(solver, bl.SOBA):  # whose own steps take 1,500
        solver = replace(solver, upper_optimizer=sgd(2e-3), lower_optimizer=sgd(0.1))
    rough = replace(problems.quadratic(), tolerance=0.3)
    check_solver(solver, problems=[rough], max_steps=140)


@pytest.mark.parametrize("name", ALL)
def test_on_batches_the_contract_holds_too(name: str) -> None:
    adam = Torch(torch.optim.Adam, lr=0.1)
    parts: dict[str, Any] = {"upper_optimizer": adam, "lower_optimizer": adam}
    parts |= {"inner_steps": 3} if isinstance(ALL[name], bl.F2SA) else {}
    parts |= {"linear_steps": 20} if isinstance(ALL[name], bl.StocBiO) else {}
    if name in ("SOBA", "MA-SOBA", "MEHA"):
        parts = {"upper_optimizer": sgd(2e-3), "lower_optimizer": sgd(0.1)}
    if name == "MEHA":
        parts["upper_optimizer"] = sgd(0.02)
    if name in FIRST_ORDER:
        parts["value_optimizer"] = parts["lower_optimizer"]
    solver = replace(ALL[name], **parts)  # pyright: ignore[reportArgumentType]
    rough = replace(problems.quadratic(), tolerance=0.5)
    check_solver(solver, problems=[rough], max_steps=100, batches=[None] * 100)


@pytest.mark.parametrize("name", ALL)
def test_domain_is_kept(name: str) -> None:
    case = problems.quadratic()
    problem = replace(case.problem, domain=bl.Box(-0.01, 0.01))
    run = bl.iterate(problem, ALL[name], case.x0, case.y0)
    assert all(float(state.x.abs().max()) <= 0.01 for state in itertools.islice(run, 20))


@pytest.mark.parametrize("name", ALL)
def test_constraints_are_refused(name: str) -> None:
    case = problems.quadratic()
    problem = replace(case.problem, lower_constraint=lambda x, y, data: y)
    with pytest.raises(ValueError, match="lower_constraint"):
        bl.solve(problem, ALL[name], case.x0, case.y0, max_steps=1)


def held() -> bl.BilevelProblem:
    """y = min(2 x, 1), and so x = 2 where F is smallest."""
    return bl.BilevelProblem(
        lambda x, y, data: ((x - 2.0) ** 2).sum() + (y**2).sum(),
        lambda x, y, data: ((y - 2.0 * x) ** 2).sum(),
        lower_constraint=lambda x, y, data: y - 1.0,
    )


def test_lower_constraint_is_held_and_found() -> None:
    zero = torch.zeros(1, dtype=torch.float64)
    states = list(itertools.islice(bl.iterate(held(), bl.LVHBA(), zero, zero), 1000))
    assert all(float(state.y) <= 1.0 + 1e-6 for state in states)
    assert float(states[-1].x) == pytest.approx(2.0, abs=0.1)
    assert float(states[-1].y) == pytest.approx(1.0, abs=1e-6)


def test_multipliers_of_lvhba_are_those_of_the_lower_problem() -> None:
    zero = torch.zeros(1, dtype=torch.float64)
    *_, last = itertools.islice(bl.iterate(held(), bl.LVHBA(), zero, zero), 1000)
    expected = 2.0 * (2.0 * float(last.x) - 1.0)  # f_y + lambda = 0 at y = 1
    assert float(last.memory["lam"]) == pytest.approx(expected, rel=0.02)


def test_lvhba_keeps_the_contract_without_a_constraint_too() -> None:
    rough = replace(problems.quadratic(), tolerance=0.3)
    check_solver(bl.LVHBA(), problems=[rough], max_steps=140)


def test_lvhba_goes_on_bit_for_bit_and_refuses_other_constraints() -> None:
    zero = torch.zeros(1, dtype=torch.float64)
    states = list(itertools.islice(bl.iterate(held(), bl.LVHBA(), zero, zero), 12))
    for state, expected in itertools.pairwise(states):
        found = next(bl.iterate(held(), bl.LVHBA(), state=state))
        assert torch.equal(found.x, expected.x)
        assert torch.equal(found.y, expected.y)
    problem = replace(held(), upper_constraint=lambda x, y, data: x)
    with pytest.raises(ValueError, match="upper_constraint"):
        bl.solve(problem, bl.LVHBA(), zero, zero, max_steps=1)


CHECKED = ALL | {"LVHBA": bl.LVHBA()}
WRONG: dict[str, tuple[Any, type[Exception]]] = {
    "rtol": (0.0, ValueError),
    "upper_optimizer": (torch.optim.Adam, TypeError),
    "lower_optimizer": (torch.optim.Adam, TypeError),
    "value_optimizer": (torch.optim.Adam, TypeError),
    "momentum": (1.0, ValueError),
    "penalty": (0.1, TypeError),
    "inner_steps": (0, ValueError),
    "value_steps": (0, ValueError),
    "lower_steps": (0, ValueError),
    "linear_steps": (0, ValueError),
    "gamma": (-1.0, ValueError),
    "eta": (0.0, ValueError),
    "max_multiplier": (0.0, ValueError),
}


@pytest.mark.parametrize(
    ("name", "field"),
    [(name, field.name) for name in CHECKED for field in fields(CHECKED[name])],  # pyright: ignore[reportArgumentType]
)
def test_every_parameter_is_checked(name: str, field: str) -> None:
    value, kind = WRONG[field]
    with pytest.raises(kind, match=field):
        replace(CHECKED[name], **{field: value})  # pyright: ignore[reportArgumentType]


def cleaning(seed: int = 0) -> tuple[bl.BilevelProblem, Tensor, Tensor, Tensor, list[Any]]:
    """Data cleaning: a weight for each of 60 samples of a linear model, a third of whose targets are noise."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(120, 4, generator=generator, dtype=torch.float64)
    targets = inputs @ torch.tensor([1.0, -2.0, 0.5, 0.0], dtype=torch.float64)
    spoiled = torch.arange(60) % 3 == 0
    targets[:60][spoiled] = 4.0 * torch.randn(20, generator=generator, dtype=torch.float64)

    def upper(x: Tensor, y: Tensor, rows: Tensor) -> Tensor:
        return ((inputs[rows] @ y - targets[rows]) ** 2).mean()

    def lower(x: Tensor, y: Tensor, rows: Tensor) -> Tensor:
        errors = (inputs[rows] @ y - targets[rows]) ** 2
        return (torch.sigmoid(x[rows]) * errors).mean() + 1e-3 * (y**2).sum()

    def batch() -> bl.Batch:
        rows = torch.randperm(60, generator=generator)
        return bl.Batch(upper=60 + rows[:30], lower=rows[:30])

    x0 = torch.zeros(60, dtype=torch.float64)
    y0 = torch.zeros(4, dtype=torch.float64)
    return bl.BilevelProblem(upper, lower), x0, y0, spoiled, [batch() for _ in range(600)]


@pytest.mark.parametrize("name", ["F2SA", "VPBGD", "SOBA"])
def test_spoiled_samples_lose_their_weight(name: str) -> None:
    problem, x0, y0, spoiled, batches = cleaning()
    fast, slow = Torch(torch.optim.Adam, lr=0.05), Torch(torch.optim.Adam, lr=0.02)
    parts = {"upper_optimizer": fast, "lower_optimizer": slow}
    if name in FIRST_ORDER:
        parts["value_optimizer"] = slow
    solver = replace(ALL[name], **parts)  # pyright: ignore[reportArgumentType]
    solution = bl.solve(problem, solver, x0, y0, batches, max_steps=600)
    weights = torch.sigmoid(solution.x)
    assert float(weights[spoiled].mean()) < 0.7 * float(weights[~spoiled].mean())
