"""What the functions of a problem return: checked, and in the form that the library computes with."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from bilevel._errors import ObjectiveError


def scalar(value: Any, name: str) -> Tensor:
    """`value` if it is a scalar floating tensor.

    Raises:
        ObjectiveError: It is not; the message names the function and the mend.
    """
    if isinstance(value, Tensor) and value.numel() == 1 and value.is_floating_point():
        return value if value.dim() == 0 else value.reshape(())
    rule = f"`BilevelProblem({name}=...)` must return a scalar tensor."
    if not isinstance(value, Tensor):
        raise ObjectiveError(
            f"{rule} Got {type(value).__name__}. Compute it with torch, and return the tensor."
        )
    if value.numel() != 1:
        raise ObjectiveError(
            f"{rule} Got shape {tuple(value.shape)}. Reduce it, e.g. with `.sum()`."
        )
    raise ObjectiveError(f"{rule} Got dtype {value.dtype}. Convert it, e.g. with `.double()`.")


def samples(value: Any) -> Tensor:
    """`value` if it is a vector of losses, as `per_sample=True` promises.

    Raises:
        ObjectiveError: It is not a floating tensor of one dimension.
    """
    if (
        not isinstance(value, Tensor)
        or value.dim() != 1
        or value.numel() == 0
        or not value.is_floating_point()
    ):
        got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise ObjectiveError(
            "`BilevelProblem(lower=..., per_sample=True)` must return one loss a sample, shape (n,). "
            f"Got {got}. Drop the reduction, or `per_sample=True`."
        )
    return value


def vector(value: Any, name: str) -> Tensor:
    """`value` as a vector if it is a floating tensor, as the constraint `name` of a problem must return.

    Raises:
        ObjectiveError: It is not; the message names the constraint and the mend.
    """
    if not isinstance(value, Tensor) or not value.is_floating_point():
        got = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise ObjectiveError(
            f"`BilevelProblem({name}=...)` must return a floating-point tensor, feasible where "
            f"{'== 0' if name.endswith('equality') else '<= 0'}. Got {got}. Return e.g. `y - 1.0`, not `y < 1.0`."
        )
    return value.reshape(-1)


def check_size(value: Tensor, before: Tensor, name: str) -> None:
    """Raises unless the constraint `name` has as many entries as at a call before."""
    if value.numel() != before.numel():
        raise ObjectiveError(
            f"`BilevelProblem({name}=...)` must return as many entries at each call. "
            f"Got {before.numel()}, and then {value.numel()}. "
            "Keep entries that do not bind, e.g. by `torch.where`, in place of leaving them out."
        )


def excess(value: Tensor, name: str) -> Tensor:
    """How far each entry of the constraint `name` is from being feasible, shape (k,), 0 where it is."""
    return value.abs() if name.endswith("equality") else value.clamp(min=0.0)
