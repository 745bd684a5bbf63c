import gc
import math
import re
import weakref
from typing import Any

import pytest
import torch
from cases import reduced
from torch import Tensor

import bilevel as bl
from bilevel.testing.problems import quadratic


def torch_through_the_loop(
    problem: bl.BilevelProblem, x: Tensor, y: Tensor, steps: int, constant: int, lr: float
) -> Tensor:
    """torch differentiates a plain loop, whose first steps it does not see."""
    x = x.clone().requires_grad_()
    v = y.clone().requires_grad_()
    for t in range(steps):
        (grad,) = torch.autograd.grad(problem.lower(x, v, None), v, create_graph=True)
        v = v - lr * grad
        if t < constant:
            v = v.detach().requires_grad_()
    return torch.autograd.grad(problem.upper(x, v, None), x)[0]


def wavy(x: Tensor, y: Tensor, data: Any) -> Tensor:
    return (torch.sin(y) * x[0]).sum() + 0.5 * (y**2).sum() + y[0] * y[1] * x[1]


WAVY = bl.BilevelProblem(lambda x, y, data: (y**3).sum() + (x * x).sum() * y[0], wavy)
X, Y = torch.tensor([0.5, -0.4]).double(), torch.tensor([0.3, 0.9, -0.2]).double()


@pytest.mark.parametrize("mode", ["reverse", "forward"])
@pytest.mark.parametrize("truncate", [None, 1, 3, 7, 50])
def test_both_modes_are_torch_through_its_own_loop(mode: Any, truncate: int | None) -> None:
    method = bl.Unrolled(7, lr=0.2, truncate=truncate, mode=mode)
    estimate = method.estimate(WAVY, X, Y)
    constant = 0 if truncate is None else max(0, 7 - truncate)
    exact = torch_through_the_loop(WAVY, X, Y, 7, constant, 0.2)
    torch.testing.assert_close(estimate.grad, exact, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("steps", [1, 2, 3, 10, 17, 50])
@pytest.mark.parametrize("truncate", [None, 7])
@pytest.mark.parametrize("memory", [0, 1, 300, 1000, 2**26, 2**40])
def test_gradient_is_the_same_with_any_memory(
    steps: int, truncate: int | None, memory: int
) -> None:
    def lower(x: Tensor, y: Any, data: Tensor) -> Tensor:
        return wavy(x, torch.cat([y["a"].reshape(-1), y["b"]]), None) + (data * y["b"]).sum()

    def upper(x: Tensor, y: Any, data: Tensor) -> Tensor:
        return (y["b"] ** 3).sum() + (x * x).sum() * y["a"].sum() * data.sum()

    problem = bl.BilevelProblem(upper, lower)
    y = {"a": Y[None, :2], "b": Y[2:]}
    batch = bl.Batch(upper=torch.ones(3).double(), lower=torch.full((1,), 0.3).double())
    ends = [
        bl.hypergradient(
            problem, X, y, bl.Unrolled(steps, lr=0.2, truncate=truncate, **room), batch
        )
        for room in ({}, {"graph_memory": memory})
    ]
    torch.testing.assert_close(ends[0].grad, ends[1].grad, rtol=1e-12, atol=1e-13)
    assert all(torch.equal(ends[0].y[name], ends[1].y[name]) for name in y)


def test_vectors_and_trees_of_other_dtypes_take_the_same_steps() -> None:
    """Leaves of float32 beside float64 are stepped in the wider of the two, as one vector."""
    problem = bl.BilevelProblem(
        lambda x, y, data: (y["a"].double() ** 2).sum() + (y["b"] ** 2).sum(),
        lambda x, y, data: ((y["a"] - x) ** 2).sum().double() + ((y["b"] - 2.0 * x) ** 2).sum(),
    )
    x = torch.ones(1).double()
    y = {"a": torch.zeros(2), "b": torch.zeros(2, 2).double()}
    found = bl.hypergradient(problem, x, y, bl.Unrolled(100, lr=0.2))
    assert found.grad.item() == pytest.approx(2 * 2.0 + 4 * 8.0, rel=1e-6)
    assert [leaf.dtype for leaf in found.y.values()] == [torch.float32, torch.float64]


@pytest.mark.parametrize("truncate", [1, 5, 20])
def test_truncation_is_off_by_its_rate(truncate: int) -> None:
    """f = (y - 3 x)^2 / 2: dy_T/dx = 3 (1 - (1 - a)^K) whatever happened before the last K steps."""
    a, x = 0.3, torch.ones(1).double()
    problem = bl.BilevelProblem(
        lambda x, y, data: 0.5 * ((y - 1.0) ** 2).sum(),
        lambda x, y, data: 0.5 * ((y - 3.0 * x) ** 2).sum(),
    )
    for mode in ("reverse", "forward"):
        method = bl.Unrolled(100, lr=a, truncate=truncate, mode=mode)
        grad = method.estimate(problem, x, 0.0 * x).grad
        assert float(grad) == pytest.approx(2.0 * 3.0 * (1.0 - (1.0 - a) ** truncate), rel=1e-12)


class Living:
    """f, and the largest number of its iterates that were in memory at once."""

    def __init__(self, n: int) -> None:
        self.known: weakref.WeakSet[Any] = weakref.WeakSet()
        self.most = 0
        self.scale = torch.linspace(0.5, 1.0, n).double()

    def __call__(self, x: Tensor, y: Tensor, data: Any) -> Tensor:
        self.known.add(y.untyped_storage())
        self.most = max(self.most, len(self.known))
        return 0.5 * (self.scale * (y - x) ** 2).sum()


def most_iterates_alive(steps: int, **options: Any) -> int:
    n = 2000
    lower = Living(n)
    problem = bl.BilevelProblem(lambda x, y, data: (y**2).sum(), lower)
    gc.collect()
    bl.Unrolled(steps, lr=0.1, graph_memory=0, **options).estimate(
        problem, torch.ones(1).double(), torch.zeros(n).double()
    )
    return lower.most


def test_memory_grows_as_the_root_of_the_steps() -> None:
    few, many = most_iterates_alive(100), most_iterates_alive(1600)
    assert few <= 2 * 10 + 8
    assert many <= 2 * 40 + 8


def test_truncated_memory_does_not_grow_with_the_steps() -> None:
    assert most_iterates_alive(400, truncate=4) <= 2 * 4 + 4


def test_forward_mode_keeps_nothing_of_its_steps() -> None:
    n = 2000
    alive: list[int] = []

    def upper(x: Tensor, y: Tensor, data: Any) -> Tensor:  # called once, after the last step
        tensors = [o for o in gc.get_objects() if type(o) is Tensor]
        alive.append(sum(o.numel() == n for o in tensors))
        return (y**2).sum()

    problem = bl.BilevelProblem(upper, lambda x, y, data: 0.5 * ((y - x) ** 2).sum())
    for steps in (5, 50):
        method = bl.Unrolled(steps, lr=0.1, mode="forward")
        gc.collect()
        method.estimate(problem, torch.ones(1).double(), torch.zeros(n).double())
    assert alive[1] <= alive[0] <= 6


@pytest.mark.parametrize("steps", [100, 900])
@pytest.mark.parametrize("graphs", [0, 1, 10, 40])
def test_memory_is_that_for_graphs_and_the_root_of_the_steps(steps: int, graphs: int) -> None:
    x, y = torch.ones(1).double(), torch.zeros(2000).double()
    problem = bl.BilevelProblem(lambda x, y, data: (y**2).sum(), Living(2000))
    memory = graphs * 3 * y.nbytes  # a graph holds y, y - x and twice that
    method = bl.Unrolled(steps, lr=0.1, graph_memory=memory)
    with bl.diagnostics.LiveMemory() as live:
        method.estimate(problem, x, y)
    at_work = 10 * y.nbytes  # one graph at least, and a product by it
    assert live.peak <= memory + 2 * math.ceil(math.sqrt(steps)) * y.nbytes + at_work


def test_memory_for_all_graphs_evaluates_nothing_twice() -> None:
    x, y = torch.ones(1).double(), torch.zeros(2000).double()
    problem = bl.BilevelProblem(lambda x, y, data: (y**2).sum(), Living(2000))
    count = bl.Unrolled(1600, lr=0.1, graph_memory=2**40).estimate(problem, x, y).evaluations
    assert (count.lower_grad, count.hvp, count.upper_grad) == (1600 + 1, 3200, 1)


@pytest.mark.parametrize(
    ("steps", "graphs", "again"),
    [
        (1, 0, 1),
        (1, 2, 0),
        (6, 0, 6),  # few enough to keep all iterates
        (17, 0, 13 + 17),  # iterates 0, 5, 10, 15 are kept: those between first, then all graphs
        (17, 1, 12 + 16),  # iterates 0, 4, 8, 12
        (17, 2, 15),  # from iterates 0, 2, 4, ..., two graphs at a time
        (17, 5, 12),
        (17, 16, 1),
        (17, 2**10, 0),
        (100, 0, 90 + 100),
        (100, 4, (4 * 16 + 12) + 96),  # from iterates 0, 20, ..., 80, four graphs at a time
        (100, 5, 95),
    ],
)
def test_what_is_computed_again_is_counted(steps: int, graphs: int, again: int) -> None:
    x, y = torch.ones(1).double(), torch.zeros(2000).double()
    problem = bl.BilevelProblem(lambda x, y, data: (y**2).sum(), Living(2000))
    memory = graphs * 3 * y.nbytes  # a graph holds y, y - x and twice that; they share the scale
    count = bl.Unrolled(steps, graph_memory=memory).estimate(problem, x, y).evaluations
    assert count.lower_grad == steps + again + 1  # down, up, and the residual
    assert count.hvp == 2 * steps
    assert count.upper_grad == 1


def test_small_graphs_are_kept_and_large_ones_built_again() -> None:
    """The graph of a step holds arrays of the data's size: those of ten steps take more than 64 MiB."""
    counts = []
    for samples in (100, 2**20):
        data = torch.linspace(0.0, 1.0, samples).double()
        problem = bl.BilevelProblem(
            lambda x, y, data: (y**2).sum(),
            lambda x, y, data: (torch.cos(data * y) * x).mean() + y @ y,
        )
        x, y = torch.ones(1).double(), torch.ones(1).double()
        counts.append(bl.Unrolled(10).estimate(problem, x, y, data).evaluations)
    assert [count.lower_grad for count in counts] == [10 + 1, 10 + 9 + 1]
    assert [count.hvp for count in counts] == [20, 20]


def test_graph_that_cannot_be_measured_is_built_again() -> None:
    """Transformations of torch.func take no hooks: the first step is evaluated once more without them."""

    def lower(x: Tensor, y: Tensor, data: Any) -> Tensor:
        slope = torch.func.grad(lambda v: (v**3).sum() / 3.0)(y)
        return 0.5 * ((slope - x) ** 2).sum()

    problem = bl.BilevelProblem(lambda x, y, data: (y**2).sum(), lower)
    x, y = torch.full((2,), 1.3).double(), torch.ones(2).double()
    found = bl.Unrolled(200, lr=0.1).estimate(problem, x, y)
    exact = torch.ones(2).double()  # y = sqrt(x), so F is the sum of x
    torch.testing.assert_close(found.grad, exact)
    assert found.evaluations.lower == 1 + 200 + 200 + 1


@pytest.mark.parametrize(("mode", "products"), [("reverse", 6), ("forward", 6)])
def test_cost_of_the_truncated_modes(mode: Any, products: int) -> None:
    count = bl.Unrolled(8, lr=0.2, truncate=3, mode=mode).estimate(WAVY, X, Y).evaluations
    assert count.hvp == products  # two a step up, or one a step and upper variable
    assert count.lower_grad == 8 + 1


@pytest.mark.parametrize("mode", ["reverse", "forward"])
@pytest.mark.parametrize("steps", [3, 10, 20])
def test_too_few_steps_are_unsolved(steps: int, mode: Any) -> None:
    case = quadratic()
    estimate = bl.Unrolled(steps, lr=0.1, mode=mode).estimate(case.problem, case.x0, case.y0)
    exact = torch.func.grad(reduced(case.problem, case.y0))(case.x0)
    assert float((estimate.grad - exact).norm() / exact.norm()) > 1e-3
    assert estimate.status is bl.Status.LOWER_UNSOLVED


@pytest.mark.parametrize("mode", ["reverse", "forward"])
@pytest.mark.parametrize(
    ("steps", "status"), [(30, bl.Status.LOWER_UNSOLVED), (400, bl.Status.NONFINITE)]
)
def test_divergence_is_said_before_and_after_it_overflows(
    steps: int, status: bl.Status, mode: Any
) -> None:
    case = quadratic()  # eigenvalues from 1 to 10: a step of 0.25 is too long
    estimate = bl.Unrolled(steps, lr=0.25 if steps == 30 else 1.5, mode=mode).estimate(
        case.problem, case.x0, case.y0
    )
    assert estimate.status is status


def test_divergence_after_a_solved_problem_is_not_hidden_by_the_first_gradient() -> None:
    case = quadratic()
    solved = bl.Unrolled(200, lr=0.15).estimate(case.problem, case.x0, case.y0)
    memory = dict(solved.memory)
    near = case.x0 + 1e-4
    diverging = bl.Unrolled(8, lr=0.25).estimate(case.problem, near, solved.y, None, memory)
    assert diverging.status is bl.Status.LOWER_UNSOLVED


def test_few_steps_from_a_solved_start_are_enough() -> None:
    case = quadratic()
    solved = bl.Unrolled(200, lr=0.15).estimate(case.problem, case.x0, case.y0)
    again = bl.Unrolled(5, lr=0.15).estimate(
        case.problem, case.x0, solved.y, None, dict(solved.memory)
    )
    assert again.status is bl.Status.CONVERGED


def test_forward_mode_over_trees() -> None:
    problem = bl.BilevelProblem(
        lambda x, y, data: (y["a"] ** 2).sum() + (y["b"] * x[0]).sum(),
        lambda x, y, data: ((y["a"] - x[0]) ** 2).sum() + ((y["b"] - x[1]) ** 2).sum(),
        per_sample=False,
    )
    x = [torch.tensor(1.5).double(), torch.tensor([2.0, 1.0]).double()]
    y = {"a": torch.zeros(1).double(), "b": torch.zeros(1, 2).double()}
    found = bl.hypergradient(problem, x, y, bl.Unrolled(100, lr=0.2, mode="forward"))
    # F = x0^2 + x0 (x1[0] + x1[1]) at the solution
    assert float(found.grad[0]) == pytest.approx(2 * 1.5 + 3.0, rel=1e-9)
    assert found.grad[1].tolist() == pytest.approx([1.5, 1.5], rel=1e-9)


def test_forward_mode_takes_the_mean_of_the_samples() -> None:
    problem = bl.BilevelProblem(
        lambda x, y, data: (y**2).sum(), lambda x, y, data: (y - x * data) ** 2, per_sample=True
    )
    x, y, data = torch.ones(1).double(), torch.zeros(1).double(), torch.tensor([1.0, 3.0]).double()
    grads = [
        bl.Unrolled(50, lr=0.4, mode=mode).estimate(problem, x, y, data).grad
        for mode in ("reverse", "forward")
    ]
    assert float(grads[0]) == pytest.approx(8.0, rel=1e-9)  # y = 2 x
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"truncate": 0}, "`Unrolled(truncate=...)` must be at least 1. Got truncate=0"),
        (
            {"mode": "both"},
            '`Unrolled(mode=...)` must be "reverse" or "forward". Got mode=\'both\'',
        ),
        (
            {"graph_memory": -1},
            "`Unrolled(graph_memory=...)` must be at least 0. Got graph_memory=-1",
        ),
        ({"lr": 0.0}, "`Unrolled(lr=...)` must be a finite number > 0. Got lr=0.0"),
    ],
)
def test_bad_parameter_is_named(options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        bl.Unrolled(**options)


def test_truncation_says_what_it_leaves_out() -> None:
    """f = a |y - x|^2 / 2: the cotangent shrinks by 1 - lr a a step, and so does the relative error."""
    problem = bl.BilevelProblem(
        lambda x, y, data: 0.5 * ((y - 1.0) ** 2).sum(),
        lambda x, y, data: 0.05 * ((y - x) ** 2).sum(),
    )
    x, y = torch.full((2,), 3.0).double(), torch.zeros(2).double()
    for truncate in (5, 50):
        cut = bl.hypergradient(problem, x, y, bl.Unrolled(2000, lr=0.5, truncate=truncate))
        assert cut.status is bl.Status.CONVERGED
        assert cut.info["truncated"] == pytest.approx(0.95**truncate, rel=1e-10)
        torch.testing.assert_close(cut.grad, 2.0 * (1.0 - 0.95**truncate) * torch.ones(2).double())
    assert "truncated" not in bl.hypergradient(problem, x, y, bl.Unrolled(100, lr=0.5)).info
