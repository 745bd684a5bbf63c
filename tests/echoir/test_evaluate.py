import json
import subprocess
import sys

import evaluate
import numpy as np
import pytest
import torch
from benchmark import Outcome, Row, deraining, results_table
from by_hand import figures
from evaluate import Arguments
from miniatures import LAYOUTS, collection, dnd, pairs
from model import EchoIR, EchoIRConfig
from protocols import RGB, Measured, Y
from rich.console import Console
from scenes import EXAMPLE, save
from test_sets import DERAINING, SETS
from weights import load_weights, save_weights

CONFIG = EchoIRConfig(width=8, blocks=(1, 1), heads=(1, 2), final_blocks=1, unshuffle=2)
LIFT = 0.02  # what the network below adds to every value
PROTOCOLS = dict.fromkeys(("test100", "rain100h", "rain100l", "test2800", "test1200"), "Y")
PROTOCOLS |= dict.fromkeys(("gopro", "hide", "sidd"), "RGB")
PROTOCOLS |= dict.fromkeys(("realblur-r", "realblur-j"), "RGB, aligned")


@pytest.fixture
def weights(tmp_path):
    """A network whose result is known: its input, brighter by 5.1 / 255, which rounds to 5."""
    net = EchoIR(CONFIG)
    with torch.no_grad():
        net.reconstruction.weight.zero_()
        net.reconstruction.bias.fill_(LIFT)
    path = tmp_path / "weights" / "lift.safetensors"
    path.parent.mkdir()
    save_weights(path, net, {"task": "denoise", "sigma": [5.0, 50.0]})
    return path


def lifted(image):
    return (image.astype(float) + 255 * LIFT).clip(0, 255).round()


def run(weights, root, *names, tmp_path, **options):
    file = tmp_path / "results" / "figures.json"
    evaluate.main(
        Arguments(weights=weights, data=root, sets=names, json=file, device="cpu", **options)
    )
    return json.loads(file.read_text())


@pytest.mark.parametrize(("name", "build"), LAYOUTS)
def test_figures_of_a_set_equal_those_by_hand(name, build, weights, tmp_path):
    root = tmp_path / "data"
    root.mkdir()
    made = build(root)
    (one,) = run(weights, root, name, tmp_path=tmp_path)["sets"]
    assert one["protocol"] == PROTOCOLS[name]
    assert one["paper"] == SETS[name].paper._asdict()
    # The search for an alignment ends at 1e-4 pixels.
    within = 1e-3 if PROTOCOLS[name] == "RGB, aligned" else 1e-6
    restored = []
    for row, (image_name, degraded, clean) in zip(one["images"], made, strict=True):
        assert row["name"] == image_name
        for key, image in (("input", degraded), ("restored", lifted(degraded))):
            psnr, ssim = figures(image, clean, PROTOCOLS[name])
            assert row[key]["psnr"] == pytest.approx(psnr, abs=within)
            assert row[key]["ssim"] == pytest.approx(ssim, abs=within / 100 + 1e-6)
        restored.append(row["restored"])
    for figure in ("psnr", "ssim"):
        assert one["restored"][figure] == pytest.approx(np.mean([r[figure] for r in restored]))


@pytest.mark.parametrize(("asked", "sigma"), [(15.0, 15), (50.0, 50), (None, 25)])
def test_gaussian_noise_of_the_papers(asked, sigma, weights, tmp_path):
    clean = pairs(1)[0][1]
    save(tmp_path / "data" / "1.png", clean)
    (one,) = run(weights, tmp_path / "data", "gaussian", tmp_path=tmp_path, sigma=asked)["sets"]
    assert one["name"] == f"data, sigma {sigma}"
    np.random.seed(0)  # noqa: NPY002  (as public code has it)
    noisy = clean + np.random.normal(0, sigma, clean.shape)  # noqa: NPY002
    (row,) = one["images"]
    for key, image in (("input", noisy), ("restored", lifted(noisy))):
        psnr, ssim = figures(image, clean, "RGB")
        assert row[key]["psnr"] == pytest.approx(psnr, abs=1e-3)  # float32: a tie or two is rounded
        assert row[key]["ssim"] == pytest.approx(ssim, abs=1e-5)  # the other way


def test_the_average_of_deraining_counts_each_set_once(tmp_path):
    made = [
        Outcome(
            SETS[name].name, Y, [Row("a", Measured(20.0, 0.5), Measured(30.0 + i, 0.9))] * (i + 1)
        )
        for i, name in enumerate(DERAINING)
    ]
    assert deraining(made).restored.psnr == pytest.approx(32.0)
    assert deraining(made[:4]) is None
    console = Console(record=True, width=120)
    console.print(results_table(made, "deraining"))
    text = console.export_text()
    assert "average of deraining" in text
    assert "33.97 / 0.952" in text
    assert "32.00 / 0.900" in text


def test_the_table_of_the_command(weights, tmp_path):
    collection("Rain100L")(tmp_path)
    collection("GoPro")(tmp_path)
    command = [sys.executable, EXAMPLE / "evaluate.py", "--weights", weights, "--data", tmp_path]
    done = subprocess.run(
        [*command, "--set", "rain100l", "gopro", "--device", "cpu"],
        capture_output=True,
        text=True,
        env={"COLUMNS": "120", "PATH": ""},
    )
    assert done.returncode == 0, done.stderr
    assert "3 of 100" in done.stdout
    assert "3 of 1111" in done.stdout
    assert "38.04 / 0.993" in done.stdout
    assert "32.82 / 0.962" in done.stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sets": ("gopro",)}, r"`--set` must come with the folder"),
        ({"json": "x.json"}, r"`--json` must come with --set"),
        (
            {"sets": ("gopro",), "data": ".", "json": "."},
            r"`--json` must be a file\. Got .*, a folder",
        ),
        ({"sets": ("dnd",), "data": "."}, r"must come together"),
        ({"sets": ("gopro",), "data": ".", "submission": "x"}, r"must come together"),
        ({"sets": ("dnd",), "data": ".", "submission": "x"}, r"DND must lie under"),
    ],
)
def test_what_cannot_be_meant(options, message, weights, tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    paths = {k: v if k == "sets" else tmp_path / "empty" / v for k, v in options.items()}
    with pytest.raises(ValueError, match=message):
        evaluate.main(Arguments(weights=weights, device="cpu", **paths))


def test_a_sigma_that_no_noise_would_have_is_refused(weights, tmp_path):
    message = r"`--sigma` must come with noise to add.* Got 15.* Leave it out"
    collection("GoPro")(tmp_path)
    for options in (
        {"data": tmp_path, "sets": ("gopro",)},
        {"data": tmp_path / "Datasets" / "test" / "GoPro"},
    ):
        with pytest.raises(ValueError, match=message):
            evaluate.main(Arguments(weights=weights, sigma=15.0, device="cpu", **options))
    net, _ = load_weights(weights, torch.device("cpu"))
    save_weights(weights, net, {"task": "derain", "sigma": 25.0})
    with pytest.raises(ValueError, match=message):
        evaluate.main(Arguments(weights=weights, sigma=15.0, device="cpu"))


@pytest.mark.parametrize("sigma", [-5.0, float("nan")])
def test_a_sigma_that_no_noise_can_have_is_refused(sigma, weights, tmp_path):
    with pytest.raises(ValueError, match=r"must have sigma >= 0.* Got sigma="):
        evaluate.main(Arguments(weights=weights, data=tmp_path, sets=("gaussian",), sigma=sigma))


def submit(weights, root, folder):
    evaluate.main(
        Arguments(weights=weights, data=root, sets=("dnd",), submission=folder, device="cpu")
    )


def test_submission_for_dnd(weights, tmp_path, capsys):
    from scipy.io import loadmat

    made = dnd(tmp_path)
    submit(weights, tmp_path, tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["0001.mat", "0002.mat"]
    for i, crops in enumerate(made, 1):
        content = loadmat(tmp_path / "out" / f"{i:04}.mat")
        assert content["Idenoised"].shape == (1, 20)  # a cell array
        assert content["israw"] == 0
        assert content["eval_version"] == "1.0"
        for box, crop in zip(content["Idenoised"][0], crops, strict=True):
            assert box.dtype == np.float32
            assert np.allclose(box, (crop + LIFT).clip(0, 1), atol=1e-5)  # clipped, not rounded
    assert "2 files for the server" in capsys.readouterr().out


def test_dnd_that_is_incomplete_or_damaged(weights, tmp_path):
    dnd(tmp_path)
    images = tmp_path / "dnd_2017" / "images_srgb"
    (images / "0002.mat").rename(images / "0003.mat")
    with pytest.raises(ValueError, match=r"must be complete\. Got no .*0002.mat"):
        submit(weights, tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (images / "0002.mat").write_bytes(b"MATLAB 5.0")
    with pytest.raises(ValueError, match=r"version 7.3\. Got .*0002.mat"):
        submit(weights, tmp_path, tmp_path / "out")


def test_dnd_without_the_package_that_reads_it(weights, tmp_path, monkeypatch):
    (tmp_path / "DND" / "images_srgb").mkdir(parents=True)
    (tmp_path / "DND" / "info.mat").touch()
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(ValueError, match=r"the package h5py reads\. Got none installed"):
        submit(weights, tmp_path, tmp_path / "out")


def test_rgb_is_not_rounded_before_it_must_be():
    assert RGB.measure(torch.full((3, 20, 20), 0.5), torch.full((3, 20, 20), 0.6)).psnr == (
        pytest.approx(20.0, abs=1e-4)
    )
