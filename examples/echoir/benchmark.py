"""Runs a network over a test set, one photograph at a time, and tells how it did beside the paper."""

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from photographs import Source
from protocols import Measured, Protocol
from rich.table import Table
from scores import channels_first, round8
from test_sets import DERAINING, DERAINING_AVERAGE, SETS, average
from torch import Tensor


@dataclass(frozen=True)
class Row:
    """One photograph: how good the input was, and the restored image."""

    name: str
    input: Measured
    restored: Measured


@dataclass(frozen=True)
class Outcome:
    """One test set.

    Attributes:
        name: of the set.
        protocol: how it was measured.
        rows: its photographs.
        images: how many the published set has, or None if it is no published one.
        paper: what the paper reports, if it does.
    """

    name: str
    protocol: Protocol
    rows: list[Row]
    images: int | None = None
    paper: Measured | None = None

    @property
    def input(self) -> Measured:
        """The mean over the inputs."""
        return average([row.input for row in self.rows])

    @property
    def restored(self) -> Measured:
        """The mean over the restored images."""
        return average([row.restored for row in self.rows])


def measure(
    photographs: Iterable[Source], protocol: Protocol, restore: Callable[[Tensor], Tensor]
) -> Iterator[Row]:
    """Restores pairs and measures, keeping none of them in memory.

    Args:
        photographs: with inputs.
        protocol: of the set.
        restore: maps (3, H, W) to the same; its result is rounded to 8 bits, as in a file.
    """
    for source in photographs:
        photograph = source.read()
        image, target = (channels_first(i) / 255 for i in (photograph.input, photograph.target))
        before, after = (
            protocol.measure(image, target),
            protocol.measure(round8(restore(image)), target),
        )
        yield Row(photograph.name, before, after)


def deraining(outcomes: list[Outcome]) -> Outcome | None:
    """The mean of the five deraining sets, each counting once as in the paper, if all were measured."""
    by_name = {outcome.name: outcome for outcome in outcomes}
    sets = [by_name.get(SETS[key].name) for key in DERAINING]
    if None in sets:
        return None
    means = [Row(one.name, one.input, one.restored) for one in sets if one]
    return Outcome("average of deraining", sets[0].protocol, means, None, DERAINING_AVERAGE)


def results_table(outcomes: list[Outcome], title: str) -> Table:
    """A row a set: the input, the restored image, and the paper's figures."""
    table = Table(title=title)
    for name in ("set", "images", "measured on"):
        table.add_column(name)
    for name in ("input", "restored", "paper"):
        table.add_column(f"{name}\nPSNR dB / SSIM", justify="right")
    for one in outcomes:
        count = f"{len(one.rows)}"
        if one.images and one.images != len(one.rows):
            count += f" of {one.images}"
        figures = (_cell(one.input), _cell(one.restored), _cell(one.paper))
        table.add_row(one.name, count, one.protocol.name, *figures)
    if mean := deraining(outcomes):
        table.add_section()
        figures = (_cell(mean.input), _cell(mean.restored), _cell(mean.paper))
        table.add_row(mean.name, "", mean.protocol.name, *figures, style="bold")
    return table


def _cell(measured: Measured | None) -> str:
    return "" if measured is None else f"{measured.psnr:.2f} / {measured.ssim:.3f}"


def save_json(path: Path, outcomes: list[Outcome], about: dict[str, Any]):
    """Writes all figures: for each set the means, the paper's, and those of every image."""
    content = {"weights": about, "sets": [_plain(one) for one in outcomes]}
    if mean := deraining(outcomes):
        content["deraining_average"] = _plain(mean)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")


def _plain(one: Outcome) -> dict[str, Any]:
    return {
        "name": one.name,
        "protocol": one.protocol.name,
        "input": one.input._asdict(),
        "restored": one.restored._asdict(),
        "paper": one.paper and one.paper._asdict(),
        "images": [
            {"name": r.name, "input": r.input._asdict(), "restored": r.restored._asdict()}
            for r in one.rows
        ],
    }
