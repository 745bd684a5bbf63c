"""F2SA, V-PBGD, BOME, MEHA, LV-HBA, SOBA, AmIGO and stocBiO: what they cost, where they end, what they refuse."""

import itertools
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import reduced, sgd
from torch import Tensor

import bilevel as bl
from bilevel.schedules import constant
from bilevel.testing import _contract
from bilevel.testing.problems import ZooProblem, bda, pbgd_toy, quadratic, ridge, sine

E = bl.Evaluations

#: The solver, and what a step costs: F, f, their gradients, products with second derivatives.
COSTS = {
    "F2SA": (bl.F2SA(inner_steps=3), E(4, 8, 4, 8, 0)),
    "F3SA": (bl.F2SA(inner_steps=3, momentum=0.5), E(8, 16, 8, 16, 0)),
    "VPBGD": (bl.VPBGD(value_steps=4), E(1, 6, 1, 6, 0)),
    "BOME": (bl.BOME(value_steps=4), E(1, 6, 1, 6, 0)),
    "MEHA": (bl.MEHA(), E(2, 4, 2, 4, 0)),
    "SOBA": (bl.SOBA(), E(1, 1, 1, 1, 2)),
    "MA-SOBA": (bl.SOBA(momentum=0.5), E(1, 1, 1, 1, 2)),
    "AmIGO": (bl.AmIGO(lower_steps=3, linear_steps=4), E(1, 4, 1, 4, 5)),
    "StocBiO": (bl.StocBiO(lower_steps=3, linear_steps=4), E(1, 4, 1, 4, 5)),
}
VALUE_FUNCTION = [bl.F2SA(), bl.VPBGD(), bl.BOME(), bl.MEHA()]
IMPLICIT = [bl.SOBA(), bl.AmIGO(), bl.StocBiO()]
ALL = [*VALUE_FUNCTION, *IMPLICIT]


def kind(solver: bl.Solver) -> str:
    return type(solver).__name__


def run(problem: bl.BilevelProblem, solver: bl.Solver, x0: Any, y0: Any, steps: int) -> bl.State:
    *_, last = itertools.islice(bl.iterate(problem, solver, x0, y0), steps)
    return last


@pytest.mark.parametrize("batches", [None, [None] * 4])
@pytest.mark.parametrize("name", list(COSTS))
def test_step_costs_what_the_docstring_says(name: str, batches: Any) -> None:
    solver, cost = COSTS[name]
    case = quadratic(3, 4, 2.0)
    calls = {"upper": 0, "lower": 0}
    problem = _contract.counted(case.problem, calls)
    state = solver.init(problem, case.x0, case.y0, None, full_batch=batches is None)
    assert state.evaluations == E(5, 4, 5, 4, 0)
    assert calls == {"upper": 5, "lower": 4}
    state = solver.step(problem, state, None)  # F3SA has no point before
    for _ in range(3):
        calls.update(upper=0, lower=0)
        new = solver.step(problem, state, None)
        assert new.evaluations == state.evaluations + cost
        assert calls == {"upper": cost.upper, "lower": cost.lower}
        state = new


@pytest.mark.parametrize("solver", VALUE_FUNCTION, ids=kind)
@pytest.mark.parametrize("case", bda().cases()[:2], ids=lambda c: c.name)
def test_bda_ends_at_one(solver: bl.Solver, case: ZooProblem) -> None:
    last = run(case.problem, solver, case.x0, case.y0, 700)
    assert case.error(last.x) < 1e-4
    assert float((last.y - case.y_star).norm()) < 1e-3


@pytest.mark.parametrize("solver", IMPLICIT, ids=kind)
def test_bda_of_implicit_differentiation_ends_at_the_mean_of_one_and_the_start(
    solver: bl.Solver,
) -> None:
    case = bda().cases()[1]  # y_2 = 2: a lower solution is differentiated, not chosen
    last = run(case.problem, solver, case.x0, case.y0, 300)
    assert float(last.x) == pytest.approx(1.5, abs=0.05)
    assert (
        last.status is bl.Status.RUNNING
    )  # the lower Hessian is singular: no convergence is claimed


ACCURACY = [
    (quadratic(), bl.F2SA(), 700, 1e-3),
    (quadratic(), bl.AmIGO(), 200, 1e-5),
    (quadratic(), bl.SOBA(), 1000, 3e-3),
    (quadratic(), bl.StocBiO(), 200, 1e-3),
    (ridge(20), bl.F2SA(), 500, 1e-3),
    (ridge(20), bl.AmIGO(), 300, 1e-4),
    (sine(2).cases()[0], bl.F2SA(), 200, 2e-3),  # the basin is chosen by F
    (sine(2).cases()[1], bl.F2SA(), 200, 2e-3),
    (sine(2).cases()[1], bl.BOME(), 600, 5e-3),
    (pbgd_toy().cases()[1], bl.F2SA(), 300, 1e-3),
    (pbgd_toy().cases()[1], bl.MEHA(), 1000, 5e-3),
    (pbgd_toy().cases()[1], bl.SOBA(), 500, 1e-5),
    (pbgd_toy().cases()[1], bl.AmIGO(), 100, 1e-6),
]


@pytest.mark.parametrize(
    ("case", "solver", "steps", "accuracy"), ACCURACY, ids=lambda v: getattr(v, "name", None)
)
def test_default_settings_solve_the_zoo(
    case: ZooProblem, solver: bl.Solver, steps: int, accuracy: float
) -> None:
    assert case.error(run(case.problem, solver, case.x0, case.y0, steps).x) < accuracy


def penalized(case: ZooProblem, weight: float) -> Tensor:
    """The x of the minimum of F + weight (f - min f), a quadratic in x, y and z, by its stationarity."""

    def lagrangian(v: Tensor) -> Tensor:
        x, y, z = v.split([case.x0.numel(), case.y0.numel(), case.y0.numel()])
        gap = case.problem.lower(x, y, None) - case.problem.lower(x, z, None)
        return case.problem.upper(x, y, None) + weight * gap

    zero = torch.zeros(case.x0.numel() + 2 * case.y0.numel(), dtype=torch.float64)
    hessian = torch.func.hessian(lagrangian)(zero)
    return -torch.linalg.solve(hessian, torch.func.grad(lagrangian)(zero))[: case.x0.numel()]


@pytest.mark.parametrize("solver", [bl.F2SA(inner_steps=3), bl.VPBGD(value_steps=3)], ids=kind)
def test_constant_penalty_ends_at_the_closed_form_of_the_penalized_problem(solver: Any) -> None:
    case = quadratic(3, 4, 2.0)
    method = replace(solver, penalty=constant(3.0), rtol=1e-12)
    last = run(case.problem, method, case.x0, case.y0, 400)
    exact = penalized(case, last.metrics["multiplier"])
    assert float((last.x - exact).norm() / exact.norm()) < 1e-6
    assert (
        case.error(exact) > 1e-2
    )  # and this is not the answer, which is why no convergence is claimed
    assert last.status is bl.Status.RUNNING


def test_multiplier_of_bome_is_that_of_the_dynamic_barrier() -> None:
    case = quadratic(3, 4, 2.0)
    x, y, z = case.x0 + 0.5, case.y0 + 0.2, case.y0 - 0.3
    solver = bl.BOME(value_steps=1, eta=0.7, penalty=constant(1e9), value_optimizer=sgd(1e-12))
    state = solver.init(case.problem, x, y, None, full_batch=True)
    state = replace(state, memory={**state.memory, "z": z})
    new = solver.step(case.problem, state, None)

    def slopes(fun: Any, v: Tensor) -> Tensor:
        return torch.cat(torch.func.grad(lambda u, w: fun(u, w, None), argnums=(0, 1))(x, v))

    of_f, of_z = slopes(case.problem.lower, y), slopes(case.problem.lower, z)
    of_q = of_f - torch.cat([of_z[:3], torch.zeros(4)])
    eta = 0.7 * state.memory["unit"]
    square = of_q @ of_q
    exact = max(0.0, float((eta * square - slopes(case.problem.upper, y) @ of_q) / square))
    assert float(new.metrics["multiplier"]) == pytest.approx(exact, rel=1e-9)


def test_momentum_of_f3sa_is_the_recursion_on_changing_batches() -> None:
    """With f = b y^2 / 2 on batch b: h = b_k z_k + beta (h - b_k z_(k-1))."""
    problem = bl.BilevelProblem(
        lambda x, y, b: ((y - x) ** 2).sum(), lambda x, y, b: (0.5 * b * (y - 0.0 * x) ** 2).sum()
    )
    solver = bl.F2SA(
        inner_steps=1, momentum=0.5, value_optimizer=sgd(0.1), upper_optimizer=sgd(1e-9)
    )
    one = torch.ones(1).double()
    numbers = [2.0, 1.0, 3.0]
    states = list(bl.iterate(problem, solver, one, one, numbers))
    z, before, h = 1.0, None, 0.0
    for b in numbers:
        h = b * z if before is None else b * z + 0.5 * (h - b * before)
        before, z = z, z - 0.1 * h
    found = states[-1].memory["estimates"]["z"]
    assert float(found["h"][0]) == pytest.approx(h, rel=1e-12)


def test_average_of_ma_soba_is_that_of_its_hypergradients() -> None:
    case = quadratic(3, 4, 2.0)
    solver = bl.SOBA(momentum=0.75, upper_optimizer=sgd(0.01), lower_optimizer=sgd(0.1))
    run_ = [*itertools.islice(bl.iterate(case.problem, solver, case.x0, case.y0), 3)]
    steps = [case.x0, *(s.x for s in run_)]
    moved = [(a - b) / 0.01 for a, b in itertools.pairwise(steps)]
    plain = replace(solver, momentum=0.0)
    raw = plain.step(case.problem, run_[1], None)
    exact = 0.75 * moved[1] + 0.25 * (run_[1].x - raw.x) / 0.01
    torch.testing.assert_close(moved[2], exact, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("solver", ALL, ids=kind)
def test_x_stays_in_its_domain(solver: bl.Solver) -> None:
    case = quadratic(3, 4, 2.0)
    problem = replace(case.problem, domain=bl.Box(-0.05, 0.05))
    states = list(itertools.islice(bl.iterate(problem, solver, case.x0, case.y0), 60))
    assert all(float(s.x.abs().max()) <= 0.05 for s in states)
    assert float(states[-1].x.abs().max()) == pytest.approx(0.05)


@pytest.mark.parametrize("solver", ALL, ids=kind)
@pytest.mark.parametrize("factors", [(1e-3, 1.0), (1.0, 1e3)])
def test_units_of_the_objectives_do_not_matter_on_the_full_batch(
    solver: bl.Solver, factors: tuple[float, float]
) -> None:
    case = quadratic(3, 4, 2.0)
    upper, lower = case.problem.upper, case.problem.lower
    problem = bl.BilevelProblem(
        lambda x, y, data: factors[0] * upper(x, y, data),
        lambda x, y, data: factors[1] * lower(x, y, data) + 7.0,
    )
    one = run(case.problem, solver, case.x0, case.y0, 20)
    other = run(problem, solver, case.x0, case.y0, 20)
    torch.testing.assert_close(other.x, one.x, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("solver", ALL, ids=kind)
def test_constraints_are_refused(solver: bl.Solver) -> None:
    case = quadratic(3, 4, 2.0)
    problem = replace(case.problem, lower_constraint=lambda x, y, data: y)
    with pytest.raises(ValueError, match=r"no `BilevelProblem\(lower_constraint="):
        run(problem, solver, case.x0, case.y0, 1)


@pytest.mark.parametrize("solver", ALL, ids=kind)
def test_lower_problem_without_a_minimum_is_not_called_solved(solver: bl.Solver) -> None:
    problem = bl.BilevelProblem(
        lambda x, y, data: ((y - 1.0) ** 2).sum() + (x**2).sum(),
        lambda x, y, data: -((y - x) ** 2).sum(),
    )
    last = run(problem, solver, torch.ones(1).double(), torch.zeros(1).double(), 300)
    assert last.status is not bl.Status.CONVERGED
    assert bool(torch.isfinite(last.x).all() & torch.isfinite(last.y).all())


@pytest.mark.parametrize("solver", ALL, ids=kind)
def test_too_long_steps_end_with_a_status(solver: Any) -> None:
    case = quadratic(3, 4, 2.0)
    wild = replace(solver, lower_optimizer=sgd(10.0), upper_optimizer=sgd(10.0))
    last = run(case.problem, wild, case.x0, case.y0, 1000)
    assert last.status in (
        bl.Status.NONFINITE,
        bl.Status.LOWER_UNBOUNDED,
        bl.Status.UPPER_UNBOUNDED,
    )
    assert "at step" in last.message


MISTAKES: list[tuple[Any, dict[str, Any], type[Exception], str]] = [
    (bl.F2SA, {"inner_steps": 0}, ValueError, r"F2SA\(inner_steps=...\)` must be at least 1"),
    (bl.F2SA, {"momentum": 1.0}, ValueError, r"F2SA\(momentum=...\)` must be in \[0, 1\)"),
    (bl.F2SA, {"penalty": 3.0}, TypeError, r"F2SA\(penalty=...\)` must be a schedule"),
    (bl.VPBGD, {"value_steps": 1.5}, TypeError, r"VPBGD\(value_steps=...\)` must be an instance"),
    (bl.BOME, {"eta": 0.0}, ValueError, r"BOME\(eta=...\)` must be a finite number > 0"),
    (bl.MEHA, {"gamma": -1.0}, ValueError, r"MEHA\(gamma=...\)` must be a finite number > 0"),
    (bl.LVHBA, {"gamma": 0.5}, ValueError, r"LVHBA\(gamma=...\)` must be above 1"),
    (bl.SOBA, {"rtol": 0.0}, ValueError, r"SOBA\(rtol=...\)` must be a finite number > 0"),
    (bl.AmIGO, {"linear_steps": 0}, ValueError, r"AmIGO\(linear_steps=...\)` must be at least 1"),
    (
        bl.StocBiO,
        {"upper_optimizer": torch.optim.SGD},
        TypeError,
        r"StocBiO\(upper_optimizer=...\)` must be an instance of `Torch`",
    ),
]


@pytest.mark.parametrize(("solver", "options", "error", "message"), MISTAKES)
def test_mistake_is_named(
    solver: Any, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        solver(**options)


def square(v: Tensor) -> Tensor:
    return (v**2).sum()


#: The problem, x* and y* by hand, and how near 1000 steps come.
CONSTRAINED = {
    "bound on y, active": (
        bl.BilevelProblem(
            lambda x, y, data: square(y - 2.0) + 0.5 * square(x - 0.5),
            lambda x, y, data: square(y - x),
            lower_constraint=lambda x, y, data: y - 1.0,
        ),
        1.0,
        1.0,
        2e-3,
    ),
    "coupled, active": (  # y = max(x, -1)
        bl.BilevelProblem(
            lambda x, y, data: square(x - 1.0) + square(y - 2.0),
            lambda x, y, data: square(y + 1.0),
            lower_constraint=lambda x, y, data: x - y,
        ),
        1.5,
        1.5,
        0.15,
    ),
    "inactive": (
        bl.BilevelProblem(
            lambda x, y, data: square(x - 1.0) + square(y - 2.0),
            lambda x, y, data: square(y - x),
            lower_constraint=lambda x, y, data: y - 10.0,
        ),
        1.5,
        1.5,
        1e-2,
    ),
}


@pytest.mark.parametrize("name", list(CONSTRAINED))
def test_lvhba_on_a_constrained_lower_problem(name: str) -> None:
    problem, x_star, y_star, accuracy = CONSTRAINED[name]
    zero = torch.zeros(1).double()
    last = run(problem, bl.LVHBA(), zero, zero, 1000)
    assert float(last.x) == pytest.approx(x_star, abs=accuracy)
    assert float(last.y) == pytest.approx(y_star, abs=accuracy)
    assert problem.lower_constraint is not None
    assert float(problem.lower_constraint(last.x, last.y, None).max()) <= 1e-9


def test_lvhba_keeps_the_rules_of_a_solver(tmp_path: Path) -> None:
    problem, *_ = CONSTRAINED["coupled, active"]
    x0, y0 = torch.zeros(1).double(), torch.zeros(1).double()
    calls = {"upper": 0, "lower": 0}
    states = [*itertools.islice(bl.iterate(problem, bl.LVHBA(), x0, y0), 20)]
    for before, after in itertools.pairwise(states):
        bl.save_state(tmp_path / "state", before)
        state = bl.load_state(tmp_path / "state")
        found = next(bl.iterate(problem, bl.LVHBA(), state=state))
        assert _contract.different_fields(found, after) == []
    counted = _contract.counted(problem, calls)
    state = bl.LVHBA().init(counted, x0, y0, None, full_batch=True)
    calls.update(upper=0, lower=0)
    new = bl.LVHBA().step(counted, state, None)
    assert calls == {"upper": 1, "lower": 3}
    assert new.evaluations == state.evaluations + E(1, 3, 1, 3, 0)
    single = run(problem, bl.LVHBA(), x0.float(), y0.float(), 1000)
    assert single.x.dtype is torch.float32
    assert float(single.x) == pytest.approx(1.5, abs=0.2)


def test_lvhba_needs_its_constraint_and_refuses_others() -> None:
    problem, *_ = CONSTRAINED["inactive"]
    zero = torch.zeros(1).double()
    with pytest.raises(ValueError, match="Use `MEHA"):
        run(replace(problem, lower_constraint=None), bl.LVHBA(), zero, zero, 1)
    with pytest.raises(ValueError, match="upper_constraint"):
        run(replace(problem, upper_constraint=lambda x, y, d: x), bl.LVHBA(), zero, zero, 1)


def cleaning() -> tuple[bl.BilevelProblem, list[bl.Batch], Tensor]:
    """Logistic regression on samples of which a third have the wrong label; x weighs them."""
    generator = torch.Generator().manual_seed(0)
    truth = torch.tensor([2.0, -1.0, 1.0, 0.5]).double()

    def draw(n: int) -> tuple[Tensor, Tensor]:
        inputs = torch.randn(n, 4, dtype=torch.float64, generator=generator)
        return inputs, torch.sign(inputs @ truth)

    inputs, labels = draw(90)
    corrupted = torch.arange(90) < 30
    labels = torch.where(corrupted, -labels, labels)
    clean = draw(100)

    def loss(y: Tensor, inputs: Tensor, labels: Tensor) -> Tensor:
        return torch.nn.functional.softplus(-labels * (inputs @ y))

    def upper(x: Tensor, y: Tensor, rows: Tensor) -> Tensor:
        return loss(y, clean[0][rows], clean[1][rows]).mean()

    def lower(x: Tensor, y: Tensor, rows: Tensor) -> Tensor:
        weighted = torch.sigmoid(x[rows]) * loss(y, inputs[rows], labels[rows])
        return weighted.mean() + 0.01 * square(y)

    batches = [
        bl.Batch(
            upper=torch.randint(100, (25,), generator=generator),
            lower=torch.randint(90, (30,), generator=generator),
        )
        for _ in range(600)
    ]
    return bl.BilevelProblem(upper, lower), batches, corrupted


def adam(lr: float) -> bl.optim.Torch:
    return bl.optim.Torch(torch.optim.Adam, lr=lr)


@pytest.mark.parametrize(
    "solver",
    [
        bl.F2SA(
            inner_steps=2,
            upper_optimizer=adam(0.05),
            lower_optimizer=sgd(0.5),
            value_optimizer=sgd(0.5),
        ),
        bl.VPBGD(
            value_steps=2,
            upper_optimizer=adam(0.05),
            lower_optimizer=sgd(0.5),
            value_optimizer=sgd(0.5),
        ),
        bl.SOBA(upper_optimizer=adam(0.05), lower_optimizer=sgd(0.5)),
        bl.AmIGO(2, 2, upper_optimizer=adam(0.05), lower_optimizer=sgd(0.5)),
    ],
    ids=kind,
)
def test_corrupted_samples_lose_their_weight_on_batches(solver: bl.Solver) -> None:
    problem, batches, corrupted = cleaning()
    zero = torch.zeros(90).double(), torch.zeros(4).double()
    *_, last = bl.iterate(problem, solver, *zero, batches)
    assert last.status is bl.Status.RUNNING
    weights = torch.sigmoid(last.x)
    assert float(weights[corrupted].mean()) < 0.5 * float(weights[~corrupted].mean())
    right = float((weights[corrupted][:, None] < weights[~corrupted][None, :]).double().mean())
    assert right > 0.9  # of all pairs of a corrupted and a clean sample


@pytest.mark.parametrize(
    ("solver", "left"), [(bl.SOBA(), 0.5), (bl.AmIGO(), 1e-4)], ids=["SOBA", "AmIGO"]
)
def test_ill_conditioned_lower_level_makes_no_step_swing_ever_wider(
    solver: bl.Solver, left: float
) -> None:
    """Condition number 97: x outran y and v, until F was 1e16 and more times what it was at the start."""
    generator = torch.Generator().manual_seed(2)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    Q = torch.linalg.qr(draw(6, 6))[0]
    A = Q @ torch.diag(torch.logspace(0.0, math.log10(97.0), 6, dtype=torch.float64)) @ Q.T
    B, c, d = draw(6, 4), draw(6), draw(6)
    problem = bl.BilevelProblem(
        lambda x, y, data: 0.5 * ((y - d) ** 2).sum() + 0.05 * (x**2).sum(),
        lambda x, y, data: 0.5 * y @ A @ y - (B @ x + c) @ y,
    )
    value = reduced(problem, d)
    M, k = torch.linalg.solve(A, B), torch.linalg.solve(A, c)
    best = torch.linalg.solve(M.T @ M + 0.1 * torch.eye(4).double(), M.T @ (d - k))
    x0, y0 = torch.zeros(4).double(), torch.zeros(6).double()
    *_, last = itertools.islice(bl.iterate(problem, solver, x0, y0), 1000)
    excess = float(value(last.x) - value(best))
    assert excess < left * float(value(x0) - value(best))
    assert last.status is bl.Status.CONVERGED or "still" in last.message


def test_lvhba_takes_an_optimizer_of_x() -> None:
    problem, x_star, y_star, _ = CONSTRAINED["bound on y, active"]
    zero = torch.zeros(1).double()
    sgd = bl.optim.Torch(torch.optim.SGD, lr=0.015)
    last = run(problem, bl.LVHBA(upper_optimizer=sgd), zero, zero, 100)
    assert float(last.x) == pytest.approx(x_star, abs=2e-2)
    assert float(last.y) == pytest.approx(y_star, abs=2e-2)


def test_lvhba_does_not_call_what_no_y_meets_solved() -> None:
    """The constraint y^2 + 1 <= 0 has no slope at y = 0 that would lead anywhere."""
    problem = bl.BilevelProblem(
        lambda x, y, data: square(x) + square(y),
        lambda x, y, data: square(y - x),
        lower_constraint=lambda x, y, data: y**2 + 1.0,
    )
    zero = torch.zeros(1).double()
    last = run(problem, bl.LVHBA(), zero, zero, 50)
    assert last.status is not bl.Status.CONVERGED
    assert torch.equal(last.y, zero)
