"""Gaussian noise, of a known strength or of any in a range."""

import numpy as np
from numpy.random import Generator


def noise(clean: np.ndarray, rng: Generator, sigma: float) -> np.ndarray:
    """Adds Gaussian noise, neither clipped nor rounded: the protocol of the papers.

    Args:
        clean: float32 (H, W, 3) in [0, 1].
        rng: the source of chance.
        sigma: standard deviation, in units of 1 / 255.
    """
    return clean + np.float32(sigma / 255) * rng.standard_normal(clean.shape, np.float32)


def blind_noise(clean: np.ndarray, rng: Generator, low: float, high: float) -> np.ndarray:
    """Adds noise of a sigma drawn evenly from a range, as blind denoisers are trained.

    References:
        Zhang et al., "Beyond a Gaussian denoiser", IEEE TIP 26 (2017), section IV (range 0 to 55).
    """
    return noise(clean, rng, rng.uniform(low, high))
