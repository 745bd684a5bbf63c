import sys

import numpy as np
import pytest
import torch
from scenes import EXAMPLE, save, scene

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
