"""Any arguments are refused in the library's words, or are in range, and outlive the disk."""

import dataclasses
import math
import re
from pathlib import Path

import pytest
from arguments import Arguments, agree, check, settle, start_anew
from hypothesis import given
from hypothesis import strategies as st

NUMBER = st.floats() | st.sampled_from([0.0, -0.0, 1.0, 1e-300, -1.0])  # NaN and infinity too
INTEGER = st.integers(-3, 10) | st.integers()
PER_STAGE = INTEGER | st.lists(INTEGER, max_size=3).map(tuple)
WILD = st.builds(
    Arguments,
    task=st.sampled_from(["denoise", "denoise-raw", "derain", "deblur"]),
    sigma=NUMBER | st.tuples(NUMBER, NUMBER),
    data=st.none() | st.text("aé 本/.", min_size=1, max_size=9).map(Path),
    lower=st.sampled_from(["echo", "restoration", "both"]),
    alpha=NUMBER,
    mu=st.none() | st.tuples(NUMBER, NUMBER, NUMBER),
    barrier=st.none() | st.tuples(NUMBER, NUMBER, NUMBER),
    minutes=NUMBER,
    steps=st.none() | INTEGER,
    stages=st.lists(INTEGER, max_size=3).map(tuple),
    patch=PER_STAGE,
    batch=PER_STAGE,
    lower_batch=PER_STAGE,
    lr=NUMBER,
    lr_end=st.none() | NUMBER,
    warmup=INTEGER,
    hold=NUMBER,
    max_norm=NUMBER,
    ema=NUMBER,
    val_share=NUMBER,
    threads=INTEGER,
    seed=INTEGER,
)
NAMES = [field.name for field in dataclasses.fields(Arguments)]
POSITIVE = st.floats(1e-9, 1e9)
SHARE = st.floats(0.0, 1.0, exclude_max=True)
SCHEDULE = st.none() | st.tuples(POSITIVE, st.floats(-3.0, 3.0), POSITIVE)
GOOD = st.builds(
    Arguments,
    sigma=POSITIVE | st.tuples(st.floats(0.0, 25.0), st.floats(25.0, 50.0)),
    data=st.none() | st.text("aé 本/.", min_size=1, max_size=9).map(Path),
    jpeg=SHARE,
    lower=st.just("both"),
    alpha=st.floats(0.0, 9.0),
    mu=SCHEDULE,
    epsilon=SCHEDULE,
    minutes=POSITIVE,
    steps=st.none() | st.integers(1, 10**9),
    lr=POSITIVE,
    lr_end=st.none() | POSITIVE,
    warmup=st.integers(0, 10**9),
    hold=SHARE,
    ema=SHARE,
    amp=st.booleans(),
    device=st.just("cpu"),
    seed=st.integers(0, 2**63 - 1),
)


def numbers(value):
    values = value if isinstance(value, tuple) else (value,)
    return [v for v in values if isinstance(v, int | float)]


def refusal(a):
    """In which words `check` refuses some arguments; None where it takes them."""
    try:
        check(a)
    except ValueError as error:
        return str(error)
    return None


@given(a=WILD | GOOD)
def test_wild_arguments_are_refused_or_in_range(a):
    text = refusal(a)
    if text is not None:
        form = r"(?:`--([a-z-]+)`|The noise) must (?:be|have) .*Got .*\. \w.*\."
        told = re.fullmatch(form, text, re.DOTALL)
        assert told, text
        assert told[1] is None or told[1].replace("-", "_") in NAMES
        return
    for name in NAMES:
        assert all(math.isfinite(v) for v in numbers(getattr(a, name))), name
    for name in ("minutes", "steps", "stages", "patch", "batch", "lr", "lr_end", "threads"):
        assert all(v > 0 for v in numbers(getattr(a, name))), name
    assert 0 < a.val_share < 1
    assert 0 <= a.ema < 1
    assert min(a.alpha, a.seed, a.warmup, *numbers(a.sigma)) >= 0


@given(a=GOOD)
def test_arguments_of_a_run_are_those_to_go_on_with(a, tmp_path_factory):
    output = tmp_path_factory.getbasetemp() / "settled"
    settled = settle(dataclasses.replace(a, output=output))
    start_anew(settled, ())
    found = settle(Arguments(output=output, resume=True))
    data = a.data and a.data.resolve()  # whatever folder the run is resumed from
    assert found == dataclasses.replace(settled, data=data, resume=True)


@given(a=GOOD, position=st.integers(0, 10**6), bit=st.integers(0, 7))
def test_flipped_bit_never_changes_the_arguments(a, position, bit, tmp_path_factory):
    output = tmp_path_factory.getbasetemp() / "flipped-arguments"
    start_anew(dataclasses.replace(a, output=output), ())
    again = Arguments(output=output, resume=True)
    known = settle(again)
    path = output / "arguments.json"
    content = bytearray(path.read_bytes())
    content[position % len(content)] ^= 1 << bit
    path.write_bytes(content)
    try:
        found = settle(again)
    except ValueError as error:
        assert "arguments.json, which is damaged" in str(error)  # noqa: PT017  # the other way is good too
    else:
        assert found == known  # 1E9 for 1e9


def test_arguments_of_a_run_before_there_was_a_checksum_are_taken(tmp_path):
    (tmp_path / "arguments.json").write_text('{"steps": 7, "sigma": [5.0, 50.0]}')
    found = settle(Arguments(output=tmp_path, resume=True))
    assert (found.steps, found.sigma) == (7, (5.0, 50.0))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"task": "derain", "sigma": 5.0}, r"`--sigma` must come with --task denoise.* Got 5\.0"),
        ({"task": "deblur", "sigma": (5.0, 50.0)}, r"`--sigma` must .* Got \(5\.0, 50\.0\)"),
        ({"alpha": 0.5}, r"`--alpha` must come with --lower both.* Got 0\.5.* leave --alpha out"),
    ],
)
def test_numbers_that_nothing_would_look_at_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        check(Arguments(**given))
    check(Arguments(task="derain"))
    check(Arguments(lower="both", alpha=0.5))


@pytest.mark.parametrize("name", ["steps", "minutes", "look_every", "lr", "stages"])
def test_a_number_that_must_be_positive_comes_with_an_example(name):
    zero = (0,) if name == "stages" else 0
    flag = f"--{name.replace('_', '-')}"
    text = refusal(dataclasses.replace(Arguments(), **{name: zero}))
    told = re.search(rf"`{flag}` must be .* Got .*\. Use e\.g\. {flag} ([0-9.e-]+)", text)
    good = (int(told[1]),) if name == "stages" else float(told[1])
    check(dataclasses.replace(Arguments(), **{name: good}))


@given(a=GOOD)
def test_a_run_goes_on_with_its_own_arguments_alone(a):
    agree(a, a)
    other = dataclasses.replace(a, warmup=a.warmup + 1, compare=True, data=Path("elsewhere"))
    with pytest.raises(
        ValueError, match=r"Got .*--warmup .* has .*--compare True.* has False"
    ) as e:
        agree(other, a)
    assert "--data elsewhere" in str(e.value)
    assert "--lr" not in str(e.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("lr", math.nan),
        ("minutes", math.inf),
        ("max_norm", math.nan),
        ("alpha", math.nan),
        ("sigma", math.inf),
        ("jpeg", 1.5),
        ("seed", -1),
        ("seed", 2**64),
    ],
)
def test_numbers_that_no_run_can_use_are_refused_before_it(name, value):
    with pytest.raises(ValueError, match=r"must (be|have) .* Got "):
        check(dataclasses.replace(Arguments(), **{name: value}))
