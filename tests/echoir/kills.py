"""Trains in forked children and kills them; a program of its own, since a fork must have no threads but one.

    python kills.py PHOTOGRAPHS OUTPUT STEPS KILLS

Under OUTPUT, `unharmed` is left alone and `killed-0`, ... are killed and resumed until KILLS children have died;
then the last of them comes to its end. Prints where each was killed, as JSON.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "echoir"))

import run
import torch
from train import command_line

WRITES = os.O_WRONLY | os.O_RDWR


def train(photographs, output, steps):
    words = ["--threads", "1", "--patch", "16", "--batch", "2", "--device", "cpu", "--amp", "False"]
    words += ["--data", str(photographs), "--output", str(output)]
    words += ["--steps", str(steps), "--look-every", "3"]
    # One that died before it noted its arguments has done nothing yet.
    command_line([*words, "--resume"] if (output / "arguments.json").exists() else words)


def die_at(operation, output):
    """Dies before a file operation under `output`, or, where a file is opened to write, when it is still empty."""
    left = operation

    def hook(event, arguments):
        nonlocal left
        ours = event.startswith(("open", "os.", "shutil.")) and str(output) in str(arguments[:1])
        left -= ours
        if ours and left == 0:
            path, mode, flags = arguments if event == "open" else (None, None, 0)
            if mode and "w" in mode and flags & WRITES:
                os.close(os.open(path, os.O_CREAT | os.O_TRUNC | os.O_WRONLY))
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def child(photographs, output, steps, *, operation=None, seconds=None):
    """One training until it ends or is killed; whether it was killed."""
    number = os.fork()
    if number == 0:
        try:
            if operation:
                die_at(operation, output)
            with open(os.devnull, "w") as nothing:
                os.dup2(nothing.fileno(), 1)
            train(photographs, output, steps)
            os._exit(0)
        finally:
            os._exit(1)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(number, signal.SIGKILL)
    status = os.waitpid(number, 0)[1]
    if status not in (0, signal.SIGKILL):
        sys.exit(f"A child ended with {status}.")
    return status == signal.SIGKILL


def last_step(output):
    """The newest step on disk, or -1 before there is one."""
    return max((int(p.name[5:]) for p in output.glob("asblo/checkpoints/step-*")), default=-1)


def main(photographs, output, steps, kills):
    torch.set_num_threads(1)
    run.SAVE_EVERY = 0.0  # a checkpoint after every step
    train(photographs, output / "warm-up", 1)  # in this process: what is loaded late is loaded now
    start = time.perf_counter()
    child(photographs, output / "unharmed", steps)
    whole = time.perf_counter() - start
    rng, died, runs = random.Random(0), [], 0
    while len(died) < kills:
        place, ended = output / f"killed-{runs}", False
        while len(died) < kills and not ended:
            how = (
                {"operation": rng.randint(1, 50)}
                if len(died) % 2
                else {"seconds": rng.uniform(0, whole * rng.choice([0.2, 1]))}
            )
            ended = not child(photographs, place, steps, **how)
            if not ended:
                died.append({"run": runs, "step": last_step(place), **how})
        runs += 1
    if not ended:
        child(photographs, place, steps)
    print(json.dumps(died))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), *map(int, sys.argv[3:]))
