"""First and second derivatives of scalar functions of trees.

Gradients are reverse mode. Hessian-vector products go backward through the graph of the gradient,
which is built once for a point and reused by every product: that works under autocast and through
layers that have no forward-mode rule. Forward mode is there for those who ask for it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, MutableMapping
from typing import Any, TypeVar

import torch
from torch import Tensor

from bilevel import _tree
from bilevel._backward import backward, batched_grad, filled, grad, grad_of_one, recording
from bilevel._errors import ObjectiveError
from bilevel._types import Tree

Function = Callable[..., Tensor]
Made = TypeVar("Made")
func: Any = torch.func  # its stubs are untyped


def _variables(trees: tuple[Tree, ...]) -> tuple[list[Tree], list[list[Tensor]]]:
    parts = [[_tracked(leaf) for leaf in _tree.leaves(tree)] for tree in trees]
    tracked = [_tree.unflatten_like(*pair) for pair in zip(trees, parts, strict=True)]
    return tracked, parts


def _tracked(leaf: Tensor) -> Tensor:
    """The same numbers, to differentiate by."""
    if torch.is_inference_mode_enabled():
        raise ObjectiveError(
            "Gradients must be taken outside `torch.inference_mode()`, where they would silently be zero. "
            "Got a call inside it. Leave that context, or use `torch.no_grad()`."
        )
    return leaf.detach().requires_grad_(True)


def value(fun: Function, *trees: Tree) -> Tensor:
    """`fun(*trees)` without a graph."""
    with torch.no_grad():
        return fun(*trees).detach()


def value_and_grad(
    fun: Function, *trees: Tree, frozen: tuple[Tree, ...] = ()
) -> tuple[Tensor, list[Tree]]:
    """The value of `fun(*trees, *frozen)` and its gradient with respect to each of `trees`.

    Args:
        fun: Returns a scalar tensor.
        *trees: The variables to differentiate by.
        frozen: Further arguments, held constant.

    Returns:
        The value, 0-d, and one tree of gradients a variable; zeros where `fun` ignores a leaf.
    """
    with recording():
        if len(trees) == 1 and isinstance(trees[0], Tensor):
            wrt = _tracked(trees[0])
            output = fun(wrt, *frozen)
            return output.detach(), [grad_of_one(output, wrt)]
        tracked, parts = _variables(trees)
        output = fun(*tracked, *frozen)
        flat = grad(output, [leaf for group in parts for leaf in group])
    grads: list[Tree] = []
    for tree, group in zip(trees, parts, strict=True):
        grads.append(_tree.unflatten_like(tree, flat[: len(group)]))
        flat = flat[len(group) :]
    return output.detach(), grads


def unused_leaves(fun: Function, *trees: Tree) -> list[list[int]]:
    """For each tree, the indices of the leaves that `fun(*trees)` does not depend on."""
    with recording():
        tracked, parts = _variables(trees)
        output = fun(*tracked)
        if not output.requires_grad:
            return [list(range(len(group))) for group in parts]
        flat = backward((output,), None, tuple(leaf for group in parts for leaf in group))
    missing = iter([part is None for part in flat])
    return [[i for i in range(len(group)) if next(missing)] for group in parts]


def differentiable_grad(output: Tensor, wrt: Tensor) -> Tensor:
    """The gradient of the scalar `output` in the tracked `wrt`, with its own graph."""
    return grad_of_one(output, wrt, create_graph=True)


def jacobian(fun: Function, *vectors: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The vector `fun(*vectors)`, shape (k,), and its derivative in each of the vectors, shapes (k, n)."""
    linear = LinearizedMap(fun, *vectors)
    return linear.value, linear.jacobian()


class LinearizedMap:
    """A vector-valued function of vectors at a point, differentiated when that is asked for.

    Attributes:
        value: `fun(*vectors)`, shape (k,).
    """

    def __init__(self, fun: Function, *vectors: Tensor) -> None:
        with recording():
            self._tracked, _ = _variables(vectors)
            self._output = fun(*self._tracked)
        self.value = self._output.detach()

    def vjp(self, number: int, cotangent: Tensor) -> Tensor:
        """The transposed derivative in the vector of that number times `cotangent`, the shape of the vector."""
        return grad_of_one(self._output, self._tracked[number], cotangent, retain_graph=True)

    def jacobian(self) -> list[Tensor]:
        """The derivative in each of the vectors, shapes (k, n): k products, in one batch where torch can.

        All have the dtype of the value, whatever that of the vector, so that they can be joined.
        """
        count = self._output.numel()
        blocks = [self.value.new_zeros((count, v.numel())) for v in self._tracked]
        used = [i for i, v in enumerate(self._tracked) if v.numel()]
        if count == 0:
            return blocks
        wrt = [self._tracked[i] for i in used]
        identity = torch.eye(count, dtype=self.value.dtype, device=self.value.device)
        columns = batched_grad(self._output, wrt, identity)
        for i, column in zip(used, columns, strict=True):
            blocks[i] = column.to(self.value)
        return blocks


class LinearizedGradient:
    """The gradient of `fun(x, y)` in y at a point, ready for any number of products.

    The graph of the gradient is built once; each product is one backward pass through it.

    Attributes:
        value: `fun(x, y)`, 0-d.
        grad: The gradient in y, a vector of shape (n,).
    """

    def __init__(self, fun: Function, x: Tensor, y: Tensor) -> None:
        with recording():
            tracked, _ = _variables((x, y))
            self._x, self._y = tracked
            output = fun(self._x, self._y)
            self._grad = differentiable_grad(output, self._y)
        self.value = output.detach()
        self.grad = self._grad.detach()

    def hvp(self, vector: Tensor) -> Tensor:
        """The Hessian in y times `vector`, shape (n,)."""
        return grad_of_one(self._grad, self._y, vector, retain_graph=True)

    def mixed_vjp(self, vector: Tensor) -> Tensor:
        """The derivative in x of `grad_y fun . vector`, the shape of x."""
        return grad_of_one(self._grad, self._x, vector, retain_graph=True)

    def products(self, vector: Tensor) -> tuple[Tensor, Tensor]:
        """`mixed_vjp(vector)` and `hvp(vector)`, from one backward pass."""
        mixed, product = grad(self._grad, (self._x, self._y), vector, retain_graph=True)
        return mixed, product

    def hessian(self) -> Tensor:
        """The Hessian in y, symmetrized, shape (n, n): n products, in one batch where torch can."""
        n = self._y.numel()
        identity = torch.eye(n, dtype=self._y.dtype, device=self._y.device)
        (rows,) = batched_grad(self._grad, (self._y,), identity)
        # torch leaves a batch of products in the dtype of the output, where y has another
        return 0.5 * (rows + rows.mT).to(identity)


class DescentSteps:
    """Steps of gradient descent on `fun(x, y)` in y, whose one graph leads back through all of them."""

    def __init__(self, fun: Function, x: Tensor, y: Tree, lr: float) -> None:
        self._fun, self._like, self._lr = fun, y, lr
        _, ((self._x,), self._first) = _variables((x, y))
        self._last = self._first

    def step(self) -> list[Tensor]:
        """Take the next one; the leaves of the gradient in y that leads there, which have a graph too."""
        with recording():
            output = self._fun(self._x, _tree.unflatten_like(self._like, self._last))
            slope = grad(output, self._last, create_graph=True)
            self._last = _tree.stepped_leaves(self._last, slope, self._lr)
        return slope

    def reached(self) -> Tree:
        """The last iterate."""
        return _tree.unflatten_like(self._like, [leaf.detach() for leaf in self._last])

    def vjp(self, cotangent: Tree) -> tuple[Tensor, Tree]:
        """From a cotangent of the last iterate those of x and of the first, once: the graph goes with it."""
        inputs = (self._x, *self._first)
        found = backward(tuple(self._last), tuple(_tree.leaves(cotangent)), inputs)
        of_x, *of_y = filled(inputs, found)
        return of_x, _tree.unflatten_like(self._like, of_y)

    def value_and_total_grad(self, fun: Function) -> tuple[Tensor, Tensor]:
        """`fun(x, y)` at the last iterate, and its derivative in x through all steps, once: the graph goes with it."""
        with recording():
            output = fun(self._x, _tree.unflatten_like(self._like, self._last))
        return output.detach(), grad_of_one(output, self._x)


def weighed(
    make: Callable[[], Made], *given: Tensor
) -> tuple[Made, MutableMapping[Any, int] | None]:
    """What `make` returns, and the bytes of each memory that its graph keeps or that is `given`.

    Memory that is freed leaves the mapping, so that once the graph is dropped, what others hold too remains in it. It
    is None where it cannot be known.
    """
    sizes: MutableMapping[Any, int] = weakref.WeakKeyDictionary()

    def saved(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        sizes[storage] = storage.nbytes()
        return tensor

    for tensor in given:
        saved(tensor)
    try:
        with torch.autograd.graph.saved_tensors_hooks(saved, lambda tensor: tensor):
            return make(), sizes
    except RuntimeError:  # transformations of torch.func inside of the function take no hooks
        return make(), None


def gradient_of(fun: Function, x: Tree, y: Tree, data: Any) -> Tree:
    """The gradient of `fun(x, y, data)` in y, itself differentiable in x and y."""
    return func.grad(fun, argnums=1)(x, y, data)


def gradient_and_tangents(
    fun: Function, x: Tensor, y: Tensor, along_x: Tensor, along_y: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradient of `fun(x, y)` in y, and its derivatives along several directions, in forward mode.

    Args:
        fun: Returns a scalar tensor; made of operations that `torch.func` can differentiate forward.
        x: Shape (m,).
        y: Shape (n,).
        along_x: The directions of x, shape (k, m).
        along_y: The directions of y, shape (k, n).

    Returns:
        The gradient, shape (n,), and its derivative along each pair of directions, shape (k, n).
    """

    def tangent(u: Tensor, v: Tensor) -> Any:
        return func.jvp(func.grad(fun, argnums=1), (x, y), (u, v))

    slope, tangents = func.vmap(tangent, out_dims=(None, 0))(along_x, along_y)
    return slope.detach(), tangents.detach()
