"""Torch's tensors as SciPy wants them."""

from __future__ import annotations

from typing import Any

from torch import Tensor

_HUGE = 1e30  # what SciPy is told instead of infinity, of which it makes NaN


def to_numpy(tensor: Tensor) -> Any:
    """The tensor as an array in float64, from whatever device it is on."""
    return tensor.detach().double().cpu().numpy()


def clipped(tensor: Tensor) -> Any:
    """The same with finite entries: NaN at zero, the rest within +-1e30."""
    return to_numpy(tensor.detach().double().nan_to_num(nan=0.0).clamp(-_HUGE, _HUGE))
