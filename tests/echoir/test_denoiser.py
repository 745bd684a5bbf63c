"""The denoisers that the repository holds: each is what its file says, and restore.py takes them by default."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from model import PRESETS
from noise import noise
from photographs import bundled
from PIL import Image
from scenes import EXAMPLE
from scores import channels_first, psnr, round8
from weights import DENOISER, JPEG_DENOISER, load_weights

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def crop():
    """The middle of a photograph that it was not trained on, (256, 256, 3)."""
    cat = next(p for p in bundled().test if p.name == "chelsea").read().target
    top, left = ((length - 256) // 2 for length in cat.shape[:2])
    return cat[top : top + 256, left : left + 256].astype(np.float32) / 255


@pytest.mark.parametrize(
    ("file", "preset", "jpeg"), [(DENOISER, "cpu_deep", 0.0), (JPEG_DENOISER, "cpu_deeper", 0.25)]
)
def test_its_file_is_small_and_says_how_it_was_made(file, preset, jpeg):
    net, about = load_weights(file, CPU)
    assert file.stat().st_size < 5e6
    assert net.config == PRESETS[preset]
    assert (about["method"], about["task"], about["sigma"]) == ("asblo", "denoise", [5, 50])
    arguments = json.loads(file.with_name("arguments.json").read_text())
    log = file.with_name("metrics.jsonl").read_text()
    rows = [json.loads(line) for line in log.splitlines()]
    assert (arguments["sigma"], arguments["seed"]) == ([5, 50], 0)
    assert (arguments["preset"], arguments.get("jpeg", 0.0)) == (preset, jpeg)
    assert rows[-1]["step"] == about["steps"] == sum(arguments["stages"])


# Measured less 0.1 dB.
@pytest.mark.parametrize(("sigma", "reached"), [(5, 38.9), (15, 33.2), (25, 30.9), (50, 28.0)])
def test_it_denoises_without_being_told_sigma(crop, sigma, reached):
    net, _ = load_weights(DENOISER, CPU)
    noisy = noise(crop, np.random.default_rng(0), sigma).astype(np.float32)
    with torch.no_grad():
        restored = net(channels_first(noisy)[None])[0]
    assert psnr(round8(restored), channels_first(crop)) > reached


def error_left(folder, name, truth):
    """The share of the squared error of a file's image that restore.py leaves."""
    command = [sys.executable, EXAMPLE / "restore.py", name, "--device", "cpu"]
    subprocess.run([str(c) for c in command], cwd=folder, check=True, capture_output=True)
    images = (
        np.asarray(Image.open(folder / f), np.float64) / 255 for f in (name, f"restored/{name}")
    )
    before, after = (np.mean((image - truth) ** 2) for image in images)
    return after / before


def test_restore_takes_it_by_default(crop, tmp_path):
    noisy = noise(crop, np.random.default_rng(0), 25).clip(0, 1)
    Image.fromarray((noisy * 255).round().astype(np.uint8)).save(tmp_path / "cat.png")
    assert error_left(tmp_path, "cat.png", crop) < 1 / 7


def test_restore_takes_another_for_jpeg_files(crop, tmp_path):
    """They halve the resolution of colors, and their noise is not independent any more."""
    noisy = noise(crop, np.random.default_rng(0), 25).clip(0, 1)
    picture = Image.fromarray((noisy * 255).round().astype(np.uint8))
    picture.save(tmp_path / "cat.jpg", quality=95, subsampling="4:2:0")
    assert error_left(tmp_path, "cat.jpg", crop) < 1 / 3
