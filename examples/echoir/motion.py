"""Motion blur: linear kernels, and those of a camera that shakes in a hand.

A kernel is the path that a point of light takes during the exposure, spread over the pixels. About five
milliseconds for an image of 256 x 256 pixels on one core, two of them for the noise.

References:
    Boracchi and Foi, "Modeling the performance of image restoration from motion blur", IEEE TIP 21
    (2012); in the form, and with the ranges, of Kupyn et al., "DeblurGAN", CVPR 2018, Algorithm 1.
"""

import numpy as np
from noise import noise
from numpy.random import Generator
from scipy.fft import irfft2, next_fast_len, rfft2

REACH = 12  # pixels from a kernel's center to its border
STEPS = 200  # points of a path
LINEAR = 0.25  # share of the straight paths
SENSOR_NOISE = 2.55  # sigma in units of 1 / 255: without any, deblurring would be inversion


def blur(clean: np.ndarray, rng: Generator) -> np.ndarray:
    """Blurs by a random kernel, straight or shaken, of 6 to 30 pixels; then 1 % noise."""
    length = rng.uniform(6, 30)
    if rng.random() < LINEAR:
        kernel = linear_kernel(min(length, 2 * REACH), rng.uniform(0, np.pi))
    else:
        kernel = shake_kernel(rng, length)
    return noise(convolve(clean, kernel), rng, SENSOR_NOISE)


def linear_kernel(length: float, angle: float) -> np.ndarray:
    """A straight path.

    Args:
        length: in pixels, at most 24.
        angle: in radians, from the horizontal.
    """
    along = np.linspace(-0.5, 0.5, STEPS)[:, None] * length
    return rasterize(along * [np.sin(angle), np.cos(angle)])


def shake_kernel(rng: Generator, length: float) -> np.ndarray:
    """The path of a camera that drifts, trembles, is pulled back, and sometimes jerks.

    Args:
        rng: the source of chance.
        length: of the whole path in pixels; a path that is too wide for the kernel is shrunk to fit.
    """
    return rasterize(trajectory(rng, length))


def trajectory(rng: Generator, length: float) -> np.ndarray:
    """Rows and columns of a shaken path, (200, 2): steps of one length in changing directions."""
    pull = rng.uniform(0, 0.7)  # back to the start
    tremble = rng.uniform(0, 10)
    jerks = rng.uniform(0, 0.2)
    anxiety = 0.1 * rng.uniform()  # how much of all three; DeblurGAN's 0.005 on 2,000 steps
    stride = length / (STEPS - 1)
    push = rng.standard_normal((STEPS, 2)) @ [1, 1j] * tremble
    jerking = rng.random(STEPS) < jerks * anxiety
    turn = np.exp(1j * (np.pi + rng.uniform(-0.5, 0.5, STEPS)))
    velocity = stride * np.exp(2j * np.pi * rng.uniform())
    place, places = 0j, np.empty(STEPS, complex)
    for step in range(STEPS):
        places[step] = place
        jerk = 2 * velocity * turn[step] if jerking[step] else 0
        velocity += jerk + anxiety * (push[step] - pull * place) * stride
        velocity *= stride / abs(velocity)
        place += velocity
    return np.stack([places.imag, places.real], 1)


def rasterize(path: np.ndarray) -> np.ndarray:
    """Centers a path, (N, 2), and spreads each point over its four pixels; the sum is one."""
    path = path - (path.max(0) + path.min(0)) / 2
    path = path * min(1.0, (REACH - 1e-6) / max(np.abs(path).max(), 1e-9))
    kernel = np.zeros((2 * REACH + 1, 2 * REACH + 1), np.float32)
    corner = np.floor(path).astype(int)
    share = path - corner
    for down in (0, 1):
        for right in (0, 1):
            weight = np.abs(1 - down - share[:, 0]) * np.abs(1 - right - share[:, 1])
            np.add.at(kernel, tuple((corner + REACH + [down, right]).T), weight)
    return kernel / kernel.sum()


def convolve(image: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """Each channel of (H, W, C) with a kernel, the image mirrored at its borders."""
    reach = [(size // 2, size // 2) for size in kernel.shape]
    padded = np.pad(image.transpose(2, 0, 1), [(0, 0), *reach], mode="symmetric")
    # Around a torus of the padded size, what wraps over falls on rows and columns that are cut off.
    shape = [next_fast_len(size, real=True) for size in padded.shape[1:]]
    blurred = irfft2(rfft2(padded, shape) * rfft2(kernel, shape), shape)
    (height, width), (top, left) = image.shape[:2], (size - 1 for size in kernel.shape)
    blurred = blurred[:, top : top + height, left : left + width]
    return np.ascontiguousarray(blurred.transpose(1, 2, 0))
