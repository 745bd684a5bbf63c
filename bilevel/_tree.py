"""Vector-space operations on trees of tensors; the only place that knows the tree library.

A tree is a tensor, or nested dicts, lists and tuples of tensors. The operations read like the
algebra: `axpy(a, x, y)` is `a x + y`, `vdot(x, y)` is the inner product over all leaves.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import optree
import torch
from torch import Tensor

from bilevel._errors import StructureError
from bilevel._types import Tree

linalg: Any = torch.linalg  # its stubs are untyped
kernels: Any = torch  # for lists of tensors, which its stubs leave out
_WIDE = (torch.float32, torch.float64)  # the dtypes of vectors
# From which sums of squares on these keep their digits.
_LEAST_SQUARE = {torch.float32: 1e-30, torch.float64: 1e-290}


def leaves(tree: Tree) -> list[Tensor]:
    """The tensors of a tree, in a fixed order (dictionaries by sorted key)."""
    return [tree] if isinstance(tree, Tensor) else cast("list[Tensor]", optree.tree_leaves(tree))


def unflatten_like(tree: Tree, new_leaves: Sequence[Any]) -> Tree:
    """A tree with the structure of `tree` and the given leaves."""
    if isinstance(tree, Tensor):
        return new_leaves[0]
    return optree.tree_unflatten(optree.tree_structure(tree), new_leaves)


def map_leaves(fun: Callable[..., Any], tree: Tree, *rest: Tree) -> Tree:
    """`fun` applied leaf by leaf."""
    return unflatten_like(
        tree, [fun(*group) for group in zip(leaves(tree), *map(leaves, rest), strict=True)]
    )


def names(tree: Tree) -> list[str]:
    """The path of each leaf, as a user would write it: `['w']`, `[0]`, or `` for a lone tensor."""
    if isinstance(tree, Tensor):
        return [""]
    return ["".join(f"[{key!r}]" for key in path) for path in optree.tree_paths(tree)]


def shapes(tree: Tree) -> str:
    """The shape of each leaf, with its name where there are several."""
    return ", ".join(
        f"{name}{tuple(leaf.shape)}" for name, leaf in zip(names(tree), leaves(tree), strict=True)
    )


def kind(tree: Tree) -> tuple[Any, ...]:
    """What two trees share that differ in their numbers alone; hashable."""
    if isinstance(tree, Tensor):
        return tree.shape, tree.dtype
    parts = leaves(tree)
    return (
        optree.tree_structure(tree),
        *(leaf.shape for leaf in parts),
        *(leaf.dtype for leaf in parts),
    )


def detach(tree: Tree) -> Tree:
    """The same values in new tensors that share no memory and no graph with `tree`."""
    return unflatten_like(tree, [leaf.detach().clone() for leaf in leaves(tree)])


def normal_like(leaf: Tensor, generator: torch.Generator) -> Tensor:
    """Normal numbers of the shape, dtype and device of `leaf`, the same ones in every dtype and on every device."""
    return torch.randn(leaf.shape, generator=generator, dtype=torch.float64).to(leaf)


def zeros_like(tree: Tree) -> Tree:
    """Zeros of the structure, shapes, dtypes and devices of `tree`."""
    return map_leaves(torch.zeros_like, tree)


def size(tree: Tree) -> int:
    """The number of entries of all leaves."""
    return sum(leaf.numel() for leaf in leaves(tree))


def nbytes(tree: Tree) -> int:
    """The bytes of all leaves."""
    return sum(leaf.nbytes for leaf in leaves(tree))


def vdot(left: Tree, right: Tree) -> Tensor:
    """The inner product over all leaves, a 0-d tensor."""
    products = [
        torch.dot(a.reshape(-1), b.reshape(-1))
        for a, b in zip(leaves(left), leaves(right), strict=True)
    ]
    return torch.stack(products).sum() if len(products) > 1 else products[0]


def norm(tree: Tree) -> Tensor:
    """The Euclidean norm over all leaves, a 0-d tensor."""
    if isinstance(tree, Tensor):
        return linalg.vector_norm(tree)
    parts = leaves(tree)
    if len(parts) == 1:
        return linalg.vector_norm(parts[0])
    return linalg.vector_norm(torch.stack(kernels._foreach_norm(parts)))


def norms(*trees: Tree) -> list[Tensor]:
    """The Euclidean norm of each leaf of all trees, 0-d tensors."""
    return list(kernels._foreach_norm([leaf for tree in trees for leaf in leaves(tree)]))


def length(tree: Tree) -> float:
    """The Euclidean norm over all leaves, as a number, whose squares may under- or overflow in the dtype."""
    if isinstance(tree, Tensor) and tree.dim() == 1 and tree.dtype in _WIDE:
        square = float(torch.dot(tree, tree))  # half of the time of a norm
        least = _LEAST_SQUARE[tree.dtype]
    else:
        found = float(norm(tree))
        square, least = found * found, _LEAST_SQUARE[torch.float32]
    return math.sqrt(square) if least < square < math.inf else _scaled_length(leaves(tree))


def _scaled_length(parts: list[Tensor]) -> float:
    peaks = [float(leaf.detach().abs().max()) for leaf in parts if leaf.numel()]
    if not (math.isfinite(sum(peaks)) and any(peaks)):
        return sum(peaks)  # zero, infinite or NaN
    largest = max(peaks)
    return largest * float(norm([leaf.detach() / largest for leaf in parts]))


def rms(tree: Tree) -> float:
    """The root mean square over all leaves."""
    return length(tree) / math.sqrt(size(tree))


def axpy(scale: float | Tensor, left: Tree, right: Tree) -> Tree:
    """`scale * left + right`."""
    if isinstance(right, Tensor):
        return right + left * scale
    ours, theirs = leaves(left), leaves(right)
    if isinstance(scale, float) and abs(scale) == 1.0:  # nothing to round: one pass instead of two
        return unflatten_like(right, kernels._foreach_add(theirs, ours, alpha=scale))
    return unflatten_like(right, kernels._foreach_add(theirs, kernels._foreach_mul(ours, scale)))


def stepped(point: Tree, direction: Tree, lr: float) -> Tree:
    """`point - lr * direction`, in one pass over each leaf."""
    return unflatten_like(point, stepped_leaves(leaves(point), leaves(direction), lr))


def stepped_leaves(point: Sequence[Tensor], direction: Sequence[Tensor], lr: float) -> list[Tensor]:
    """The same from and to lists of leaves."""
    return [torch.add(leaf, d, alpha=-lr) for leaf, d in zip(point, direction, strict=True)]


def scale(factor: float | Tensor, tree: Tree) -> Tree:
    """`factor * tree`."""
    if isinstance(tree, Tensor):
        return tree * factor
    return unflatten_like(tree, kernels._foreach_mul(leaves(tree), factor))


def where(condition: Tensor, left: Tree, right: Tree) -> Tree:
    """`left` where the 0-d `condition` holds, else `right`; decided on the device."""
    pairs = zip(leaves(left), leaves(right), strict=True)
    return unflatten_like(right, [torch.where(condition, a, b) for a, b in pairs])


def is_finite(tree: Tree) -> bool:
    """Whether no leaf holds a NaN or an infinity."""
    # A finite sum has finite terms, and is one pass; finite terms may still overflow together.
    return all(
        math.isfinite(float(leaf.detach().sum())) or bool(torch.isfinite(leaf).all())
        for leaf in leaves(tree)
    )


def ravel(tree: Tree) -> tuple[Tensor, Callable[[Tree], Tree]]:
    """One vector of all entries, and the function that puts such a vector back into the tree.

    The function keeps the graph: gradients flow from the tree to the vector. Leaves of several
    dtypes meet in the widest of them, float32 at least, and return to their own. What is a tree
    already passes through it.
    """
    if isinstance(tree, Tensor) and tree.dim() == 1 and tree.dtype in _WIDE:
        own = tree.dtype

        def as_own(vector: Tree) -> Tree:
            is_ready = not isinstance(vector, Tensor) or vector.dtype == own
            return vector if is_ready else vector.to(own)

        return tree, as_own
    parts = leaves(tree)
    dtype = torch.float32
    for leaf in parts:
        dtype = torch.promote_types(dtype, leaf.dtype)
    shapes = [leaf.shape for leaf in parts]
    dtypes = [leaf.dtype for leaf in parts]
    sizes = [leaf.numel() for leaf in parts]
    # The structure alone, so that the tensors need not live on; of tensors, as `torch.compile` follows no others.
    like = unflatten_like(tree, [leaf.new_empty(0) for leaf in parts])

    def unravel(vector: Tree) -> Tree:
        if not isinstance(vector, Tensor):
            return vector
        pieces = torch.split_with_sizes(vector, sizes) if len(sizes) > 1 else (vector,)
        views = [p.view(s) for p, s in zip(pieces, shapes, strict=True)]
        return unflatten_like(
            like, [v if v.dtype == d else v.to(d) for v, d in zip(views, dtypes, strict=True)]
        )

    return torch.cat([leaf.reshape(-1).to(dtype) for leaf in parts]), unravel


def check_variable(tree: Tree, where: str) -> None:
    """Raises unless `tree` holds at least one tensor and every leaf is a floating tensor.

    Args:
        tree: What the user passed as a variable.
        where: How to name it in the error, e.g. ``"x0"``.

    Raises:
        StructureError: No leaf, a leaf that is no tensor, or a leaf that is not floating. (A NaN
            is a state of the numbers, not of the structure: solvers report it as a `Status`.)
    """
    parts = leaves(tree)
    if not parts:
        raise StructureError(
            f"`{where}` must hold at least one tensor. Got an empty tree: {tree!r}. "
            "Pass a tensor, or dicts, lists and tuples of tensors."
        )
    for name, leaf in zip(names(tree), parts, strict=True):
        if not isinstance(leaf, Tensor):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise StructureError(
                f"`{where}{name}` must be a tensor. Got {type(leaf).__name__}. Wrap it, e.g. with `torch.tensor(...)`."
            )
        if not leaf.is_floating_point():
            raise StructureError(
                f"`{where}{name}` must be a floating-point tensor. Got dtype {leaf.dtype}. "
                "Convert it, e.g. with `.to(torch.float64)`."
            )
    if size(tree) == 0:
        raise StructureError(
            f"`{where}` must hold at least one number. Got shapes {[tuple(leaf.shape) for leaf in parts]}. "
            "Pass a tensor with entries."
        )


def check_like(
    tree: Tree,
    reference: Tree,
    where: str,
    mend: str = "Return a tree like the one that was passed in.",
) -> None:
    """Raises unless `tree` has the structure, shapes and dtypes of `reference`."""
    if names(tree) != names(reference):
        raise StructureError(
            f"`{where}` must have the structure {names(reference)}. Got {names(tree)}. {mend}"
        )
    for name, leaf, other in zip(names(tree), leaves(tree), leaves(reference), strict=True):
        if not isinstance(leaf, Tensor):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise StructureError(
                f"`{where}{name}` must be a tensor. Got {type(leaf).__name__}. {mend}"
            )
        if leaf.shape != other.shape or leaf.dtype != other.dtype:
            raise StructureError(
                f"`{where}{name}` must have shape {tuple(other.shape)} and dtype {other.dtype}. "
                f"Got {tuple(leaf.shape)} and {leaf.dtype}. {mend}"
            )
    if optree.tree_structure(tree) != optree.tree_structure(reference):
        raise StructureError(
            f"`{where}` must be made of the same dicts, lists and tuples as {type(reference).__name__} "
            f"{names(reference)}. Got {type(tree).__name__}. {mend}"
        )
