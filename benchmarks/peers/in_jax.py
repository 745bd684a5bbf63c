"""The objectives of the tasks in JAX, and the way of tensors there and back.

XLA works on one thread, as torch does here: when the first array is made, it takes NPROC for the number of processors.
Its flags for as much change nothing. JAX counts in float64 where a task does.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import torch
from jax import Array
from jax import numpy as jnp
from speed.work import Work
from torch import Tensor

os.environ["NPROC"] = "1"
jax.config.update("jax_enable_x64", True)

APART = {torch.float64: 1e-10, torch.float32: 1e-5}  # relative, of a value here and in torch

Data = tuple[Array, ...]
Variable = tuple[Array, ...]
Objective = Callable[[Data, Array, Variable], Array]


class Quadratic:
    """T0 and T1: data are the Hessian of f, the target of y and the weight of x in F."""

    @staticmethod
    def upper(data: Data, x: Array, y: Variable) -> Array:
        _, target, weight = data
        return 0.5 * jnp.sum((y[0] - target) ** 2) + 0.5 * weight * jnp.sum(x**2)

    @staticmethod
    def lower(data: Data, x: Array, y: Variable) -> Array:
        hessian, *_ = data
        return 0.5 * y[0] @ (hessian @ y[0]) - y[0] @ x


class Logistic:
    """T2: data are the signed features of the training and of the validation samples."""

    @staticmethod
    def upper(data: Data, x: Array, y: Variable) -> Array:
        _, B = data
        return jnp.mean(jax.nn.softplus(-(B @ y[0])))

    @staticmethod
    def lower(data: Data, x: Array, y: Variable) -> Array:
        A, _ = data
        return jnp.mean(jax.nn.softplus(-(A @ y[0]))) + 0.5 * jnp.sum(jnp.exp(x) * y[0] ** 2)


class Classifier:
    """T3 and T4: data are samples and labels of the training, then of the validation, then the weight of y in f."""

    @staticmethod
    def upper(data: Data, x: Array, y: Variable) -> Array:
        _, _, V, of_V, _ = data
        return jnp.mean(losses(V, of_V, y))

    @staticmethod
    def lower(data: Data, x: Array, y: Variable) -> Array:
        X, of_X, _, _, weight = data
        squares = sum(jnp.sum(leaf**2) for leaf in y)
        return jnp.mean(jax.nn.sigmoid(x) * losses(X, of_X, y)) + weight * squares


def losses(samples: Array, labels: Array, y: Variable) -> Array:
    """The cross entropy of each sample, through a network with tanh between its layers."""
    for weight, bias in zip(y[:-2:2], y[1:-2:2], strict=True):
        samples = jnp.tanh(samples @ weight + bias)
    logs = jax.nn.log_softmax(samples @ y[-2] + y[-1])
    return -jnp.take_along_axis(logs, labels[:, None], axis=1)[:, 0]


FAMILIES = {family.__name__: family for family in (Quadratic, Logistic, Classifier)}


def objectives(work: Work) -> tuple[Objective, Objective, Data]:
    """F and f of a work, and their data.

    Raises:
        ValueError: they are not those of the work, near where it starts.
    """
    family, data = FAMILIES[work.family], tuple(map(array, work.data))
    generator = torch.Generator().manual_seed(0)
    x, *y = (
        leaf + 0.1 * torch.randn(leaf.shape, dtype=leaf.dtype, generator=generator)
        for leaf in (work.x, *work.y)
    )
    for name in ("upper", "lower"):
        expected = float(getattr(work, name)(x, *y))
        found = float(getattr(family, name)(data, array(x), tuple(map(array, y))))
        if abs(found - expected) > APART[x.dtype] * abs(expected):
            raise ValueError(
                f"`{work.family}.{name}` must be that of the work. Got {found}, not {expected}."
            )
    return family.upper, family.lower, data


def array(tensor: Tensor) -> Array:
    return jnp.asarray(tensor.detach().numpy())


def tensor(found: Array) -> Tensor:
    return torch.from_numpy(np.array(found))


def compiled(program: Callable[..., Any], *inputs: Any) -> tuple[Callable[..., Any], float]:
    """The program under `jit`, and the seconds of its first call. It returns when it has computed."""
    jitted = jax.jit(program)

    def run(*inputs: Any) -> Any:
        return jax.block_until_ready(jitted(*inputs))

    began = time.perf_counter()
    run(*inputs)
    return run, time.perf_counter() - began
