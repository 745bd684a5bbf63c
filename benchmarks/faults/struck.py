"""Runs a command of the EchoIR example, and strikes it at a call of one of its functions.

python benchmarks/faults/struck.py MODULE.FUNCTION NUMBER BLOW SCRIPT WORDS...

BLOW is the name of a signal, which the process sends to itself; `memory`, which leaves it a few megabytes; or `disk`,
which fills the disk of the folder after `--output`, and asks by SIGTERM for the checkpoint that no longer fits.
"""

import importlib
import os
import resource
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "echoir"))

SPARE = 4 * 2**20  # bytes


def leave_no_memory() -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + SPARE
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))


def leave_no_disk() -> None:
    folder = Path(sys.argv[sys.argv.index("--output") + 1])
    try:
        with (folder / "filling").open("wb", buffering=0) as file:
            while file.write(b"0" * 4096):
                pass
    except OSError:
        os.kill(os.getpid(), signal.SIGTERM)


def deal(blow: str) -> None:
    if blow == "memory":
        leave_no_memory()
    elif blow == "disk":
        leave_no_disk()
    else:
        os.kill(os.getpid(), getattr(signal, blow))


def strike(where: str, number: int, blow: str) -> None:
    """Makes the call with this number, from one, of a function start with the blow."""
    module, name = where.split(".")
    owner: Any = importlib.import_module(module)
    original: Callable[..., Any] = getattr(owner, name)
    calls = iter(range(1, number + 1))

    def struck(*args: Any, **options: Any) -> Any:
        if next(calls, None) == number:
            deal(blow)
        return original(*args, **options)

    setattr(owner, name, struck)


if __name__ == "__main__":
    where, number, blow, script, *words = sys.argv[1:]
    main = importlib.import_module(script)
    strike(where, int(number), blow)
    main.command_line(words)
