import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

EXAMPLE = Path(__file__).parents[2] / "examples" / "echoir"
sys.path.insert(0, str(EXAMPLE))  # the example's files import each other by their bare names


@pytest.fixture(autouse=True)
def one_thread():
    """Small tensors: a second thread only costs, and bits depend on the number of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def folder(tmp_path):
    """A folder of five small photographs: smooth color with an edge and some texture."""
    rng = np.random.default_rng(0)
    path = tmp_path / "photographs"
    path.mkdir()
    for i in range(5):
        save(path / f"photo{i}.png", scene(rng, 60 + i, 70))
    return path


def scene(rng, height, width):
    y, x = np.mgrid[:height, :width]
    color = rng.uniform(40, 200, 3)
    edge = 60 * (x * rng.uniform(-1, 1) + y * rng.uniform(-1, 1) > 0)
    texture = 10 * np.sin(x * rng.uniform(0.2, 1)) * np.cos(y * rng.uniform(0.2, 1))
    return (color + (edge + texture)[..., None]).clip(0, 255).astype(np.uint8)


def save(path, image):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path)
