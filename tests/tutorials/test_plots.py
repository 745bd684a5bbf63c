"""What the figures of the tutorials share: a file says the same each time, a name stands in the legend once."""

import re
import xml.etree.ElementTree as ET
from pathlib import Path

import plots
from matplotlib.figure import Figure


def two_panels() -> Figure:
    figure, both = plots.panels(2)
    for axes in both:
        axes.plot([0.1, 10.0], [1.0, 2.0], "o-", label="a < b & c")
    plots.legend(figure, columns=1)
    return figure


def test_file_is_the_same_each_time(tmp_path: Path) -> None:
    for name in ("one.svg", "two.svg"):
        plots.save(two_panels(), tmp_path / name)
    text = (tmp_path / "one.svg").read_text("utf-8")
    assert text == (tmp_path / "two.svg").read_text("utf-8")
    assert ET.fromstring(text).tag == "{http://www.w3.org/2000/svg}svg"


def test_shared_name_stands_in_the_legend_once() -> None:
    (legend,) = two_panels().legends
    assert [text.get_text() for text in legend.get_texts()] == ["a < b & c"]


def test_black_takes_the_color_of_the_page() -> None:
    figure, (axes,) = plots.panels(1)
    axes.plot([0.0, 1.0], color="black")
    text = plots.svg(figure)
    assert "stroke: currentColor" in text
    assert not re.search("#000000|#ffffff", text)
    assert "<text" in text  # of the page's own type, and to be searched
