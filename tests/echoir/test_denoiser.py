"""The denoiser that the repository holds: it is what its file says, and restore.py takes it by default."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from model import PRESETS, count
from noise import noise
from photographs import bundled
from PIL import Image
from scenes import EXAMPLE
from scores import channels_first, psnr, round8
from weights import DENOISER, load_weights

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def crop():
    """The middle of a photograph that it was not trained on, (256, 256, 3)."""
    cat = next(p for p in bundled().test if p.name == "chelsea").read().target
    top, left = ((length - 256) // 2 for length in cat.shape[:2])
    return cat[top : top + 256, left : left + 256].astype(np.float32) / 255


def test_its_file_is_small_and_says_how_it_was_made():
    net, about = load_weights(DENOISER, CPU)
    assert DENOISER.stat().st_size < 5e6
    assert sum(p.numel() for p in net.parameters()) == count(PRESETS["cpu_deep"])["parameters"]
    assert (about["method"], about["task"], about["sigma"]) == ("asblo", "denoise", [5, 50])
    arguments = json.loads(DENOISER.with_name("arguments.json").read_text())
    log = DENOISER.with_name("metrics.jsonl").read_text()
    rows = [json.loads(line) for line in log.splitlines()]
    assert (arguments["sigma"], arguments["seed"]) == ([5, 50], 0)
    assert rows[-1]["step"] == about["steps"] == sum(arguments["stages"])


# Measured less 0.1 dB.
@pytest.mark.parametrize(("sigma", "reached"), [(5, 38.9), (15, 33.2), (25, 30.9), (50, 28.0)])
def test_it_denoises_without_being_told_sigma(crop, sigma, reached):
    net, _ = load_weights(DENOISER, CPU)
    noisy = noise(crop, np.random.default_rng(0), sigma).astype(np.float32)
    with torch.no_grad():
        restored = net(channels_first(noisy)[None])[0]
    assert psnr(round8(restored), channels_first(crop)) > reached


def test_restore_takes_it_by_default(crop, tmp_path):
    noisy = noise(crop, np.random.default_rng(0), 25).clip(0, 1)
    Image.fromarray((noisy * 255).round().astype(np.uint8)).save(tmp_path / "cat.png")
    command = [sys.executable, EXAMPLE / "restore.py", "cat.png", "--device", "cpu"]
    subprocess.run([str(c) for c in command], cwd=tmp_path, check=True, capture_output=True)
    restored = np.asarray(Image.open(tmp_path / "restored" / "cat.png"), np.float64) / 255
    error, before = (np.mean((image - crop) ** 2) for image in (restored, noisy))
    assert error < before / 7
