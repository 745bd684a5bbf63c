"""Noise as a camera's sensor has it: added to raw values, then developed to a picture.

A photograph is taken back to raw values (gamma and white balance undone, one color a pixel), gets noise
whose variance grows with the light, and is developed again: gamma makes the noise of the dark visible, and
demosaicing correlates it between neighbors. About five milliseconds for an image of 256 x 256 pixels on one
core.

References:
    Foi et al., "Practical Poissonian-Gaussian noise modeling and fitting for single-image raw-data", IEEE
    TIP 17 (2008): variance = shot * signal + read.
    Brooks et al., "Unprocessing images for learned raw denoising", CVPR 2019, section 3: the steps, the
    gains and the strengths of the noise. Left out are their tone curve and color matrices.
"""

import numpy as np
from numpy.random import Generator
from scipy.ndimage import correlate

SHOT = (1e-4, 0.012)  # Brooks et al.: least and greatest, between which log(shot) is even
LINEAR_PART = 0.0031308  # of sRGB's curve (IEC 61966-2-1)
GREEN = np.array([[0, 1, 0], [1, 4, 1], [0, 1, 0]], np.float32) / 4  # bilinear demosaicing
OTHER = np.array([[1, 2, 1], [2, 4, 2], [1, 2, 1]], np.float32) / 4


def sensor_noise(clean: np.ndarray, rng: Generator) -> np.ndarray:
    """Takes the picture again with a sensor of a random strength of noise and white balance.

    Args:
        clean: float32 (H, W, 3) in [0, 1], in sRGB.
        rng: the source of chance.
    """
    shot, read = random_strength(rng)
    gains = np.array([rng.uniform(1.9, 2.4), 1.0, rng.uniform(1.5, 1.9)], np.float32)
    return retake(clean, rng, shot=shot, read=read, gains=gains, mosaic=True)


def random_strength(rng: Generator) -> tuple[float, float]:
    """Variance per unit of signal and at zero signal, as cameras have them (Brooks et al., section 3.1)."""
    log_shot = rng.uniform(np.log(SHOT[0]), np.log(SHOT[1]))
    log_read = rng.normal(2.18 * log_shot + 1.20, 0.26)
    return float(np.exp(log_shot)), float(np.exp(log_read))


def retake(
    clean: np.ndarray,
    rng: Generator,
    *,
    shot: float,
    read: float,
    gains: np.ndarray,
    mosaic: bool,
) -> np.ndarray:
    """Undoes the development, adds noise, and develops.

    Args:
        clean: float32 (H, W, 3) in [0, 1], in sRGB.
        rng: the source of chance.
        shot: variance per unit of raw signal.
        read: variance at zero signal.
        gains: white balance of red, green and blue, each 1 or more.
        mosaic: sense one color a pixel and interpolate the others.
    """
    raw = linearize(clean) / gains
    raw = shot_and_read(raw, rng, shot, read)
    if mosaic:
        raw = demosaic(raw)
    return develop((raw * gains).clip(0, 1))


def shot_and_read(raw: np.ndarray, rng: Generator, shot: float, read: float) -> np.ndarray:
    """Adds noise of variance shot * signal + read: the normal approximation of Poisson and Gaussian."""
    deviation = np.sqrt(np.float32(shot) * raw + np.float32(read))
    return raw + deviation * rng.standard_normal(raw.shape, np.float32)


def demosaic(color: np.ndarray) -> np.ndarray:
    """Keeps of (H, W, 3) what a sensor with the Bayer pattern RGGB sees, and interpolates bilinearly."""
    sites = {0: [(0, 0)], 1: [(0, 1), (1, 0)], 2: [(1, 1)]}
    seen = np.zeros_like(color)
    for channel, places in sites.items():
        for row, column in places:
            seen[row::2, column::2, channel] = color[row::2, column::2, channel]
    # "mirror" leaves the border pixel out, so that the pattern goes on beyond it.
    kernels = (OTHER, GREEN, OTHER)
    channels = [correlate(seen[..., c], kernel, mode="mirror") for c, kernel in enumerate(kernels)]
    return np.stack(channels, -1)


def linearize(srgb: np.ndarray) -> np.ndarray:
    """SRGB to linear light."""
    low = srgb / np.float32(12.92)
    high = ((srgb + np.float32(0.055)) / np.float32(1.055)) ** np.float32(2.4)
    return np.where(srgb <= 12.92 * LINEAR_PART, low, high)


def develop(linear: np.ndarray) -> np.ndarray:
    """Linear light to sRGB."""
    low = linear * np.float32(12.92)
    high = np.float32(1.055) * linear ** np.float32(1 / 2.4) - np.float32(0.055)
    return np.where(linear <= LINEAR_PART, low, high)
