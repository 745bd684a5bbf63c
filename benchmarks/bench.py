"""Times the library against hand-written torch and its peers, and writes docs/benchmarks.md.

    make bench        or        python benchmarks/bench.py [--tasks t0 t2] [--repeats 7] [--peers .venv-peers]

All contenders of a table run in one process, on one thread, and take turns. A row's time is the median of its
rounds in seconds of the processor, and its ratio the median of the ratios to the fastest version by hand in the same
round. `make peers` installs the other libraries. The page is written when all tasks ran; those that are named alone
take their places in it where all that its first lines say is the same: the day, the machine and the versions.
"""

from __future__ import annotations

import datetime
import importlib
import os
import platform
import sys
import time
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

import torch
import tyro
from page import DOCS, between, write
from speed.race import Rules

TASKS = {
    "t0": "t0_tiny",
    "t1": "t1_quadratic",
    "t2": "t2_logistic",
    "t3": "t3_hypercleaning",
    "t4": "t4_network",
    "t5": "t5_echoir",
    "t6": "t6_upsampler",
}
PEERS = ("torchopt", "betty-ml", "boat-torch", "higher", "jax", "jaxopt")


@dataclass(frozen=True)
class Arguments:
    """Times the library against hand-written torch and its peers.

    Attributes:
        tasks: which to run.
        repeats: rounds of each.
        peers: environment with the other libraries, made by `make peers`.
    """

    tasks: tuple[Literal[tuple(TASKS)], ...] = tuple(TASKS)
    repeats: int = 7
    peers: Path = Path(".venv-peers")


def add_peers(environment: Path) -> bool:
    """Let the packages of another environment be imported where this one has none of the name.

    So all contenders share the torch of this one.
    """
    packages = sorted(environment.glob("lib/python*/site-packages"))
    sys.path += map(str, packages)
    return bool(packages)


def about(rules: Rules) -> str:
    """Where and when it was measured."""
    lines = [
        f"Measured on {datetime.date.today()} on {processor()}, {os.cpu_count()} cores, "
        f"with one thread, in {rules.repeats} rounds.",
        f"Python {platform.python_version()}, torch {torch.__version__}, bilevel {version('bilevel')}.",
    ]
    if rules.with_peers:
        lines.append(f"Peers: {', '.join(f'{name} {known_version(name)}' for name in PEERS)}.")
    else:
        lines.append("The other libraries were not there: `make peers` installs them.")
    return "\n".join(lines)


def known_version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "(not installed)"


def processor() -> str:
    """The model of the CPU."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def main(a: Arguments) -> None:
    torch.set_num_threads(1)
    rules = Rules(a.repeats, add_peers(a.peers))
    parts = [about(rules)]
    print(parts[0], flush=True)
    for task in a.tasks:
        began = time.perf_counter()
        module = importlib.import_module(f"speed.{TASKS[task]}")
        title = module.__doc__.split("\n\n")[0].replace("\n", " ").rstrip(".")
        parts.append(f"## {title}\n\n{module.tables(rules)}")
        print(f"\n{parts[-1]}\n\n({time.perf_counter() - began:.0f} s)", flush=True)
    page = DOCS / "benchmarks.md"
    if set(a.tasks) != set(TASKS):
        parts = renewed(between(page), parts)
    if parts:
        write(page, "\n\n".join(parts))


def renewed(before: str, parts: list[str]) -> list[str]:
    """The parts of a page with the new ones in place of those with the same heading; none where its first differs."""
    first, *sections = before.split("\n\n## ")
    if first != parts[0]:
        return []
    new = {part.split("\n")[0]: part for part in parts[1:]}
    known = [f"## {section}" for section in sections]
    return [first, *(new.get(section.split("\n")[0], section) for section in known)]


if __name__ == "__main__":
    main(tyro.cli(Arguments))
