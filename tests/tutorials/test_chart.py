"""The charts of the tutorials are well-formed, and their marks are round numbers in range."""

import xml.etree.ElementTree as ET

import pytest
from chart import Panel, _ticks, figure


def test_figure_is_well_formed_and_escapes_names() -> None:
    panel = Panel("a < b", "x", "y", {"f & g": [(0.1, 1.0), (10.0, 2.0)]}, log_x=True)
    other = Panel("dots", "x", "y", dots={"d": [(0.0, 1.0)]}, levels={"l": 3.0}, labels=["one"])
    root = ET.fromstring(figure(panel, other))
    texts = [node.text for node in root.iter("{http://www.w3.org/2000/svg}text")]
    assert {"a < b", "f & g", "d", "l", "one", "1"} <= set(texts)
    assert len(list(root.iter("{http://www.w3.org/2000/svg}circle"))) == 1


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (-3.2, 7.1), (0.83, 0.95), (1e-5, 2e-4)])
def test_ticks_are_three_to_seven(low: float, high: float) -> None:
    ticks = _ticks(low, high)
    assert all(low <= tick <= high for tick in ticks)
    assert 3 <= len(ticks) <= 7
