"""What goes wrong with a photograph, by task: the choice among noise, rain and motion blur.

A degradation maps a clean image, float32 (H, W, 3) in [0, 1], to a degraded one. All chance comes
from the generator it is given, so the same generator state gives the same image.
"""

import math
from collections.abc import Callable, Sequence
from typing import Literal, get_args

import numpy as np
from motion import REACH, blur
from noise import blind_noise, noise
from numpy.random import Generator
from rain import rain
from sensor import sensor_noise

Task = Literal["denoise", "denoise-raw", "derain", "deblur"]
Degradation = Callable[[np.ndarray, Generator], np.ndarray]

MARGIN = REACH  # pixels that a kernel may reach beyond a patch
USUAL = 25.0  # sigma by which blind denoisers are compared


def degradation(task: Task, sigma: float | Sequence[float]) -> Degradation:
    """The degradation of a task.

    Args:
        task: `"denoise"` (Gaussian noise), `"denoise-raw"` (a sensor's), `"derain"` or `"deblur"`.
        sigma: standard deviation of the Gaussian noise, in units of 1 / 255; or the lowest and the
            highest, between which every image gets its own.

    Raises:
        ValueError: if the task is unknown, or sigma is negative or infinite, or a range in the wrong order.
    """
    low, high = (sigma, sigma) if isinstance(sigma, int | float) else sigma
    if not 0 <= low <= high < math.inf:
        raise ValueError(
            f"The noise must have sigma >= 0, or a range of two such numbers, the lower first. Got sigma={sigma}. "
            "Use e.g. 25, or 5 50."
        )
    if task == "denoise" and low == high:
        return lambda clean, rng: noise(clean, rng, low)
    if task == "denoise":
        return lambda clean, rng: blind_noise(clean, rng, low, high)
    known = {"denoise-raw": sensor_noise, "derain": rain, "deblur": blur}
    if task not in known:
        raise ValueError(
            f"The task must be one of {', '.join(get_args(Task))}. Got {task!r}. "
            "For another degradation, give pairs of input and target images."
        )
    return known[task]


def one_sigma(sigma: float | Sequence[float]) -> float:
    """The sigma to measure with: of a range 25, as is usual, or its middle if 25 is outside."""
    if isinstance(sigma, int | float):
        return float(sigma)
    low, high = sigma
    return USUAL if low <= USUAL <= high else (low + high) / 2
