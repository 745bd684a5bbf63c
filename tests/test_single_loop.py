import copy
import itertools
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import sgd
from torch import Tensor, nn

import bilevel as bl
from bilevel.schedules import constant, polynomial
from bilevel.testing import _contract
from bilevel.testing.problems import ZooProblem, bda, quadratic, sine


def solver(z: float = 0.1, y: float = 0.1, x: float = 0.02, **options: Any) -> bl.ASBLO:
    return bl.ASBLO(
        value_optimizer=sgd(z), lower_optimizer=sgd(y), upper_optimizer=sgd(x), **options
    )


def states(problem: Any, method: bl.Solver, x0: Any, y0: Any, batches: Any) -> list[bl.State]:
    return list(bl.iterate(problem, method, x0, y0, batches))


@pytest.mark.parametrize("multiplier", ["slack", "gap"])
@pytest.mark.parametrize(("a", "b"), [(1, 1), (3, 1), (1, 4), (5, 2)])
def test_step_costs_what_the_theory_says(a: int, b: int, multiplier: Any) -> None:
    """f: a passes on z and b on y; F: b passes; a backward for each; no second derivative."""
    case = quadratic()
    method = solver(value_steps=a, lower_steps=b, multiplier=multiplier)
    calls = {"upper": 0, "lower": 0}
    problem = _contract.counted(case.problem, calls)
    state = method.init(problem, case.x0, case.y0, None, full_batch=False)
    for _ in range(3):
        calls.update(upper=0, lower=0)
        new = method.step(problem, state, None)
        assert calls == {"upper": b, "lower": a + b}
        assert new.evaluations == state.evaluations + bl.Evaluations(b, a + b, b, a + b, 0)
        state = new


def test_default_step_is_three_passes() -> None:
    case = quadratic()
    first, second = states(case.problem, bl.ASBLO(), case.x0, case.y0, [None] * 2)
    assert second.evaluations == first.evaluations + bl.Evaluations(1, 2, 1, 2, 0)
    assert first.evaluations.hvp == 0


SLACK = {"epsilon": polynomial(4.0, 2.0, scale=100.0)}  # wide enough to choose the basin
FAST = {k: polynomial(1.0, p, scale=30.0) for k, p in (("epsilon", 2.0), ("sigma", 1.0))}
CONVERGES = [
    (bda().cases()[0], solver(0.5, 0.5, 0.2, value_steps=5, lower_steps=5), 800, 1e-3),
    (bda().cases()[1], solver(0.5, 0.5, 0.2, value_steps=5, lower_steps=5), 800, 1e-3),
    (quadratic(), solver(value_steps=5, lower_steps=5, **FAST), 500, 7.5e-3),
    (
        sine(2).cases()[0],
        solver(0.5, 0.3, 0.05, value_steps=5, lower_steps=5, **SLACK),
        500,
        4.1e-2,
    ),
    (sine(2).cases()[1], solver(0.5, 0.3, 0.05, value_steps=5, lower_steps=5), 500, 4.1e-2),
]


def pairs() -> list[Any]:
    """Each problem with each multiplier."""
    other_basin = "the averaged gap leaves the wide slack before y has crossed to the better basin"
    found = []
    for multiplier, row in itertools.product(("slack", "gap"), CONVERGES):
        name = row[0].name
        marks = []
        if (name, multiplier) == ("sine 2 from x = 0, y = 0", "gap"):
            marks = [pytest.mark.xfail(reason=other_basin, strict=True)]
        found.append(pytest.param(*row, multiplier, id=f"{name}, {multiplier}", marks=marks))
    return found


@pytest.mark.parametrize(("case", "method", "steps", "accuracy", "multiplier"), pairs())
def test_single_loop_converges(
    case: ZooProblem, method: bl.ASBLO, steps: int, accuracy: float, multiplier: Any
) -> None:
    method = replace(method, multiplier=multiplier)
    last = states(case.problem, method, case.x0, case.y0, [None] * steps)[-1]
    assert last.status is bl.Status.RUNNING
    assert case.error(last.x) < accuracy


def noisy(seed: int = 0, n: int = 200) -> tuple[bl.BilevelProblem, Tensor]:
    """Ridge regression whose samples come in batches; upper and lower see the same distribution."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(n, 3, dtype=torch.float64, generator=generator)
    targets = inputs @ torch.tensor([1.0, -2.0, 0.5]).double()
    targets = targets + 0.1 * torch.randn(n, dtype=torch.float64, generator=generator)
    data = torch.cat([inputs, targets[:, None]], dim=1)

    def residual(y: Tensor, rows: Tensor) -> Tensor:
        return rows[:, :3] @ y - rows[:, 3]

    return bl.BilevelProblem(
        lambda x, y, rows: (residual(y, rows) ** 2).mean(),
        lambda x, y, rows: (residual(y, rows) ** 2).mean() + (x.exp() * y**2).sum(),
    ), data


def test_both_lower_passes_see_the_same_batch_and_the_upper_one_its_own() -> None:
    seen: list[tuple[str, int]] = []

    def upper(x: Tensor, y: Tensor, data: int) -> Tensor:
        seen.append(("F", data))
        return ((y - x) ** 2).sum()

    def lower(x: Tensor, y: Tensor, data: int) -> Tensor:
        seen.append(("f", data))
        return ((y - 2.0 * x) ** 2).sum()

    x = torch.ones(2).double()
    method = solver(value_steps=2, lower_steps=2)
    batches = [bl.Batch(upper=10 + k, lower=k) for k in range(3)]
    run = bl.iterate(bl.BilevelProblem(upper, lower), method, x, x, batches)
    next(run)
    for k in (1, 2):
        seen.clear()
        next(run)
        assert sorted(seen) == [("F", 10 + k)] * 2 + [("f", k)] * 4


@pytest.mark.parametrize("multiplier", ["slack", "gap"])
def test_batches_of_a_noisy_problem_keep_it_stable(multiplier: Any) -> None:
    problem, data = noisy()
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randint(200, (16,), generator=generator) for _ in range(600)]
    batches = [bl.Batch(upper=data[r], lower=data[r.flip(0)]) for r in rows]
    method = solver(0.05, 0.05, 0.1, multiplier=multiplier)
    run = states(problem, method, torch.zeros(3).double(), torch.zeros(3).double(), batches)
    assert run[-1].status is bl.Status.RUNNING
    assert all(bool(torch.isfinite(s.x).all()) for s in run)
    assert bool((run[-1].x < -1.0).all())  # less of each weight serves F: the noise is small
    assert float(problem.upper(run[-1].x, run[-1].y, data)) < 0.1 * float(
        problem.upper(run[0].x, run[0].y, data)
    )


@pytest.mark.parametrize("multiplier", ["slack", "gap"])
def test_negative_gap_of_an_unsolved_z_keeps_x_bounded(multiplier: Any) -> None:
    case = quadratic()
    method = solver(z=1e-5, multiplier=multiplier)  # z hardly moves, so that y is far below it
    run = states(case.problem, method, case.x0, case.y0, [None] * 300)
    assert min(float(s.metrics["value_gap"]) for s in run) < 0.0
    assert all(float(s.x.norm()) < 100.0 for s in run)
    assert all(float(s.metrics["multiplier"]) >= 0.0 for s in run)


def test_slack_is_the_known_one_and_the_multiplier_its_derivative() -> None:
    case = quadratic()
    method = solver(epsilon=constant(0.1), mu=constant(1e-3), sigma=constant(0.2), kappa=50.0)
    run = states(case.problem, method, case.x0, case.y0 + 1.0, [None] * 5)
    lower_unit, upper_unit, square = run[0].memory["units"]
    for before, state in itertools.pairwise(run):
        z = before.memory["z"]
        slack = 0.1 * lower_unit + 0.5 * 1e-3 * lower_unit / square * float(z @ z)
        assert float(state.metrics["slack"]) == pytest.approx(slack, rel=1e-12)
        gap = min(0.0, *(float(s.metrics["value_gap"]) for s in run))  # negative: further slack
        weight = float(state.metrics["multiplier"])
        assert 0.2 * upper_unit / (slack - gap) <= weight <= 0.2 * upper_unit / slack


def test_multiplier_at_a_positive_gap_is_that_of_the_slack_alone() -> None:
    case = quadratic()
    method = solver(epsilon=constant(0.1), mu=constant(1e-3), sigma=constant(0.2), kappa=50.0)
    state = method.init(case.problem, case.x0, case.y0, None, full_batch=False)
    z = torch.linalg.solve(
        torch.func.hessian(lambda y: case.problem.lower(case.x0, y, None))(case.y0),
        -torch.func.grad(lambda y: case.problem.lower(case.x0, y, None))(case.y0),
    )
    state = replace(state, memory={**state.memory, "z": z})
    new = method.step(case.problem, state, None)
    assert float(new.metrics["value_gap"]) > 0.0
    slack = float(new.metrics["slack"])
    expected = 0.2 * state.memory["units"][1] / slack
    assert float(new.metrics["multiplier"]) == pytest.approx(expected, rel=1e-12)


def test_multiplier_is_capped() -> None:
    case = quadratic()
    method = solver(epsilon=constant(1e-12), mu=constant(1e-12), max_multiplier=7.0)
    last = states(case.problem, method, case.x0, case.y0, [None] * 3)[-1]
    lower_unit, upper_unit, _ = last.memory["units"]
    assert float(last.metrics["multiplier"]) == pytest.approx(7.0 * upper_unit / lower_unit)


def test_hypergradient_of_the_step_is_eq_16() -> None:
    case = quadratic()
    x, y, z = case.x0 + 0.5, case.y0 + 0.2, case.y0 - 0.3
    method = solver()
    state = method.init(case.problem, x, y, None, full_batch=False)
    state = replace(state, memory={**state.memory, "z": z})
    new = method.step(case.problem, state, None)

    def slope(fun: Any, v: Tensor) -> Tensor:
        return torch.func.grad(lambda u: fun(u, v, None))(x)

    weight = new.metrics["multiplier"]
    lower = case.problem.lower
    exact = slope(case.problem.upper, y) + weight * (slope(lower, y) - slope(lower, z))
    torch.testing.assert_close(new.x, x - 0.02 * exact, rtol=1e-12, atol=1e-12)
    assert float(new.metrics["hypergradient"]) == pytest.approx(float(exact.norm()))


def test_pessimistic_step_turns_the_upper_pull_on_y_and_the_penalty_on_x() -> None:
    case = quadratic()
    x, y, z = case.x0 + 0.5, case.y0 + 0.2, case.y0 - 0.3
    method = solver(pessimistic=True)
    state = method.init(case.problem, x, y, None, full_batch=False)
    new = method.step(case.problem, replace(state, memory={**state.memory, "z": z}), None)

    def slope(fun: Any, v: Tensor) -> Tensor:
        return torch.func.grad(lambda u: fun(u, v, None))(x)

    weight, lower = new.metrics["multiplier"], case.problem.lower
    exact = slope(case.problem.upper, y) - weight * (slope(lower, y) - slope(lower, z))
    torch.testing.assert_close(new.x, x - 0.02 * exact, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("per_sample", [True, False])
def test_per_sample_losses_keep_the_digits_of_the_gap_in_float32(per_sample: bool) -> None:
    # f = 1000 + a difference of 1e-5 by sample: the mean of 4096 losses resolves 1e-4 in float32
    generator = torch.Generator().manual_seed(0)
    base = 1000.0 * torch.rand(4096, generator=generator)

    def lower(x: Tensor, y: Tensor, data: Any) -> Tensor:
        losses = base + 1024.0 * (y.sum() + 0.0 * x.sum())
        return losses if per_sample else losses.mean()

    problem = bl.BilevelProblem(
        lambda x, y, data: ((y - x) ** 2).sum(), lower, per_sample=per_sample
    )
    y = torch.zeros(1)
    method = solver()
    state = method.init(problem, y, y, None, full_batch=False)
    state = replace(state, memory={**state.memory, "z": y - 2.0**-20})  # a gap of 2^-10 in truth
    gap = float(method.step(problem, state, None).metrics["value_gap"])
    error = abs(gap / 2.0**-10 - 1.0)
    assert error < 0.02 if per_sample else error < 0.5


@pytest.mark.parametrize("domain", [bl.Box(-0.1, 0.1), lambda x: x.clamp(-0.1, 0.1)])
def test_x_stays_in_its_domain(domain: Any) -> None:
    case = quadratic()
    problem = replace(case.problem, domain=domain)
    run = states(problem, solver(), case.x0, case.y0, [None] * 50)
    assert all(float(s.x.abs().max()) <= 0.1 for s in run)
    assert float(run[-1].x.abs().max()) == pytest.approx(0.1)


def test_domain_that_returns_another_tree_says_the_rule() -> None:
    case = quadratic()
    problem = replace(case.problem, domain=lambda x: {"x": x})
    with pytest.raises(bl.StructureError, match=r"domain=\.\.\.\)\(x\)` must have the structure"):
        states(problem, solver(), case.x0, case.y0, [None])


@pytest.mark.parametrize("optimizer", [torch.optim.Adam, torch.optim.SGD, torch.optim.AdamW])
def test_network_cut_in_two_learns_from_batches(optimizer: Any) -> None:
    net = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1)).double()
    before = copy.deepcopy(net.state_dict())

    def loss(model: Any, data: tuple[Tensor, Tensor]) -> Tensor:
        return ((model(data[0]) - data[1]) ** 2).mean()

    problem, x0, y0 = bl.from_module(net, lower=["2.*"], upper_loss=loss, lower_loss=loss)
    inputs = torch.randn(256, 2, dtype=torch.float64)
    targets = torch.sin(inputs.sum(1, keepdim=True))
    batches = [
        bl.Batch(upper=(inputs[i::16], targets[i::16]), lower=(inputs[-i::16], targets[-i::16]))
        for _ in range(20)
        for i in range(16)
    ]
    adapter = bl.optim.Torch(optimizer, lr=0.02)
    method = bl.ASBLO(value_optimizer=adapter, lower_optimizer=adapter, upper_optimizer=adapter)
    rng = torch.random.get_rng_state()
    last = states(problem, method, x0, y0, batches)[-1]
    assert torch.equal(torch.random.get_rng_state(), rng)
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    start = loss(net, (inputs, targets)).item()
    bl.update_module(net, last)
    assert loss(net, (inputs, targets)).item() < 0.3 * start


@pytest.mark.parametrize("multiplier", ["slack", "gap"])
@pytest.mark.parametrize("optimizer", [torch.optim.Adam, torch.optim.SGD])
def test_every_step_goes_on_from_disk_bit_for_bit(
    optimizer: Any, multiplier: Any, tmp_path: Path
) -> None:
    problem, data = noisy()
    batches = [data[16 * k : 16 * k + 16] for k in range(10)]
    adapter = bl.optim.Torch(optimizer, lr=polynomial(0.05, 0.5))
    method = bl.ASBLO(
        value_optimizer=adapter,
        lower_optimizer=adapter,
        upper_optimizer=adapter,
        multiplier=multiplier,
        value_steps=2,
        lower_steps=3,
    )
    zero = torch.zeros(3).double()
    run = states(problem, method, zero, zero, batches)
    kept = copy.deepcopy(run)
    for number, (state, expected) in enumerate(itertools.pairwise(run), start=1):
        bl.save_state(tmp_path / "state", state)
        rest = batches[number:]
        found = next(
            bl.iterate(problem, method, batches=rest, state=bl.load_state(tmp_path / "state"))
        )
        assert _contract.different_fields(found, expected) == []
    assert _contract.same(run, kept)  # a state of the past is not written into


def test_nan_in_a_batch_ends_the_run_with_the_last_finite_variables() -> None:
    problem, data = noisy()
    bad = data.clone()
    bad[0, 3] = math.nan
    zero = torch.zeros(3).double()
    run = states(problem, solver(), zero, zero, [data, data, bad, data])
    assert [s.status.name for s in run] == ["RUNNING", "RUNNING", "NONFINITE"]
    assert torch.equal(run[2].x, run[1].x)
    assert torch.equal(run[2].y, run[1].y)
    assert "at step 3; F = nan, f = nan" in run[2].message
    first = states(problem, solver(), zero, zero, [bad, data])
    assert [s.status.name for s in first] == ["NONFINITE"]
    assert "at x0, y0" in first[0].message


def test_trees_give_the_iterates_of_the_vector() -> None:
    case = quadratic()
    expected = states(case.problem, solver(), case.x0, case.y0, [None] * 20)[-1]
    nested = states(
        _contract.over_halves(case.problem),
        solver(),
        _contract.halves(case.x0),
        _contract.halves(case.y0),
        [None] * 20,
    )[-1]
    torch.testing.assert_close(_contract.whole(nested.x), expected.x, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(_contract.whole(nested.y), expected.y, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("factor", [(1e-3, 1.0), (1e3, 1.0), (1.0, 1e-3), (1.0, 1e3)])
def test_multiplier_speaks_in_units_of_the_objectives(factor: tuple[float, float]) -> None:
    a, b = factor
    case = quadratic()
    upper, lower = case.problem.upper, case.problem.lower
    problem = replace(
        case.problem,
        upper=lambda x, y, data: a * upper(x, y, data),
        lower=lambda x, y, data: b * lower(x, y, data),
    )
    tiny = solver(1e-12, 1e-12, 1e-12)  # the same point in both runs: SGD is not invariant itself
    one = states(case.problem, tiny, case.x0, case.y0 + 1.0, [None] * 3)[-1]
    other = states(problem, tiny, case.x0, case.y0 + 1.0, [None] * 3)[-1]
    expected = float(one.metrics["multiplier"]) * a / b
    assert float(other.metrics["multiplier"]) == pytest.approx(expected, rel=1e-3)


def test_ridge_does_not_wipe_out_what_f_hardly_sees() -> None:
    """Adam makes a full step of any gradient, however small; the ridge must not become one."""
    problem = bl.BilevelProblem(
        upper=lambda x, y, data: ((y[0] - 1.0) ** 2 + 0.1 * x**2).sum(),
        lower=lambda x, y, data: ((y[0] - x) ** 2 + 1e-12 * (y[1] - 1.0) ** 2).sum(),
    )
    adam = bl.optim.Torch(torch.optim.Adam, lr=1e-2)
    method = bl.ASBLO(value_optimizer=adam, lower_optimizer=adam, upper_optimizer=adam)
    x0, y0 = torch.zeros(1).double(), torch.tensor([0.0, 1.0]).double()
    found = bl.solve(problem, method, x0, y0, [None] * 500, max_steps=500)
    assert found.y[1].item() == pytest.approx(1.0, abs=0.05)


def test_ridge_is_that_of_eq_14_where_the_step_is_along_the_gradient() -> None:
    problem = bl.BilevelProblem(
        upper=lambda x, y, data: ((y - 1.0) ** 2 + 0.1 * x**2).sum(),
        lower=lambda x, y, data: ((y - x) ** 2).sum(),
    )
    mu, lr = 0.3, 0.05
    sgd = bl.optim.Torch(torch.optim.SGD, lr=lr)
    method = bl.ASBLO(
        mu=constant(mu), value_optimizer=sgd, lower_optimizer=sgd, upper_optimizer=sgd
    )
    x, y = torch.tensor([0.5]).double(), torch.tensor([2.0]).double()
    state = next(iter(bl.iterate(problem, method, x, y, [None])))
    weight = state.metrics["mu"] * float(y)  # in the user's units
    gap = float(state.metrics["value_gap"])
    assert gap == 0.0  # z starts at y
    expected_z = float(y) - lr * (2.0 * float(y - x) + weight)
    assert float(state.memory["z"]) == pytest.approx(expected_z, rel=1e-12)
