"""One compiled graph against the same steps one by one, and against closed forms.

The numbers of the program are those of its operations, run as they are; some tests trace it too, and one makes it
machine code, which takes a C++ compiler and half a minute.
"""

import copy
import pickle
import shutil
from dataclasses import replace
from typing import Any

import pytest
import torch
from cases import reduced, sgd
from torch import Tensor

import bilevel as bl
from bilevel.linear import CG, Dense
from bilevel.testing.problems import quadratic

STEPS = 6
needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None and shutil.which("clang++") is None,
    reason="torch.compile needs a C++ compiler, and there is neither g++ nor clang++",
)


def steps(optimizer: Any = torch.optim.SGD, **options: Any) -> bl.optim.Torch:
    return bl.optim.Torch(optimizer, **{"lr": 0.1, "max_steps": STEPS, **options})


def start(nx: int, ny: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    return torch.linspace(-1.0, 1.0, nx, dtype=dtype), torch.linspace(0.0, 1.0, ny, dtype=dtype)


METHODS = {
    "SGD, CG": bl.Implicit(CG(max_steps=8), steps()),
    "momentum, CG": bl.Implicit(CG(rtol=1e-6, max_steps=8), steps(momentum=0.5)),
    "Nesterov, decay, Dense": bl.Implicit(
        Dense(), steps(momentum=0.5, nesterov=True, weight_decay=0.1)
    ),
    "dampened, shortened": bl.Implicit(Dense(), steps(momentum=0.5, dampening=0.3, max_norm=0.2)),
    "Adam": bl.Implicit(Dense(), steps(torch.optim.Adam, weight_decay=0.1)),
    "AdamW": bl.Implicit(Dense(), steps(torch.optim.AdamW, betas=(0.8, 0.9))),
    "schedule": bl.Implicit(Dense(), steps(lr=bl.schedules.geometric(0.1, 0.9))),
    "to a tolerance": bl.Implicit(Dense(), steps(lr=0.2, max_steps=40), tol=1e-2),
    "Newton, Dense": bl.Implicit(Dense(), bl.optim.Newton(max_steps=3)),
    "Unrolled": bl.Unrolled(STEPS, lr=0.1),
    "Unrolled(truncate)": bl.Unrolled(STEPS, lr=0.1, truncate=5),
}


@pytest.mark.usefixtures("untraced")
@pytest.mark.parametrize("name", METHODS)
def test_compiled_equals_step_by_step(name: str) -> None:
    problem = quadratic(3, 4, 5.0).problem
    x, y = start(3, 4)
    eager = METHODS[name].estimate(problem, x, y)
    one = replace(METHODS[name], compile=True).estimate(problem, x, y)
    torch.testing.assert_close(one.grad, eager.grad, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(one.y, eager.y, rtol=1e-12, atol=1e-13)
    assert one.status is eager.status
    assert set(one.info) == set(eager.info)
    for key in ("upper", "lower", "lower_residual"):
        assert one.info[key] == pytest.approx(eager.info[key], rel=1e-8)
    assert one.noise == pytest.approx(eager.noise, rel=1e-6)


@pytest.mark.usefixtures("untraced")
@pytest.mark.parametrize("linear", [CG(max_steps=12), Dense()], ids=str)
def test_compiled_is_the_closed_form_once_the_lower_problem_is_solved(linear: Any) -> None:
    case = quadratic(3, 4, 5.0)
    x, y = start(3, 4)
    exact = torch.func.grad(reduced(case.problem, case.y0))(x)
    momentum = steps(lr=0.25, momentum=0.3, max_steps=60)
    found = bl.Implicit(linear, momentum, tol=1e-7, compile=True).estimate(case.problem, x, y)
    assert found.status is bl.Status.CONVERGED
    torch.testing.assert_close(found.grad, exact, rtol=1e-6, atol=1e-8)


@needs_compiler
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
def test_machine_code_equals_step_by_step() -> None:
    problem = quadratic(2, 2, 3.0).problem
    x, y = start(2, 2)
    method = bl.Implicit(CG(max_steps=4), steps(max_steps=5))
    fast = replace(method, compile=True)
    for k in (1.0, 2.0):  # the first call, and one that goes straight to the graph
        eager = bl.hypergradient(problem, k * x, y, method).grad
        one = bl.hypergradient(problem, k * x, y, fast).grad
        torch.testing.assert_close(one, eager, rtol=1e-9, atol=1e-11)


@pytest.mark.usefixtures("traced")
def test_trees_data_and_changed_tensors_are_followed_by_one_program() -> None:
    scale = torch.ones((), dtype=torch.float64)

    def lower(x: Any, y: Any, data: Tensor) -> Tensor:
        return 0.5 * ((y["w"] - scale * x[0] * data) ** 2).sum() + 0.5 * (y["b"] - x[1]) ** 2

    def upper(x: Any, y: Any, data: Tensor) -> Tensor:
        return 0.5 * (y["w"] ** 2).sum() + y["b"] * x[1]

    problem = bl.BilevelProblem(upper, lower)
    method = bl.Unrolled(3, lr=0.5)
    fast = replace(method, compile=True)
    x = (torch.ones(2, 2).double(), torch.tensor(2.0).double())
    y = {"w": torch.zeros(2, 2).double(), "b": torch.tensor(0.5).double()}
    for data in (1.0, 2.0):
        batch = bl.Batch(upper=torch.zeros(1), lower=torch.full((2,), data).double())
        scale.fill_(data + 1.0)
        eager = bl.hypergradient(problem, x, y, method, batch)
        one = bl.hypergradient(problem, x, y, fast, batch)
        assert one.grad[0].shape == (2, 2)
        for found, truth in ((one.grad, eager.grad), (list(one.y.values()), [*eager.y.values()])):
            for a, b in zip(found, truth, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


@pytest.mark.usefixtures("traced")
def test_number_outside_that_changes_is_seen() -> None:
    """A graph that keeps the number of its first call would be wrong, silently."""
    factor = 1.0
    problem = bl.BilevelProblem(
        lambda x, y, _: 0.5 * (y**2).sum(), lambda x, y, _: 0.5 * ((y - factor * x) ** 2).sum()
    )
    method = bl.Unrolled(1, lr=1.0, compile=True)  # y = factor x, so that the answer is factor^2 x
    one = torch.ones(1)
    for factor in (1.0, 3.0):
        found = bl.hypergradient(problem, one, one, method)
        torch.testing.assert_close(found.grad, factor**2 * one)


@pytest.mark.usefixtures("traced")
def test_newton_steps_are_traced_in_one_variable_too() -> None:
    problem = bl.BilevelProblem(
        lambda x, y, _: 0.5 * (y**2).sum(), lambda x, y, _: torch.cosh(y - 3.0 * x).sum()
    )
    method = bl.Implicit(Dense(), bl.optim.Newton(max_steps=8), compile=True)
    found = bl.hypergradient(problem, torch.ones(1), torch.zeros(1), method)
    assert found.status is bl.Status.CONVERGED
    torch.testing.assert_close(found.grad, torch.tensor([9.0]))


@pytest.mark.usefixtures("traced")
def test_more_problems_than_torch_keeps_of_one_code() -> None:
    for k in range(1, 10):
        problem = bl.BilevelProblem(
            lambda x, y, _: 0.5 * (y**2).sum(),
            lambda x, y, _, k=k: 0.5 * ((y - k * x) ** 2).sum(),
        )
        one = torch.ones(1)
        found = bl.hypergradient(problem, one, one, bl.Unrolled(1, lr=1.0, compile=True))
        torch.testing.assert_close(found.grad, k**2 * one)


@pytest.mark.usefixtures("untraced")
@pytest.mark.parametrize("name", ["SGD, CG", "Unrolled"])
def test_solver_with_a_compiled_estimator_takes_the_same_way(name: str) -> None:
    case = quadratic(3, 4, 5.0)

    def run(method: bl.Estimator) -> bl.Solution:
        solver = bl.HypergradientDescent(method, upper_optimizer=sgd(0.05))
        return bl.solve(case.problem, solver, case.x0, case.y0, [None] * 5, max_steps=5)

    with pytest.warns(bl.BilevelWarning, match="not solved to its tolerance"):
        eager, one = run(METHODS[name]), run(replace(METHODS[name], compile=True))
    torch.testing.assert_close(one.x, eager.x, rtol=1e-9, atol=1e-11)


@pytest.mark.usefixtures("untraced")
def test_nan_gives_a_status_and_the_start() -> None:
    problem = quadratic(3, 4, 5.0).problem
    x, y = start(3, 4)
    for method in (METHODS["SGD, CG"], METHODS["Unrolled"]):
        found = bl.hypergradient(problem, x * float("nan"), y, replace(method, compile=True))
        assert found.status is bl.Status.NONFINITE
        torch.testing.assert_close(found.y, y)


@pytest.mark.usefixtures("untraced")
def test_negative_curvature_ends_the_conjugate_gradients() -> None:
    problem = bl.BilevelProblem(
        lambda x, y, _: (y - x).square().sum(),
        lambda x, y, _: y[0] ** 2 - y[1] ** 2 + (x * y).sum(),
    )
    x, y = start(2, 2)
    found = bl.Implicit(CG(max_steps=4), steps(lr=0.01, max_steps=1), tol=1.0, compile=True)
    estimate = found.estimate(problem, x + 1.0, y)
    assert bool(torch.isfinite(estimate.grad).all())
    assert estimate.status is bl.Status.LINEAR_UNSOLVED


@pytest.mark.usefixtures("untraced")
def test_evaluations_are_counted() -> None:
    counted = {"upper": 0, "lower": 0}
    case = quadratic(3, 40, 5.0)

    def lower(x: Tensor, y: Tensor, data: Any) -> Tensor:
        counted["lower"] += 1
        return case.problem.lower(x, y, data)

    problem = bl.BilevelProblem(case.problem.upper, lower)
    x, y = start(3, 40)
    implicit = bl.Implicit(CG(max_steps=8), steps(), compile=True).estimate(problem, x, y)
    assert implicit.evaluations == bl.Evaluations(1, STEPS + 1, 1, STEPS + 1, 8 + 2)
    unrolled = bl.Unrolled(STEPS, lr=0.1, truncate=5, compile=True).estimate(problem, x, y)
    assert unrolled.evaluations == bl.Evaluations(1, STEPS + 1, 1, STEPS + 1, 2 * 5)
    newton = bl.Implicit(Dense(), bl.optim.Newton(max_steps=2), compile=True)
    counted["lower"] = 0
    estimate = newton.estimate(problem, x, y)
    # The first length, then a gradient and twelve lengths of each step, and the system; maps call once for all.
    assert estimate.evaluations == bl.Evaluations(1, 2 * 13 + 1, 1, 2 + 2, 2 * 40 + 40 + 2)
    assert counted["lower"] == 1 + 2 * 2 + 1


def lower_solution(lower: Any, y: Tensor, steps: int, linear: Any = None) -> bl.Estimate:
    """By `steps` Newton steps from y, as one program of x = 1."""
    problem = bl.BilevelProblem(
        lambda x, y, _: (x * y).sum(), lambda x, y, _: lower(y) + 0.0 * x.sum()
    )
    newton = bl.optim.Newton(max_steps=steps)
    method = bl.Implicit(linear or Dense(), newton, tol=1e-9, compile=True)
    return method.estimate(problem, torch.ones_like(y), y)


@pytest.mark.usefixtures("untraced")
def test_newton_is_shortened_where_the_whole_step_would_diverge() -> None:
    """On sqrt(1 + y^2) whole steps go to -y^3."""
    y = torch.tensor([2.0, -3.0], dtype=torch.float64)
    found = lower_solution(lambda y: torch.sqrt(1.0 + y**2).sum(), y, 12)
    assert found.status is bl.Status.CONVERGED
    torch.testing.assert_close(found.y, torch.zeros_like(y), rtol=0.0, atol=1e-8)


@pytest.mark.usefixtures("untraced")
def test_newton_leaves_a_hill_downwards() -> None:
    y = torch.tensor([0.1, 2.0], dtype=torch.float64)
    found = lower_solution(lambda y: 0.25 * ((y**2 - 1.0) ** 2).sum(), y, 12)
    assert found.status is bl.Status.CONVERGED
    torch.testing.assert_close(found.y, torch.ones_like(y))


@pytest.mark.usefixtures("untraced")
def test_too_few_newton_steps_are_said() -> None:
    y = torch.full((2,), 1.5, dtype=torch.float64)
    found = lower_solution(lambda y: (y**4).sum(), y, 2)
    assert found.status is bl.Status.LOWER_UNSOLVED


@pytest.mark.usefixtures("untraced")
@pytest.mark.parametrize("start", [3.0, 1.0], ids=["afar", "at the minimum"])
def test_newton_in_float32_converges_to_the_last_digits(start: float) -> None:
    """The gradient never falls to `tol` of the first, where the first is rounding too."""
    scales = torch.tensor([1.0, 30.0, 300.0])
    y = torch.full((3,), start)
    found = lower_solution(lambda y: torch.cosh(y - 1.0 / 3.0) @ scales, y, 12)
    again = lower_solution(lambda y: torch.cosh(y - 1.0 / 3.0) @ scales, found.y, 2)
    assert found.status is again.status is bl.Status.CONVERGED
    torch.testing.assert_close(again.y, torch.full_like(y, 1.0 / 3.0), rtol=1e-4, atol=0.0)


@pytest.mark.usefixtures("untraced")
def test_newton_crosses_where_there_is_no_curvature_at_all() -> None:
    y = torch.tensor([9.0, -9.0], dtype=torch.float64)
    found = lower_solution(lambda y: torch.nn.functional.huber_loss(y, torch.zeros_like(y)), y, 12)
    assert found.status is bl.Status.CONVERGED
    torch.testing.assert_close(found.y, torch.zeros_like(y))


@pytest.mark.usefixtures("untraced")
def test_newton_is_as_fast_where_the_hessian_is_singular() -> None:
    y = torch.zeros(30, dtype=torch.float64)
    found = lower_solution(lambda y: torch.cosh(y.sum() - 1.0), y, 6, CG(max_steps=30))
    assert found.status is bl.Status.CONVERGED
    torch.testing.assert_close(found.y, torch.full_like(found.y, 1.0 / 30.0))


@pytest.mark.usefixtures("untraced")
def test_saddle_is_no_lower_solution() -> None:
    y = torch.zeros(2, dtype=torch.float64)
    found = lower_solution(lambda y: y[0] * y[1] + (y**4).sum(), y, 4)
    assert found.status is bl.Status.LOWER_UNSOLVED


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: bl.Implicit(compile=True), r"linear=.*fixed number.*CG\(max_steps=10\)"),
        (
            lambda: bl.Implicit(Dense(), compile=True),
            r"minimizer=.*max_steps=100.*Newton\(max_steps=8\)",
        ),
        (lambda: bl.Implicit(bl.linear.MINRES(), steps(), compile=True), "linear=.*MINRES"),
        (lambda: bl.Implicit(Dense(), steps(torch.optim.RMSprop), compile=True), "RMSprop"),
        (lambda: bl.Implicit(Dense(), steps(maximize=True), compile=True), "maximize.*Leave"),
        (lambda: bl.Implicit(Dense(), steps(), error_bound=True, compile=True), "error_bound="),
        (lambda: bl.Unrolled(3, mode="forward", compile=True), "mode=.*reverse"),
    ],
)
def test_what_has_no_fixed_program_is_refused(make: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        make()


def test_objective_that_cannot_be_traced_says_so() -> None:
    torch.compiler.reset()
    problem = bl.BilevelProblem(
        lambda x, y, _: (y - x).square().sum(),
        lambda x, y, _: (y - x).square().sum() * (2.0 if y.sum().item() > 0.0 else 1.0),
    )
    one = torch.ones(1)
    with pytest.raises(Exception, match=r".") as caught:
        bl.hypergradient(problem, one, one, bl.Unrolled(2, compile=True))
    assert any("without branches on numbers" in note for note in caught.value.__notes__)


@pytest.mark.usefixtures("traced")
def test_problem_is_copied_and_pickled_without_what_was_compiled() -> None:
    problem = quadratic(2, 2, 3.0).problem
    x, y = start(2, 2)
    method = bl.Unrolled(2, lr=0.1, compile=True)
    bl.hypergradient(problem, x, y, method)
    assert problem.programs
    assert not copy.deepcopy(problem).programs
    assert not pickle.loads(pickle.dumps(problem.programs))
    assert not replace(problem, upper=problem.lower).programs
    assert pickle.loads(pickle.dumps(method)) == method


@pytest.mark.slow
@pytest.mark.usefixtures("traced")
def test_torch_that_cannot_leave_out_guards_gives_the_same_gradient(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delattr(torch.compiler, "skip_guard_on_globals_unsafe", raising=False)
    problem = quadratic(2, 2, 3.0).problem
    x, y = start(2, 2)
    method = bl.Implicit(CG(max_steps=4), steps(max_steps=5))
    eager = method.estimate(problem, x, y).grad
    one = replace(method, compile=True).estimate(problem, x, y).grad
    torch.testing.assert_close(one, eager, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("unit", [1e-25, 1e-20, 1.0, 1e18])
@pytest.mark.parametrize(
    "method",
    [
        bl.Implicit(bl.linear.Dense(), bl.optim.Newton(max_steps=3), compile=True),
        bl.Implicit(bl.linear.CG(max_steps=4), bl.optim.Newton(max_steps=3), compile=True),
    ],
    ids=["Dense", "CG"],
)
def test_fixed_program_in_float32_knows_no_unit(method: bl.Implicit, unit: float) -> None:
    """The program itself, not compiled, which changes no operation of it."""
    problem = bl.BilevelProblem(
        upper=lambda x, y, data: unit * ((y - 1.0) ** 2).sum(),
        lower=lambda x, y, data: unit * ((y - 2.0 * x) ** 2).sum(),
    )
    x, y = torch.ones(3), torch.zeros(3)
    found = method.fused.program(problem)(x, y, None, None, None)
    estimate = method.fused.estimate(found, found[-1].tolist(), is_warm=False, memory=None)
    assert estimate.status is bl.Status.CONVERGED
    torch.testing.assert_close(estimate.grad / unit, torch.full((3,), 4.0))


def test_fixed_unrolling_in_float32_knows_no_unit() -> None:
    unit = 1e-25
    problem = bl.BilevelProblem(
        upper=lambda x, y, data: unit * ((y - 1.0) ** 2).sum(),
        lower=lambda x, y, data: unit * ((y - 2.0 * x) ** 2).sum(),
    )
    method = bl.Unrolled(60, lr=0.2 / unit, compile=True)
    found = method.fused.program(problem)(torch.ones(3), torch.zeros(3), None, None, None)
    estimate = method.fused.estimate(found, found[-1].tolist(), is_warm=False, memory=None)
    assert estimate.status is bl.Status.CONVERGED
    torch.testing.assert_close(estimate.grad / unit, torch.full((3,), 4.0))
