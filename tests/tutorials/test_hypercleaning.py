"""Each method of the hyper-cleaning tutorial cleans a small set of digits."""

import itertools

import hypercleaning as h
import pytest
import torch


@pytest.fixture(scope="module")
def digits() -> h.Digits:
    return h.load(seed=0, training=400, validation=100)


def test_half_of_the_labels_are_wrong(digits: h.Digits) -> None:
    true = h.load(seed=0, training=400, validation=100)
    assert 0.4 < digits.is_corrupted.float().mean() < 0.6
    assert torch.equal(true.labels, digits.labels)
    assert len(digits.X) + len(digits.X_validation) + len(digits.X_test) == 1797


@pytest.fixture(scope="module")
def levels(digits: h.Digits) -> dict[str, float]:
    return h.levels(digits)


@pytest.mark.parametrize("name", list(h.METHODS))
def test_method_cleans(name: str, digits: h.Digits, levels: dict[str, float]) -> None:
    method = h.METHODS[name]
    count = {"F2SA": 30, "Implicit(CG)": 25, "Unrolled": 80}.get(name, 150)
    x0, y0 = h.start(digits)
    run = h.steps(h.objectives(digits), method.solver, x0, y0, method.batches(digits))
    *_, last = itertools.islice(run, count)
    found = h.judge(digits, last.x, last.y, 0.0)
    assert found.accuracy > levels["all labels"] + 0.05
    assert found.accuracy > levels["clean labels"] - 0.05  # a small set, and few steps
    assert found.f1 > 0.8


def test_curve_measures_over_time(digits: h.Digits) -> None:
    points = h.curve(digits, h.METHODS["Unrolled"], seconds=0.5)
    assert points[0].seconds == 0.0
    assert points[-1].seconds >= 0.45
    assert points[-1].f1 > points[0].f1
    left, right = h.drawing({"Unrolled": [points, points]}, {"a": 0.5, "b": 0.9}).axes
    assert left.lines[0].get_ydata()[-1] == pytest.approx(points[-1].accuracy)
    assert right.lines[0].get_ydata()[-1] == pytest.approx(points[-1].f1)


def test_table_is_of_the_last_measurements_and_the_first_good_one() -> None:
    runs = [
        [h.Measurement(s, 0.9, f1) for s, f1 in ((1.0, 0.1), (2.0, 0.92), (3.0, last))]
        for last in (0.94, 0.96)
    ]
    row = h.table({"A": runs}).splitlines()[-1]
    assert row.split() == ["A", "0.900", "(0.900,", "0.900)", "0.950", "(0.940,", "0.960)", "2.00"]


def test_weights_of_zero_and_one_train_on_a_part(digits: h.Digits) -> None:
    some = torch.zeros_like(digits.is_corrupted)
    some[digits.labels == 3] = True
    always_three = (digits.labels_test == 3).float().mean()
    assert h.train(digits, some) == pytest.approx(float(always_three), abs=1e-6)
