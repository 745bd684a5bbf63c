import subprocess
import sys

import numpy as np
import pytest
import torch
from degradations import degradation
from model import EchoIR, EchoIRConfig
from photographs import Photograph, load_image
from PIL import Image
from restore import Arguments, main
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
    with pytest.raises(
        ValueError, match=r"does not exist\. Train first.*, or name another file\.$"
    ):
        load_weights(tmp_path / "absent", CPU)
    with pytest.raises(ValueError, match=r"must be a file\. Got .*, which is a folder\."):
        load_weights(tmp_path, CPU)
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(ValueError, match="must be a safetensors file"):
        load_weights(weights, CPU)


def test_restore_command_keeps_names_and_odd_sizes(weights, tmp_path):
    rng = np.random.default_rng(0)
    sizes = {"a.png": (31, 45), "b.png": (64, 33)}
    for name, (height, width) in sizes.items():
        save(tmp_path / "in" / name, scene(rng, height, width))
    save(tmp_path / "c.jpg", scene(rng, 20, 21))
    words = [sys.executable, EXAMPLE / "restore.py", tmp_path / "in", tmp_path / "c.jpg"]
    options = ["--output", tmp_path / "out", "--weights", weights, "--tile", "32", "--overlap", "8"]
    subprocess.run([*words, *options], check=True, capture_output=True)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["a.png", "b.png", "c.jpg"]
    for name, size in sizes.items():
        assert load_image(tmp_path / "out" / name).shape == (*size, 3)
    with Image.open(tmp_path / "out" / "c.jpg") as image:
        assert image.format == "JPEG"


def restored(weights, *inputs, **options):
    inputs = tuple(str(path) for path in inputs)
    main(Arguments(inputs, weights=weights, device="cpu", **options))


def test_restore_refuses_to_replace_its_input(weights, tmp_path):
    save(tmp_path / "in" / "a.png", np.zeros((8, 8, 3), np.uint8))
    with pytest.raises(ValueError, match="must not replace an input"):
        restored(weights, tmp_path / "in", output=tmp_path / "in")


def test_restore_goes_on_after_a_broken_file(weights, tmp_path, capsys):
    folder, out = tmp_path / "Äpfel und Birnen", tmp_path / "out put"
    for name in ("a", "ö 1", "日本"):
        save(folder / f"{name}.png", scene(np.random.default_rng(0), 20, 30))
    content = (folder / "a.png").read_bytes()
    (folder / "a.png").write_bytes(content[: len(content) // 2])
    (out / "ö 1.png" / "in the way").mkdir(parents=True)
    with pytest.raises(SystemExit) as stop:
        restored(weights, folder / "*.png", output=out)
    assert stop.value.code == 1
    printed = capsys.readouterr()
    assert "1 of 3 restored" in printed.out
    assert "readable as a whole" in printed.err
    assert f"Got {folder / 'a.png'}" in printed.err
    assert f"can be written. Got {out / 'ö 1.png'}" in printed.err
    assert sorted(p.name for p in out.iterdir()) == ["ö 1.png", "日本.png"]


def test_restore_names_a_file_that_may_not_be_written(weights, tmp_path, monkeypatch, capsys):
    save(tmp_path / "in" / "a.png", scene(np.random.default_rng(0), 20, 30))
    out = tmp_path / "out"

    def deny(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("os.replace", deny)
    with pytest.raises(SystemExit):
        restored(weights, tmp_path / "in", output=out)
    assert f"Got {out / 'a.png'}: Permission denied" in capsys.readouterr().err
    assert list(out.iterdir()) == []


def test_restore_with_self_ensemble(weights, tmp_path):
    save(tmp_path / "in" / "a.png", scene(np.random.default_rng(0), 20, 30))
    restored(weights, tmp_path / "in", output=tmp_path / "out", self_ensemble=True)
    net, _ = load_weights(weights, CPU)
    image = torch.from_numpy(load_image(tmp_path / "in" / "a.png") / np.float32(255))
    eight = []
    with torch.no_grad():
        for mirrored in (image, image.flip(1)):
            for turns in range(4):
                out = net(mirrored.rot90(turns).permute(2, 0, 1)[None])[0].permute(1, 2, 0)
                out = out.rot90(-turns)
                eight.append(out if mirrored is image else out.flip(1))
    expected = (torch.stack(eight).mean(0).clamp(0, 1) * 255).numpy()
    copied = load_image(tmp_path / "out" / "a.png").astype(float)
    assert np.abs(copied - expected).max() < 0.5 + 1e-3


def test_restore_says_what_it_leaves_out(weights, tmp_path, capsys):
    save(tmp_path / "in" / "a.png", np.zeros((8, 8, 3), np.uint8))
    (tmp_path / "in" / "deeper").mkdir()
    restored(weights, tmp_path / "in", output=tmp_path / "out")
    told = capsys.readouterr().out
    assert "left out: 1 subfolder" in told
    assert f"'{tmp_path / 'in' / '**' / '*'}'" in told.replace("\n", "")


def test_a_window_without_local_statistics_is_refused(weights, tmp_path):
    save(tmp_path / "a.png", np.zeros((8, 8, 3), np.uint8))
    with pytest.raises(
        ValueError, match=r"`--window` must come with --statistics local.* Got .*64"
    ):
        restored(weights, tmp_path / "a.png", output=tmp_path / "out", window=64)
    assert not (tmp_path / "out").exists()
    local = {"output": tmp_path / "out", "statistics": "local"}
    restored(weights, tmp_path / "a.png", window=64, **local)
    with pytest.raises(ValueError, match=r"multiple of 8.* Got window=63\. Use 56 or 64\."):
        restored(weights, tmp_path / "a.png", window=63, **local)
    with pytest.raises(ValueError, match=r"Got window=0\. Use 8 or 16\."):
        restored(weights, tmp_path / "a.png", window=0, **local)


def test_restore_says_what_is_wrong_before_the_first_image(weights, tmp_path):
    save(tmp_path / "a.png", np.zeros((8, 8, 3), np.uint8))
    with pytest.raises(ValueError, match="at most half their size"):
        restored(weights, tmp_path / "a.png", output=tmp_path / "out", overlap=300)
    with pytest.raises(ValueError, match=r"a folder that can be made\. Got"):
        restored(weights, tmp_path / "a.png", output=tmp_path / "a.png" / "out")


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
