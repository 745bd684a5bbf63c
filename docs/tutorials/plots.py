"""What the figures of the tutorials share: a light grid, one legend, files that say the same each time."""

import io
import re
from pathlib import Path

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

GRID = {"axes.grid": True, "grid.alpha": 0.3, "axes.spines.top": False, "axes.spines.right": False}


def panels(count: int) -> tuple[Figure, list[Axes]]:
    """So many axes side by side."""
    with rc_context(GRID):
        figure = Figure(figsize=(4.8 * count, 4.2), layout="constrained")
        return figure, list(figure.subplots(1, count, squeeze=False)[0])


def legend(figure: Figure, columns: int) -> None:
    """One for all panels, below them; a name that several panels share stands there once."""
    entries = [axes.get_legend_handles_labels() for axes in figure.axes]
    handles = {n: h for hs, names in entries for h, n in zip(hs, names, strict=True)}
    figure.legend(
        handles.values(), handles.keys(), loc="outside lower center", ncols=columns, frameon=False
    )


def svg(figure: Figure) -> str:
    """As SVG that stands in a page: without a background, what is black in the color of the page's text.

    It says the same in each run: no date, and identifiers that come from the content. Text with the group
    identifier `on-color`, which stands on a color of the figure and not of the page, says so by its class.
    """
    buffer = io.StringIO()
    with rc_context({"svg.hashsalt": "bilevel", "svg.fonttype": "none"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None}, transparent=True)
    text = buffer.getvalue()
    root = '<svg fill="currentColor" stroke-linejoin="round" '
    text = text[text.index("<svg ") :].replace("<svg ", root, 1)
    # What would reach beyond the figure: a style for the whole page, names of other figures' parts.
    text = re.sub(r"\s*<metadata>.*?</metadata>|\s*<style.*?</style>", "", text, flags=re.DOTALL)
    text = text.replace('<g id="on-color"', '<g class="on-color"')
    text = re.sub(r'<g id="[^"]*"', "<g", text)
    return re.sub(r"(fill|stroke): #000000", r"\1: currentColor", text)


def save(figure: Figure, path: Path) -> None:
    """Writes `svg` to a file."""
    path.write_text(svg(figure), "utf-8")
