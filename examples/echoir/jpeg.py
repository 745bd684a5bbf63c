"""What a JPEG file keeps of a degraded photograph: most halve the resolution of colors, and blur their noise."""

from io import BytesIO

import numpy as np
from degradations import Degradation
from numpy.random import Generator
from PIL import Image

QUALITIES = 75, 98  # of cameras, telephones and editors, about
HALVED = 0.75  # share of the files whose colors have half the resolution


def saved(image: np.ndarray, quality: int, subsampling: str = "4:2:0") -> np.ndarray:
    """An image, float32 (H, W, 3) in [0, 1], as it is read back from a JPEG file."""
    file = BytesIO()
    pixels = (image.clip(0, 1) * 255).round().astype(np.uint8)
    Image.fromarray(pixels).save(file, "JPEG", quality=quality, subsampling=subsampling)
    return np.asarray(Image.open(file), np.float32) / 255


def sometimes_saved(degrade: Degradation, share: float) -> Degradation:
    """The degradation, followed by a JPEG file of any quality for a `share` of the images."""

    def degraded(clean: np.ndarray, rng: Generator) -> np.ndarray:
        image = degrade(clean, rng)
        if rng.random() >= share:
            return image
        quality = int(rng.integers(QUALITIES[0], QUALITIES[1] + 1))
        return saved(image, quality, "4:2:0" if rng.random() < HALVED else "4:4:4")

    return degraded if share else degrade
