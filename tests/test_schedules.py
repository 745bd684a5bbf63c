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


ABOVE, LEAST, FINITE = " above 0", " of at least 0", ""
HALVE, FIRST, LAST = "Pass e.g. 0.5 to halve.", "Pass the first value.", "Pass the last value."
NUMBER, POWER = "Pass the number itself, e.g. 0.1.", "Pass e.g. 1.0; below 0 it grows."
STEPS = "Pass a number of steps."


@pytest.mark.parametrize("wrong", [math.nan, math.inf, 0.0, -1.0])
@pytest.mark.parametrize(
    ("make", "name", "rule", "mend"),
    [
        (constant, "constant(value", FINITE, NUMBER),
        (lambda v: geometric(v, 0.5), "geometric(initial", ABOVE, FIRST),
        (lambda v: geometric(1.0, v), "geometric(ratio", ABOVE, HALVE),
        (lambda v: geometric(1.0, 0.5, floor=v), "geometric(floor", LEAST, LAST),
        (lambda v: polynomial(v, 1.0), "polynomial(initial", ABOVE, FIRST),
        (lambda v: polynomial(1.0, v), "polynomial(power", FINITE, POWER),
        (lambda v: polynomial(1.0, 1.0, scale=v), "polynomial(scale", ABOVE, STEPS),
        (lambda v: polynomial(1.0, 1.0, floor=v), "polynomial(floor", LEAST, LAST),
    ],
)
def test_parameter_out_of_range_says_the_rule(
    make: Callable[[float], object], name: str, rule: str, mend: str, wrong: float
) -> None:
    if math.isfinite(wrong) and (rule == FINITE or (rule == LEAST and wrong == 0.0)):
        make(wrong)
        return
    with pytest.raises(ValueError, match="must be a finite number") as caught:
        make(wrong)
    assert str(caught.value) == f"`{name}=...)` must be a finite number{rule}. Got {wrong}. {mend}"


@pytest.mark.parametrize(
    ("parts", "boundaries", "rule"),
    [
        ([], [], "one boundary between"),
        ([constant(1.0)], [2], "one boundary between"),
        ([constant(1.0), constant(2.0)], [0], "positive and increasing"),
        ([constant(1.0)] * 3, [4, 4], "positive and increasing"),
        ([constant(1.0)] * 3, [5, 4], "positive and increasing"),
    ],
)
def test_join_of_parts_that_do_not_fit_says_the_rule(
    parts: list, boundaries: list[int], rule: str
) -> None:
    with pytest.raises(ValueError, match=rule):
        join(parts, boundaries)


def test_errors_of_join_tell_what_it_got_and_what_to_pass() -> None:
    with pytest.raises(ValueError, match="one boundary") as caught:
        join([constant(1.0)] * 2, [1, 2, 3])
    assert str(caught.value) == (
        "`join(schedules, boundaries)` must have one boundary between any two schedules. "
        "Got 2 schedules and 3 boundaries. Pass one boundary fewer than schedules."
    )
    with pytest.raises(ValueError, match="increasing") as caught:
        join([constant(1.0)] * 3, [5, 4])
    assert str(caught.value) == (
        "`join(boundaries=...)` must be positive and increasing. Got [5, 4]. "
        "Sort them, and leave out repeated ones."
    )


def test_first_part_may_have_one_step() -> None:
    schedule = join([constant(3.0), geometric(8.0, 0.5)], [1])
    assert [schedule(k) for k in range(3)] == [3.0, 8.0, 4.0]


@given(
    lengths=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    ratio=st.floats(0.1, 2.0),
    step=st.integers(0, 30),
)
def test_joined_parts_count_from_their_own_start(
    lengths: list[int], ratio: float, step: int
) -> None:
    parts = [geometric(float(k + 1), ratio) for k in range(len(lengths) + 1)]
    boundaries = [sum(lengths[: k + 1]) for k in range(len(lengths))]
    begin = max(b for b in (0, *boundaries) if b <= step)
    part = (0, *boundaries).index(begin)
    assert join(parts, boundaries)(step) == parts[part](step - begin)


@given(initial=POSITIVE, floor=st.floats(0.0, 1e6), step=st.integers(0, 1000))
def test_nothing_falls_below_its_floor(initial: float, floor: float, step: int) -> None:
    for make in (
        lambda low: geometric(initial, 0.7, low),
        lambda low: polynomial(initial, 1.5, 3.0, low),
    ):
        assert make(floor)(step) == max(make(0.0)(step), floor)
