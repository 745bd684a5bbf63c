"""Counts what the tests have found of the mutants that `mutmut run` has made; `make mutants` runs both.

Prints a row a file and the names of the survivors, which `mutmut show NAME` shows. The exit code is 1 where less than
90 % of a file's mutants were killed, or some were not tried.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from page import table

FOLDER = Path(__file__).resolve().parent.parent / "mutants"
REQUIRED = 0.9
# Exit codes of pytest and of mutmut; 5 and 33 say that no test was found.
SURVIVED, NOT_TRIED = (0, 5, 33), (None, 2)


def main() -> int:
    rows, survivors, good = [], [], True
    for file in sorted(FOLDER.glob("bilevel/**/*.meta")):
        codes = json.loads(file.read_text("utf-8"))["exit_code_by_key"]
        alive = [name for name, code in codes.items() if code in SURVIVED]
        missing = [name for name, code in codes.items() if code in NOT_TRIED]
        killed = len(codes) - len(alive) - len(missing)
        share = killed / max(1, len(codes))
        name = str(file.relative_to(FOLDER).with_suffix(""))
        rows.append([f"`{name}`", str(len(codes)), str(killed), f"{100 * share:.1f} %"])
        survivors += alive + [f"{name} (not tried)" for name in missing]
        good = good and share >= REQUIRED and not missing
    print(table(["file", "mutants", "killed", ""], rows))
    print("\nSurvivors:", *survivors, sep="\n  ")
    return 0 if rows and good else 1


if __name__ == "__main__":
    sys.exit(main())
