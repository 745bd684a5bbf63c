"""The EchoIR trainer, struck in the middle: signals, no memory, no disk, damaged files; and then resumed."""

from __future__ import annotations

import functools
import resource
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from benchmarks.faults.checkpoints import mounted
from benchmarks.faults.fault import Fault, Lost, expect
from benchmarks.faults.inputs import EXAMPLE, album, photograph, weights_file

STRUCK = Path(__file__).with_name("struck.py")
STEPS = 8
DONE, FAILED, MISTAKE, NO_ROOM, STOPPED = 0, 1, 2, 74, 75
OPTIONS = f"""--threads 1 --patch 16 --batch 2 --device cpu --amp False --preset small --steps {STEPS}
    --look-every 4""".split()


def ended(command: list[object], **options: object) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, *map(str, command)]
    return subprocess.run(words, capture_output=True, text=True, timeout=120, **options)


def words(folder: Path, output: Path) -> list[object]:
    data = folder / "photographs"
    if not data.exists():
        album(data)
    return ["--data", data, "--output", output]


def train(folder: Path, output: Path, *more: object, blow: tuple[object, ...] = ()):
    """One training of a few steps: how it ended."""
    script = [STRUCK, *blow, "train"] if blow else [EXAMPLE / "train.py"]
    return ended([*script, *words(folder, output), *OPTIONS, *more])


def resume(folder: Path, output: Path):
    return ended([EXAMPLE / "train.py", *words(folder, output), "--resume"])


@functools.cache
def unharmed() -> dict[str, Tensor]:
    """The weights of a training that nothing happened to."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        done = train(folder, folder / "run")
        expect(
            done.returncode == DONE, f"the unharmed run ends with {done.returncode}: {done.stderr}"
        )
        return load_file(folder / "run" / "weights.safetensors")


def has_code(done: subprocess.CompletedProcess[str], code: int, *said: str) -> None:
    """Raises unless a command ended with this code, said so, and showed no traceback."""
    text = done.stdout + done.stderr
    expect(done.returncode == code, f"exit code {done.returncode}, not {code}: {text[-300:]}")
    expect("Traceback" not in text, f"a traceback: {text[-300:]}")
    expect(all(word in text for word in said), f"it does not say {said}: {text[-300:]}")


def is_unharmed(folder: Path, output: Path) -> None:
    """Raises unless the run, resumed, ends with the bits of one that nothing happened to."""
    done = resume(folder, output)
    text = done.stdout + done.stderr
    expect(done.returncode == DONE, f"resuming ends with {done.returncode}: {text[-300:]}", Lost)
    found, expected = load_file(output / "weights.safetensors"), unharmed()
    same = found.keys() == expected.keys()
    same = same and all(torch.equal(found[k], v) for k, v in expected.items())
    expect(same, "resumed, it ends with other weights than the unharmed run", Lost)


RESUMED = "--resume ends with the weights of the unharmed run, bit for bit"


def struck(where: str, number: int, blow: str, code: int, said: str, folder: Path) -> str:
    output = folder / "run"
    has_code(train(folder, output, blow=(where, number, blow)), code, *([said] if said else []))
    is_unharmed(folder, output)
    ends = f"exit code {code}" if code > 0 else f"ended by the signal ({128 - code} in a shell)"
    return f"{ends}{f', says {said!r}' if said else ''}; {RESUMED}"


def twice(folder: Path) -> str:
    """Stopped twice, and the newest checkpoint spoiled."""
    output = folder / "run"
    train(folder, output, blow=("run._average", 3, "SIGTERM"))
    again = ended(
        [STRUCK, "run._average", 4, "SIGTERM", "train", *words(folder, output), "--resume"]
    )
    has_code(again, STOPPED)
    newest = max((output / "asblo" / "checkpoints").glob("step-*"))
    content = bytearray((newest / "state.pt").read_bytes())
    content[len(content) // 2] ^= 1
    (newest / "state.pt").write_bytes(content)
    is_unharmed(folder, output)
    return f"the one before it is taken; {RESUMED}"


def no_disk(folder: Path) -> str:
    """The disk fills up in the run; there is room again when it is resumed."""
    with mounted(folder, "-t", "tmpfs", "-o", "size=64m", "none") as disk:
        output = disk / "run"
        has_code(train(folder, output, blow=("run._average", 3, "SIGTERM")), STOPPED)
        saved = set((output / "asblo" / "checkpoints").glob("step-*"))
        blow = ["run._average", 3, "disk", "train", *words(folder, output), "--resume"]
        has_code(ended([STRUCK, *blow]), NO_ROOM, "No space left", "what was written before stays")
        expect(saved <= set((output / "asblo" / "checkpoints").glob("step-*")), "it is gone", Lost)
        (output / "filling").unlink()
        is_unharmed(folder, output)
    return f"exit code {NO_ROOM}, says 'No space left', the checkpoint before stays; {RESUMED}"


def read_only(folder: Path) -> str:
    (folder / "source").mkdir()
    with mounted(folder, "--bind", str(folder / "source")) as where:
        subprocess.run(["mount", "-o", "remount,ro,bind", str(where)], check=True)
        has_code(train(folder, where / "run"), NO_ROOM, "Read-only file system")
    return f"exit code {NO_ROOM} before the first step, says 'Read-only file system'"


def in_the_way(folder: Path) -> str:
    (folder / "run").write_text("a file of the user's")
    has_code(train(folder, folder / "run"), NO_ROOM, "run")
    expect((folder / "run").read_text() == "a file of the user's", "the file is gone", Lost)
    return f"exit code {NO_ROOM} before the first step; the file stays"


def diverged(folder: Path) -> str:
    has_code(train(folder, folder / "run", "--lr", "1e30"), FAILED, "NaN or infinite")
    return f"exit code {FAILED}, says 'NaN or infinite'"


def cut_log(folder: Path) -> str:
    """A power failure leaves half a line, and zeros where blocks were not written."""
    output = folder / "run"
    train(folder, output, blow=("run._average", 5, "SIGTERM"))
    with (output / "asblo" / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 8, "sec\n' + b"\0" * 100)
    is_unharmed(folder, output)
    rows = (output / "metrics.jsonl").read_text().splitlines()
    expect(len(rows) == 2, f"{len(rows)} rows of metrics, not 2", Lost)  # of the looks
    return f"the half line is left out; {RESUMED}"


def cut_arguments(folder: Path) -> str:
    output = folder / "run"
    train(folder, output, blow=("run._average", 3, "SIGTERM"))
    path = output / "arguments.json"
    whole = path.read_text()
    path.write_text(whole[: len(whole) // 2])
    has_code(resume(folder, output), MISTAKE, "arguments.json", "damaged")
    path.write_text(whole)
    is_unharmed(folder, output)
    return f"exit code {MISTAKE} that names it; with the file mended {RESUMED}"


def damaged_photograph(folder: Path) -> str:
    output = folder / "run"
    train(folder, output, blow=("run._average", 3, "SIGTERM"))
    path = folder / "photographs" / "photo2.png"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    has_code(resume(folder, output), MISTAKE, "photo2.png")
    path.write_bytes(whole)
    is_unharmed(folder, output)
    return f"exit code {MISTAKE} that names it; with the file mended {RESUMED}"


def no_memory_restoring(folder: Path) -> str:
    """A tile of a hundred megapixels, in two gigabytes of address space."""
    photograph(20, 20).resize((4000, 4000)).save(folder / "large.png")

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (2 * 2**30, 2 * 2**30))

    options = ["--output", folder / "out", "--weights", weights_file(folder), "--device", "cpu"]
    script = [EXAMPLE / "restore.py", folder / "large.png", *options]
    has_code(ended([*script, "--tile", 4096], preexec_fn=limit), NO_ROOM, "--tile")
    expect(not list((folder / "out").iterdir()), "half an image is left")
    return f"exit code {NO_ROOM}, says to lower --tile; no half image is left"


def blow(
    name: str, how: str, where: str, number: int, what: str, code: int, said: str = ""
) -> Fault:
    return Fault(name, how, partial(struck, where, number, what, code, said))


STOP = "go on with --resume"
FAULTS = [
    blow("SIGTERM in a step", "in step 5 of 8", "run._average", 5, "SIGTERM", STOPPED, STOP),
    blow("SIGINT in a step", "in step 5 of 8", "run._average", 5, "SIGINT", STOPPED, STOP),
    blow(
        "SIGTERM while the PSNR is measured in training",
        "in the look at step 4",
        "train.evaluate",
        1,
        "SIGTERM",
        STOPPED,
        STOP,
    ),
    blow(
        "SIGTERM in the evaluation at the end",
        "when all steps are done",
        "train.evaluate",
        3,
        "SIGTERM",
        -15,
    ),
    blow(
        "SIGINT in the evaluation at the end",
        "when all steps are done",
        "train.evaluate",
        3,
        "SIGINT",
        STOPPED,
        STOP,
    ),
    blow("SIGKILL in a step", "in step 7 of 8", "run._average", 7, "SIGKILL", -9),
    blow(
        "SIGKILL as a checkpoint is to be saved", "at the last step", "run.save", 1, "SIGKILL", -9
    ),
    blow(
        "SIGKILL as the weights are to be written",
        "when all steps are done",
        "train.save_weights",
        3,
        "SIGKILL",
        -9,
    ),
    Fault("stopped twice, the newest checkpoint damaged", "a flipped bit in state.pt", twice),
    blow(
        "no memory in a step",
        "RLIMIT_AS 4 MiB above what is used, step 3",
        "run._average",
        3,
        "memory",
        NO_ROOM,
        "--batch",
    ),
    Fault(
        "no memory for a tile", "restore.py in 2 GiB, a tile of 4,000 x 4,000", no_memory_restoring
    ),
    Fault("the disk fills up in training", "a tmpfs of 64 MiB, filled in step 6", no_disk),
    Fault("the output folder is read-only", "a bind mount, read-only", read_only),
    Fault("a file has the name of the output folder", "--output names it", in_the_way),
    Fault("training diverges", "--lr 1e30", diverged),
    Fault("the log is cut", "half a line and 100 zeros at its end", cut_log),
    Fault("the run's arguments are cut", "half of arguments.json", cut_arguments),
    Fault("a photograph is damaged between two parts of a run", "cut in half", damaged_photograph),
]
