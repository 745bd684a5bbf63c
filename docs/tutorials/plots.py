"""What the figures of the tutorials share: a light grid, one legend, files that say the same each time."""

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


def save(figure: Figure, path: Path) -> None:
    """As SVG, without the date and with the same identifiers in each run."""
    with rc_context({"svg.hashsalt": "bilevel"}):
        figure.savefig(path, format="svg", metadata={"Date": None})
