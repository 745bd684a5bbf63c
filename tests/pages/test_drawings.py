"""What the figures of the pages show is what is computed."""

import xml.etree.ElementTree as ET

import architecture
import barrier_curves
import central_path
import echo_weights
import interior
import numpy as np
import one_picture
import pytest
import showing
from model import PRESETS


def test_path_ends_at_the_solution_with_a_growing_multiplier() -> None:
    states = central_path.walk()
    end = float(states[-1].x), float(states[-1].y)
    assert end == pytest.approx(central_path.SOLUTION, abs=1e-4)
    first = [state.metrics["multiplier"] for state in states[: central_path.STAGES]]
    assert first == sorted(first)
    assert first[-1] > 10 * first[0]


def test_stages_are_drawn_with_the_points_of_the_run() -> None:
    states = central_path.walk()
    for k, axes in enumerate(central_path.drawing().axes):
        (path,) = [line for line in axes.lines if line.get_label().startswith("ASBLO")]
        assert path.get_xdata()[-1] == float(states[k].x)
        assert len(path.get_xdata()) == k + 2


def test_drawn_derivatives_are_slopes_of_the_drawn_curves() -> None:
    value, slope, curvature = (axes.lines[0] for axes in barrier_curves.drawing().axes)
    zeta = value.get_xdata()
    inner = zeta < -0.2  # a difference needs steps that are small beside the distance to the bound
    for curve, derivative in ((value, slope), (slope, curvature)):
        by_difference = np.gradient(curve.get_ydata(), zeta)
        np.testing.assert_allclose(
            by_difference[inner][1:-1], derivative.get_ydata()[inner][1:-1], rtol=5e-3
        )


def test_interior_is_empty_without_slack_where_zero_is_a_solution() -> None:
    at_zero, at_one = interior.drawing().axes
    assert len(at_zero.collections) == 1
    assert len(at_one.collections) == 2


def test_tangent_of_the_home_picture_is_the_slope() -> None:
    h = 1e-5
    for x in one_picture.DECISIONS:
        ends = one_picture.answer(x + h).value, one_picture.answer(x - h).value
        slope = (ends[0] - ends[1]) / (2 * h)
        assert float(one_picture.answer(x).grad) == pytest.approx(slope, rel=1e-5, abs=1e-8)


@pytest.mark.parametrize("name", ["paper", "cpu"])
def test_architecture_has_a_row_and_an_echo_a_level(name: str) -> None:
    config = PRESETS[name]
    text = architecture.drawing(config)
    root = ET.fromstring(text)
    levels = len(config.blocks) - 1
    for level in range(levels + 1):
        assert f"{config.width * 2**level} channels" in text
    words = [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]
    assert words.count("Upsampler") == levels
    assert text.count("url(#arrow-echo)") == levels
    assert words.count(f"{config.blocks[0]} blocks") >= 2


def test_weights_of_a_neighborhood_add_up_to_one() -> None:
    figure = echo_weights.drawing()
    rows = [axes for axes in figure.axes if axes.texts]
    assert len(rows) >= 3
    for axes in rows:
        total = sum(float(text.get_text()) for text in axes.texts)
        assert total == pytest.approx(1.0, abs=0.01)  # three digits each


def test_pages_show_source_and_output_as_they_are() -> None:
    assert "def cross_validation(" in showing.source("folds", "cross_validation")
    with pytest.raises(AttributeError):
        showing.source("folds", "no_such_name")
    assert "<svg" in showing.made("ridge", "caption")
    assert "RidgeCV" in showing.printed("ridge")
