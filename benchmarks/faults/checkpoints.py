"""States on disk: damaged, foreign and malicious ones, and disks that are full or may not be written."""

from __future__ import annotations

import errno
import hashlib
import io
import os
import pickle
import random
import signal
import subprocess
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

import bilevel as bl
from benchmarks.faults.fault import Broken, Fault, Lost, Skipped, expect, message_of
from benchmarks.faults.problems import ANSWER, GOOD

STATE = bl.State(
    {"weight": torch.arange(4096.0)}, [torch.ones(3).double()], step=12, memory={"z": (0.5, None)}
)
KILLS = 60
FLIPS = 1000


class Malicious:
    """Unpickled, it makes a folder."""

    def __init__(self, proof: Path) -> None:
        self._proof = str(proof)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.mkdir, (self._proof,)


def saved(folder: Path, state: bl.State = STATE) -> Path:
    path = folder / "state.pt"
    bl.save_state(path, state)
    return path


def is_refused(path: Path, content: bytes, what: str) -> None:
    path.write_bytes(content)
    try:
        bl.load_state(path)
    except bl.CheckpointError:
        return
    raise Broken(f"{what} is read as if it were whole")


def truncated(folder: Path) -> str:
    path = saved(folder)
    content = path.read_bytes()
    lengths = range(0, len(content), len(content) // 150)
    for length in lengths:
        is_refused(path, content[:length], f"a file of {length} bytes")
    return f"CheckpointError at each of {len(lengths)} lengths, from empty on"


def flipped(folder: Path) -> str:
    path = saved(folder)
    content, draw = path.read_bytes(), random.Random(0)
    for _ in range(FLIPS):
        spoiled, position = bytearray(content), draw.randrange(len(content))
        spoiled[position] ^= 1 << draw.randrange(8)
        is_refused(path, bytes(spoiled), f"a flipped bit at {position}")
    return f"CheckpointError at each of {FLIPS} flips"


def edited(change: Callable[[bytes], bytes], word: str, folder: Path) -> str:
    path = saved(folder)
    path.write_bytes(change(path.read_bytes()))
    return f"{message_of(bl.CheckpointError, lambda: bl.load_state(path), word)}: {word}"


def signed(payload: bytes) -> bytes:
    """With a header and a digest that are right."""
    digest = hashlib.sha256(payload).hexdigest()
    return f"bilevel-state version 1 sha256 {digest}\n".encode() + payload


def zipped(content: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def malicious(folder: Path) -> str:
    proof, path = folder / "proof", folder / "state.pt"
    evil = Malicious(proof)
    pickle.loads(pickle.dumps(evil))  # it works
    expect(proof.is_dir(), "the pickle is not malicious")
    proof.rmdir()
    for payload in (zipped(evil), zipped({"x": evil}), pickle.dumps(evil, protocol=2)):
        path.write_bytes(signed(payload))
        message_of(bl.CheckpointError, lambda: bl.load_state(path))
        path.rename(folder / "step-000000009.pt")
        message_of(bl.CheckpointError, bl.callbacks.Checkpoint(folder).newest)
        path.write_bytes(payload)
        message_of(bl.CheckpointError, lambda: bl.load_state(path))
        expect(not proof.exists(), "its code was run")
    return "CheckpointError, signed or not, by load_state and Checkpoint.newest; no code was run"


def one_step(problem: bl.BilevelProblem, solver: bl.Solver, state: bl.State) -> bl.State:
    return next(iter(bl.iterate(problem, solver, batches=[None], state=state)))


def foreign(folder: Path) -> str:
    path = saved(folder)
    states = [*bl.iterate(GOOD, bl.ASBLO(), torch.zeros(1), torch.zeros(1), [None] * 2)]
    bl.save_state(path, states[-1])
    other = bl.BilevelProblem(
        lambda x, y, data: ((y["b"] - 1.0) ** 2).sum() + (x["a"] ** 2).sum(),
        lambda x, y, data: ((y["b"] - x["a"]) ** 2).sum(),
    )
    for problem, solver in ((GOOD, bl.F2SA()), (other, bl.ASBLO())):
        state = bl.load_state(path)
        message_of(bl.StructureError, partial(one_step, problem, solver, state))
    return "StructureError, by another solver and by another problem"


def nan_inside(folder: Path) -> str:
    states = [*bl.iterate(GOOD, bl.ASBLO(), torch.zeros(1), torch.zeros(1), [None] * 2)]
    spoiled = replace(states[-1], x=torch.tensor([float("nan")]))
    bl.save_state(folder / "state.pt", spoiled)
    state = bl.load_state(folder / "state.pt")
    last = list(bl.iterate(GOOD, bl.ASBLO(), batches=[None] * 5, state=state))
    expect(last[0].status is bl.Status.NONFINITE, last[0].status.name)
    return "it is saved and read as it is; the run ends in its first step with NONFINITE"


def spoiled_newest(folder: Path) -> str:
    checkpoint = bl.callbacks.Checkpoint(folder / "run", every=1)
    zero = torch.zeros(1).double()
    solution = bl.solve(GOOD, bl.ASBLO(), zero, zero, max_steps=500, callback=checkpoint)
    newest = max((folder / "run").iterdir())
    newest.write_bytes(newest.read_bytes()[:-9])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        state = checkpoint.newest()
    expect(state is not None, "no state is left", Lost)
    expect(any(w.category is bl.BilevelWarning for w in caught), "it is not told")
    last = list(bl.iterate(GOOD, bl.ASBLO(), state=state))[-1]
    expect(torch.equal(last.x, solution.x), "another end than the run that was not harmed", Lost)
    expect((folder / "run" / f"{newest.stem}.damaged").exists(), "the damaged file is gone", Lost)
    return "a warning, the state before is taken, and the run ends as the unharmed one, bit for bit"


def folder_vanishes(folder: Path) -> str:
    checkpoint = bl.callbacks.Checkpoint(folder / "run", every=1)
    checkpoint(replace(STATE, step=1))
    for path in (folder / "run").iterdir():
        path.unlink()
    (folder / "run").rmdir()
    checkpoint(replace(STATE, step=2))
    state = checkpoint.newest()
    expect(state is not None and state.step == 2, "the next state is not saved", Lost)
    return "the next save makes it again"


def other_run(folder: Path) -> str:
    checkpoint = bl.callbacks.Checkpoint(folder, every=1)
    checkpoint(replace(STATE, step=9))
    name = message_of(ValueError, lambda: checkpoint(replace(STATE, step=1)), "a folder for each")
    state = checkpoint.newest()
    expect(state is not None and state.step == 9, "the other run's state is gone", Lost)
    return f"{name}; the states of the other run stay"


def killed(folder: Path) -> str:
    """A child saves states without end; it is killed at a random moment, and what is there is read."""
    path, draw, steps = folder / "state.pt", random.Random(0), [0]
    bl.save_state(path, replace(STATE, step=0))
    for _ in range(KILLS):
        child = os.fork()
        if child == 0:
            _save_without_end(path, steps[-1])
        before, until = path.stat().st_ino, time.monotonic() + 10.0
        while path.stat().st_ino == before and time.monotonic() < until:
            time.sleep(1e-4)
        time.sleep(0.01 * draw.random())  # some saves long, on a disk that is not busy
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        try:
            steps.append(bl.load_state(path).step)
        except (bl.CheckpointError, OSError) as error:
            raise Lost(f"after {len(steps)} kills: {error}") from error
        expect(steps[-1] >= steps[-2], "an older state came back", Lost)
    expect(steps[-1] >= KILLS, f"only {steps[-1]} states were saved in {KILLS} lives")
    left = {file.name for file in folder.iterdir()} - {"state.pt", ".state.pt.tmp"}
    expect(not left, f"files are left: {left}")
    return f"{KILLS} kills, {KILLS} whole files, each as new as the one before or newer"


def _save_without_end(path: Path, step: int) -> None:
    try:
        while True:
            step += 1
            bl.save_state(path, replace(STATE, step=step))
    finally:
        os._exit(1)  # never into the parent's code


@contextmanager
def mounted(folder: Path, *words: str) -> Iterator[Path]:
    """A file system at a folder, unmounted at the end."""
    where = folder / "mounted"
    where.mkdir()
    try:
        done = subprocess.run(["mount", *words, str(where)], capture_output=True)
    except OSError as error:
        raise Skipped(f"there is no mount: {error.strerror}") from error
    if done.returncode:
        raise Skipped("mounting is not allowed here")
    try:
        yield where
    finally:
        subprocess.run(["umount", str(where)], check=True)


def small_disk(folder: Path):
    return mounted(folder, "-t", "tmpfs", "-o", "size=96k", "none")


def full_disk(folder: Path) -> str:
    with small_disk(folder) as disk:
        checkpoint = bl.callbacks.Checkpoint(disk / "run", every=1, keep=5)
        written = 0

        def fill() -> None:
            nonlocal written
            for written in range(9):
                checkpoint(replace(STATE, step=written + 1))

        message_of(OSError, fill, "what was there before stays", "No space left")
        state = checkpoint.newest()
        expect(state is not None and state.step == written, "a saved state is gone", Lost)
        names = {path.suffix for path in (disk / "run").iterdir()}
        expect(names == {".pt"}, f"half a file is left: {names}")
    return f"OSError that says so, {written} states stay whole, no half file is left"


def full_disk_replacing(folder: Path) -> str:
    with small_disk(folder) as disk:
        path = saved(disk)
        (disk / "filling").write_bytes(b"0" * 61_000)
        name = message_of(OSError, lambda: bl.save_state(path, replace(STATE, step=99)), "No space")
        expect(bl.load_state(path).step == STATE.step, "the old state is gone", Lost)
        (disk / "filling").unlink()
        bl.save_state(path, replace(STATE, step=99))
        expect(bl.load_state(path).step == 99, "there is room again, and nothing is saved", Lost)
    return f"{name}; the old state stays, and the next save succeeds once there is room"


def file_limit(folder: Path) -> str:
    """A file may not grow beyond 8 KiB, half of what the state takes."""
    import resource

    path = saved(folder)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (8192, before[1]))
        message_of(OSError, lambda: bl.save_state(path, replace(STATE, step=99)), "File too large")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    expect(bl.load_state(path).step == STATE.step, "the old state is gone", Lost)
    return "OSError that says so; the old state stays"


def read_only(folder: Path) -> str:
    """Root may write everywhere but on a file system that is read-only."""
    source = folder / "source"
    source.mkdir()
    saved(source)
    with mounted(folder, "--bind", str(source)) as where:
        subprocess.run(["mount", "-o", "remount,ro,bind", str(where)], check=True)
        message_of(OSError, lambda: bl.save_state(where / "state.pt", STATE), "Read-only")
        expect(bl.load_state(where / "state.pt").step == STATE.step, "the old state is gone", Lost)
    return "OSError that says so; the old state stays"


def no_folder(folder: Path) -> str:
    (folder / "file").write_text("")
    (folder / "folder").mkdir()
    for path in (folder / "none" / "state", folder / "file" / "state", folder / "folder"):
        message_of(OSError, lambda path=path: bl.save_state(path, STATE), "was not saved")
    message_of(FileNotFoundError, lambda: bl.load_state(folder / "none"))
    return "OSError with the path: no such folder, a file for a folder, a folder for a file"


def odd_paths(folder: Path) -> str:
    for name in ("a b", "Äpfel & Birnen", "日本 語", "-x", "'quoted'", "new\nline", "e\u0301"):
        checkpoint = bl.callbacks.Checkpoint(folder / name / name, every=1)
        checkpoint(STATE)
        state = checkpoint.newest()
        expect(state is not None and state.step == STATE.step, f"{name!r} is not read", Lost)
    return "saved and read: spaces, umlauts, Japanese, quotes, a line break, a leading hyphen"


def not_serializable(folder: Path) -> str:
    path = saved(folder)
    state = replace(STATE, memory={"log": open})
    message_of(TypeError, lambda: bl.save_state(path, state), "memory['log']")
    expect(bl.load_state(path).step == STATE.step, "the old state is gone", Lost)
    return "TypeError that names the entry; the old state stays"


def leftover(folder: Path) -> str:
    (folder / ".state.pt.tmp").write_bytes(b"half a state")
    expect(bl.load_state(saved(folder)).step == STATE.step, "nothing is saved", Lost)
    expect(os.listdir(folder) == ["state.pt"], "the half file is left")
    return "the next save takes its place"


def unsynced(folder: Path) -> str:
    """An error of the disk itself, at the moment the bytes are to last."""
    path = saved(folder)
    before = os.fsync

    def fails(_: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    os.fsync = fails
    try:
        message_of(OSError, lambda: bl.save_state(path, replace(STATE, step=99)), "Input/output")
    finally:
        os.fsync = before
    expect(bl.load_state(path).step == STATE.step, "the old state is gone", Lost)
    return "OSError that says so; the old state stays"


def resumed_midway(folder: Path) -> str:
    """A run cut at each of its steps ends as if it had not been."""
    zero = torch.zeros(1).double()
    for solver in (bl.ASBLO(), bl.HypergradientDescent(bl.Implicit()), bl.SOBA()):
        states = list(bl.iterate(GOOD, solver, zero, zero))
        for state in states[:-1][:: max(1, len(states) // 12)]:
            bl.save_state(folder / "state", state)
            last = list(bl.iterate(GOOD, solver, state=bl.load_state(folder / "state")))[-1]
            expect(torch.equal(last.x, states[-1].x), f"other bits from step {state.step}", Lost)
            expect(last.step == states[-1].step, "another number of steps")
    expect(abs(states[-1].x.item() - ANSWER) < 1e-4, "another answer")
    return "from each cut the same steps and the same bits: ASBLO, Implicit, SOBA"


LATER = partial(edited, lambda content: content.replace(b"version 1", b"version 2", 1))
FAULTS = [
    Fault("a truncated state", "cut at lengths from 0 on, evenly spread", truncated),
    Fault("a flipped bit in a state", f"{FLIPS:,} random bits", flipped),
    Fault(
        "a state of a newer format",
        "version 2 in its header",
        partial(LATER, "its format is version 2"),
    ),
    Fault(
        "a file of something else",
        "a torch.save file under the state's name",
        partial(edited, lambda _: zipped({"x": 1}), "does not begin as a saved state"),
    ),
    Fault(
        "a file of something else with a right checksum",
        "a torch.save file below the header and its sha256",
        partial(edited, lambda _: signed(zipped({"x": 1})), "it holds no state"),
    ),
    Fault("a malicious pickle as a state", "`__reduce__` makes a folder", malicious),
    Fault("a state of another run", "another solver, another problem", foreign),
    Fault("NaN in a state", "x is NaN", nan_inside),
    Fault("the newest checkpoint is damaged", "nine bytes are missing", spoiled_newest),
    Fault("the folder of the checkpoints vanishes", "it is removed in the run", folder_vanishes),
    Fault("two runs in one folder", "a state of step 1 beside one of step 9", other_run),
    Fault(
        "SIGKILL while a state is saved",
        f"{KILLS} children, each up to 10 ms after its first save",
        killed,
    ),
    Fault("the run is cut between two steps", "at a dozen steps of each run", resumed_midway),
    Fault("half a file of a killed save", "`.state.pt.tmp` is left", leftover),
    Fault("the disk is full, new file", "a tmpfs of 96 KiB", full_disk),
    Fault("the disk is full, file replaced", "a tmpfs of 96 KiB", full_disk_replacing),
    Fault("a file may not grow", "RLIMIT_FSIZE of 8 KiB", file_limit),
    Fault("the disk fails", "EIO raised in the place of fsync", unsynced),
    Fault("the folder is read-only", "a bind mount, read-only", read_only),
    Fault("there is no such folder", "and a file, or a folder, in its place", no_folder),
    Fault("odd paths", "spaces, Unicode, quotes, a line break", odd_paths),
    Fault("a state that cannot be saved", "a function in its memory", not_serializable),
]
