"""What one step of the single loop computes, the same whether its numbers are floats or traced tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from bilevel import _tree
from bilevel._problem import projected_by
from bilevel._types import Projection, Tree
from bilevel.barriers import LogRational, relaxed

_AVERAGING = 0.9  # of the gap over the batches: one batch alone says next to nothing about it
_RELAXATION = (
    0.1  # of the slack: nearer to the border than this the barrier is continued by a parabola
)
Number = float | Tensor  # a tensor is 0-d


class Form(NamedTuple):
    """What decides which operations a step is made of; see `ASBLO`."""

    pessimistic: bool
    value_steps: int
    lower_steps: int
    multiplier: str


class Numbers(NamedTuple):
    """The schedules at one step, in the user's units."""

    mu: Number
    theta: Number | None
    sigma: Number
    epsilon: Number
    kappa: Number
    max_multiplier: Number
    rate_y: Number
    stiffness: Number  # L_f / L_F: the rate of y over that of z
    kept: Number  # how much of the gap so far stays in its average


class Passes(Protocol):
    """The passes through F and f of a step; see `Oracle`."""

    losses: Tensor | None

    def upper_grad(self, x: Tree, y: Tree) -> tuple[Tensor, Tree, Tree]: ...
    def lower_grad(self, x: Tree, y: Tree) -> tuple[Tensor, Tree, Tree]: ...
    def upper_grad_y(self, x: Tree, y: Tree) -> tuple[Tensor, Tree]: ...
    def lower_grad_y(self, x: Tree, y: Tree) -> tuple[Tensor, Tree]: ...


METRICS: tuple[str, ...] = (
    "upper",
    "lower",
    "value_gap",
    "slack",
    "multiplier",
    "hypergradient",
    "theta",
)
#: The variable of that name after a step of its optimizer along the gradient, and along the ridge times the
#: variable beside it. An adaptive optimizer would make full steps of a ridge, however small, wherever the gradient is
#: smaller yet: it would wipe out what f hardly sees (as weight decay in the gradient of Adam does; Loshchilov and
#: Hutter, 2019).
Move = Callable[[str, Tree, Tree, Number | None], Tree]


class Found(NamedTuple):
    """Where a step leads, and what it measured on its way."""

    x: Tree
    y: Tree
    z: Tree
    average: Tensor  # of the gap, 0-d
    upper: Tensor
    lower: Tensor
    value_gap: Tensor
    slack: Tensor
    multiplier: Tensor
    theta: Number
    hypergradient: Tensor  # its norm
    checked: tuple[
        Tree, ...
    ]  # what is to be finite too: an optimizer may overflow where its gradient did not


def first_average(like: Tensor) -> Tensor:
    """The averaged gap before the first one, in float64 (which mps lacks)."""
    wide = torch.float32 if like.device.type == "mps" else torch.float64
    return torch.zeros((), dtype=wide, device=like.device)


def kept(*, is_first: bool) -> float:
    """See `Numbers.kept`."""
    return 0.0 if is_first else _AVERAGING


def moved(
    form: Form,
    numbers: Numbers,
    passes: Passes,
    move: Move,
    domain: Projection | None,
    x: Tree,
    y: Tree,
    z: Tree,
    average: Tensor,
) -> Found:
    r"""One step of z, y and x on one batch.

    The gradients of all three come from three passes at the same point: f(x, z), f(x, y) and F(x, y).
    f(x, y) and f(x, z) see the same batch, so that its noise cancels in their difference.
    """
    sign = -1.0 if form.pessimistic else 1.0
    for _ in range(form.value_steps - 1):  # z <- z - alpha (grad f + mu z), Eq. 14
        _, lower_z = passes.lower_grad_y(x, z)
        z = move("z", z, lower_z, numbers.mu)
    value_z, lower_x_at_z, lower_z = passes.lower_grad(x, z)
    losses_z = passes.losses
    # v(x) - f(x, z) is known without a batch
    slack = numbers.epsilon + 0.5 * numbers.mu * _tree.vdot(z, z)

    kept = numbers.kept
    for _ in range(form.lower_steps - 1):
        value_y, lower_y = passes.lower_grad_y(x, y)
        gap = _gap(value_y, value_z, passes.losses, losses_z, average)
        average, kept = kept * average + (1.0 - kept) * gap, _AVERAGING
        _, upper_y = passes.upper_grad_y(x, y)
        weight = _multiplier(form, numbers, average, slack)
        grad_y, ridge = _pull(numbers, weight, _tree.scale(sign, upper_y), lower_y)
        y = move("y", y, grad_y, ridge)
    value_y, lower_x, lower_y = passes.lower_grad(x, y)
    gap = _gap(value_y, value_z, passes.losses, losses_z, average)
    average = kept * average + (1.0 - kept) * gap
    upper, upper_x, upper_y = passes.upper_grad(x, y)
    weight = _multiplier(form, numbers, average, slack)
    grad_y, ridge = _pull(numbers, weight, _tree.scale(sign, upper_y), lower_y)
    # Eq. 16: the hypergradient, lambda a constant
    difference = _tree.axpy(-1.0, lower_x_at_z, lower_x)
    hypergradient = _tree.axpy(sign * weight.value, difference, upper_x)

    z = move("z", z, lower_z, numbers.mu)
    y = move("y", y, grad_y, ridge)
    # The value function lies below f(x, y): where y is the better lower minimizer, z goes on from there,
    # from the moved y: one step behind it, z would lose again, and x climb on the lag.
    z = _tree.where(average < 0.0, y, z)
    x = projected_by(domain, move("x", x, hypergradient, None))
    return Found(
        x=x,
        y=y,
        z=z,
        average=average.clamp(min=0.0),  # zero where z has become y
        upper=upper,
        lower=value_y,
        value_gap=gap,
        slack=slack,
        multiplier=weight.value,
        theta=_theta(numbers, weight),
        hypergradient=_tree.norm(hypergradient),
        checked=(grad_y, lower_z, x, y, z),
    )


def measured(found: Found) -> dict[str, Number]:
    """The metrics of a step, beside its schedules."""
    return {name: getattr(found, name) for name in METRICS}


def _gap(
    value_y: Tensor,
    value_z: Tensor,
    losses_y: Tensor | None,
    losses_z: Tensor | None,
    average: Tensor,
) -> Tensor:
    """f(x, y) - f(x, z) in the dtype of its average: sample by sample where there are samples."""
    wide = average.dtype
    if losses_y is None or losses_z is None:
        return value_y.to(wide) - value_z.to(wide)
    return (losses_y.to(wide) - losses_z.to(wide)).mean()


class _Weight(NamedTuple):
    """The multiplier lambda = P'(zeta), and P''(zeta), 0-d."""

    value: Tensor
    curvature: Tensor


def _multiplier(form: Form, numbers: Numbers, gap: Tensor, slack: Tensor) -> _Weight:
    """Lambda and P'' at the known slack, or at the averaged gap by the relaxed barrier.

    A negative gap says that z is not the lower minimizer yet. It counts as further slack: otherwise x would
    run after -lambda f(x, z) faster than z can follow.
    """
    gap, barrier = gap.to(slack.dtype), LogRational(numbers.kappa)
    if form.multiplier == "slack":
        value = barrier.derivative(gap.clamp(max=0.0) - slack, numbers.sigma)
        curvature = torch.zeros_like(value)
    else:
        smooth = relaxed(barrier, _RELAXATION * slack)
        value = smooth.derivative(gap - slack, numbers.sigma)
        curvature = smooth.second_derivative(gap - slack, numbers.sigma)
    return _Weight(value.clamp(max=numbers.max_multiplier), curvature)


def _pull(numbers: Numbers, weight: _Weight, upper_y: Tree, lower_y: Tree) -> tuple[Tree, Tensor]:
    r"""The gradient in y of Eq. 15 without its ridge, and theta, over their curvature in units of the learning rate.

    alpha_y = 1 / (L_F + lambda L_f + P'' |grad f|^2), with L_F = 1 / lr_y and L_f = 1 / lr_z.
    """
    grad = _tree.axpy(weight.value, lower_y, upper_y)
    stiffness = 1.0 + weight.value * numbers.stiffness
    stiffness = stiffness + numbers.rate_y * weight.curvature * _tree.vdot(lower_y, lower_y)
    return _tree.scale(1.0 / stiffness, grad), _theta(numbers, weight) / stiffness


def _theta(numbers: Numbers, weight: _Weight) -> Number:
    return weight.value * numbers.mu if numbers.theta is None else numbers.theta
