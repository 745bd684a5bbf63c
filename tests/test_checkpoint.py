import errno
import hashlib
import io
import os
import pickle
from collections import OrderedDict
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import optree
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bilevel import _checkpoint
from bilevel._checkpoint import load_state, save_state
from bilevel._errors import CheckpointError
from bilevel._solution import Evaluations, State, Status

STATE = State(
    x={"b": torch.tensor([0.1, -0.0, float("inf")]), "a": [torch.ones(2, 2, dtype=torch.bfloat16)]},
    y=(torch.tensor(1.0 / 3.0, dtype=torch.float64), OrderedDict(w=torch.arange(3))),
    step=12,
    status=Status.CONVERGED,
    metrics={"gap": 1e-300, "lambda": torch.tensor(3.0)},
    memory={"scales": (1.5, None), "history": [{"s": torch.zeros(0)}], "pessimistic": True, "k": 3},
    evaluations=Evaluations(upper=5, lower_grad=7, hvp=2),
    message="the gradient is below 1e-6",
)


def same(first: Any, second: Any) -> bool:
    if type(first) is not type(second):
        return False
    if isinstance(first, torch.Tensor):
        bits = [t.contiguous().reshape(-1).view(torch.uint8).tolist() for t in (first, second)]
        return first.dtype == second.dtype and first.shape == second.shape and bits[0] == bits[1]
    if isinstance(first, dict):
        pairs = zip(first, second, strict=True)
        return all(k == m and same(first[k], second[m]) for k, m in pairs)
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(same, first, second))
    return first == second


def test_round_trip_is_exact(tmp_path: Path) -> None:
    save_state(tmp_path / "state", STATE)
    loaded = load_state(tmp_path / "state")
    for field in fields(State):
        assert same(getattr(loaded, field.name), getattr(STATE, field.name)), field.name
    assert optree.tree_structure(loaded.y) == optree.tree_structure(STATE.y)
    assert os.listdir(tmp_path) == ["state"]


NUMBERS = st.none() | st.booleans() | st.integers(-(2**40), 2**40) | st.text(max_size=3)
VALUES = st.recursive(
    NUMBERS | st.floats(allow_nan=False),
    lambda part: (
        st.lists(part, max_size=3)
        | st.tuples(part, part)
        | st.dictionaries(st.text(max_size=3) | st.integers(0, 9), part, max_size=3)
    ),
    max_leaves=8,
)


@given(memory=st.dictionaries(st.text(max_size=3), VALUES, max_size=3))
def test_any_memory_of_plain_values_returns(
    memory: dict, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "memory"
    save_state(path, replace(STATE, memory=memory))
    assert same(load_state(path).memory, memory)


def test_parameters_and_views_become_small_plain_tensors(tmp_path: Path) -> None:
    leaf = torch.nn.Parameter(torch.ones(3))
    save_state(tmp_path / "state", State(leaf, torch.zeros(100_000)[:2]))
    loaded = load_state(tmp_path / "state")
    assert type(loaded.x) is torch.Tensor
    assert not loaded.x.requires_grad
    assert (tmp_path / "state").stat().st_size < 10_000


def test_saving_again_replaces(tmp_path: Path) -> None:
    for step in (1, 2):
        save_state(tmp_path / "state", replace(STATE, step=step))
    assert load_state(tmp_path / "state").step == 2


def test_float_subclass_is_stored_as_a_float(tmp_path: Path) -> None:
    save_state(tmp_path / "state", replace(STATE, metrics={"psnr": np.float64(0.1)}))
    assert same(load_state(tmp_path / "state").metrics, {"psnr": 0.1})


@pytest.mark.parametrize("value", [np.zeros(2), Status.RUNNING, object(), {1.0}])
def test_other_values_are_refused_before_anything_is_written(tmp_path: Path, value: Any) -> None:
    with pytest.raises(TypeError, match=r"Got \w+ in `memory\['a'\]\[1\]`"):
        save_state(tmp_path / "state", replace(STATE, memory={"a": [1, value]}))
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("length", [0, 10, 90, 110, 1000, -1])
def test_file_that_was_cut_short_says_so(tmp_path: Path, length: int) -> None:
    path = tmp_path / "state"
    save_state(path, STATE)
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(CheckpointError, match=r"Got '.*state': it(s bytes| does not begin)"):
        load_state(path)


@given(position=st.integers(0, 10**6), bit=st.integers(0, 7))
def test_flipped_bit_is_found(
    position: int, bit: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "flipped"
    save_state(path, STATE)
    content = bytearray(path.read_bytes())
    content[position % len(content)] ^= 1 << bit
    path.write_bytes(content)
    with pytest.raises(CheckpointError):
        load_state(path)


def packed(payload: bytes) -> bytes:
    digest = hashlib.sha256(payload).hexdigest()
    return f"bilevel-state version 1 sha256 {digest}\n".encode() + payload


class Malicious:
    def __reduce__(self) -> tuple:
        return os.system, ("touch owned",)


def test_code_in_a_file_does_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    buffer = io.BytesIO()
    torch.save({"x": Malicious()}, buffer)
    for payload in (buffer.getvalue(), pickle.dumps(Malicious(), protocol=2)):
        Path("state").write_bytes(packed(payload))
        with pytest.raises(CheckpointError, match="it holds no state"):
            load_state("state")
    assert not Path("owned").exists()


def test_file_of_something_else_says_so(tmp_path: Path) -> None:
    torch.save({"x": torch.ones(1)}, tmp_path / "other")
    with pytest.raises(CheckpointError, match="does not begin as a saved state"):
        load_state(tmp_path / "other")
    buffer = io.BytesIO()
    torch.save({"x": torch.ones(1)}, buffer)
    (tmp_path / "other").write_bytes(packed(buffer.getvalue()))
    with pytest.raises(CheckpointError, match="it holds no state"):
        load_state(tmp_path / "other")


def test_later_version_says_so(tmp_path: Path) -> None:
    save_state(tmp_path / "state", STATE)
    content = (tmp_path / "state").read_bytes().replace(b"version 1", b"version 2", 1)
    (tmp_path / "state").write_bytes(content)
    with pytest.raises(CheckpointError, match="its format is version 2, this library reads"):
        load_state(tmp_path / "state")


def test_file_of_the_first_version_still_loads() -> None:
    """Written by 0.1.0, and never anew: whoever changes the format keeps a reader for it."""
    loaded = load_state(Path(__file__).parent / "states" / "version-1")
    for field in fields(State):
        assert same(getattr(loaded, field.name), getattr(STATE, field.name)), field.name


def test_missing_file_and_folder_are_the_usual_errors(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        load_state(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match="The state was not saved"):
        save_state(tmp_path / "none" / "state", STATE)


@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_full_disk_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str
) -> None:
    save_state(tmp_path / "state", STATE)

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(_checkpoint.os, function, full)
    with pytest.raises(OSError, match="what was there before stays: No space left") as caught:
        save_state(tmp_path / "state", replace(STATE, step=99))
    assert caught.value.errno == errno.ENOSPC
    assert os.listdir(tmp_path) == ["state"]
    assert load_state(tmp_path / "state").step == STATE.step


def test_leftover_of_a_killed_save_is_taken_over(tmp_path: Path) -> None:
    (tmp_path / ".state.tmp").write_bytes(b"half a st")
    save_state(tmp_path / "state", STATE)
    assert os.listdir(tmp_path) == ["state"]
    assert load_state(tmp_path / "state").step == STATE.step
