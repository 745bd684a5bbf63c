import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from checkpoint import Checkpoint
from checkpoint import load as load_checkpoint
from checkpoint import save as save_checkpoint
from PIL import Image
from safetensors.torch import load_file
from scenes import EXAMPLE, save
from train import command_line
from weights import load_weights

import bilevel as bl

CPU = torch.device("cpu")


def command(folder, output, *options):
    fixed = ["--threads", "1", "--patch", "16", "--batch", "2", "--device", "cpu", "--no-amp"]
    words = [sys.executable, EXAMPLE / "train.py", "--data", folder, "--output", output, *fixed]
    return [str(word) for word in (*words, *options)]


def train(folder, output, *options):
    return subprocess.run(command(folder, output, *options), capture_output=True, text=True)


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A short run with the baseline, on five small photographs."""
    import numpy as np
    from scenes import scene

    folder = tmp_path_factory.mktemp("photographs")
    rng = np.random.default_rng(0)
    for i in range(5):
        save(folder / f"photo{i}.png", scene(rng, 60 + i, 70))
    output = tmp_path_factory.mktemp("run")
    done = train(folder, output, "--steps", "30", "--compare")
    assert done.returncode == 0, done.stderr
    return folder, output, done.stdout


def test_a_run_leaves_all_that_it_promises(finished):
    _, output, text = finished
    assert {"weights.safetensors", "picture.png", "metrics.jsonl"} <= set(os.listdir(output))
    metrics = rows(output / "metrics.jsonl")
    assert metrics[-1]["step"] == 30
    assert {"upper", "value_gap", "sigma", "psnr", "step_seconds"} <= metrics[-1].keys()
    with Image.open(output / "picture.png") as picture:
        picture.load()
    assert "asblo" in text
    assert "single-level" in text
    assert "picture.png" in text.splitlines()[-2]


def same(a, b):
    first, second = load_file(a / "weights.safetensors"), load_file(b / "weights.safetensors")
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_sigterm_saves_and_resume_goes_on_bit_for_bit(finished, tmp_path):
    folder, straight, _ = finished
    broken = tmp_path
    process = subprocess.Popen(command(folder, broken, "--steps", "30"), stdout=subprocess.DEVNULL)
    log = broken / "asblo" / "metrics.jsonl"
    deadline = time.monotonic() + 120  # the machine may be busy
    while not (log.exists() and log.read_text().count("\n")):  # ten steps are done
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    assert process.wait(120) == 75
    assert not (broken / "weights.safetensors").exists()
    assert train(folder, broken, "--resume").returncode == 0
    same(straight, broken)
    assert [row["step"] for row in rows(log)] == [10, 20, 30]


def test_a_blind_denoiser_is_trained_and_resumed(folder, tmp_path):
    options = ["--sigma", "5", "50", "--steps", "2"]
    command_line(command(folder, tmp_path, *options)[2:])
    assert json.loads((tmp_path / "arguments.json").read_text())["sigma"] == [5.0, 50.0]
    command_line(command(folder, tmp_path, "--resume")[2:])
    assert load_weights(tmp_path / "weights.safetensors", CPU)[1]["sigma"] == [5.0, 50.0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--steps", "0"], "`--steps` must be positive. Got 0"),
        (["--val-share", "1.5"], "above 0 and below 1. Got 1.5"),
        (["--sigma", "50", "5"], "the lower first. Got sigma=(50.0, 5.0)"),
        (["--resume"], "must find a run to go on with"),
        (["--patch", "500"], "at least as large as a patch"),
        (["--device", "abacus"], "must name a device of this machine. Got 'abacus'"),
        (["--task", "dehaze"], "dehaze"),
        (["--stepz", "3"], "--stepz"),
    ],
)
def test_mistakes_are_told_in_a_sentence(folder, tmp_path, options, message, capsys):
    with pytest.raises(SystemExit) as left:
        command_line(command(folder, tmp_path / "out", *options)[2:])
    assert left.value.code == 2
    captured = capsys.readouterr()
    assert message in captured.err + captured.out


def test_a_damaged_checkpoint_falls_back_to_the_one_before(tmp_path):
    for step in (10, 20, 30):
        state = bl.State({"a": torch.full((3,), float(step))}, {"b": torch.zeros(2)}, step=step)
        save_checkpoint(tmp_path, Checkpoint(state, state, seconds=1.0))
    assert sorted(os.listdir(tmp_path)) == ["step-00000020", "step-00000030"]
    newest = tmp_path / "step-00000030" / "state.pt"
    newest.write_bytes(newest.read_bytes()[:-7])
    assert load_checkpoint(tmp_path, CPU).state.step == 20
    older = tmp_path / "step-00000020" / "state.pt"
    older.write_bytes(b"")
    with pytest.raises(ValueError, match="only damaged ones"):
        load_checkpoint(tmp_path, CPU)
    assert load_checkpoint(tmp_path / "nothing here", CPU) is None


def test_divergence_is_told(folder, tmp_path, capsys):
    with pytest.raises(SystemExit) as left:
        command_line(command(folder, tmp_path, "--steps", "5", "--lr", "1e30")[2:])
    assert left.value.code == 1
    assert "NaN or infinite" in capsys.readouterr().out
