"""Backward passes: the only calls of torch's engine, and what is zero where a function ignores an input.

`torch.autograd.grad` checks its arguments in Python, which takes a third of the time of a small gradient. Here the
library makes those arguments itself, and hands them to the engine as that function would.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

Found = Sequence[Tensor | None]
engine: Any = getattr(torch.autograd.Variable, "_execution_engine", None)
_overrides: Any = torch.overrides
_nothing = nullcontext()


def recording() -> AbstractContextManager[Any]:
    """Where a graph is built, whatever the caller has set; entering torch's own context takes longer than this asks."""
    return _nothing if torch.is_grad_enabled() else torch.enable_grad()


def backward(
    outputs: tuple[Tensor, ...],
    cotangents: tuple[Tensor, ...] | None,
    inputs: tuple[Tensor, ...],
    retain_graph: bool = False,
    create_graph: bool = False,
) -> Found:
    """The derivatives of the inner product of outputs and cotangents, None in those inputs that no output knows.

    Args:
        outputs: Tensors with a graph.
        cotangents: Like the outputs; None for the one of a single scalar.
        inputs: Tensors of that graph.
        retain_graph: Whether another pass through the graph is to come.
        create_graph: Whether the derivatives are to be differentiable; then the graph stays too.
    """
    retain_graph = retain_graph or create_graph
    # Subclasses and modes of torch are to see the call that they know.
    if engine is None or _overrides.has_torch_function(outputs + inputs):
        return torch.autograd.grad(
            outputs,
            inputs,
            cotangents,
            retain_graph=retain_graph,
            create_graph=create_graph,
            allow_unused=True,
        )
    return engine.run_backward(
        outputs,
        cotangents or (torch.ones_like(outputs[0]),),
        retain_graph,
        create_graph,
        inputs,
        allow_unreachable=True,
        accumulate_grad=False,
    )


def grad(
    output: Tensor,
    inputs: Sequence[Tensor],
    cotangent: Tensor | None = None,
    *,
    retain_graph: bool = False,
    create_graph: bool = False,
) -> list[Tensor]:
    """The derivatives of `output . cotangent` in the tracked `inputs`, zero in those that it ignores.

    Args:
        output: A tensor; a scalar where there is no cotangent.
        inputs: What to differentiate by.
        cotangent: The shape of `output`.
        retain_graph: See `backward`.
        create_graph: See `backward`.
    """
    if not output.requires_grad:
        return [torch.zeros_like(leaf) for leaf in inputs]
    cotangents = None if cotangent is None else (cotangent,)
    found = backward((output,), cotangents, tuple(inputs), retain_graph, create_graph)
    return filled(inputs, found)


def grad_of_one(
    output: Tensor,
    wrt: Tensor,
    cotangent: Tensor | None = None,
    *,
    retain_graph: bool = False,
    create_graph: bool = False,
) -> Tensor:
    """The same for one input: lists would show beside a small gradient."""
    if not output.requires_grad:
        return torch.zeros_like(wrt)
    cotangents = None if cotangent is None else (cotangent,)
    (found,) = backward((output,), cotangents, (wrt,), retain_graph, create_graph)
    return torch.zeros_like(wrt) if found is None else found


def batched_grad(output: Tensor, inputs: Sequence[Tensor], cotangents: Tensor) -> list[Tensor]:
    """The same for each row of `cotangents`, shape (k, *output.shape), by one batch where torch can; the graph stays.

    Returns:
        For each input a tensor of shape (k, *input.shape).
    """
    if output.requires_grad and not torch.is_anomaly_enabled():
        # In anomaly mode torch would tell the user of the error that is caught here.
        try:
            found: Found = torch.autograd.grad(
                output,
                inputs,
                cotangents,
                retain_graph=True,
                allow_unused=True,
                is_grads_batched=True,
            )
        except RuntimeError:  # an operator without a rule for batches
            pass
        else:
            return filled([leaf.expand(len(cotangents), *leaf.shape) for leaf in inputs], found)
    rows = [grad(output, inputs, row, retain_graph=True) for row in cotangents]
    return [torch.stack(column) for column in zip(*rows, strict=True)]


def filled(inputs: Sequence[Tensor], found: Found) -> list[Tensor]:
    """Zeros where a derivative is None."""
    return [
        torch.zeros_like(leaf) if part is None else part
        for leaf, part in zip(inputs, found, strict=True)
    ]
