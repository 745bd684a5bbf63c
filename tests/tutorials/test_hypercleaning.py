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


@pytest.mark.parametrize("name", list(h.METHODS))
def test_method_cleans(name: str, digits: h.Digits) -> None:
    method = h.METHODS[name]
    count = 400 if "ASBLO" in name else 150 if name == "Unrolled" else 60
    x0, y0 = h.start(digits)
    batches = None if method.batches is None else method.batches(digits)
    run = h.steps(h.objectives(digits), method.solver, x0, y0, batches)
    *_, last = itertools.islice(run, count)
    found = h.judge(digits, last.x, last.y, 0.0)
    dirty = h.train(digits, torch.ones_like(digits.is_corrupted))
    clean = h.train(digits, ~digits.is_corrupted)
    assert found.accuracy > dirty + 0.05
    assert found.accuracy > clean - 0.05  # a small set, and few steps
    assert found.f1 > 0.8


def test_curve_measures_over_time(digits: h.Digits) -> None:
    points = h.curve(digits, h.METHODS["Unrolled"], seconds=0.5)
    assert points[0].seconds == 0.0
    assert points[-1].seconds >= 0.45
    assert points[-1].f1 > points[0].f1
    svg = h.drawing({"Unrolled": points}, {"trained on all labels": 0.5})
    assert svg.count("<svg") == svg.count("</svg>") == 1


def test_weights_of_zero_and_one_train_on_a_part(digits: h.Digits) -> None:
    some = torch.zeros_like(digits.is_corrupted)
    some[digits.labels == 3] = True
    always_three = (digits.labels_test == 3).float().mean()
    assert h.train(digits, some) == pytest.approx(float(always_three), abs=1e-6)
