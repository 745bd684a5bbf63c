"""The fields of ASBLO: what they refuse, in which words, and what becomes of them in its two modes."""

import dataclasses
from typing import Any

import pytest
import torch

import bilevel as bl
from bilevel.barriers import log_rational
from bilevel.optim import Newton, QuasiNewton, Torch
from bilevel.schedules import constant, geometric, polynomial

X, Y = torch.ones(1).double(), torch.zeros(1).double()
PROBLEM = bl.BilevelProblem(
    lambda x, y, data: ((y - 1.0) ** 2 + 0.1 * x**2).sum(),
    lambda x, y, data: ((y - x) ** 2).sum(),
)
CONSTRAINED = dataclasses.replace(PROBLEM, lower_constraint=lambda x, y, data: y - 1.0)

SCHEDULE = (
    "`ASBLO({name}=...)` must be a schedule, a function of the step. Got 0.1. "
    "Use e.g. `bilevel.schedules.constant(0.1)`."
)
POSITIVE = (
    "`ASBLO({name}=...)` must be a finite number > 0. Got {name}=0.0. Leave it out for the default."
)
COUNT = "`ASBLO({name}=...)` must be at least 1. Got {name}=0. Raise it, e.g. to 1."
WRAPPED = (
    "`ASBLO({name}=...)` must be a `bilevel.optim.Torch`. Got type. "
    "Wrap the class, e.g. `Torch(torch.optim.Adam, lr=1e-3)`."
)
OPTIMIZERS = ("value_optimizer", "lower_optimizer", "upper_optimizer")
REFUSED: list[tuple[str, Any, type[Exception], str]] = [
    *((name, 0.1, TypeError, SCHEDULE) for name in ("mu", "theta", "sigma", "epsilon")),
    *((name, 0.0, ValueError, POSITIVE) for name in ("kappa", "rtol", "max_multiplier")),
    *((name, 0, ValueError, COUNT) for name in ("value_steps", "lower_steps")),
    *((name, torch.optim.Adam, TypeError, WRAPPED) for name in OPTIMIZERS),
    (
        "first_stage",
        -1,
        ValueError,
        "`ASBLO(first_stage=...)` must be at least 0. Got first_stage=-1. Leave it out.",
    ),
    (
        "pessimistic",
        1,
        TypeError,
        "`ASBLO(pessimistic=...)` must be an instance of `bool`. Got int. Pass True or False.",
    ),
    (
        "multiplier",
        "gaps",
        ValueError,
        '`ASBLO(multiplier=...)` must be "slack" or "gap". Got \'gaps\'. '
        'Use "slack" unless batches are large.',
    ),
    (
        "minimizer",
        1e-3,
        TypeError,
        "`ASBLO(minimizer=...)` must be an instance of `Minimizer`. Got float. Pass e.g. `Newton()`.",
    ),
    (
        "optimizer",
        1e-3,
        TypeError,
        "`ASBLO(optimizer=...)` must be an instance of `QuasiNewton`. Got float. "
        "It steps on the full batch; `upper_optimizer` takes a `Torch` for batches.",
    ),
]


@pytest.mark.parametrize(("name", "value", "error", "text"), REFUSED, ids=lambda v: str(v)[:20])
def test_field_out_of_range_says_the_rule(
    name: str, value: Any, error: type[Exception], text: str
) -> None:
    with pytest.raises(error) as caught:
        bl.ASBLO(**{name: value})
    assert str(caught.value) == text.format(name=name)


@pytest.mark.parametrize("multiplier", ["slack", "gap"])
def test_least_values_are_taken(multiplier: Any) -> None:
    solver = bl.ASBLO(value_steps=1, lower_steps=1, first_stage=0, multiplier=multiplier)
    assert solver.multiplier == multiplier


@pytest.mark.parametrize("name", ["mu", "theta", "sigma", "epsilon"])
def test_schedule_that_does_not_fall_is_refused_on_the_full_batch(name: str) -> None:
    rising = {0: 0.125, 10: 0.5}  # at the two stages that are looked at; anything else between
    solver = bl.ASBLO(**{name: lambda k: rising.get(k, 1.0)})
    with pytest.raises(ValueError, match="fall") as caught:
        solver.init(PROBLEM, X, Y, None, full_batch=True)
    assert str(caught.value) == (
        f"`ASBLO({name}=...)` must fall to zero on the full batch. Got 0.125 at stage 0 and 0.5 at stage 10. "
        "Use e.g. `bilevel.schedules.geometric`, or `HypergradientDescent(ValueFunction(...))` for fixed parameters."
    )


@pytest.mark.parametrize("value", [1.0, 0.1])
def test_constant_schedule_is_refused_on_the_full_batch_unless_it_is_zero(value: float) -> None:
    with pytest.raises(ValueError, match=rf"ASBLO\(mu=\.\.\.\).* Got {value:.3g} at stage 0 and"):
        bl.ASBLO(mu=constant(value)).init(PROBLEM, X, Y, None, full_batch=True)
    bl.ASBLO(mu=constant(0.0), theta=geometric(1e-3, 0.1)).init(
        PROBLEM, X, Y, None, full_batch=True
    )


@pytest.mark.parametrize("name", ["mu", "theta", "sigma", "epsilon"])
def test_any_schedule_is_taken_on_batches(name: str) -> None:
    solver = bl.ASBLO(**{name: constant(0.1)})
    state = solver.init(PROBLEM, X, Y, None, full_batch=False)
    assert solver.step(PROBLEM, state, None).status is bl.Status.RUNNING


def test_pessimistic_form_takes_no_lower_constraints() -> None:
    bl.ASBLO().init(CONSTRAINED, X, Y, None, full_batch=True)
    bl.ASBLO(pessimistic=True).init(PROBLEM, X, Y, None, full_batch=True)
    with pytest.raises(ValueError, match="pessimistic") as caught:
        bl.ASBLO(pessimistic=True).init(CONSTRAINED, X, Y, None, full_batch=True)
    assert str(caught.value) == (
        "`ASBLO(pessimistic=True)` must have a lower level without constraints. Got `lower_constraint` or "
        "`lower_equality`. Put them into f as a penalty, or solve the optimistic form."
    )


def test_pessimistic_walk_starts_where_the_user_says_and_the_other_where_upper_is_small() -> None:
    solver = bl.ASBLO(pessimistic=True)
    assert torch.equal(solver.init(PROBLEM, X, Y, None, full_batch=True).x, X)
    start = bl.ASBLO().init(PROBLEM, X, Y, None, full_batch=True)
    assert start.x.item() == pytest.approx(0.0, abs=1e-6)  # F = (y - 1)^2 + x^2 / 10 over both


def test_batches_take_no_constraints() -> None:
    with pytest.raises(ValueError, match=r"^`ASBLO on batches` takes a domain of x, and no"):
        bl.ASBLO().init(CONSTRAINED, X, Y, None, full_batch=False)


def test_nearby_begins_at_a_later_stage_and_changes_nothing_else() -> None:
    solver = bl.ASBLO(kappa=0.5, rtol=1e-3)
    assert solver.nearby() == dataclasses.replace(solver, first_stage=3)
    late = bl.ASBLO(first_stage=5)
    assert late.nearby() == late


def test_stage_of_a_unitless_problem_is_the_schedules_themselves() -> None:
    falling = {name: geometric(2.0 + i, 0.5) for i, name in enumerate(("mu", "sigma", "epsilon"))}
    stage = bl.ASBLO(**falling).stage(2)
    assert (stage.mu, stage.sigma, stage.epsilon) == (0.5, 0.75, 1.0)
    assert stage.theta is None
    assert stage.barrier == log_rational(1.0)


def test_stage_has_the_parts_of_its_solver_in_the_units_of_the_problem() -> None:
    newton = Newton(max_steps=7)
    solver = bl.ASBLO(
        mu=geometric(1.0, 0.5),
        theta=geometric(3.0, 0.5),
        sigma=geometric(2.0, 0.5),
        epsilon=geometric(4.0, 0.5),
        kappa=0.25,
        pessimistic=True,
        minimizer=newton,
    )
    stage = solver.stage(1, lower=2.0, upper=8.0, square=4.0)
    assert stage.mu == 0.5 * 2.0 / 4.0
    assert stage.theta == 1.5 * 8.0 / 4.0
    assert stage.sigma == 1.0 * 8.0
    assert stage.epsilon == 2.0 * 2.0
    assert stage.barrier == log_rational(0.5)
    assert stage.pessimistic is True
    assert stage.minimizer == newton


def stages(solver: bl.ASBLO) -> list[float]:
    return [float(state.metrics["stage"]) for state in bl.iterate(PROBLEM, solver, X, Y)]


def test_walk_begins_at_the_first_stage_and_ends_by_rtol() -> None:
    assert stages(bl.ASBLO())[0] == 0.0
    assert stages(bl.ASBLO(first_stage=2))[0] == 2.0
    assert stages(bl.ASBLO(rtol=1e-1))[-1] < stages(bl.ASBLO(rtol=1e-7))[-1]


def test_fields_of_the_full_batch_reach_its_walk() -> None:
    """Each changes the path, and none the answer: x = 10/11, where y = x."""
    plain = bl.solve(PROBLEM, bl.ASBLO(), X, Y, max_steps=200)
    changed: dict[str, Any] = {
        "optimizer": QuasiNewton(max_trials=1),
        "epsilon": geometric(1.0, 0.1),
        "sigma": geometric(0.5, 0.2),
        "mu": geometric(1e-3, 0.04),
        "theta": geometric(1e-3, 0.04),
        "kappa": 0.1,
    }
    for name, part in changed.items():
        other = bl.solve(PROBLEM, bl.ASBLO(**{name: part}), X, Y, max_steps=200)
        assert other.x.item() == pytest.approx(10.0 / 11.0, abs=1e-4), name
        assert not torch.equal(other.x, plain.x), name


def test_fields_of_the_batches_reach_their_loop() -> None:
    """Five steps with a field changed end elsewhere."""
    sgd = Torch(torch.optim.SGD, lr=0.05)

    def end(**options: Any) -> torch.Tensor:
        fields = dict.fromkeys(OPTIMIZERS, sgd) | options
        *_, last = bl.iterate(PROBLEM, bl.ASBLO(**fields), X, Y, [None] * 5)
        return torch.cat([last.x, last.y])

    plain = end()
    for name, part in {
        "mu": polynomial(1.0, 1.0),
        "theta": polynomial(1.0, 1.0),
        "sigma": polynomial(2.0, 1.0),
        "epsilon": polynomial(3.0, 1.0),
        "kappa": 0.2,
        "pessimistic": True,
        "value_steps": 2,
        "lower_steps": 2,
        "multiplier": "gap",
        "max_multiplier": 0.3,
        "value_optimizer": Torch(torch.optim.SGD, lr=0.02),
        "lower_optimizer": Torch(torch.optim.SGD, lr=0.02),
        "upper_optimizer": Torch(torch.optim.SGD, lr=0.02),
    }.items():
        assert not torch.equal(end(**{name: part}), plain), name
