"""The faults that cost little, by the functions that `make faults` calls, and the page that it wrote."""

import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.faults import checkpoints, numerics, problems  # noqa: E402
from benchmarks.faults.fault import (  # noqa: E402
    Broken,
    Fault,
    Lost,
    Skipped,
    expect,
    message_of,
    outcome,
)

FAULTS = [*numerics.FAULTS, *problems.FAULTS, *checkpoints.FAULTS]
CHEAP = (
    "F is NaN, on batches",
    "an empty batch",
    "a truncated state",
    "a malicious pickle as a state",
    "the newest checkpoint is damaged",
    "SIGKILL while a state is saved",
    "a file may not grow",
)


@pytest.mark.skipif(sys.platform != "linux", reason="signals, limits and /proc of Linux")
@pytest.mark.parametrize("name", CHEAP)
def test_fault_does_no_harm(name: str, tmp_path: Path) -> None:
    (fault,) = (fault for fault in FAULTS if fault.name == name)
    found = outcome(fault, tmp_path)
    assert found.verdict == "not lost", found.seen


def raising(error: Exception) -> Fault:
    def do(_: Path) -> str:
        raise error

    return Fault("a fault", "by hand", do)


@pytest.mark.parametrize(
    ("error", "verdict", "is_good"),
    [
        (Lost("gone"), "LOST", False),
        (Broken("other"), "OTHERWISE", False),
        (KeyError("a traceback"), "OTHERWISE", False),
        (Skipped("not allowed"), "skipped", True),
    ],
)
def test_harm_is_seen(error: Exception, verdict: str, is_good: bool, tmp_path: Path) -> None:
    found = outcome(raising(error), tmp_path)
    assert (found.verdict, found.is_good) == (verdict, is_good)


def test_what_is_promised_is_looked_at() -> None:
    with pytest.raises(Lost, match="it is gone"):
        expect(False, "it is gone", Lost)
    with pytest.raises(Broken, match="no ValueError, but 3"):
        message_of(ValueError, lambda: 3)
    with pytest.raises(Broken, match="does not say"):
        message_of(ValueError, lambda: int("x"), "the path")


def test_page_lists_every_fault_and_none_is_lost() -> None:
    text = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    table = text.split("<!-- table: begin -->")[1].split("<!-- table: end -->")[0]
    rows = [
        re.split(r" +(?<!\\)\| *", line.strip("| ")) for line in table.splitlines() if "|" in line
    ]
    verdicts = {row[0].replace("\\|", "|"): row[-1] for row in rows}
    assert {fault.name for fault in FAULTS} <= verdicts.keys()
    results = [verdict for verdict in verdicts.values() if verdict in ("not lost", "skipped")]
    assert len(results) >= 40
    assert "LOST" not in table
    assert "OTHERWISE" not in table
