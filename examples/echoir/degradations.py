"""What goes wrong with a photograph: Gaussian noise, rain streaks, motion blur.

A degradation maps a clean image, float32 (H, W, 3) in [0, 1], to a degraded one. All chance comes
from the generator it is given, so the same generator state gives the same image.
"""

from collections.abc import Callable
from typing import Literal, get_args

import numpy as np
from numpy.random import Generator
from scipy.ndimage import convolve

Task = Literal["denoise", "derain", "deblur"]
Degradation = Callable[[np.ndarray, Generator], np.ndarray]

MARGIN = 12  # pixels that a kernel may reach beyond a patch: half of the longest one


def degradation(task: Task, sigma: float) -> Degradation:
    """The degradation of a task.

    Args:
        task: `"denoise"`, `"derain"` or `"deblur"`.
        sigma: standard deviation of the noise to remove, in units of 1 / 255.

    Raises:
        ValueError: if the task is unknown or sigma is negative.
    """
    if sigma < 0:
        raise ValueError(f"The noise must have sigma >= 0. Got sigma={sigma}. Use e.g. 25.")
    if task == "denoise":
        return lambda clean, rng: noise(clean, rng, sigma)
    if task == "derain":
        return rain
    if task == "deblur":
        return blur
    raise ValueError(
        f"The task must be one of {', '.join(get_args(Task))}. Got {task!r}. "
        "For another degradation, give pairs of input and target images."
    )


def noise(clean: np.ndarray, rng: Generator, sigma: float) -> np.ndarray:
    """Adds Gaussian noise, neither clipped nor rounded: the protocol of the papers."""
    return clean + np.float32(sigma / 255) * rng.standard_normal(clean.shape, np.float32)


def rain(clean: np.ndarray, rng: Generator) -> np.ndarray:
    """Adds bright streaks of one direction over a veil of mist.

    Direction within 30 degrees of vertical, 9 to 21 pixels long, starting on 1 to 4 % of the
    pixels; the veil takes up to 15 % of the contrast.
    """
    angle = np.deg2rad(rng.uniform(60, 120))
    length = rng.uniform(9, 21)
    density = rng.uniform(0.01, 0.04)
    drops = (rng.random(clean.shape[:2]) < density) * rng.uniform(0.5, 1.5, clean.shape[:2])
    path = np.linspace(-0.5, 0.5, 64)[:, None] * length * [np.sin(angle), np.cos(angle)]
    streaks = convolve(drops.astype(np.float32), _kernel(path) * 6.0, mode="mirror")
    veil = np.float32(rng.uniform(0, 0.15))
    rainy = clean * (1 - veil) + 0.8 * veil + streaks[..., None]
    return rainy.clip(0, 1).astype(np.float32)


def blur(clean: np.ndarray, rng: Generator) -> np.ndarray:
    """Moves the camera along a curved path of 6 to 18 pixels; then 1 % noise, as a sensor adds."""
    turn = rng.normal(0, 1.5)  # radians over the whole path
    heading = rng.uniform(0, 2 * np.pi) + np.linspace(0, turn, 64)
    path = np.cumsum(np.stack([np.sin(heading), np.cos(heading)], 1), 0) * rng.uniform(6, 18) / 64
    kernel = _kernel(path - path.mean(0))
    blurred = np.stack([convolve(clean[..., c], kernel, mode="mirror") for c in range(3)], -1)
    return noise(blurred, rng, 2.55)


def _kernel(path: np.ndarray) -> np.ndarray:
    """Spreads the points (row, column) of a path over a grid, each over its four pixels."""
    kernel = np.zeros((2 * MARGIN + 1, 2 * MARGIN + 1), np.float32)
    corner = np.floor(path).astype(int)
    share = path - corner
    for down in (0, 1):
        for right in (0, 1):
            weight = np.abs(1 - down - share[:, 0]) * np.abs(1 - right - share[:, 1])
            np.add.at(kernel, tuple((corner + MARGIN + [down, right]).T), weight)
    return kernel / kernel.sum()
