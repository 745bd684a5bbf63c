import subprocess
import sys

import numpy as np
import pytest
import torch
from degradations import degradation
from model import EchoIR, EchoIRConfig
from photographs import Photograph, load_image
from PIL import Image
from scenes import EXAMPLE, save, scene
from scores import evaluate, luma, psnr, round8, score
from weights import load_weights, save_weights

CPU = torch.device("cpu")
TINY = EchoIRConfig(width=8, blocks=(1, 1), heads=(1, 2), final_blocks=1, unshuffle=2)
ABOUT = {"task": "denoise", "sigma": 25.0}


@pytest.fixture
def weights(tmp_path):
    torch.manual_seed(0)
    path = tmp_path / "weights.safetensors"
    save_weights(path, EchoIR(TINY), ABOUT)
    return path


def test_weights_round_trip(weights):
    net, about = load_weights(weights, CPU)
    assert about == ABOUT
    assert net.config == TINY
    torch.manual_seed(0)
    expected = EchoIR(TINY).state_dict()
    for name, value in net.state_dict().items():
        assert torch.equal(value, expected[name])


def test_a_flipped_byte_is_noticed(weights):
    content = bytearray(weights.read_bytes())
    content[-5] ^= 1
    weights.write_bytes(content)
    with pytest.raises(ValueError, match="must match their checksum"):
        load_weights(weights, CPU)


def test_weights_that_are_none(weights, tmp_path):
    with pytest.raises(ValueError, match=r"does not exist\. Train first"):
        load_weights(tmp_path / "absent", CPU)
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(ValueError, match="must be a safetensors file"):
        load_weights(weights, CPU)


def test_restore_command_keeps_names_and_odd_sizes(weights, tmp_path):
    rng = np.random.default_rng(0)
    sizes = {"a.png": (31, 45), "b.png": (64, 33)}
    for name, (height, width) in sizes.items():
        save(tmp_path / "in" / name, scene(rng, height, width))
    save(tmp_path / "c.jpg", scene(rng, 20, 21))
    command = [sys.executable, EXAMPLE / "restore.py", tmp_path / "in", tmp_path / "c.jpg"]
    options = ["--output", tmp_path / "out", "--weights", weights, "--tile", "32", "--overlap", "8"]
    subprocess.run([*command, *options], check=True, capture_output=True)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["a.png", "b.png", "c.jpg"]
    for name, size in sizes.items():
        assert load_image(tmp_path / "out" / name).shape == (*size, 3)
    with Image.open(tmp_path / "out" / "c.jpg") as image:
        assert image.format == "JPEG"


def test_restore_command_refuses_in_one_sentence(weights, tmp_path):
    save(tmp_path / "in" / "a.png", np.zeros((8, 8, 3), np.uint8))
    command = [sys.executable, EXAMPLE / "restore.py", tmp_path / "in", "--weights", weights]
    done = subprocess.run([*command, "--output", tmp_path / "in"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "must not be the input's" in done.stderr
    assert "Traceback" not in done.stderr


def test_evaluate_command_on_a_folder(weights, folder):
    command = [sys.executable, EXAMPLE / "evaluate.py", "--weights", weights, "--data", folder]
    done = subprocess.run(command, capture_output=True, check=True, text=True)
    assert "photo0.png" in done.stdout
    assert "mean" in done.stdout


def test_psnr_of_noise_and_of_luma():
    gray = torch.full((3, 64, 64), 0.5)
    assert psnr(gray, gray + 0.1) == pytest.approx(20.0, abs=1e-4)
    # Y spans 219 of 255 levels: the same error is 20 log10(255 / 219) = 1.32 dB smaller in it.
    assert psnr(luma(gray), luma(gray + 0.1)) == pytest.approx(20 + 1.32, abs=0.01)


def test_ssim_equals_scikit_image():
    from skimage.metrics import structural_similarity

    rng = np.random.default_rng(0)
    clean = scene(rng, 50, 60).astype(np.float32) / 255
    noisy = (clean + 0.05 * rng.standard_normal(clean.shape)).astype(np.float32)
    options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    expected = structural_similarity(noisy, clean, data_range=1.0, channel_axis=2, **options)
    ours = score(*(torch.from_numpy(i).permute(2, 0, 1) for i in (noisy, clean))).ssim
    assert ours == pytest.approx(expected, abs=1e-4)


def test_evaluation_rounds_the_output_but_not_the_input():
    photographs = [Photograph("p", scene(np.random.default_rng(0), 30, 40))]
    (result,) = evaluate(photographs, degradation("denoise", 25.0), lambda image: image)
    assert torch.equal(result.restored, round8(result.input))
    assert not torch.equal(result.input, round8(result.input))
    assert psnr(result.input, result.target) == pytest.approx(20.17, abs=0.2)
