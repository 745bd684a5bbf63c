"""Each user mistake is met with the rule, what was got, and what to change."""

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import bilevel as bl

X, Y = torch.zeros(2, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)


def upper(x: Any, y: Any, data: Any) -> torch.Tensor:
    return ((y - 1.0) ** 2).sum() + (x**2).sum()


def lower(x: Any, y: Any, data: Any) -> torch.Tensor:
    return ((y - x.sum()) ** 2).sum()


CALLS = itertools.count(1)
GOOD = bl.BilevelProblem(upper, lower)


def solve(
    upper: Any = upper, lower: Any = lower, x0: Any = X, y0: Any = Y, **options: Any
) -> Callable[[], object]:
    """A call that solves a problem of which one part is wrong."""

    def call() -> object:
        problem = bl.BilevelProblem(upper, lower, **options)
        return bl.solve(problem, bl.ASBLO(), x0, y0, max_steps=2)

    return call


def cut(lower: Any, **options: Any) -> Callable[[], object]:
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    return lambda: bl.from_module(
        net, lower, lambda net, data: net(data), lambda net, data: data, **options
    )


def resumed_with_adam() -> object:
    problem = bl.BilevelProblem(upper, lower)
    state = next(bl.iterate(problem, bl.HypergradientDescent(bl.Implicit()), X, Y))
    adam = bl.optim.Torch(torch.optim.Adam, lr=0.1)
    other = bl.HypergradientDescent(bl.Implicit(), upper_optimizer=adam)
    return next(bl.iterate(problem, other, state=state))


MISTAKES: dict[str, tuple[Callable[[], object], type[Exception], list[str]]] = {
    "upper is no scalar": (
        solve(upper=lambda x, y, d: (y - 1.0) ** 2 + x.sum()),
        bl.ObjectiveError,
        ["`BilevelProblem(upper=...)` must return a scalar", "shape (3,)", ".sum()"],
    ),
    "lower is no scalar": (
        solve(lower=lambda x, y, d: (y - x.sum()) ** 2),
        bl.ObjectiveError,
        ["`BilevelProblem(lower=...)` must return a scalar", "shape (3,)", ".sum()"],
    ),
    "objective returns a float": (
        solve(upper=lambda x, y, d: float(y.detach().sum())),
        bl.ObjectiveError,
        ["must return a scalar tensor", "Got float", "torch"],
    ),
    "objective is no function": (
        lambda: bl.BilevelProblem(upper, 3.0),  # pyright: ignore[reportArgumentType]
        TypeError,
        ["`BilevelProblem(lower=...)` must be callable", "Got float", "Pass a function"],
    ),
    "objective of other shapes": (
        solve(lower=lambda x, y, d: ((y - x) ** 2).sum()),
        RuntimeError,
        ["size of tensor"],
    ),
    "x is an integer tensor": (
        solve(x0=torch.zeros(2, dtype=torch.int64)),
        bl.StructureError,
        ["`x0` must be a floating-point tensor", "torch.int64", "Convert"],
    ),
    "y is a list of floats": (
        solve(y0=[0.0, 1.0]),
        bl.StructureError,
        ["`y0[0]` must be a tensor", "Got float", "torch.tensor"],
    ),
    "x is empty": (
        solve(x0={}),
        bl.StructureError,
        ["`x0` must hold at least one tensor", "empty tree", "Pass a tensor"],
    ),
    "x used by no objective": (
        solve(upper=lambda x, y, d: (y**2).sum(), lower=lambda x, y, d: ((y - 1.0) ** 2).sum()),
        bl.ObjectiveError,
        ["must depend on every leaf of x", "`x0`", "leave it out of x0"],
    ),
    "a leaf of x used by no objective": (
        solve(
            upper=lambda x, y, d: (y**2).sum(),
            lower=lambda x, y, d: ((y - x["a"].sum()) ** 2).sum(),
            x0={"a": X, "b": X},
        ),
        bl.ObjectiveError,
        ["every leaf of x", "`x0['b']`", "leave it out"],
    ),
    "y not used by lower": (
        solve(lower=lambda x, y, d: (x**2).sum()),
        bl.ObjectiveError,
        ["`BilevelProblem(lower=...)` must depend on every leaf of y", "`y0`", "lower objective"],
    ),
    "y not used by upper": (
        solve(upper=lambda x, y, d: (x**2).sum()),
        bl.ObjectiveError,
        ["`BilevelProblem(upper=...)` must depend on y", "no dependence", "one level"],
    ),
    "box upside down": (
        lambda: bl.Box(1.0, 0.0),
        ValueError,
        ["low <= high", "low=1.0", "Swap"],
    ),
    "box of another shape": (
        solve(domain=bl.Box(torch.zeros(5), torch.ones(5))),
        bl.StructureError,
        ["must broadcast to the shape of x", "(5,)", "Use a number"],
    ),
    "kappa out of range": (
        lambda: bl.ASBLO(kappa=0.0),
        ValueError,
        ["`ASBLO(kappa=...)` must be a finite number > 0", "kappa=0.0", "Leave it out"],
    ),
    "kappa of the barrier out of range": (
        lambda: bl.barriers.log_rational(-1.0),
        ValueError,
        ["`log_rational(kappa=...)` must be", "kappa=-1.0", "Pass"],
    ),
    "schedule is a number": (
        lambda: bl.ASBLO(sigma=0.1),  # pyright: ignore[reportArgumentType]
        TypeError,
        ["`ASBLO(sigma=...)` must be a schedule", "Got 0.1", "schedules.constant"],
    ),
    "optimizer is an instance": (
        lambda: bl.optim.Torch(torch.optim.SGD([X.clone()], lr=0.1), lr=0.1),  # pyright: ignore[reportArgumentType]
        TypeError,
        ["must be a class of `torch.optim`", "Got SGD", "Pass the class"],
    ),
    "optimizer is not wrapped": (
        lambda: bl.ASBLO(upper_optimizer=torch.optim.Adam),  # pyright: ignore[reportArgumentType]
        TypeError,
        ["`ASBLO(upper_optimizer=...)` must be a `bilevel.optim.Torch`", "Got type", "Wrap"],
    ),
    "learning rate is negative": (
        lambda: bl.optim.Torch(torch.optim.SGD, lr=-0.1),
        ValueError,
        ["`Torch(lr=...)` must be a finite number > 0", "lr=-0.1", "Use"],
    ),
    "max_norm is zero": (
        lambda: bl.optim.Torch(torch.optim.SGD, lr=0.1, max_norm=0.0),
        ValueError,
        ["`Torch(max_norm=...)` must be a finite number > 0", "max_norm=0.0", "leave it out"],
    ),
    "unknown multiplier": (
        lambda: bl.ASBLO(multiplier="gaps"),  # pyright: ignore[reportArgumentType]
        ValueError,
        ['must be "slack" or "gap"', "'gaps'", "Use"],
    ),
    "no steps": (
        lambda: bl.solve(GOOD, bl.ASBLO(), X, Y, max_steps=0),
        ValueError,
        ["`solve(max_steps=...)` must be at least 1", "max_steps=0", "Raise it"],
    ),
    "no batches": (
        lambda: bl.solve(GOOD, bl.ASBLO(), X, Y, [], max_steps=1),
        ValueError,
        ["must hold at least one batch", "Got none", "leave it out"],
    ),
    "a start and a state": (
        lambda: bl.iterate(GOOD, bl.ASBLO(), X, Y, state=bl.State(X, Y)),
        bl.StructureError,
        ["either x0 and y0, or state", "Got both", "Leave out one"],
    ),
    "neither a start nor a state": (
        lambda: bl.iterate(GOOD, bl.ASBLO()),
        bl.StructureError,
        ["either x0 and y0, or state", "Got neither"],
    ),
    "quasi-Newton on batches": (
        lambda: bl.solve(GOOD, bl.HypergradientDescent(bl.Implicit()), X, Y, [None], max_steps=1),
        ValueError,
        ["must be a `Torch` where batches are given", "Got QuasiNewton", "Use"],
    ),
    "a constraint that is a condition": (
        solve(lower_constraint=lambda x, y, d: y < 1.0),
        bl.ObjectiveError,
        [
            "`BilevelProblem(lower_constraint=...)` must return a floating",
            "Got torch.bool",
            "y - 1.0",
        ],
    ),
    "a constraint on batches": (
        lambda: bl.solve(
            bl.BilevelProblem(upper, lower, lower_constraint=lambda x, y, d: y - 1.0),
            bl.ASBLO(),
            X,
            Y,
            [None],
            max_steps=1,
        ),
        ValueError,
        ["no `BilevelProblem(lower_constraint=...)`", "Got one", "Put"],
    ),
    "per_sample without samples": (
        solve(per_sample=True),
        bl.ObjectiveError,
        ["one loss a sample, shape (n,)", "shape ()", "Drop"],
    ),
    "inference mode": (
        lambda: torch.inference_mode()(solve())(),
        bl.ObjectiveError,
        ["outside `torch.inference_mode()`", "Got a call inside it", "Leave that context"],
    ),
    "pattern that matches nothing": (
        cut(["2.*"]),
        bl.StructureError,
        ["2.*"],
    ),
    "pattern that matches all": (cut(["*"]), bl.StructureError, ["*"]),
    "pattern that is a string": (cut("1.*"), TypeError, ["1.*"]),
    "no slack and no theta": (
        lambda: bl.ValueFunction(epsilon=0.0),
        ValueError,
        [
            "`ValueFunction(epsilon=...)` must be > 0 where theta is None",
            "epsilon=0.0",
            "give theta",
        ],
    ),
    "no unrolled step": (
        lambda: bl.Unrolled(max_steps=0),
        ValueError,
        ["`Unrolled(max_steps=...)` must be at least 1", "max_steps=0", "Raise it"],
    ),
    "solver is a class": (
        lambda: bl.solve(GOOD, bl.ASBLO, X, Y, max_steps=1),  # pyright: ignore[reportArgumentType]
        TypeError,
        [
            "`iterate(solver=...)` must be an instance of `Solver`",
            "the class ASBLO",
            "`ASBLO(...)`",
        ],
    ),
    "estimator for a solver": (
        lambda: bl.solve(GOOD, bl.Implicit(), X, Y, max_steps=1),  # pyright: ignore[reportArgumentType]
        TypeError,
        [
            "`iterate(solver=...)` must be an instance of `Solver`",
            "Got Implicit",
            "HypergradientDescent",
        ],
    ),
    "problem is a function": (
        lambda: bl.solve(upper, bl.ASBLO(), X, Y, max_steps=1),  # pyright: ignore[reportArgumentType]
        TypeError,
        ["must be an instance of `BilevelProblem`", "Got function", "BilevelProblem(upper, lower)"],
    ),
    "solver for an estimator": (
        lambda: bl.HypergradientDescent(bl.ASBLO()),  # pyright: ignore[reportArgumentType]
        TypeError,
        [
            "`HypergradientDescent(estimator=...)` must be an instance of `Estimator`",
            "Got ASBLO",
            "Implicit",
        ],
    ),
    "a part of another kind": (
        lambda: bl.Implicit(bl.optim.Newton()),  # pyright: ignore[reportArgumentType]
        TypeError,
        ["`Implicit(linear=...)` must be an instance of `LinearSolver`", "Got Newton", "linear.CG"],
    ),
    "x without entries": (
        solve(x0=torch.zeros(0, dtype=torch.float64)),
        bl.StructureError,
        ["`x0` must hold at least one number", "(0,)", "Pass"],
    ),
    "one batch for a stream of them": (
        lambda: bl.solve(GOOD, bl.ASBLO(), X, Y, bl.Batch(1, 2), max_steps=1),
        TypeError,
        ["`solve(batches=...)` must be an iterable", "Got one Batch", "Pass a list"],
    ),
    "a tensor for a stream of batches": (
        lambda: bl.solve(GOOD, bl.ASBLO(), X, Y, torch.zeros(3), max_steps=1),
        TypeError,
        ["`solve(batches=...)` must be an iterable", "Got one Tensor", "Pass a list"],
    ),
    "a state of no run": (
        lambda: bl.iterate(GOOD, bl.ASBLO(), state=bl.State(X, Y)),
        bl.StructureError,
        ["must go on in the way the state was made", "Got a state of no run", "start anew"],
    ),
    "a full-batch state on batches": (
        lambda: bl.iterate(
            GOOD, bl.ASBLO(), batches=[None], state=next(bl.iterate(GOOD, bl.ASBLO(), X, Y))
        ),
        bl.StructureError,
        ["Got a state of ASBLO on the full batch for ASBLO on batches", "Pass the same solver"],
    ),
    "half a step": (
        lambda: bl.solve(GOOD, bl.ASBLO(), X, Y, max_steps=1.5),  # pyright: ignore[reportArgumentType]
        TypeError,
        ["`solve(max_steps=...)` must be an instance of `int`", "Got float", "whole number"],
    ),
    "a domain that is no projection": (
        solve(domain=lambda x: x + 1.0),
        bl.ObjectiveError,
        ["`BilevelProblem(domain=...)` must project x", "moves on", "nearest point"],
    ),
    "a domain that gives NaN": (
        solve(domain=lambda x: x / 0.0),
        bl.ObjectiveError,
        ["`BilevelProblem(domain=...)` must project x", "NaN", "nearest point"],
    ),
    "a schedule that does not fall": (
        lambda: bl.solve(GOOD, bl.ASBLO(mu=bl.schedules.constant(0.1)), X, Y, max_steps=1),
        ValueError,
        ["`ASBLO(mu=...)` must fall to zero", "Got 0.1 at stage 0", "schedules.geometric"],
    ),
    "a start that is not finite": (
        solve(x0=X + torch.nan),
        bl.BilevelError,
        ["not finite: x0", "Start elsewhere"],
    ),
    "objective of two arguments": (
        lambda: bl.BilevelProblem(lambda x, y: (y**2).sum(), lower),  # pyright: ignore[reportArgumentType]
        bl.ObjectiveError,
        ["must be callable as `upper(x, y, data)`", "Got a function of (x, y)", "Add `data`"],
    ),
    "domain of two arguments": (
        lambda: bl.BilevelProblem(upper, lower, domain=lambda x, y: x),  # pyright: ignore[reportArgumentType]
        bl.ObjectiveError,
        ["must be callable as `domain(x)`", "Got a function of (x, y)", "Take x alone"],
    ),
    "a constraint that changes its size": (
        solve(lower_constraint=lambda x, y, d: y[: next(CALLS)] - 1.0),
        bl.ObjectiveError,
        [
            "`BilevelProblem(lower_constraint=...)` must return as many entries at each call",
            "Got 1, and then 2",
            "torch.where",
        ],
    ),
    "a constraint whose size follows y": (
        solve(upper_constraint=lambda x, y, d: y[y < 0.3] - 1.0),
        bl.ObjectiveError,
        ["`BilevelProblem(upper_constraint=...)` must return as many entries", "Got 3, and then 0"],
    ),
    "a constraint with an entry of -inf": (
        solve(lower_constraint=lambda x, y, d: torch.cat([y - 1.0, y[:1] - torch.inf])),
        bl.ObjectiveError,
        ["must have finite entries at x0, y0", "Got -inf in its entries [3]", "Leave out"],
    ),
    "a start of one part": (
        lambda: bl.solve(GOOD, bl.ASBLO(), X, Y, max_steps=1, starts=[(X,)]),  # pyright: ignore[reportArgumentType]
        bl.StructureError,
        ["`solve(starts=...)[0]` must be a pair (x, y)", "Got a tuple of 1", "list of pairs"],
    ),
    "one pair for a list of them": (
        lambda: bl.solve(GOOD, bl.ASBLO(), X, Y, max_steps=1, starts=(X, Y)),  # pyright: ignore[reportArgumentType]
        bl.StructureError,
        ["`solve(starts=...)[0]` must be a pair (x, y)", "Got one Tensor", "list of pairs"],
    ),
    "no further start": (
        lambda: bl.solve(GOOD, bl.ASBLO(), X, Y, max_steps=1, starts=[]),
        ValueError,
        ["`solve(starts=...)` must hold at least one pair", "Got none", "Leave it out"],
    ),
    "starts is a truth value": (
        lambda: bl.solve(GOOD, bl.ASBLO(), X, Y, max_steps=1, starts=True),
        TypeError,
        ["`solve(starts=...)` must be an instance of `int`", "Got bool", "whole number"],
    ),
    "a start of another shape": (
        lambda: bl.solve(GOOD, bl.ASBLO(), X, Y, max_steps=1, starts=[(X, Y), (X, X)]),
        bl.StructureError,
        ["`solve(starts=...)[1], y` must have shape (3,)", "Got (2,)", "pairs like (x0, y0)"],
    ),
    "no x0": (
        lambda: bl.solve(GOOD, bl.ASBLO(), None, Y, max_steps=1),
        bl.StructureError,
        ["either x0 and y0, or state", "Got y0 alone", "Pass tensors"],
    ),
    "a list of solvers": (
        lambda: bl.compare(GOOD, [bl.ASBLO()], X, Y, budget=10),  # pyright: ignore[reportArgumentType]
        TypeError,
        ["`compare(solvers=...)` must be an instance of `Mapping`", "Got list", "in a dict"],
    ),
    "a budget in words": (
        lambda: bl.compare(GOOD, {"a": bl.ASBLO()}, X, Y, budget="10"),  # pyright: ignore[reportArgumentType]
        TypeError,
        ["`compare(budget=...)` must be", "Got str", "budget=10_000"],
    ),
    "a solver for a hypergradient": (
        lambda: bl.hypergradient(GOOD, X, Y, bl.ASBLO()),  # pyright: ignore[reportArgumentType]
        TypeError,
        ["`hypergradient(method=...)` must be an instance of `Estimator`", "Got ASBLO", "Implicit"],
    ),
    "a dict for a state to save": (
        lambda: bl.save_state("unused", {"x": X}),  # pyright: ignore[reportArgumentType]
        TypeError,
        ["`save_state(path, state)` must be an instance of `State`", "Got dict", "Solution.state"],
    ),
    "a state for a path": (
        lambda: bl.save_state(bl.State(X, Y), "unused"),  # pyright: ignore[reportArgumentType]
        TypeError,
        ["`save_state(path, ...)` must be an instance of `str`", "Got State", "the file, then"],
    ),
    "a solution for a state": (
        lambda: bl.iterate(
            GOOD,
            bl.ASBLO(),
            state=bl.solve(GOOD, bl.ASBLO(), X, Y, max_steps=1),  # pyright: ignore[reportArgumentType]
        ),
        TypeError,
        ["`iterate(state=...)` must be an instance of `State`", "Got Solution", "Solution.state"],
    ),
    "a state of a problem of other variables": (
        lambda: next(
            bl.iterate(
                bl.BilevelProblem(upper, lambda x, y, d: ((y["a"] - x.sum()) ** 2).sum()),
                bl.ASBLO(),
                state=next(bl.iterate(GOOD, bl.ASBLO(), X, Y)),
            )
        ),
        bl.StructureError,
        ["`iterate(state=...)` must hold variables", "Got x (2,), y (3,)", "start anew"],
    ),
    "a part of the barrier of another kind": (
        lambda: bl.ValueFunction(barrier=0.5),  # pyright: ignore[reportArgumentType]
        TypeError,
        ["`ValueFunction(barrier=...)` must be an instance of `Barrier`", "Got float", "Pass"],
    ),
    "a lower constraint that no y meets": (
        lambda: bl.solve(
            bl.BilevelProblem(upper, lower, lower_constraint=lambda x, y, d: y**2 + 0.3),
            bl.HypergradientDescent(bl.ImplicitKKT()),
            X,
            Y + 2.0,
            max_steps=5,
        ),
        bl.InfeasibleError,
        ["infeasible: `lower_constraint` must be <= 0, and is violated by 0.3;"],
    ),
    "callback is no function": (
        lambda: bl.solve(
            bl.BilevelProblem(upper, lower), bl.ASBLO(), X, Y, max_steps=5, callback=3
        ),  # pyright: ignore[reportArgumentType]
        TypeError,
        ["`solve(callback=...)` must be callable", "Got int", "Pass a function of the state"],
    ),
    "optimizer that calls the objective itself": (
        lambda: bl.optim.Torch(torch.optim.LBFGS, lr=1.0),
        TypeError,
        ["`Torch(optimizer=...)` must be", "Got LBFGS", "Use `bilevel.optim.QuasiNewton()`"],
    ),
    "smooth part of a fixed point is no function": (
        lambda: bl.fixed_points.prox_gradient(1.0, lambda x, v, lr: v, lr=0.1),  # pyright: ignore[reportArgumentType]
        TypeError,
        ["`prox_gradient(smooth=...)` must be callable", "Got float", "a function of (x, y, data)"],
    ),
    "prox of a fixed point is no function": (
        lambda: bl.fixed_points.prox_gradient(lower, None, lr=0.1),  # pyright: ignore[reportArgumentType]
        TypeError,
        ["`prox_gradient(prox=...)` must be callable", "Got NoneType", "a function of (x, v, lr)"],
    ),
    "state of a run with another optimizer of x": (
        resumed_with_adam,
        KeyError,
        ["While going on from a state, which must come from a run of this problem and solver."],
    ),
    "file that is no checkpoint": (
        lambda: bl.load_state(__file__),
        bl.CheckpointError,
        ["test_mistakes.py"],
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistake_is_named(mistake: str) -> None:
    call, kind, fragments = MISTAKES[mistake]
    with pytest.raises(kind) as caught:
        call()
    said = " ".join([str(caught.value), *getattr(caught.value, "__notes__", [])])
    missing = [fragment for fragment in fragments if fragment not in said]
    assert not missing, f"the message lacks {missing}: {said}"


def test_error_inside_an_objective_names_the_shapes() -> None:
    with pytest.raises(RuntimeError) as caught:
        MISTAKES["objective of other shapes"][0]()
    assert caught.value.__notes__ == [
        "While calling the objectives of the BilevelProblem for the first time, with x0 (2,), y0 (3,)."
    ]


def test_error_inside_an_objective_names_the_data() -> None:
    problem = bl.BilevelProblem(
        lambda x, y, data: (data @ y).sum(), lambda x, y, data: (y**2).sum()
    )
    with pytest.raises(RuntimeError) as caught:
        bl.hypergradient(problem, X, Y, bl.Implicit(), torch.zeros(4, 7))
    assert "data (4, 7)" in caught.value.__notes__[0]
    with pytest.raises(TypeError) as caught:
        bl.hypergradient(problem, X, Y, bl.Implicit(), {"a": X})
    assert "data of kind dict" in caught.value.__notes__[0]


NUMBERS: list[tuple[Any, dict[str, Any]]] = [
    (bl.ASBLO, {}),
    (bl.AmIGO, {}),
    (bl.BOME, {}),
    (bl.F2SA, {}),
    (bl.HypergradientDescent, {"estimator": bl.Implicit()}),
    (bl.LVHBA, {}),
    (bl.MEHA, {}),
    (bl.SOBA, {}),
    (bl.StocBiO, {}),
    (bl.VPBGD, {}),
    (bl.Implicit, {}),
    (bl.ImplicitKKT, {}),
    (bl.OneStep, {}),
    (bl.TwoSided, {}),
    (bl.Unrolled, {}),
    (bl.ValueFunction, {}),
    (bl.FixedPoint, {"map": lower}),
    (bl.linear.CG, {}),
    (bl.linear.GMRES, {}),
    (bl.linear.MINRES, {}),
    (bl.linear.Neumann, {}),
    (bl.linear.Nystrom, {}),
    (bl.optim.Newton, {}),
    (bl.optim.QuasiNewton, {}),
    (bl.optim.Torch, {"optimizer": torch.optim.SGD, "lr": 0.1}),
]
FIELDS = [
    (kind, given, field.name, value)
    for kind, given in NUMBERS
    for field in dataclasses.fields(kind)
    for word, values in {
        "int": (10.5, "5", True, float("nan")),
        "float": ("0.1", (), True),
        "bool": ("yes", 2),
    }.items()
    if word in str(field.type)
    for value in values
]


@pytest.mark.parametrize(("kind", "given", "field", "value"), FIELDS)
def test_number_of_another_kind_is_named(
    kind: Any, given: dict[str, Any], field: str, value: Any
) -> None:
    with pytest.raises(TypeError) as caught:
        kind(**{**given, field: value})
    said = str(caught.value)
    assert said.startswith(f"`{kind.__name__}({field}=...)` must be an instance of `")
    assert f"Got {type(value).__name__}. " in said


def test_whole_numbers_of_numpy_are_numbers() -> None:
    steps, starts = np.int64(3), np.int32(1)
    assert bl.Unrolled(steps, lr=np.float32(0.5)).max_steps == 3  # pyright: ignore[reportArgumentType]
    found = bl.solve(GOOD, bl.ASBLO(), X, Y, max_steps=steps, starts=starts)  # pyright: ignore[reportArgumentType]
    assert found.steps == 3


@pytest.mark.parametrize("name", ["upper_constraint", "upper_equality"])
def test_y_that_only_an_upper_constraint_uses_is_used(name: str) -> None:
    """min |x - 1|^2 under y <= 0.5, or y = 0.5, with y = 2 x: x = 0.25."""
    problem = bl.BilevelProblem(
        lambda x, y, data: ((x - 1.0) ** 2).sum(),
        lambda x, y, data: ((y - 2.0 * x) ** 2).sum(),
        **{name: lambda x, y, data: y - 0.5},
    )
    x0, y0 = torch.zeros(1).double(), torch.zeros(1).double()
    assert float(bl.solve(problem, bl.ASBLO(), x0, y0, max_steps=500).x) == pytest.approx(0.25)


def test_leaf_of_y_that_only_a_lower_constraint_uses_is_used() -> None:
    """f does not know of b, which the equality ties to x: F = (a - 1)^2 + (b - 3)^2 with a = b = x."""
    problem = bl.BilevelProblem(
        lambda x, y, data: ((y["a"] - 1.0) ** 2).sum() + ((y["b"] - 3.0) ** 2).sum(),
        lambda x, y, data: ((y["a"] - x) ** 2).sum(),
        lower_equality=lambda x, y, data: y["b"] - x,
    )
    zero = torch.zeros(1).double()
    found = bl.solve(problem, bl.ASBLO(), zero, {"a": zero, "b": zero}, max_steps=500)
    assert float(found.x) == pytest.approx(2.0, abs=1e-4)


def bounded(dtype: torch.dtype) -> tuple[bl.BilevelProblem, torch.Tensor]:
    """y = min(x, 1), so the best x is 1; and where to start."""
    problem = bl.BilevelProblem(
        lambda x, y, data: ((y - 2.0) ** 2).sum() + 0.5 * ((x - 0.5) ** 2).sum(),
        lambda x, y, data: ((y - x) ** 2).sum(),
        lower_constraint=lambda x, y, data: y - 1.0,
    )
    return problem, torch.zeros(1, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_constraints_in_half_precision_are_solved(dtype: torch.dtype) -> None:
    problem, zero = bounded(dtype)
    found = bl.solve(problem, bl.ASBLO(), zero, zero, max_steps=300)
    assert float(found.x) == pytest.approx(1.0, abs=0.05)
    assert float(found.y) == pytest.approx(1.0, abs=0.05)


def test_multipliers_beyond_half_precision_are_no_overflow() -> None:
    """float16 ends at 65504, below `LVHBA(bound=1e6)`."""
    problem, zero = bounded(torch.float16)
    states = list(itertools.islice(bl.iterate(problem, bl.LVHBA(), zero, zero), 50))
    assert float(states[-1].y) == pytest.approx(1.0, abs=0.05)
    assert not states[-1].status.is_failure


class GivesUp(bl.Solver):
    def init(self, problem: Any, x0: Any, y0: Any, data: Any, *, full_batch: bool) -> bl.State:
        return bl.State(x0, y0)

    def step(self, problem: Any, state: bl.State, data: Any) -> bl.State:
        return dataclasses.replace(state, status=bl.Status.INFEASIBLE, message="no step is left")


def test_infeasible_error_names_the_constraint_that_is_violated_most() -> None:
    problem = bl.BilevelProblem(
        upper,
        lower,
        upper_constraint=lambda x, y, data: x - 1.0,
        lower_constraint=lambda x, y, data: y + 0.1,
        upper_equality=lambda x, y, data: y[:1] - 0.5,
    )
    words = r"infeasible: `upper_equality` must be == 0, and is violated by 0.5; no step is left"
    with pytest.raises(bl.InfeasibleError, match=words):
        bl.solve(problem, GivesUp(), X, Y, max_steps=3)
    with pytest.raises(bl.InfeasibleError, match="infeasible; no step is left"):
        bl.solve(GOOD, GivesUp(), X, Y, max_steps=3)
