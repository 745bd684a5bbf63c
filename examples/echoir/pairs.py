"""Which input belongs to which target: by their names, as public data sets have them."""

import re
from collections.abc import Sequence
from pathlib import Path


def natural(path: Path) -> list[tuple[int, str]]:
    """A key that sorts digits as numbers (2 before 10) and the rest as text."""
    parts = re.split(r"(\d+)", path.name)
    return [(int(part), "") if part.isdigit() else (-1, part) for part in parts]


def match_pairs(inputs: Sequence[Path], targets: Sequence[Path]) -> list[tuple[Path, Path]]:
    """Finds the target of each input: the same stem, or the same after public data sets' affixes.

    Those are `rain-` and `norain-` (Rain100), `xN` (its scales) and `_1` to `_14` (Rain1400, where
    14 inputs share a target).

    Raises:
        ValueError: if an input has no target or several, or a target no input.
    """
    exact = {path.stem: path for path in targets}
    loose: dict[str, list[Path]] = {}
    for path in targets:
        loose.setdefault(_bare(path), []).append(path)
    pairs = []
    for path in inputs:
        found = [exact[path.stem]] if path.stem in exact else loose.get(_bare(path), [])
        if len(found) != 1:
            raise ValueError(
                f"Every input must have exactly one target of the same name. Got {len(found)} for "
                f"{path} ({len(inputs)} inputs, {len(targets)} targets). Rename or remove it."
            )
        pairs.append((path, found[0]))
    if lonely := set(targets) - {target for _, target in pairs}:
        raise ValueError(
            f"Every target must have an input of the same name. Got none for {min(lonely)} "
            f"({len(inputs)} inputs, {len(targets)} targets). Rename or remove it."
        )
    return pairs


def _bare(path: Path) -> str:
    stem = re.sub(r"^(no)?rain-", "", path.stem)
    return re.sub(r"(x\d+|_([1-9]|1[0-4]))$", "", stem)
