"""Rain: layers of streaks before the scene, and the veil of those too far to be seen singly.

About three milliseconds for an image of 256 x 256 pixels and two layers on one core.

References:
    Yang et al., "Deep joint rain detection and removal from a single image", CVPR 2017, Eq. 3: the model
    O = a (B + S_1 + ... + S_n) + (1 - a) A with streak layers S of one direction each, transmission a
    and atmospheric light A.
    Garg and Nayar, "Vision and rain", IJCV 75 (2007): a drop brightens what is behind it, and its streak
    is as long as it falls during the exposure.
"""

from dataclasses import dataclass

import numpy as np
from motion import REACH, convolve, rasterize
from numpy.random import Generator


@dataclass(frozen=True)
class Layer:
    """Streaks at one distance.

    Attributes:
        angle: of the fall in radians, from the horizontal; pi / 2 is straight down.
        length: of a streak in pixels, at most 24.
        width: of a streak in pixels, at least one.
        cover: share of the pixels that lie under a streak, were none above another.
        brightness: that a streak adds, at its middle.
    """

    angle: float
    length: float
    width: float
    cover: float
    brightness: float

    def streaks(self, size: tuple[int, int], rng: Generator) -> np.ndarray:
        """The light that the streaks add, (H, W); single ones differ by a factor of up to three."""
        density = self.cover / (self.length * self.width)
        drops = (rng.random(size, np.float32) < density).astype(np.float32)
        drops *= rng.uniform(0.5, 1.5, size).astype(np.float32)
        along, across = (
            [np.sin(self.angle), np.cos(self.angle)],
            [np.cos(self.angle), -np.sin(self.angle)],
        )
        s, t = np.meshgrid(np.linspace(-0.5, 0.5, 64), np.linspace(-0.5, 0.5, 5))
        path = s.reshape(-1, 1) * self.length * along + t.reshape(-1, 1) * (self.width - 1) * across
        kernel = rasterize(path)
        return convolve(drops[..., None], kernel * (self.brightness / kernel.max()))[..., 0]


def rain(clean: np.ndarray, rng: Generator) -> np.ndarray:
    """Adds one to three layers of streaks that fall alike, within 30 degrees of vertical, and a veil.

    Streaks are 8 to 24 pixels long and 1 to 3 wide, lie over 1 to 30 % of the pixels, and add 0.2 to 0.7;
    the veil takes up to a third of the contrast.
    """
    fall = rng.uniform(np.pi / 3, 2 * np.pi / 3)
    layers = [
        Layer(
            angle=fall + rng.normal(0, 0.05),
            length=rng.uniform(8, 2 * REACH),
            width=rng.uniform(1, 3),
            cover=np.exp(rng.uniform(np.log(0.01), np.log(0.3))),
            brightness=rng.uniform(0.2, 0.7),
        )
        for _ in range(rng.integers(1, 4))
    ]
    return compose(
        clean, rng, layers, transmission=rng.uniform(0.67, 1), light=rng.uniform(0.7, 0.95)
    )


def compose(
    clean: np.ndarray, rng: Generator, layers: list[Layer], *, transmission: float, light: float
) -> np.ndarray:
    """Eq. 3 of Yang et al.

    Args:
        clean: float32 (H, W, 3) in [0, 1].
        rng: the source of chance.
        layers: of streaks.
        transmission: share of the scene's light that reaches the camera, a.
        light: brightness of the veil, A.
    """
    streaks = sum((layer.streaks(clean.shape[:2], rng) for layer in layers), np.float32(0))
    rainy = transmission * (clean + np.asarray(streaks)[..., None]) + (1 - transmission) * light
    return rainy.clip(0, 1).astype(np.float32)
