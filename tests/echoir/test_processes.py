"""Two processes that share the batches train as one does, and one of them writes."""

import os
import signal
import sys
import time
from datetime import timedelta

import pytest
import run
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from processes import ALONE, Processes
from safetensors.torch import load_file
from train import command_line

STEPS = 6
STOPPED = 3


def words(folder, output, *options):
    fixed = ["--threads", "1", "--patch", "16", "--batch", "2", "--device", "cpu", "--amp", "False"]
    usual = ["--lower", "both", "--warmup", "0", "--steps", str(STEPS), "--look-every", "3"]
    chosen = options if "--resume" in options else [*fixed, *usual, *options]
    return ["--data", str(folder), "--output", str(output), *chosen]


def leave(step, how):
    """Does something to this process, and to it alone, when it has computed a step."""

    def average(mean, state, decay, original=run._average):
        if state.step == step:
            how()
        original(mean, state, decay)

    run._average = average


def exit_code(words):
    with pytest.raises(SystemExit) as left:
        command_line(words)
    return left.value.code


def work(rank, photographs, folder):
    """One of two processes: trains, is told to stop, is asked for what does not go, and loses the other."""
    dist.init_process_group(
        "gloo",
        f"file://{folder}/store",
        timeout=timedelta(seconds=30),
        rank=rank,
        world_size=2,
    )
    sys.stdout, sys.stderr = ((folder / f"{rank}.{name}").open("w") for name in ("out", "err"))
    usual = run._average
    assert Processes(rank, 2).agree(rank == 1, 10.0 + rank) == (True, 10.0)
    by_time = ["--threads", "1", "--patch", "16", "--device", "cpu", "--minutes", "0.01"]
    command_line(["--data", str(photographs), "--output", str(folder / "by time"), *by_time])
    command_line(words(photographs, folder / "straight", "--compare"))
    if rank == 1:
        leave(STOPPED, lambda: os.kill(os.getpid(), signal.SIGINT))
    assert exit_code(words(photographs, folder / "stopped")) == 75
    run._average = usual
    assert exit_code(words(photographs, folder / "uneven", "--batch", "3")) == 2
    if rank == 1:
        leave(2, lambda: os._exit(9))
    began = time.monotonic()
    assert exit_code(words(photographs, folder / "lost")) == 75
    assert time.monotonic() - began < 25


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The photographs, and the folder that two processes have worked in."""
    import numpy as np
    from scenes import save, scene

    photographs, folder = tmp_path_factory.mktemp("photographs"), tmp_path_factory.mktemp("two")
    rng = np.random.default_rng(0)
    for i in range(5):
        save(photographs / f"photo{i}.png", scene(rng, 60 + i, 70))
    context = mp.start_processes(work, (photographs, folder), 2, join=False, start_method="spawn")
    for process in context.processes:
        process.join(150)
    said = "\n".join((folder / f"{rank}.err").read_text() for rank in range(2))
    assert [process.exitcode for process in context.processes] == [0, 9], said
    return photographs, folder


@pytest.fixture(scope="module")
def one(two, tmp_path_factory):
    """The same by one process."""
    output = tmp_path_factory.mktemp("one")
    command_line(words(two[0], output, "--compare"))
    return output


def files(folder):
    return {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()}


def close(first, second):
    """In float32; the weights have moved by 7e-3 in these steps."""
    a, b = load_file(first), load_file(second)
    assert a.keys() == b.keys()
    for name, value in a.items():
        torch.testing.assert_close(value, b[name], rtol=0, atol=1e-4, msg=name)


@pytest.mark.parametrize("method", ["asblo", "single-level"])
def test_two_processes_train_as_one_does(two, one, method):
    for name in ("weights", "best"):
        file = f"{method}/{name}.safetensors"
        close(two[1] / "straight" / file, one / file)


def test_one_of_them_writes_and_speaks(two, one):
    assert files(two[1] / "straight") == files(one)
    assert "photographs held out" in (two[1] / "0.out").read_text()
    assert (two[1] / "1.out").read_text() == ""


def test_a_signal_to_one_stops_both_and_one_process_goes_on(two, one):
    photographs, folder = two
    stopped = folder / "stopped"
    saved = [path.name for path in (stopped / "asblo" / "checkpoints").iterdir()]
    assert saved == [f"step-{STOPPED:08d}"]
    assert f"asblo stopped at step {STOPPED}" in (folder / "0.out").read_text()
    command_line(words(photographs, stopped, "--resume"))
    close(stopped / "weights.safetensors", one / "weights.safetensors")


def test_batches_that_cannot_be_shared_are_refused(two):
    message = "`--batch` must be divisible by the number of processes, in each stage. Got 3 for 2 processes."
    assert message in (two[1] / "0.err").read_text()
    assert not (two[1] / "uneven").exists()


def test_a_process_that_dies_ends_the_other_with_a_message(two):
    assert "must answer. Got no answer from another" in (two[1] / "0.err").read_text()


def test_shares_make_up_the_batch():
    three = [list(range(6))[Processes(rank, 3).share] for rank in range(3)]
    assert three == [[0, 3], [1, 4], [2, 5]]
    assert list(range(6))[ALONE.share] == list(range(6))
    assert ALONE.agree(True, 2.0) == (True, 2.0)
