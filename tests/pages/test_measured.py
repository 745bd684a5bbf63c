"""The comparison's times are those of the page of the benchmarks."""

import math

import measured
import pytest

PAGE = """
small, relative error at most 1e-03

| library | method | ms | spread |
| ------- | ------ | -- | ------ |
| by hand | a | 3.5 | 3 to 4 |
| bilevel | a | 5 | 5 to 6 |
| bilevel | b | 4.25 | 4 to 5 |
| Betty | a | misses 1e-03: its relative error is 1e+00 | |

large, relative error at most 1e-03

| library | method | ms | spread |
| ------- | ------ | -- | ------ |
| by hand | a | 1174 | 900 to 1200 |
"""


def test_fastest_row_of_each_library_is_taken_from_the_named_table_alone() -> None:
    assert measured.fastest(PAGE, "small,") == {
        "by hand": 3.5,
        "bilevel": 4.25,
        "Betty": math.inf,
    }
    assert measured.fastest(PAGE, "large,") == {"by hand": 1174.0}


def test_library_without_a_time_misses_the_accuracy_and_one_without_a_row_has_none() -> None:
    rows = measured.side_by_side({"small": "small,", "large": "large,"}, PAGE).splitlines()
    assert rows[0] == "|  | small | large |"
    assert "| bilevel | 4.25 |  |" in rows
    assert "| Betty | misses it |  |" in rows


def test_caption_that_the_page_has_not_is_an_error() -> None:
    with pytest.raises(IndexError):
        measured.fastest(PAGE, "huge,")
