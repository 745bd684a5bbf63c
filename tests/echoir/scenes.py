"""Small photographs for the tests, and where the example is."""

from pathlib import Path

import numpy as np
from PIL import Image

EXAMPLE = Path(__file__).parents[2] / "examples" / "echoir"


def scene(rng, height, width):
    y, x = np.mgrid[:height, :width]
    color = rng.uniform(40, 200, 3)
    edge = 60 * (x * rng.uniform(-1, 1) + y * rng.uniform(-1, 1) > 0)
    texture = 10 * np.sin(x * rng.uniform(0.2, 1)) * np.cos(y * rng.uniform(0.2, 1))
    return (color + (edge + texture)[..., None]).clip(0, 255).astype(np.uint8)


def save(path, image):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path)
