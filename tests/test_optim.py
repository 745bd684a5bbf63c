import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import minimize, rosen
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook

from bilevel import Box, State, Status, load_state, save_state
from bilevel.optim import Newton, Point, QuasiNewton, SmoothFunction, Torch
from bilevel.optim._conjugate import ConjugateSteps


class Smooth(SmoothFunction):
    """A function of a vector, differentiated by torch; counts what is measured."""

    def __init__(self, fun: Callable[[Tensor], Tensor]) -> None:
        self.fun = fun
        self.matrix: Tensor | None = None
        self.evaluations = self.hessians = self.products = 0

    def evaluate(self, y: Tensor) -> Point:
        self.evaluations += 1
        value = self.fun(y)
        eps = torch.finfo(y.dtype).eps
        return Point(y, float(value), torch.func.grad(self.fun)(y), noise=eps * abs(float(value)))

    @property
    def has_hessian(self) -> bool:
        return self.matrix is not None

    def hessian(self, point: Point, *, refresh: bool) -> Tensor:
        if refresh or self.matrix is None:
            self.hessians += 1
            self.matrix = torch.func.hessian(self.fun)(point.y)
        return self.matrix

    def hvp(self, point: Point) -> Callable[[Tensor], Tensor]:
        def product(v: Tensor) -> Tensor:
            self.products += 1
            return torch.func.jvp(torch.func.grad(self.fun), (point.y,), (v,))[1]

        return product


def rosenbrock(y: Tensor) -> Tensor:
    return (100.0 * (y[1:] - y[:-1] ** 2) ** 2 + (1.0 - y[:-1]) ** 2).sum()


def logistic(y: Tensor) -> Tensor:
    rows = torch.cos(torch.arange(200.0).double()).reshape(20, 10)
    return torch.nn.functional.softplus(rows @ y).sum() + 0.05 * (y**2).sum()


def double_well(y: Tensor) -> Tensor:
    return ((y**2 - 1.0) ** 2).sum() + 0.1 * y.sum() + 0.5 * (y[1:] * y[:-1]).sum()


def vector(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


FUNCTIONS = {
    "rosenbrock": (rosenbrock, vector(-1.2, 1.0, 0.5, 2.0)),
    "logistic": (logistic, torch.ones(10, dtype=torch.float64)),
    "double well": (double_well, vector(0.9, -0.8, 0.7, -1.1)),
}


def scipy_minimum(fun: Callable[[Tensor], Tensor], start: Tensor) -> Tensor:
    found = minimize(
        lambda y: float(fun(torch.as_tensor(y))),
        start.numpy(),
        jac=lambda y: torch.func.grad(fun)(torch.as_tensor(y)).numpy(),
        hess=lambda y: torch.func.hessian(fun)(torch.as_tensor(y)).numpy(),
        method="trust-exact",
        options={"gtol": 1e-12, "maxiter": 1000},
    )
    return torch.as_tensor(found.x)


@pytest.mark.parametrize("limit", [256, 0], ids=["dense", "CG"])
@pytest.mark.parametrize("name", list(FUNCTIONS))
def test_newton_finds_the_minimum_of_scipy(name: str, limit: int) -> None:
    fun, start = FUNCTIONS[name]
    smooth = Smooth(fun)
    found = Newton(dense_limit=limit, max_steps=300).minimize(smooth, smooth.evaluate(start), 1e-9)
    assert found.status is Status.CONVERGED
    assert found.residual <= 1e-9
    torch.testing.assert_close(found.point.y, scipy_minimum(fun, start), rtol=1e-8, atol=1e-8)
    assert (smooth.hessians == 0) == (limit == 0)
    assert (smooth.products == 0) == (limit > 0)


@pytest.mark.parametrize("limit", [256, 0], ids=["dense", "CG"])
def test_newton_leaves_a_start_where_the_hessian_is_indefinite(limit: int) -> None:
    smooth = Smooth(double_well)
    start = vector(0.1, -0.1, 0.05, -0.2)
    curvatures = torch.linalg.eigvalsh(torch.func.hessian(double_well)(start))
    assert float(curvatures[0]) < 0.0
    found = Newton(dense_limit=limit).minimize(smooth, smooth.evaluate(start), 1e-9)
    assert found.status is Status.CONVERGED
    assert found.point.value < double_well(start)
    assert float(torch.linalg.eigvalsh(torch.func.hessian(double_well)(found.point.y))[0]) > 0.0


def test_newton_solves_a_quadratic_in_one_step_and_one_hessian() -> None:
    smooth = Smooth(lambda y: ((y - 3.0) ** 2 * torch.arange(1.0, 6.0).double()).sum())
    found = Newton().minimize(smooth, smooth.evaluate(torch.full((5,), 2.5).double()), 1e-12)
    assert (found.steps, smooth.hessians, found.status) == (1, 1, Status.CONVERGED)
    torch.testing.assert_close(found.point.y, torch.full((5,), 3.0).double())


def test_newton_keeps_a_hessian_that_serves() -> None:
    smooth = Smooth(lambda y: (y**2 + 0.01 * y**4).sum())
    found = Newton().minimize(smooth, smooth.evaluate(torch.ones(3).double()), 1e-12)
    assert found.status is Status.CONVERGED
    assert smooth.hessians < found.steps


def test_newton_stops_as_soon_as_it_is_told() -> None:
    smooth = Smooth(rosenbrock)
    start = smooth.evaluate(vector(-1.2, 1.0))
    seen: list[float] = []

    def stop(point: Point) -> bool:
        seen.append(point.value)
        return point.value < 1.0

    found = Newton().minimize(smooth, start, 0.0, stop=stop)
    assert found.status is Status.CONVERGED
    assert found.point.value < 1.0
    assert all(value >= 1.0 for value in seen[:-1])
    assert Newton().minimize(smooth, start, stop=lambda point: True).point is start


FLAT = [
    (lambda y: -(y**2).sum(), Status.LOWER_UNBOUNDED),
    (lambda y: (y**2).sum() * math.nan, Status.NONFINITE),
    (lambda y: (y - 5.0).sqrt().sum(), Status.NONFINITE),
]


@pytest.mark.parametrize("limit", [256, 0], ids=["dense", "CG"])
@pytest.mark.parametrize(("fun", "status"), FLAT, ids=["concave", "NaN", "root"])
def test_newton_says_why_there_is_no_minimum(fun: Any, status: Status, limit: int) -> None:
    smooth = Smooth(fun)
    start = smooth.evaluate(torch.ones(2).double())
    assert Newton(dense_limit=limit, max_steps=500).minimize(smooth, start, 1e-9).status is status


def test_newton_makes_no_step_along_which_a_singular_hessian_says_nothing() -> None:
    """Its rank is one, and rounding alone decides whether Cholesky's method notices."""
    fun = Smooth(lambda y: torch.cosh(y.sum() - 1.0))
    found = Newton().minimize(fun, fun.evaluate(torch.zeros(30, dtype=torch.float64)), 1e-12)
    assert found.status is Status.CONVERGED
    torch.testing.assert_close(found.point.y, torch.full_like(found.point.y, 1.0 / 30.0))


@pytest.mark.parametrize("off", [0.0, 0.1, 0.2, 0.25, 0.26, 0.3, 0.4, -0.4])
def test_conjugate_steps_go_on_only_where_that_is_steep(off: float) -> None:
    """After a solve, the gradient comes back as its residual with something off along the last direction."""
    n = 400
    curvature = torch.logspace(-4, 0, n, dtype=torch.float64)
    steps = ConjugateSteps(200)
    grad = torch.sin(torch.arange(n, dtype=torch.float64))

    def product(v: Tensor) -> Tensor:
        return curvature * v

    def decrease(d: Tensor, g: Tensor) -> float:
        return -float(g @ d + 0.5 * d @ product(d))

    steps.direction(product, grad, 0.3 * float(grad.norm()))
    left, p, _ = steps._last  # pyright: ignore[reportPrivateUsage, reportGeneralTypeIssues]
    new = -left + off * float(left.norm() / p.norm()) * p
    target = 1e-3 * float(new.norm())
    fresh = ConjugateSteps(200).direction(product, new, target)
    assert decrease(steps.direction(product, new, target), new) > 0.9 * decrease(fresh, new)


def test_newton_says_that_its_steps_ran_out() -> None:
    smooth = Smooth(rosenbrock)
    found = Newton(max_steps=2).minimize(smooth, smooth.evaluate(vector(-1.2, 1.0)), 1e-9)
    assert (found.status, found.steps) == (Status.MAX_STEPS, 2)


def test_newton_ends_at_rounding_where_no_tolerance_is_given() -> None:
    for dtype, bound in ((torch.float64, 1e-7), (torch.float32, 1e-2)):
        smooth = Smooth(rosenbrock)
        start = smooth.evaluate(vector(-1.2, 1.0).to(dtype))
        found = Newton().minimize(smooth, start)
        assert found.status is Status.CONVERGED
        assert float((found.point.y - 1.0).norm()) < bound


def test_newton_step_is_capped() -> None:
    smooth = Smooth(lambda y: torch.log1p((y - 100.0) ** 2).sum())
    visited: list[float] = []
    evaluate = smooth.evaluate

    def watch(y: Tensor) -> Point:
        visited.append(float(y))
        return evaluate(y)

    smooth.evaluate = watch  # type: ignore[method-assign]
    Newton(max_steps=1).minimize(smooth, evaluate(vector(0.0)), 1e-9)
    assert max(map(abs, visited)) <= 1.0


def descend(
    fun: Callable[[Tensor], Tensor], x: Tensor, domain: Any = None, steps: int = 300
) -> tuple[Point, int]:
    smooth, optimizer = Smooth(fun), QuasiNewton()
    memory, point = optimizer.init(x), smooth.evaluate(x)
    for _ in range(steps):
        new, memory = optimizer.step(smooth.evaluate, point, memory, domain)
        if new is None and memory["steps"].shape[0] == 0:
            new, memory = optimizer.step(smooth.evaluate, point, memory, domain)
            if new is None:
                break
        point = new or point
        if float(point.grad.norm()) < 1e-10:
            break
    return point, smooth.evaluations


@pytest.mark.parametrize("n", [2, 5, 20])
def test_quasi_newton_minimizes_rosenbrock(n: int) -> None:
    start = torch.full((n,), -1.0).double()
    found, evaluations = descend(rosenbrock, start)
    torch.testing.assert_close(found.y, torch.ones(n).double(), rtol=1e-7, atol=1e-7)
    reference = minimize(rosen, start.numpy(), method="L-BFGS-B", options={"gtol": 1e-8})
    assert evaluations < 4 * reference.nfev / (n + 1)  # SciPy spends n + 1 on a gradient


def test_quasi_newton_keeps_to_a_box() -> None:
    low, high = vector(-2.0, -2.0, -2.0), vector(0.5, 2.0, 0.1)
    start = vector(-1.0, 1.5, -1.0)
    exact = minimize(
        lambda y: float(rosenbrock(torch.as_tensor(y))),
        start.numpy(),
        jac=lambda y: torch.func.grad(rosenbrock)(torch.as_tensor(y)).numpy(),
        bounds=list(zip(low.tolist(), high.tolist(), strict=True)),
        method="L-BFGS-B",
        options={"ftol": 1e-15, "gtol": 1e-10},
    )
    found, _ = descend(rosenbrock, start, Box(low, high))
    assert bool(((found.y >= low) & (found.y <= high)).all())
    torch.testing.assert_close(found.y, torch.as_tensor(exact.x), rtol=1e-6, atol=1e-6)


def test_quasi_newton_takes_any_projection() -> None:
    def to_ball(y: Tensor) -> Tensor:
        return y / y.norm().clamp(min=1.0)

    found, _ = descend(rosenbrock, vector(-0.5, 0.5), to_ball, steps=2000)
    exact = minimize(
        lambda y: rosen(y),
        [0.5, 0.5],
        method="SLSQP",
        constraints={"type": "ineq", "fun": lambda y: 1.0 - (y**2).sum()},
        options={"ftol": 1e-15},
    )
    torch.testing.assert_close(found.y, torch.as_tensor(exact.x), rtol=1e-4, atol=1e-4)


def test_quasi_newton_rejects_infinite_trials() -> None:
    def walled(y: Tensor) -> Tensor:  # a step of the first length would land beyond the wall
        return torch.where(y.sum() > 1.05, torch.inf, ((y - 1.0) ** 2).sum() * 100.0)

    found, _ = descend(walled, vector(0.9))
    assert math.isfinite(found.value)
    assert float(found.y) == pytest.approx(1.0, abs=1e-6)


def test_quasi_newton_remembers_its_history_only() -> None:
    optimizer, smooth = QuasiNewton(history=3), Smooth(rosenbrock)
    memory, point = optimizer.init(vector(-1.2, 1.0)), smooth.evaluate(vector(-1.2, 1.0))
    for _ in range(6):
        before = {name: part.clone() for name, part in memory.items()}
        new, after = optimizer.step(smooth.evaluate, point, memory)
        assert all(torch.equal(memory[name], before[name]) for name in memory)
        assert after["steps"].shape[0] <= 3
        assert new is not None
        point, memory = new, after


def torch_optimizers() -> list[Any]:
    found = [
        (torch.optim.SGD, {}),
        (torch.optim.SGD, {"momentum": 0.9}),
        (torch.optim.SGD, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.01}),
        (torch.optim.Adam, {"betas": (0.8, 0.99)}),
        (torch.optim.Adam, {"eps": 1e-3, "weight_decay": 0.1}),
        (torch.optim.Adam, {"amsgrad": True}),
        (torch.optim.AdamW, {}),
        (torch.optim.AdamW, {"weight_decay": 0.1}),
        (torch.optim.RMSprop, {"momentum": 0.5}),
        (torch.optim.Adagrad, {}),
        (torch.optim.NAdam, {}),
    ]
    if hasattr(torch.optim, "Muon"):
        found.append((torch.optim.Muon, {"momentum": 0.9}))
    return [pytest.param(*pair, id=f"{pair[0].__name__} {pair[1]}") for pair in found]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("is_constant", [False, True], ids=["schedule", "constant"])
@pytest.mark.parametrize(("optimizer", "options"), torch_optimizers())
def test_torch_is_the_optimizer_used_directly_bit_for_bit(
    optimizer: Any, options: Any, is_constant: bool, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(shape, generator=generator).to(dtype) for shape in ((3, 4), (2, 2))]
    grads = [[torch.randn(p.shape, generator=generator).to(dtype) for p in start] for _ in range(7)]
    rates = [0.1 if is_constant else 0.1 / (k + 1) for k in range(7)]
    direct = [torch.nn.Parameter(p.clone()) for p in start]
    reference = optimizer(direct, lr=rates[0], **options)
    adapter = Torch(optimizer, lr=rates[0] if is_constant else lambda k: rates[k], **options)
    variables, memory = [p.clone() for p in start], adapter.init(start)
    for k, grad in enumerate(grads):
        for group in reference.param_groups:
            group["lr"] = rates[k]
        for parameter, part in zip(direct, grad, strict=True):
            parameter.grad = part.clone()
        reference.step()
        kept = [v.clone() for v in variables], [g.clone() for g in grad]
        new, memory = adapter.step(variables, grad, memory)
        assert all(map(torch.equal, variables, kept[0]))
        assert all(map(torch.equal, grad, kept[1]))
        variables = new
        assert all(map(torch.equal, variables, direct))


ADAMS = [
    pytest.param(torch.optim.Adam, {}, id="Adam"),
    pytest.param(
        torch.optim.Adam, {"betas": (0.0, 0.5), "eps": 0.1, "weight_decay": 0.3}, id="decay"
    ),
    pytest.param(torch.optim.AdamW, {"betas": (0.5, 0.0)}, id="AdamW"),
    pytest.param(torch.optim.AdamW, {"weight_decay": 0, "max_norm": 0.5}, id="shortened"),
]


def leaves_of_many_kinds(dtype: torch.dtype, generator: torch.Generator) -> list[Tensor]:
    shapes = [(2, 3, 3, 3), (4, 3, 1, 1), (4, 1, 3, 3)]
    filters = [torch.randn(shape, generator=generator) for shape in shapes]
    parts = [
        *(part.to(memory_format=torch.channels_last) for part in filters),
        torch.randn((), generator=generator),
        torch.randn(5, 4, generator=generator).T,
    ]
    return [part.to(dtype) for part in parts]


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str
)
@pytest.mark.parametrize(("optimizer", "options"), ADAMS)
def test_adam_written_out_is_that_of_torch_bit_for_bit(
    optimizer: Any, options: Any, dtype: torch.dtype, tmp_path: Path
) -> None:
    """Those of `torch.optim`, asked for by an option that changes nothing, go on from its memory and the reverse."""
    generator = torch.Generator().manual_seed(0)
    ours, theirs = (
        Torch(optimizer, lr=lambda k: 0.1 / (k + 1), **options, **more)
        for more in ({}, {"foreach": False})
    )
    x = expected = leaves_of_many_kinds(dtype, generator)
    memory, other = ours.init(x), theirs.init(x)
    for k in range(8):
        grads = leaves_of_many_kinds(dtype, generator)
        grads[0] = grads[0].contiguous()  # in another layout than its variable
        kept = [part.clone() for part in (*x, *grads)]
        new, memory = (theirs if k == 5 else ours).step(x, grads, memory)
        assert all(map(torch.equal, (*x, *grads), kept))
        expected, other = theirs.step(expected, grads, other)
        for leaf, reference in zip(new, expected, strict=True):
            assert torch.equal(leaf, reference)
            assert (leaf.dtype, leaf.stride()) == (reference.dtype, reference.stride())
        for slot, reference in zip(memory["slots"], other["slots"], strict=True):
            assert slot.keys() == reference.keys()
            assert all(torch.equal(slot[name], reference[name]) for name in slot)
            assert all(slot[name].dtype == reference[name].dtype for name in slot)
            assert all(slot[name].stride() == reference[name].stride() for name in slot)
        save_state(tmp_path / "state.pt", State(new, [], memory=memory))
        state = load_state(tmp_path / "state.pt")
        x, memory = state.x, state.memory


def test_only_plain_adam_is_written_out() -> None:
    taken: list[Any] = []
    hook = register_optimizer_step_pre_hook(lambda optimizer, *_: taken.append(optimizer))
    x = [torch.ones(2)]
    options = [{"betas": (0.5, 0.9), "eps": 1e-3, "weight_decay": 0.1}]
    options += [{name: True} for name in ("amsgrad", "maximize", "foreach", "fused")]
    try:
        counts = []
        for some in options:
            adam = Torch(torch.optim.AdamW, lr=0.1, **some)
            adam.step(x, x, adam.init(x))
            counts.append(len(taken))
    finally:
        hook.remove()
    assert counts == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    "options",
    [{"betas": (1.0, 0.9)}, {"betas": (0.5, -0.1)}, {"eps": -1.0}, {"weight_decay": -1.0}],
)
def test_adam_out_of_range_is_refused_by_torch(options: Any) -> None:
    x = [torch.ones(2)]
    adam = Torch(torch.optim.Adam, lr=0.1, **options)
    with pytest.raises(ValueError, match="Invalid"):
        adam.step(x, x, adam.init(x))
    falling = Torch(torch.optim.Adam, lr=lambda _: -0.1)
    with pytest.raises(ValueError, match="Invalid learning rate"):
        falling.step(x, x, falling.init(x))


def test_torch_memory_of_the_past_is_not_written_into() -> None:
    adam = Torch(torch.optim.Adam, lr=0.1)
    x = [torch.ones(2)]
    _, first = adam.step(x, [torch.ones(2)], adam.init(x))
    kept = {name: value.clone() for name, value in first["slots"][0].items()}
    adam.step(x, [torch.full((2,), 5.0)], first)
    assert first["count"] == 1
    assert all(torch.equal(first["slots"][0][name], value) for name, value in kept.items())


def test_torch_minimizes_a_lower_problem_and_says_how_it_ended() -> None:
    smooth = Smooth(lambda y: ((y - 2.0) ** 2).sum())
    start = smooth.evaluate(torch.zeros(2).double())
    sgd = Torch(torch.optim.SGD, lr=0.4, max_steps=200)
    found = sgd.minimize(smooth, start, 1e-8)
    assert found.status is Status.CONVERGED
    torch.testing.assert_close(found.point.y, torch.full((2,), 2.0).double())
    short = replace_max_steps(sgd, 3).minimize(smooth, start, 1e-8)
    assert (short.status, short.steps) == (Status.MAX_STEPS, 3)
    early = sgd.minimize(smooth, start, stop=lambda point: point.value < 1.0)
    assert (early.status, early.point.value < 1.0) == (Status.CONVERGED, True)
    wild = Torch(torch.optim.SGD, lr=1e200, max_steps=10).minimize(smooth, start, 1e-8)
    assert wild.status is Status.NONFINITE


@pytest.mark.parametrize(
    "method",
    [
        Torch(torch.optim.SGD, lr=0.01, max_steps=20),
        Torch(torch.optim.SGD, lr=0.01, momentum=0.9, max_steps=20),
        Torch(torch.optim.SGD, lr=lambda step: 0.01 / (1 + step), momentum=0.9, max_steps=20),
        Torch(torch.optim.SGD, lr=0.01, momentum=0.9, nesterov=True, max_steps=20),
        Torch(torch.optim.Adam, lr=lambda step: 0.1 / (1 + step), amsgrad=True, max_steps=20),
        Torch(torch.optim.Rprop, lr=0.01, max_norm=0.5, max_steps=20),
    ],
    ids=["plain", "momentum", "scheduled", "nesterov", "schedule", "shortened"],
)
def test_torch_minimizes_by_its_own_steps_bit_for_bit(method: Torch) -> None:
    smooth = Smooth(logistic)
    start = smooth.evaluate(torch.full((10,), 0.5).double())
    y, memory = [start.y], method.init([start.y])
    for _ in range(20):
        y, memory = method.step(y, [smooth.evaluate(y[0]).grad], memory)
    found = method.minimize(smooth, start)
    assert torch.equal(found.point.y, y[0])
    assert torch.equal(start.y, torch.full((10,), 0.5).double())


def test_torch_shortens_a_step_out_of_the_domain() -> None:
    smooth = Smooth(lambda y: torch.where(y < 1.0, -5.0 * y - torch.log(1.0 - y), torch.inf).sum())
    start = smooth.evaluate(torch.full((1,), -3.0).double())
    found = Torch(torch.optim.SGD, lr=2.0, max_steps=1).minimize(smooth, start)
    assert found.point.value < start.value
    assert -3.0 < float(found.point.y) < 1.0


def test_fused_torch_optimizer_takes_gradients_of_any_layout() -> None:
    adam, fused = Torch(torch.optim.AdamW, lr=0.1), Torch(torch.optim.AdamW, lr=0.1, fused=True)
    x, grad = [torch.zeros(2, 3)], [torch.arange(6.0).reshape(3, 2).T]
    expected, _ = adam.step(x, grad, adam.init(x))
    got, _ = fused.step(x, grad, fused.init(x))
    torch.testing.assert_close(got, expected)


def replace_max_steps(adapter: Torch, steps: int) -> Torch:
    return Torch(adapter.optimizer, lr=adapter.lr, max_steps=steps, **adapter.options)


def test_equal_settings_make_equal_parts() -> None:
    assert Newton() == Newton(max_steps=100)
    assert replace(Newton(), max_steps=7).max_steps == 7
    assert Torch(torch.optim.SGD, lr=0.1) == Torch(torch.optim.SGD, lr=0.1)
    assert np.isclose(Torch(torch.optim.SGD, lr=lambda k: 0.5**k).rate(3), 0.125)


def test_torch_shortens_long_gradients_only() -> None:
    clipped = Torch(torch.optim.SGD, lr=1.0, max_norm=1.0)
    start = [torch.zeros(2, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)]
    long = [torch.tensor([3.0, 0.0]).double(), torch.tensor([4.0]).double()]
    new, memory = clipped.step(start, long, clipped.init(start))
    torch.testing.assert_close(torch.cat(new), torch.tensor([-0.6, 0.0, -0.8]).double())
    short = [grad / 10.0 for grad in long]
    new, _ = clipped.step(start, short, memory)
    torch.testing.assert_close(torch.cat(new), -torch.cat(short))
    new, _ = clipped.step(start, [torch.zeros_like(leaf) for leaf in start], memory)
    assert not torch.cat(new).any()


def test_newton_leaves_a_saddle_whose_basin_is_narrow() -> None:
    """y^4 - 2 s^2 y^2 has its minima at s and -s; a step of length one from its maximum at 0 goes up."""
    s = 1e-2
    fun = Smooth(lambda y: (y**4 - 2.0 * s**2 * y**2).sum())
    found = Newton().minimize(fun, fun.evaluate(torch.zeros(1).double()), 1e-14)
    assert found.status is Status.CONVERGED
    assert abs(float(found.point.y)) == pytest.approx(s, rel=1e-6)


def test_newton_with_one_product_a_step_is_steepest_descent_and_converges() -> None:
    scale = torch.tensor([1.0, 3.0]).double()
    fun = Smooth(lambda y: 0.5 * (scale * (y - 2.0) ** 2).sum())
    start = fun.evaluate(torch.zeros(2).double())
    found = Newton(dense_limit=0, cg_steps=1, max_steps=100).minimize(fun, start, 1e-8)
    assert found.status is Status.CONVERGED
    torch.testing.assert_close(found.point.y, torch.full((2,), 2.0).double())
    assert fun.products <= found.steps + 1


def ball(x: Tensor) -> Tensor:
    return x / max(1.0, float(x.norm()))


def test_quasi_newton_makes_no_step_where_the_gradient_vanishes() -> None:
    def evaluate(y: Tensor) -> Point:
        return Point(y, float(y @ y), 2.0 * y)

    zero = torch.zeros(2).double()
    method = QuasiNewton()
    assert method.step(evaluate, evaluate(zero), method.init(zero), ball)[0] is None


def test_quasi_newton_gives_up_after_its_trials() -> None:
    """Every trial but the start is infinite."""
    start = torch.full((2,), 0.5).double()

    def evaluate(y: Tensor) -> Point:
        return Point(y, 0.5 if torch.equal(y, start) else math.inf, torch.ones_like(y))

    method = QuasiNewton(max_trials=3)
    point, memory = method.step(evaluate, evaluate(start), method.init(start), ball)
    assert point is None
    assert not len(memory["steps"])
