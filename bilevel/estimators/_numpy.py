"""Torch's tensors as SciPy wants them."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def to_numpy(tensor: Tensor) -> Any:
    """The tensor as an array in float64, from whatever device it is on."""
    return tensor.detach().double().cpu().numpy()
