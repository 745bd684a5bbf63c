"""JAX 0.10.2 alone: what one would write in it by hand, each hypergradient one program of XLA."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
from jax import Array, lax
from jax import numpy as jnp
from jax.scipy.sparse.linalg import cg
from speed.work import Answer, Hypergradient, Lower, Work
from torch import Tensor

from peers.in_jax import Data, Objective, Variable, array, compiled, objectives, tensor

Found = tuple[Array, Variable]  # the hypergradient, and y
Program = Callable[[Data, Array, Variable, Array], Found]
Run = Callable[[], Answer]
Count = int | Array


def implicit(work: Work, rtol: float, products: int) -> Callable[[int], Hypergradient]:
    """By a number of steps of gradient descent on y, which is no part of the program, then conjugate gradients."""
    upper, lower, data = objectives(work)

    def program(data: Data, x: Array, y: Variable, steps: Array) -> Found:
        y = _descent(lower, work, steps, data, x, y)
        return _implicit(upper, lower, rtol, products, data, x, y)

    return called(work, program, data)


def unrolled(work: Work, steps: int) -> Hypergradient:
    """Reverse mode through all `steps`, which keeps what each of them made."""
    upper, lower, data = objectives(work)

    def program(data: Data, x: Array, y: Variable, _: Array) -> Found:
        def solved(x: Array) -> Found:
            at = _descent(lower, work, steps, data, x, y)
            return upper(data, x, at), at

        return jax.grad(solved, has_aux=True)(x)

    return called(work, program, data)(0)


def called(work: Work, program: Program, data: Data) -> Callable[[int], Hypergradient]:
    """A program as the tasks call it, with tensors, for each number that is its last input."""
    start = array(work.x), tuple(map(array, work.y))
    run, cold = compiled(program, data, *start, 0)

    def with_number(number: int) -> Hypergradient:
        def hypergradient(x: Tensor, y: Lower) -> Answer:
            found, at = run(data, array(x), tuple(map(array, y)), number)
            return Answer(tensor(found), tuple(map(tensor, at)), cold=cold)

        return hypergradient

    return with_number


def stepwise(work: Work, lr: float, steps: int, *numbers: float) -> Run:
    """`steps` of gradient descent on x, each one call; x and y stay in JAX between them.

    `numbers` are the lower steps, and the tolerance and the most products of the conjugate gradients.
    """
    step, data = _upper_step(work, lr, *numbers)
    start = array(work.x), tuple(map(array, work.y))
    run, cold = compiled(step, data, *start)

    def descent() -> Answer:
        x, y = start
        for _ in range(steps):
            x, y = run(data, x, y)
        return Answer(tensor(x), tuple(map(tensor, y)), cold=cold)

    return descent


def at_once(work: Work, lr: float, steps: int, *numbers: float) -> Run:
    """The same in one program."""
    descent, data = _upper_descent(work, lr, steps, *numbers)
    x = array(work.x)
    run, cold = compiled(descent, data, x)
    return lambda: Answer(tensor(run(data, x)), cold=cold)


def many(work: Work, starts: Tensor, lr: float, steps: int, *numbers: float) -> Run:
    """The same from each row of `starts`, by `vmap`."""
    descent, data = _upper_descent(work, lr, steps, *numbers)
    x = array(starts)
    run, cold = compiled(jax.vmap(descent, (None, 0)), data, x)
    return lambda: Answer(tensor(run(data, x)), cold=cold)


def _upper_descent(
    work: Work, lr: float, steps: int, *numbers: float
) -> tuple[Callable[[Data, Array], Array], Data]:
    step, data = _upper_step(work, lr, *numbers)
    y = tuple(map(array, work.y))

    def descent(data: Data, x: Array) -> Array:
        x, _ = lax.fori_loop(0, steps, lambda _, state: step(data, *state), (x, y))
        return x

    return descent, data


def _upper_step(
    work: Work, lr: float, lower_steps: int, rtol: float, products: int
) -> tuple[Callable[[Data, Array, Variable], Found], Data]:
    upper, lower, data = objectives(work)

    def step(data: Data, x: Array, y: Variable) -> Found:
        y = _descent(lower, work, lower_steps, data, x, y)
        by_x, y = _implicit(upper, lower, rtol, products, data, x, y)
        return x - lr * by_x, y

    return step, data


def _implicit(
    upper: Objective,
    lower: Objective,
    rtol: float,
    products: int,
    data: Data,
    x: Array,
    y: Variable,
) -> Found:
    by_x, b = jax.grad(upper, (1, 2))(data, x, y)
    gradient = partial(jax.grad(lower, 2), data)
    _, hvp = jax.linearize(partial(gradient, x), y)
    v, _ = cg(hvp, b, tol=rtol, maxiter=products)
    _, vjp = jax.vjp(lambda x: gradient(x, y), x)
    return by_x - vjp(v)[0], y


def _descent(
    lower: Objective, work: Work, steps: Count, data: Data, x: Array, y: Variable
) -> Variable:
    """Gradient descent on y with the step and the momentum that all contenders take."""

    def step(_: Count, state: tuple[Variable, Variable]) -> tuple[Variable, Variable]:
        y, velocity = state
        g = jax.grad(lower, 2)(data, x, y)
        velocity = jax.tree.map(lambda v, a: work.momentum * v + a, velocity, g)
        return jax.tree.map(lambda leaf, v: leaf - work.lr * v, y, velocity), velocity

    y, _ = lax.fori_loop(0, steps, step, (y, jax.tree.map(jnp.zeros_like, y)))
    return y
