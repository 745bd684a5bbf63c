"""Any optimizer of `torch.optim`, used without side effects."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bilevel import _tree
from bilevel._errors import check_count, check_number
from bilevel._solution import Status
from bilevel._types import Schedule
from bilevel.optim._adam import plain_adam
from bilevel.optim._base import Minimizer, Minimum, Point, SmoothFunction

_HALVINGS = 40  # 2^-40 of a step is no step


@dataclass(frozen=True, init=False)
class Torch(Minimizer):
    """An optimizer of `torch.optim` as a pure function: variables and memory in, new ones out.

    The optimizer's own state travels in the solver's `State`, so that a saved run goes on exactly.

    Plain `SGD` at a constant rate, and on the CPU plain `Adam` and `AdamW`, take the same steps without an instance of
    their class, so that hooks on optimizers are not called.

    Attributes:
        optimizer: The class, or any callable `(params, lr=..., **options) -> torch.optim.Optimizer`.
        lr: Learning rate: a number > 0, or a schedule of the step.
        max_norm: Gradients longer than this are shortened to it, > 0; None leaves them as they are.
        max_steps: Steps where it minimizes a lower problem for an estimator, > 0.
        options: The remaining keyword arguments, e.g. `betas`.

    Raises:
        TypeError: `optimizer` is not callable, or an instance instead of a class.
        ValueError: A number is out of its range.

    Example:
        >>> import bilevel as bl
        >>> adam = bl.optim.Torch(torch.optim.Adam, lr=0.1)
        >>> (x,), memory = adam.step([torch.ones(1)], [torch.ones(1)], adam.init([torch.ones(1)]))
        >>> x
        tensor([0.9000])
    """

    optimizer: Callable[..., torch.optim.Optimizer]
    lr: float | Schedule
    max_norm: float | None
    max_steps: int
    options: Mapping[str, Any]

    def __init__(
        self,
        optimizer: Callable[..., torch.optim.Optimizer],
        *,
        lr: float | Schedule,
        max_norm: float | None = None,
        max_steps: int = 100,
        **options: Any,
    ) -> None:
        if isinstance(optimizer, torch.optim.Optimizer) or not callable(optimizer):
            raise TypeError(
                f"`Torch(optimizer=...)` must be a class of `torch.optim`. Got {type(optimizer).__name__}. "
                "Pass the class and its arguments, e.g. `Torch(torch.optim.Adam, lr=1e-3)`."
            )
        if optimizer is torch.optim.LBFGS:
            raise TypeError(
                "`Torch(optimizer=...)` must be an optimizer that steps on a given gradient. Got LBFGS, which "
                "calls the objective itself. Use `bilevel.optim.QuasiNewton()` or `Newton()`."
            )
        if not callable(lr):
            check_number("Torch", "lr", lr, "Use e.g. 1e-3, or a schedule.")
        if max_norm is not None:
            mend = "Use a few times the usual norm of the gradient, or leave it out."
            check_number("Torch", "max_norm", max_norm, mend)
        check_count("Torch", "max_steps", max_steps, "Raise it, e.g. to 100.")
        for name, value in (
            ("optimizer", optimizer),
            ("lr", lr),
            ("max_norm", max_norm),
            ("max_steps", max_steps),
            ("options", options),
        ):
            object.__setattr__(self, name, value)

    def rate(self, count: int) -> float:
        """The learning rate of step number `count`."""
        return self.lr(count) if callable(self.lr) else self.lr

    def init(self, variables: Sequence[Tensor]) -> dict[str, Any]:
        """The memory before the first step."""
        return {"count": 0, "slots": [{} for _ in variables]}

    def step(
        self, variables: Sequence[Tensor], grads: Sequence[Tensor], memory: Mapping[str, Any]
    ) -> tuple[list[Tensor], dict[str, Any]]:
        """New variables and memory after one step along `grads`; the arguments stay as they are."""
        momentum = self._plain_momentum
        if momentum is not None:
            groups = zip(variables, grads, memory["slots"], strict=True)
            moved = [_descended(*group, self.rate(0), momentum) for group in groups]
            slots = [slot for _, slot in moved]
            return [leaf for leaf, _ in moved], {"count": memory["count"] + 1, "slots": slots}
        lr = self.rate(memory["count"])
        adam = plain_adam(self.optimizer, self.options, lr, variables)
        if adam is not None:
            new, slots = adam.step(variables, self._prepared(variables, grads), memory["slots"], lr)
            return new, {"count": memory["count"] + 1, "slots": slots}
        new = [leaf.detach().clone() for leaf in variables]
        self._set_grads(new, grads)
        optimizer = self.optimizer(new, lr=lr, **self.options)
        for leaf, slot in zip(new, memory["slots"], strict=True):
            if slot:
                optimizer.state[leaf] = {
                    k: v.clone() if isinstance(v, Tensor) else v for k, v in slot.items()
                }
        optimizer.step()
        for leaf in new:
            leaf.grad = None
        return new, {
            "count": memory["count"] + 1,
            "slots": [dict(optimizer.state[leaf]) for leaf in new],
        }

    def _set_grads(self, variables: Sequence[Tensor], grads: Sequence[Tensor]) -> None:
        for leaf, grad in zip(variables, self._prepared(variables, grads), strict=True):
            leaf.grad = grad

    def _prepared(self, variables: Sequence[Tensor], grads: Sequence[Tensor]) -> list[Tensor]:
        """The gradients, shortened where that is asked for, in the layout of their variables."""
        if self.max_norm is not None:
            tree = list(grads)
            grads = _tree.scale((self.max_norm / _tree.norm(tree)).clamp(max=1.0), tree)
        return [
            # Kernels over many tensors, fused ones above all, take the entries in memory order.
            grad if grad.stride() == leaf.stride() else torch.empty_like(leaf).copy_(grad)
            for leaf, grad in zip(variables, grads, strict=True)
        ]

    def minimize(
        self,
        fun: SmoothFunction,
        start: Point,
        tol: float = 0.0,
        *,
        stop: Callable[[Point], bool] | None = None,
    ) -> Minimum:
        """See `Minimizer.minimize`."""
        point, count = start, 0
        move = self._mover(start.y)
        while True:
            residual = _tree.length(point.grad)
            if not (math.isfinite(point.value) and math.isfinite(residual)):
                return Minimum(point, residual, Status.NONFINITE, count)
            if residual <= tol or (stop is not None and stop(point)):
                return Minimum(point, residual, Status.CONVERGED, count)
            if count == self.max_steps:
                return Minimum(point, residual, Status.MAX_STEPS, count)
            y = move(point.y, point.grad, count)
            evaluate = fun.evaluate_ahead if count + 1 == self.max_steps else fun.evaluate
            new = evaluate(y)
            for _ in range(_HALVINGS):  # a step out of the function's domain is shortened
                if new.value != math.inf:
                    break
                y = 0.5 * (point.y + y)
                new = evaluate(y)
            point, count = new, count + 1

    @property
    def _plain_momentum(self) -> float | None:
        """The momentum, where the optimizer is `SGD` at a constant rate and has no other option; else None."""
        is_plain = (
            self.optimizer is torch.optim.SGD
            and self.options.keys() <= {"momentum"}
            and self.max_norm is None
            and not callable(self.lr)
        )
        momentum = self.options.get("momentum", 0.0)
        return momentum if is_plain and momentum >= 0.0 else None

    def _mover(self, y: Tensor) -> Callable[[Tensor, Tensor, int], Tensor]:
        """The next y after that of step number `count`, of which it is given the gradient."""
        momentum = self._plain_momentum
        if momentum is not None:
            rate, velocity = self.rate(0), torch.zeros_like(y)

            def descend(y: Tensor, grad: Tensor, count: int) -> Tensor:
                # As `_descended`, with a memory that nobody else sees and that can be moved in place.
                along = velocity.mul_(momentum).add_(grad) if momentum else grad
                return torch.add(y, along, alpha=-rate)

            return descend
        own = y.detach().clone()  # moves in place, so that one optimizer can serve all steps
        optimizer = self.optimizer([own], lr=self.rate(0), **self.options)

        def move(y: Tensor, grad: Tensor, count: int) -> Tensor:
            nonlocal optimizer
            own.copy_(y)
            if count and callable(self.lr):
                before = optimizer.state[own]
                optimizer = self.optimizer([own], lr=self.rate(count), **self.options)
                optimizer.state[own] = before
            self._set_grads([own], [grad])
            optimizer.step()
            return own.clone()

        return move


def _descended(
    leaf: Tensor, grad: Tensor, slot: Mapping[str, Any], lr: float, momentum: float
) -> tuple[Tensor, dict[str, Any]]:
    """A step of `SGD` in its own operations, bit for bit.

    What `torch.optim` does around them takes as long as the gradient of a small problem.
    """
    leaf, grad = leaf.detach(), grad.detach()
    if not momentum:
        return torch.add(leaf, grad, alpha=-lr), {}
    before = slot.get("momentum_buffer")
    velocity = grad.clone() if before is None else before.mul(momentum).add_(grad)
    return torch.add(leaf, velocity, alpha=-lr), {"momentum_buffer": velocity}
