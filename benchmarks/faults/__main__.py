"""Does every fault, and writes the table of what came of it.

    make faults        or        python -m benchmarks.faults [WORDS IN THE NAME OF A FAULT]

Writes docs/reliability.md, unless only some faults were named. The exit code is 1 if something was lost, or went
otherwise than promised.
"""

from __future__ import annotations

import sys
import tempfile
import warnings
from pathlib import Path

import torch

from benchmarks.faults import checkpoints, inputs, numerics, problems, processes
from benchmarks.faults.fault import Fault, Outcome, outcome
from benchmarks.page import DOCS, table, write

KINDS = {
    "Numbers": numerics.FAULTS,
    "Problems, starts and data": problems.FAULTS,
    "States on disk": checkpoints.FAULTS,
    "Images, lists and weights": inputs.FAULTS,
    "Training": processes.FAULTS,
}


def done(fault: Fault) -> Outcome:
    """What came of a fault, in words that hold no name of a folder that is gone."""
    with tempfile.TemporaryDirectory() as folder:
        found = outcome(fault, Path(folder))
    return Outcome(found.seen.replace(folder, "FOLDER").replace("\n", " "), found.verdict)


def main(words: str) -> int:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # a fault's own test looks at them
    counts: dict[str, int] = {}
    sections: list[str] = []
    is_good = True
    for kind, faults in KINDS.items():
        rows: list[list[str]] = []
        for fault in faults:
            if words not in fault.name:
                continue
            found = done(fault)
            is_good = is_good and found.is_good
            counts[found.verdict] = counts.get(found.verdict, 0) + 1
            cells = (fault.name, fault.how, found.seen, found.verdict)
            rows.append([cell.replace("|", "\\|") for cell in cells])
            print(f"{found.verdict:<9}  {fault.name}: {found.seen}", flush=True)
        head = ["fault", "how it is done", "what happened", ""]
        sections.append(f"### {kind}\n\n{table(head, rows)}" if rows else "")
    summary = ", ".join(f"{count} {verdict}" for verdict, count in sorted(counts.items()))
    print(f"\n{sum(counts.values())} faults: {summary}")
    if not words:
        total = f"{sum(counts.values())} faults: {summary}."
        write(DOCS / "reliability.md", "\n\n".join([total, *sections]))
    return 0 if is_good else 1


if __name__ == "__main__":
    sys.exit(main(" ".join(sys.argv[1:])))
