"""What the page of the benchmarks has measured, for pages that compare: a rerun changes both."""

import math
import re
from pathlib import Path

PAGE = Path(__file__).resolve().parents[1] / "benchmarks.md"
LIBRARIES = (
    "by hand",
    "bilevel",
    "TorchOpt",
    "higher",
    "BOAT",
    "Betty",
    "JAX",
    "JAXopt",
    "benchopt",
)


def fastest(page: str, caption: str) -> dict[str, float]:
    """The least median milliseconds of each library in the first table after a line that starts with `caption`.

    Infinite where each of its rows says why there is no time.
    """
    after = re.split(rf"^{re.escape(caption)}.*$", page, maxsplit=1, flags=re.MULTILINE)[1]
    lines = [line for line in after.strip().split("\n\n")[0].splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    column = rows[0].index("ms")
    found: dict[str, float] = {}
    for row in rows[2:]:
        ms = float(row[column]) if re.fullmatch(r"[0-9.]+", row[column]) else math.inf
        found[row[0]] = min(found.get(row[0], math.inf), ms)
    return found


def side_by_side(columns: dict[str, str], page: str | None = None) -> str:
    """A Markdown table, a row a library; `columns` has the caption of each table by the head of its column."""
    text = PAGE.read_text("utf-8") if page is None else page
    tables = [fastest(text, caption) for caption in columns.values()]
    lines = [["", *columns], ["---"] * (1 + len(columns))]
    for library in LIBRARIES:
        times = [table.get(library) for table in tables]
        lines.append([library, *map(_words, times)])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _words(ms: float | None) -> str:
    """Of a library that does not take part, that misses the accuracy, or that has a time."""
    return "" if ms is None else "misses it" if ms == math.inf else f"{ms:g}"
