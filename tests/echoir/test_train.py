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
from miniatures import collection
from PIL import Image
from safetensors.torch import load_file
from scenes import EXAMPLE, save
from train import command_line
from weights import load_weights

import bilevel as bl

CPU = torch.device("cpu")


def command(folder, output, *options):
    fixed = ["--threads", "1", "--patch", "16", "--batch", "2", "--device", "cpu", "--amp", "False"]
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
    files = {"weights.safetensors", "best.safetensors", "picture.png", "metrics.jsonl"}
    assert files <= set(os.listdir(output))
    metrics = rows(output / "metrics.jsonl")
    assert metrics[-1]["step"] == 30
    columns = {"upper", "lower", "value_gap", "slack", "sigma", "multiplier", "mu", "theta"}
    assert columns | {"lr", "psnr", "seconds", "step_seconds"} <= metrics[-1].keys()
    last = metrics[-1]
    assert last["theta"] == pytest.approx(last["multiplier"] * last["mu"], rel=1e-6)
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


def test_resume_with_other_arguments_is_refused(finished, capsys):
    """The run would go on with its own, and nothing would say so."""
    folder, output, _ = finished
    before = (output / "arguments.json").read_bytes()
    with pytest.raises(SystemExit) as left:
        command_line(command(folder, output, "--resume", "--steps", "5", "--lr", "2e-3")[2:])
    assert left.value.code == 2
    message = " ".join(capsys.readouterr().err.split())
    assert "Got --steps 5, where the run has 30. Leave that out" in message
    assert (output / "arguments.json").read_bytes() == before


def test_resume_takes_the_arguments_of_the_run_in_any_words(folder, tmp_path, monkeypatch):
    """A whole configuration with one number overridden, the data by a relative path."""
    monkeypatch.chdir(folder.parent)
    tiny = [
        "--patch",
        "16",
        "--batch",
        "1",
        "--lower-batch",
        "1",
        "--preset",
        "cpu",
        "--steps",
        "6",
    ]
    words = ["--config", "small", *tiny, "--data", folder.name, "--output", str(tmp_path / "run")]
    command_line(words)
    command_line([*words, "--resume"])
    command_line(["--config", "small", "--output", str(tmp_path / "run"), "--resume"])
    with pytest.raises(SystemExit):
        command_line(["--config", "paper", "--output", str(tmp_path / "run"), "--resume"])


def stop_at(monkeypatch, step):
    """Interrupts the run of this process as Ctrl-C would, in a step."""
    import run

    def ask(average, state, decay, original=run._average):
        if state.step == step:
            os.kill(os.getpid(), signal.SIGINT)
        original(average, state, decay)

    monkeypatch.setattr(run, "_average", ask)


@pytest.mark.skipif(os.name != "posix", reason="signals")
@pytest.mark.parametrize("stopped", [3, 4, 5])
def test_resume_across_a_stage_border_is_bit_for_bit(folder, tmp_path, monkeypatch, stopped):
    """The second stage begins with the fifth step; the run is stopped before, at and behind it."""
    stages = ["--stages", "4", "4", "--patch", "16", "24", "--batch", "2", "1"]
    options = [*stages, "--lower-batch", "1", "--look-every", "2"]
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    command_line(command(folder, straight, *options)[2:])
    with monkeypatch.context() as patch:
        stop_at(patch, stopped)
        with pytest.raises(SystemExit) as left:
            command_line(command(folder, broken, *options)[2:])
    assert left.value.code == 75
    command_line(command(folder, broken, "--resume", *options)[2:])
    same(straight, broken)
    logs = [rows(path / "metrics.jsonl") for path in (straight, broken)]
    timeless = [[{k: v for k, v in r.items() if "seconds" not in k} for r in log] for log in logs]
    assert timeless[0] == timeless[1]
    assert [row["step"] for row in logs[0]] == [2, 4, 6, 8]


def test_the_best_weights_are_kept_beside_the_last(folder, tmp_path):
    """The learning rate rises until it is far too large: the best are from before."""
    options = ["--steps", "8", "--look-every", "2", "--ema", "0", "--warmup", "50", "--lr", "0.3"]
    command_line(command(folder, tmp_path, *options)[2:])
    psnr = {row["step"]: row["psnr"] for row in rows(tmp_path / "metrics.jsonl")}
    best = max(psnr, key=psnr.get)
    assert best < 8  # else this shows nothing
    about = load_weights(tmp_path / "best.safetensors", CPU)[1]
    assert (about["steps"], about["psnr_rgb"]) == (best, psnr[best])
    assert load_weights(tmp_path / "weights.safetensors", CPU)[1]["steps"] == 8


def test_training_goes_on_from_given_weights(finished, folder, tmp_path, capsys):
    start = finished[1] / "weights.safetensors"
    options = ["--steps", "1", "--lr", "1e-9", "--ema", "0"]  # goes nowhere
    command_line(command(folder, tmp_path, *options, "--init", start)[2:])
    first, second = load_file(start), load_file(tmp_path / "weights.safetensors")
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, rtol=0, atol=1e-7)
    deep = command(folder, tmp_path / "deep", *options, "--init", start, "--preset", "cpu_deep")
    command_line(deep[2:])
    second = load_file(tmp_path / "deep" / "weights.safetensors")
    assert len(second) > len(first)
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, rtol=0, atol=1e-7)
    with pytest.raises(SystemExit) as left:
        command_line(command(folder, tmp_path, *options, "--init", start, "--preset", "small")[2:])
    assert left.value.code == 2
    message = " ".join(capsys.readouterr().err.split())
    assert "`--init` must hold weights of --preset small, or" in message
    assert "width=32 instead of 16" in message
    assert "Use --preset cpu." in message


def test_the_schedules_of_asblo_are_settable(folder, tmp_path):
    schedules = ["--mu", "0.5", "1", "10", "--theta", "0.25", "1", "10"]
    schedules += ["--barrier", "3", "1", "10", "--epsilon", "2", "1", "10"]
    command_line(command(folder, tmp_path / "usual", "--steps", "10")[2:])
    command_line(command(folder, tmp_path / "given", "--steps", "10", *schedules)[2:])
    usual, given = (rows(tmp_path / run / "metrics.jsonl")[-1] for run in ("usual", "given"))
    # The units are those of the first batch, which is the same. By hand, at the ninth step from zero:
    shrunk = {"mu": 1e-2 * 1.09**-2, "sigma": 1.09**-1, "epsilon": 1.09**-2}
    for name, start in (("mu", 0.5), ("sigma", 3.0), ("epsilon", 2.0)):
        expected = usual[name] / shrunk[name] * start / 1.9
        assert given[name] == pytest.approx(expected), name
    # theta over mu, in units of F over f
    units = (usual["sigma"] / shrunk["sigma"]) / (usual["epsilon"] / shrunk["epsilon"])
    assert given["theta"] == pytest.approx(given["mu"] * 0.25 / 0.5 * units)


@pytest.mark.parametrize("config", ["paper", "small"])
def test_a_configuration_runs(folder, tmp_path, config):
    """Its network, stages and losses on patches that fit the tests' photographs."""
    tiny = ["--patch", "16", "--lower-batch", "1", "--preset", "small", "--steps", "6"]
    words = ["--config", config, "--batch", "1", *tiny, "--data", str(folder)]
    command_line([*words, "--output", str(tmp_path), "--device", "cpu"])
    kept = json.loads((tmp_path / "arguments.json").read_text())
    assert (kept["config"], kept["lower"], len(kept["stages"])) == (config, "both", 6)


def test_a_blind_denoiser_is_trained_and_resumed(folder, tmp_path):
    options = ["--sigma", "5", "50", "--steps", "2"]
    command_line(command(folder, tmp_path, *options)[2:])
    assert json.loads((tmp_path / "arguments.json").read_text())["sigma"] == [5.0, 50.0]
    command_line(command(folder, tmp_path, "--resume")[2:])
    assert load_weights(tmp_path / "weights.safetensors", CPU)[1]["sigma"] == [5.0, 50.0]


@pytest.mark.parametrize("name", ["sigma", "jpeg"])
def test_what_would_degrade_pairs_again_is_refused(name, tmp_path, capsys):
    """They come with their inputs."""
    collection("Rain13K", "")(tmp_path)
    with pytest.raises(SystemExit) as left:
        command_line(command(tmp_path / "Rain13K", tmp_path / "out", f"--{name}", "0.5")[2:])
    assert left.value.code == 2
    message = " ".join(capsys.readouterr().err.split())
    assert f"`--{name}` must come with clean photographs" in message
    assert f"Got 0.5 with the pairs of {tmp_path / 'Rain13K'}. Leave --{name} out" in message


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--steps", "0"], "`--steps` must be positive and finite. Got 0"),
        (["--val-share", "1.5"], "above 0 and below 1. Got 1.5"),
        (["--sigma", "50", "5"], "the lower first. Got sigma=(50.0, 5.0)"),
        (["--resume"], "must find a run to go on with"),
        (["--patch", "500"], "at least half as large as a patch (500 x 500)"),
        (["--task", "derain", "--sigma", "5"], "`--sigma` must come with --task denoise"),
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


class Killed(BaseException):
    """Nothing after it is done, as after SIGKILL."""


def die(*_, **__):
    raise Killed


def die_writing(path, _):
    """With the file open, and still empty."""
    path.write_bytes(b"")
    raise Killed


@pytest.mark.parametrize(
    ("where", "death"), [("shutil.rmtree", die), ("pathlib.Path.write_text", die_writing)]
)
def test_a_start_that_is_killed_leaves_no_run_to_go_on_with(
    folder, tmp_path, monkeypatch, where, death
):
    """Its cleared folder with the arguments of the run before would be trained as that one."""
    (tmp_path / "arguments.json").write_text("{}")
    monkeypatch.setattr(where, death)
    with pytest.raises(Killed):
        command_line(command(folder, tmp_path, "--steps", "1")[2:])
    assert not (tmp_path / "arguments.json").exists()


def test_a_resume_that_is_killed_keeps_the_log(folder, tmp_path, monkeypatch):
    """The best weights yet are known by it."""
    with monkeypatch.context() as patch:
        stop_at(patch, 3)
        with pytest.raises(SystemExit):
            command_line(command(folder, tmp_path, "--steps", "4", "--look-every", "2")[2:])
    log = tmp_path / "asblo" / "metrics.jsonl"
    assert [row["step"] for row in rows(log)] == [2]
    monkeypatch.setattr("pathlib.Path.write_text", die_writing)
    with pytest.raises(Killed):
        command_line(command(folder, tmp_path, "--resume")[2:])
    assert [row["step"] for row in rows(log)] == [2]


def test_divergence_is_told(folder, tmp_path, capsys):
    with pytest.raises(SystemExit) as left:
        command_line(command(folder, tmp_path, "--steps", "5", "--lr", "1e30")[2:])
    assert left.value.code == 1
    assert "NaN or infinite" in capsys.readouterr().out
