import math
import pickle
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bilevel.schedules import constant, geometric, join, polynomial

POSITIVE = st.floats(1e-6, 1e6)


@given(initial=POSITIVE, ratio=st.floats(0.01, 0.999), step=st.integers(0, 1000))
def test_geometric_is_its_formula_and_decreases(initial: float, ratio: float, step: int) -> None:
    schedule = geometric(initial, ratio)
    assert schedule(step) == initial * ratio**step
    assert schedule(step + 1) <= schedule(step)


@given(
    initial=POSITIVE,
    power=st.floats(0.1, 3.0),
    scale=st.floats(0.1, 1e3),
    step=st.integers(0, 10**6),
)
def test_polynomial_is_its_formula_and_decreases(
    initial: float, power: float, scale: float, step: int
) -> None:
    schedule = polynomial(initial, power, scale)
    assert schedule(0) == initial
    assert schedule(step) == pytest.approx(initial / (1 + step / scale) ** power, rel=1e-12)
    assert schedule(step + 1) <= schedule(step)


def test_negative_power_and_ratio_above_one_grow() -> None:
    assert polynomial(1.0, -0.5)(3) == 2.0
    assert geometric(1.0, 2.0)(10) == 1024.0


def test_floor_is_the_least_value() -> None:
    assert geometric(1.0, 0.5, floor=0.3)(5) == 0.3
    assert polynomial(1.0, 1.0, floor=0.3)(5) == 0.3
    assert geometric(1.0, 0.5)(10**6) == 0.0  # underflow, no error


def test_join_restarts_each_part_at_its_boundary() -> None:
    schedule = join([geometric(8.0, 0.5), geometric(1.0, 0.1), constant(7.0)], [2, 4])
    assert [schedule(k) for k in range(6)] == [8.0, 4.0, 1.0, 0.1, 7.0, 7.0]


def test_schedules_print_compare_and_pickle() -> None:
    schedule = join([geometric(1.0, 0.5), constant(0.0)], [3])
    assert "Geometric(initial=1.0, ratio=0.5, floor=0.0)" in repr(schedule)
    assert schedule == join([geometric(1.0, 0.5), constant(0.0)], [3])
    assert pickle.loads(pickle.dumps(schedule)) == schedule


@pytest.mark.parametrize(
    "make",
    [
        lambda: constant(math.nan),
        lambda: constant(math.inf),
        lambda: geometric(0.0, 0.5),
        lambda: geometric(math.nan, 0.5),
        lambda: geometric(1.0, 0.0),
        lambda: geometric(1.0, -0.5),
        lambda: geometric(1.0, math.inf),
        lambda: geometric(1.0, 0.5, floor=-1.0),
        lambda: polynomial(-1.0, 1.0),
        lambda: polynomial(1.0, math.nan),
        lambda: polynomial(1.0, 1.0, scale=0.0),
        lambda: polynomial(1.0, 1.0, floor=math.nan),
    ],
)
def test_parameter_out_of_range_says_the_rule(make: Callable[[], object]) -> None:
    with pytest.raises(ValueError, match=r"=\.\.\.\)` must be a finite number.*Got "):
        make()


@pytest.mark.parametrize(
    ("parts", "boundaries", "rule"),
    [
        ([], [], "one boundary between"),
        ([constant(1.0)], [2], "one boundary between"),
        ([constant(1.0), constant(2.0)], [0], "positive and increasing"),
        ([constant(1.0)] * 3, [4, 4], "positive and increasing"),
    ],
)
def test_join_of_parts_that_do_not_fit_says_the_rule(
    parts: list, boundaries: list[int], rule: str
) -> None:
    with pytest.raises(ValueError, match=rule):
        join(parts, boundaries)
