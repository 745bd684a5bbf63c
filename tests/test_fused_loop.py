"""A step of ASBLO in one compiled graph against the same step operation by operation.

The numbers of the program are those of its operations, run as they are; some tests trace it too, and one makes it
machine code, which takes a C++ compiler and half a minute.
"""

import itertools
import math
import pickle
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import bilevel as bl
from bilevel.schedules import constant, polynomial
from bilevel.testing import _contract
from bilevel.testing.problems import quadratic

STEPS = 8
TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-12}  # a few roundings a step


def sgd(lr: Any = 0.05, **options: Any) -> bl.optim.Torch:
    return bl.optim.Torch(torch.optim.SGD, lr=lr, **options)


def adam(lr: Any = 0.02, **options: Any) -> bl.optim.Torch:
    return bl.optim.Torch(torch.optim.Adam, lr=lr, **options)


def asblo(optimizer: bl.optim.Torch | None = None, **options: Any) -> bl.ASBLO:
    names = ("value_optimizer", "lower_optimizer", "upper_optimizer")
    return bl.ASBLO(**{**dict.fromkeys(names, optimizer or sgd()), **options})


def ridge(n: int = 64, dtype: torch.dtype = torch.float64) -> tuple[bl.BilevelProblem, Tensor]:
    """Ridge regression with one weight a feature, and its rows of data."""
    generator = torch.Generator().manual_seed(0)
    data = torch.randn(n, 4, dtype=torch.float64, generator=generator).to(dtype)

    def losses(y: Tensor, rows: Tensor) -> Tensor:
        return (rows[:, :3] @ y - rows[:, 3]) ** 2

    return bl.BilevelProblem(
        lambda x, y, rows: losses(y, rows).mean(),
        lambda x, y, rows: losses(y, rows).mean() + (x.exp() * y**2).sum(),
    ), data


def run(
    problem: bl.BilevelProblem, method: bl.ASBLO, data: Tensor, steps: int = STEPS
) -> list[bl.State]:
    x = torch.linspace(-0.5, 0.5, 3).to(data)
    batches = [bl.Batch(data[: 2 * k + 8], data[-2 * k - 8 :]) for k in range(steps)]
    return list(bl.iterate(problem, method, x, x + 1.0, batches))


def assert_same(found: list[bl.State], expected: list[bl.State], rtol: float) -> None:
    assert [state.status for state in found] == [state.status for state in expected]
    for k, (one, other) in enumerate(zip(found, expected, strict=True), start=1):
        for name in ("x", "y"):
            a, b = getattr(one, name), getattr(other, name)
            torch.testing.assert_close(a, b, rtol=rtol, atol=k * rtol)
        assert (one.step, one.evaluations) == (other.step, other.evaluations)
        assert one.metrics.keys() == other.metrics.keys()
        for name, value in other.metrics.items():
            scale = 1.0 if name != "value_gap" else abs(float(other.metrics["lower"]))
            assert float(one.metrics[name]) == pytest.approx(
                float(value), rel=10.0 * rtol, abs=10.0 * rtol * scale
            )


METHODS = {
    "SGD": asblo(),
    "momentum": asblo(sgd(momentum=0.8)),
    "Nesterov, decay": asblo(sgd(momentum=0.5, nesterov=True, weight_decay=0.1)),
    "dampened": asblo(sgd(momentum=0.5, dampening=0.3)),
    "Adam": asblo(adam()),
    "Adam, decay": asblo(adam(betas=(0.8, 0.9), eps=1e-4, weight_decay=0.1)),
    "AdamW": asblo(bl.optim.Torch(torch.optim.AdamW, lr=0.02)),
    "one of each": asblo(upper_optimizer=adam(), value_optimizer=sgd(momentum=0.5)),
    "falling rates": asblo(adam(polynomial(0.05, 0.5))),
    "shortened": asblo(sgd(max_norm=0.3)),
    "pessimistic": asblo(adam(), pessimistic=True),
    "gap": asblo(adam(), multiplier="gap"),
    "several steps": asblo(adam(), value_steps=3, lower_steps=2),
    "several steps, gap": asblo(value_steps=2, lower_steps=3, multiplier="gap"),
    "theta": asblo(theta=constant(0.1), max_multiplier=2.0, kappa=0.3),
}


@pytest.mark.usefixtures("untraced")
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", METHODS)
def test_program_takes_the_way_of_its_operations(name: str, dtype: torch.dtype) -> None:
    problem, data = ridge(dtype=dtype)
    expected = run(problem, METHODS[name], data)
    found = run(problem, replace(METHODS[name], compile=True), data)
    assert len(found) == STEPS
    assert_same(found, expected, TOLERANCE[dtype])


@pytest.mark.usefixtures("untraced")
@pytest.mark.parametrize("domain", [bl.Box(-0.45, 0.3), lambda x: x.clamp(-0.45, 0.3)])
def test_program_keeps_x_in_its_domain(domain: Any) -> None:
    problem, data = ridge()
    problem = replace(problem, domain=domain)
    expected = run(problem, asblo(adam()), data)
    found = run(problem, asblo(adam(), compile=True), data)
    assert_same(found, expected, 1e-12)
    assert any(float(state.x.max()) == 0.3 for state in found)


@pytest.mark.usefixtures("untraced")
def test_program_takes_the_gap_sample_by_sample() -> None:
    generator = torch.Generator().manual_seed(0)
    base = 1000.0 * torch.rand(4096, generator=generator)
    problem = bl.BilevelProblem(
        lambda x, y, _: ((y - x) ** 2).sum(),
        lambda x, y, _: base + 1024.0 * (y.sum() + 0.0 * x.sum()),
        per_sample=True,
    )
    method, y = asblo(compile=True), torch.zeros(1)
    state = method.init(problem, y, y, None, full_batch=False)
    state = replace(state, memory={**state.memory, "z": y - 2.0**-20})  # a gap of 2^-10 in truth
    gap = method.step(problem, state, None).metrics["value_gap"]
    assert gap == pytest.approx(2.0**-10, rel=0.02)  # as where a step is not compiled


@pytest.mark.usefixtures("traced")
def test_trees_go_through_one_program() -> None:
    case = quadratic()
    problem, vectors = _contract.over_halves(case.problem), case.problem
    method = asblo(adam(), compile=True)
    trees = _contract.halves(case.x0), _contract.halves(case.y0)
    *_, found = bl.iterate(problem, method, *trees, [None] * STEPS)
    *_, expected = bl.iterate(
        vectors, replace(method, compile=False), case.x0, case.y0, [None] * STEPS
    )
    torch.testing.assert_close(_contract.whole(found.x), expected.x, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(_contract.whole(found.y), expected.y, rtol=1e-10, atol=1e-12)


@pytest.mark.usefixtures("traced")
def test_first_step_compiles_for_all_steps_and_numbers() -> None:
    problem, data = ridge()
    batches = [bl.Batch(data[k : k + 8], data[k + 8 : k + 16]) for k in range(STEPS)]
    x = torch.zeros(3, dtype=torch.float64)

    def way(scale: float) -> Any:
        optimizer = adam(polynomial(0.02 * scale, 0.5))
        method = asblo(optimizer, kappa=scale, mu=constant(scale), compile=True)
        return bl.iterate(problem, method, x, x + scale, batches)

    states = way(1.0)
    next(states)
    with torch.compiler.set_stance("fail_on_recompile"):
        assert [state.status for state in states] == [bl.Status.RUNNING] * (STEPS - 1)
        assert len(list(way(2.0))) == STEPS


@pytest.mark.usefixtures("untraced")
@pytest.mark.parametrize("multiplier", ["slack", "gap"])
@pytest.mark.parametrize("optimizer", [adam(polynomial(0.05, 0.5)), sgd(momentum=0.5), sgd()])
def test_program_goes_on_from_disk_bit_for_bit(
    optimizer: Any, multiplier: Any, tmp_path: Path
) -> None:
    problem, data = ridge()
    method = asblo(optimizer, multiplier=multiplier, value_steps=2, lower_steps=2, compile=True)
    batches = [data[8 * k : 8 * k + 8] for k in range(6)]
    zero = torch.zeros(3).double()
    states = list(bl.iterate(problem, method, zero, zero, batches))
    for number, (state, expected) in enumerate(itertools.pairwise(states), start=1):
        bl.save_state(tmp_path / "state", state)
        loaded = bl.load_state(tmp_path / "state")
        found = next(bl.iterate(problem, method, batches=batches[number:], state=loaded))
        assert _contract.different_fields(found, expected) == []


@pytest.mark.usefixtures("untraced")
def test_nan_ends_a_program_as_it_ends_the_operations() -> None:
    problem, data = ridge()
    bad = data.clone()
    bad[0, 3] = math.nan
    zero, batches = torch.zeros(3).double(), [data, data, bad, data]
    for method in (asblo(), asblo(sgd(1e200))):  # the data, or a step that overflows
        expected = list(bl.iterate(problem, method, zero, zero + 1.0, batches))
        found = list(bl.iterate(problem, replace(method, compile=True), zero, zero + 1.0, batches))
        assert [s.status for s in found] == [s.status for s in expected]
        assert found[-1].status is bl.Status.NONFINITE
        assert found[-1].message == expected[-1].message
        assert torch.equal(found[-1].x, found[max(len(found) - 2, 0)].x)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (
            lambda: asblo(
                lower_optimizer=bl.optim.Torch(torch.optim.RMSprop, lr=0.1), compile=True
            ),
            r"ASBLO\(lower_optimizer=.*SGD, Adam or AdamW.*Got RMSprop",
        ),
        (
            lambda: asblo(upper_optimizer=adam(amsgrad=True), compile=True),
            r"upper_optimizer=.*amsgrad.*Leave",
        ),
        (
            lambda: bl.iterate(
                quadratic().problem, asblo(compile=True), quadratic().x0, quadratic().y0
            ),
            r"ASBLO\(compile=True\)` must be given batches",
        ),
    ],
)
def test_what_is_no_program_is_refused(make: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        make()


@pytest.mark.usefixtures("untraced")
@pytest.mark.parametrize("compiled", [True, False])
def test_state_of_the_other_form_is_refused(compiled: bool) -> None:
    problem, data = ridge()
    *_, state = run(problem, asblo(compile=not compiled), data, steps=2)
    with pytest.raises(bl.StructureError, match=f"Got compile={compiled}"):
        next(bl.iterate(problem, asblo(compile=compiled), batches=[data], state=state))


def test_objective_that_cannot_be_traced_says_so() -> None:
    torch.compiler.reset()
    problem = bl.BilevelProblem(
        lambda x, y, _: (y - x).square().sum(),
        lambda x, y, _: (y - x).square().sum() * (2.0 if y.sum().item() > 0.0 else 1.0),
    )
    one = torch.ones(1)
    with pytest.raises(Exception, match=r".") as caught:
        next(bl.iterate(problem, asblo(compile=True), one, one, [None]))
    assert any("without branches on numbers" in note for note in caught.value.__notes__)
    assert not any(problem.programs.values())


def test_solver_is_pickled_with_its_option() -> None:
    method = asblo(adam(), compile=True)
    assert pickle.loads(pickle.dumps(method)) == method != replace(method, compile=False)


@pytest.mark.skipif(
    shutil.which("g++") is None and shutil.which("clang++") is None,
    reason="torch.compile needs a C++ compiler, and there is neither g++ nor clang++",
)
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
def test_machine_code_takes_the_way_of_its_operations() -> None:
    problem, data = ridge()
    method = asblo(adam(), value_steps=2, multiplier="gap")
    batches = [data[8 * k : 8 * k + 8] for k in range(6)]
    x = torch.linspace(-0.5, 0.5, 3).double()
    expected = list(bl.iterate(problem, method, x, x + 1.0, batches))
    found = list(bl.iterate(problem, replace(method, compile=True), x, x + 1.0, batches))
    assert_same(found, expected, 1e-11)


def test_betas_in_a_list_make_the_same_program() -> None:
    made = [asblo(adam(betas=betas), compile=True) for betas in ([0.8, 0.9], (0.8, 0.9))]
    ours = [solver._fused for solver in made]  # pyright: ignore[reportPrivateUsage]
    assert ours[0] == ours[1]
    assert hash(ours[0]) == hash(ours[1])
