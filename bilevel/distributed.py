r"""Data parallelism: each process evaluates the objectives on its own part of a batch."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

from bilevel import _tree
from bilevel._errors import ObjectiveError, StructureError, check_kind
from bilevel._problem import CONSTRAINTS, BilevelProblem
from bilevel._returned import samples, scalar, vector
from bilevel._types import Objective, Tree

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

# The stubs of both are untyped, and a torch without `distributed` must still import this file.
dist: Any = torch.distributed
Function: Any = torch.autograd.Function

__all__ = ["data_parallel"]


def data_parallel(problem: BilevelProblem, group: ProcessGroup | None = None) -> BilevelProblem:
    r"""The same problem, each rank evaluating it on its own part of the batch.

    Objectives and constraints of the returned problem are the means over the ranks,

    $$F(x, y) = \frac{1}{W} \sum_{r=1}^{W} F(x, y; \text{data}_r),$$

    and so are their gradients, Hessian-vector products and forward-mode derivatives. Where the problem is
    `per_sample`, the losses of all ranks are joined in the order of the ranks, so that f(x, y) - f(x, z) is formed
    sample by sample of the joined batch. Any solver and estimator then runs on every rank as it would in one
    process, each with its own `data` or batches. What it decides by are the reduced numbers, so x, y and all that is
    found stay equal on all ranks to the last bit.

    It holds if all ranks do the same: they begin with the same x0 and y0 (checked at the first evaluation) and have
    the same solver, schedules and seeds of its generators; the parts of the batch are of equal size (checked where
    the problem is `per_sample`; elsewhere a mean over unequal parts would weigh their samples unequally); and
    objectives are means over samples, not sums. Constraints are averaged entry by entry: let them not look at the
    data, or be means over it. The map of a `FixedPoint` is not the problem's, and must be equal on all ranks.

    Args:
        problem: Its functions are called with the data of this rank.
        group: The processes; all, by default.

    Raises:
        TypeError: `problem` is no `BilevelProblem`.
        RuntimeError: There is no process group.
        ValueError: This process is not in `group`.

    The functions of the returned problem raise further:

    - `StructureError`: x or y differ between the ranks at the first evaluation, or hold a `DTensor`.
    - `ObjectiveError`: Losses by sample, or constraints, are not equally many on all ranks.
    - `ConnectionError`: Another rank has ended or has not answered in the time of the group.

    Example:
        >>> import bilevel as bl
        >>> torch.distributed.init_process_group(
        ...     "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
        ... )  # under torchrun: init_process_group("gloo")
        >>> problem = bl.BilevelProblem(
        ...     upper=lambda x, y, data: ((y - data) ** 2).mean(),
        ...     lower=lambda x, y, data: ((y - x) ** 2).sum(),
        ... )
        >>> parallel = bl.distributed.data_parallel(problem)
        >>> x, y, part = torch.zeros(2), torch.zeros(2), torch.tensor([1.0, 3.0])
        >>> bl.hypergradient(parallel, x, y, bl.Implicit(), data=part).grad  # y = x, so x - data
        tensor([-1., -3.])
        >>> torch.distributed.destroy_process_group()

    Note:
        Don't wrap the network in `DistributedDataParallel`: it silently does not synchronize gradients that are
        returned, as here and by `torch.autograd.grad`. FSDP2 modules, and other `DTensor`s, are refused: a backward
        pass of FSDP2 with `create_graph=True` silently gives gradients that do not require grad, so that second
        derivatives would be lost. x and y lie whole on each rank.

        All leaves of x and y take part in an objective then, so a leaf that it ignores has a gradient of zero.
    """
    check_kind(
        "data_parallel(problem=...)", problem, BilevelProblem, "Create one of two functions."
    )
    ranks = _Ranks(group)
    wrapped = {name: _parallel(problem, name, ranks) for name in ("upper", "lower", *CONSTRAINTS)}
    return replace(problem, **wrapped)


def _parallel(problem: BilevelProblem, name: str, ranks: _Ranks) -> Any:
    """The function `name` of a problem, over all ranks; None where the problem has none."""
    fun: Objective | None = getattr(problem, name)
    if fun is None:
        return None

    def parallel(x: Tree, y: Tree, data: Any) -> Tensor:
        value = fun(*ranks.to_local(x, y), data)
        if name == "lower" and problem.per_sample:
            return ranks.joined(samples(value), name)
        if name in CONSTRAINTS:
            return ranks.mean(vector(value, name), name)
        return ranks.mean(scalar(value, name))

    return parallel


class _Ranks:
    """The processes of a group, and how tensors pass between them.

    A tensor is replicated, equal on all ranks, or local, each rank's own. The linear maps between the two kinds are
    `_Copy` and `_Sum`, each the other's adjoint, so derivatives of any order and mode are right.
    """

    def __init__(self, group: ProcessGroup | None) -> None:
        if not (dist.is_available() and dist.is_initialized()):
            raise RuntimeError(
                "`data_parallel` must be called where torch.distributed has a process group. Got none. Call "
                "`torch.distributed.init_process_group(...)` first, e.g. in a script that torchrun starts."
            )
        self.group = group
        self.rank: int = dist.get_rank(group)
        if self.rank < 0:
            raise ValueError(
                "`data_parallel(group=...)` must hold the process that calls it. Got a group without process "
                f"{dist.get_rank()}. Call it on the processes of the group only."
            )
        self.count: int = dist.get_world_size(group)
        self._has_begun = False

    def to_local(self, x: Tree, y: Tree) -> tuple[Tree, Tree]:
        """X and y, replicated, as variables of this rank's objective: their cotangents are summed over the ranks."""
        of_x, of_y = _tree.leaves(x), _tree.leaves(y)
        for leaf in (*of_x, *of_y):
            if hasattr(leaf, "placements"):
                raise StructureError(
                    "x and y must lie whole on each rank for `data_parallel`. Got a `DTensor`, as FSDP2 makes them. "
                    "Its backward pass loses second derivatives silently. Leave the module unsharded."
                )
        local: tuple[Tensor, ...] = _Copy.apply(self, *of_x, *of_y)
        return (
            _tree.unflatten_like(x, local[: len(of_x)]),
            _tree.unflatten_like(y, local[len(of_x) :]),
        )

    def mean(self, value: Tensor, name: str | None = None) -> Tensor:
        """The mean of a local tensor over the ranks, which all have it; of equal shape where it has a `name`."""
        return _Sum.apply(self, value, name) / self.count

    def joined(self, losses: Tensor, name: str) -> Tensor:
        """The local losses of all ranks, (n,) each, in the order of the ranks, (count * n,)."""
        before, behind = self.rank, self.count - 1 - self.rank
        among_zeros = functional.pad(losses, (before * len(losses), behind * len(losses)))
        return _Sum.apply(self, among_zeros, name)

    def summed(self, tensor: Tensor) -> Tensor:
        """The sum over the ranks, in a new tensor."""
        total = tensor.clone(memory_format=torch.contiguous_format)
        # A batch of cotangents (`is_grads_batched`) has no memory to send: torch says so here, with the error after
        # which `_autodiff` takes one product at a time.
        total.data_ptr()
        with _answered():
            dist.all_reduce(total, group=self.group)
        return total

    def check_length(self, name: str, value: Tensor) -> None:
        """Raises on all ranks unless `value` has as many entries on each."""
        lengths = self._gathered(value.numel(), value.device)
        if len(set(lengths)) > 1:
            raise ObjectiveError(
                f"`BilevelProblem({name}=...)` must return equally many numbers on all ranks of `data_parallel`. "
                f"Got {[length // self.count if name == 'lower' else length for length in lengths]}. Give each rank "
                "an equal part of the batch, e.g. drop the last, incomplete batch."
            )

    def check_start(self, leaves: Sequence[Tensor]) -> None:
        """Raises on all ranks unless all begin with the same values; looks at the first evaluation only."""
        if self._has_begun:
            return
        mine = _flat(leaves)
        lengths = self._gathered(mine.numel(), mine.device)
        if len(set(lengths)) > 1:
            raise StructureError(
                "x0 and y0 must be the same on all ranks of `data_parallel`. Got different numbers of entries: "
                f"{lengths}. Build the same problem on each rank."
            )
        first = mine.clone()
        with _answered():
            dist.broadcast(first, group=self.group, group_src=0)
        same = bool(((mine == first) | (mine.isnan() & first.isnan())).all())
        differ = [rank for rank, x in enumerate(self._gathered(int(same), mine.device)) if not x]
        if differ:
            raise StructureError(
                "x0 and y0 must be the same on all ranks of `data_parallel`. Got other values than rank 0's on "
                f"{differ}. Seed all ranks alike where the start is drawn, or `torch.distributed.broadcast` it."
            )
        self._has_begun = True

    def _gathered(self, number: int, device: torch.device) -> list[int]:
        """A number of each rank."""
        mine = torch.tensor([number], device=device)
        numbers = [torch.empty_like(mine) for _ in range(self.count)]
        with _answered():
            dist.all_gather(numbers, mine, group=self.group)
        return [int(number) for number in torch.cat(numbers)]


@contextmanager
def _answered() -> Generator[None, None, None]:
    """Names what a failed exchange means."""
    try:
        yield
    except RuntimeError as error:
        raise ConnectionError(
            "All ranks of `data_parallel` must take part in each evaluation. Got no answer from another rank, which "
            "has ended or hangs. Look for the first error of all ranks."
        ) from error


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    """All entries in one vector of the widest dtype."""
    dtype = tensors[0].dtype
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return torch.cat([tensor.reshape(-1).to(dtype) for tensor in tensors])


class _Copy(Function):
    """Replicated tensors -> local ones: the identity. Its adjoint is the sum over the ranks, in one exchange."""

    @staticmethod
    def forward(ranks: _Ranks, *leaves: Tensor) -> tuple[Tensor, ...]:
        ranks.check_start(leaves)
        return tuple(leaf.view_as(leaf) for leaf in leaves)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.ranks = inputs[0]

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        needed: tuple[bool, ...] = ctx.needs_input_grad[1:]
        local = [part for part, need in zip(cotangents, needed, strict=True) if need]
        flat: Tensor = _Sum.apply(ctx.ranks, _flat(local), None)
        pieces = zip(torch.split(flat, [part.numel() for part in local]), local, strict=True)
        sums = iter([piece.view(part.shape).to(part.dtype) for piece, part in pieces])
        return (None, *(next(sums) if need else None for need in needed))

    @staticmethod
    def jvp(ctx: Any, _: None, *tangents: Tensor) -> tuple[Tensor, ...]:
        return _Copy.apply(ctx.ranks, *tangents)

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], ranks: _Ranks, *leaves: Tensor
    ) -> tuple[tuple[Tensor, ...], tuple[int | None, ...]]:
        return _Copy.apply(ranks, *leaves), in_dims[1:]


class _Sum(Function):
    """A local tensor -> the replicated sum over the ranks. Its adjoint is the identity."""

    @staticmethod
    def forward(ranks: _Ranks, local: Tensor, name: str | None) -> Tensor:
        if name is not None:
            ranks.check_length(name, local)
        return ranks.summed(local)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.ranks = inputs[0]

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[None, Tensor, None]:
        (local,) = _Copy.apply(ctx.ranks, cotangent)
        return None, local, None

    @staticmethod
    def jvp(ctx: Any, _: None, tangent: Tensor, __: None) -> Tensor:
        return _Sum.apply(ctx.ranks, tangent, None)

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[Any, ...], ranks: _Ranks, local: Tensor, name: str | None
    ) -> tuple[Tensor, int | None]:
        return _Sum.apply(ranks, local, name), in_dims[1]
