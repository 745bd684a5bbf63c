"""Training photographs gathered from folders of large ones."""

from pathlib import Path

import gather
import numpy as np
import pytest
from PIL import Image


def photograph(path: Path, size: tuple[int, int], seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    coarse = np.random.default_rng(seed).integers(0, 256, (12, 12, 3), np.uint8)
    noise = np.random.default_rng(seed).normal(0, 20, (size[1], size[0], 3))
    image = np.asarray(Image.fromarray(coarse).resize(size), float) + noise
    Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(path)


def test_photographs_are_shrunk_and_each_is_taken_once(tmp_path: Path) -> None:
    found = tmp_path / "found"
    photograph(found / "a.png", (300, 200), 0)
    photograph(found / "sub" / "b.png", (200, 400), 1)
    photograph(found / "small.png", (90, 300), 2)
    with Image.open(found / "a.png") as image:
        image.resize((240, 160)).save(found / "again.png")
    Image.new("RGB", (300, 300), (9, 99, 199)).save(found / "flat.png")
    (found / "link.png").symlink_to(found / "sub" / "b.png")
    (found / "words.txt").write_text("no image")
    names = gather.gather(gather.Arguments((found,), tmp_path / "out", short_side=100))
    assert names == ["000-a.png", "001-b.png"]
    for name, size in zip(names, [(150, 100), (100, 200)], strict=True):
        with Image.open(tmp_path / "out" / name) as image:
            assert image.size == size


def test_some_are_left_out_and_those_of_packages_added(tmp_path: Path) -> None:
    for number, name in enumerate(("a", "Waves/b", "c")):
        photograph(tmp_path / f"{name}.png", (120, 110), number)
    options = {"short_side": 100, "leave_out": ("*Waves*", "*c.png"), "bundled": True}
    names = gather.gather(gather.Arguments((tmp_path,), tmp_path / "out", **options))
    assert names == ["000-a.png", "flower.png", "astronaut.png", "rocket.png"]
    with Image.open(tmp_path / "out" / "astronaut.png") as image:
        assert image.size == (512, 512)


def test_folder_that_is_none_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"must exist. Got .*nowhere"):
        gather.gather(gather.Arguments((tmp_path / "nowhere",), tmp_path / "out"))
