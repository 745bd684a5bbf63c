"""Tables in Markdown, and their place in a page of the documentation."""

from __future__ import annotations

from pathlib import Path

DOCS = Path(__file__).resolve().parent.parent / "docs"
BEGIN, END = "<!-- table: begin -->", "<!-- table: end -->"


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table whose columns are aligned in the source too."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = [head, ["-" * width for width in widths], *rows]
    return "\n".join(
        "| " + " | ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)) + " |"
        for line in lines
    )


def between(page: Path) -> str:
    """What is between the marks of the page."""
    return page.read_text(encoding="utf-8").split(BEGIN)[1].split(END)[0].strip()


def write(page: Path, text: str) -> None:
    """Put `text` between the marks of the page, in the place of what was there."""
    old = page.read_text(encoding="utf-8")
    before, after = old.split(BEGIN)[0], old.split(END)[1]
    page.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{after}", encoding="utf-8")
    print(f"\nWritten to {page}")
