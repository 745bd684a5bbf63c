"""Finds test sets on disk: in the layout of the common collections, or as their authors distribute them.

A finder looks in one place and returns what it found there, or nothing; `locate` tries them all, and says
what it looked for where nothing was found.
"""

import re
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
from folders import listed, paired, scenes, subfolders
from photographs import Unread, image_size, list_images, load_image
from scipy.io import loadmat
from scipy.io.matlab import MatReadError

ABOVE = ("", "test", "Datasets", "Datasets/test")  # folders that may lie between the root and a set
SHOWN = 8  # entries of a folder that an error names
# What SciPy raises for a file that is damaged, or of version 7.3.
UNREADABLE = (
    MatReadError,
    NotImplementedError,
    OSError,
    ValueError,
    TypeError,
    IndexError,
    zlib.error,
)
VOTERS = 15  # files that decide which side of all is the rainy one


@dataclass(frozen=True)
class Layout:
    """One way in which a set may lie on disk.

    Attributes:
        looks: what is looked for, in words.
        find: the photographs of a place, none if they do not lie so.
        names: of the place; empty if the root itself is meant.
    """

    looks: str
    find: Callable[[Path], list[Unread]]
    names: tuple[str, ...] = ()


def locate(root: Path, layouts: Sequence[Layout]) -> list[Unread]:
    """The photographs of a set somewhere under a root.

    Raises:
        ValueError: if it is not there in any of the layouts.
    """
    if not root.is_dir():
        raise ValueError(f"A data folder must exist. Got {root}. Check the path.")
    for layout in layouts:
        for place in places(root, layout.names):
            if found := layout.find(place):
                return found
    looked = "; ".join(layout.looks for layout in layouts)
    entries = sorted(path.name + "/" * path.is_dir() for path in root.iterdir())
    more = ", ..." if len(entries) > SHOWN else ""
    raise ValueError(
        f"The data set must lie under `--data` as one of: {looked}. Got {root}, which holds "
        f"{', '.join(entries[:SHOWN]) or 'nothing'}{more}. Unpack the set there, or name the folder above it."
    )


def places(root: Path, names: Sequence[str]) -> list[Path]:
    """The folders of one of these names, near the root or the root itself."""
    if not names:
        return [root]
    near = [root]
    for above in ABOVE:
        if (root / above).is_dir():
            near += sorted(path for path in (root / above).iterdir() if path.is_dir())
    return [path for path in near if _plain(path.resolve().name) in names]


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def folders_of_pairs(*names: str) -> Layout:
    """`NAME/{input,target}`, as Restormer's collection has all sets."""
    return Layout(f"{names[0]}/{{input,target}}", subfolders, tuple(map(_plain, names)))


def side_by_side(*names: str) -> Layout:
    """`NAME/*.jpg`, the rainy and the clean image side by side in each."""
    return Layout(f"{names[0]}/*.jpg (side by side)", halves, tuple(map(_plain, names)))


def halves(folder: Path) -> list[Unread]:
    """Photographs from files that show input and target side by side.

    Copies differ in which is on the left. Rain adds edges, so the side with more of them is the rainy one:
    the first files vote.
    """
    if not any(path.is_file() for path in folder.iterdir()):
        return []
    paths = list_images(folder)
    for path in paths:
        if image_size(path)[1] % 2:
            raise ValueError(
                f"An image of two side by side must have an even width. Got {path} of size "
                f"{image_size(path)}. Take it out of the folder."
            )
    votes = [_edges(load_half(p, 1)) > _edges(load_half(p, 0)) for p in paths[:VOTERS]]
    rainy = int(2 * sum(votes) > len(votes))
    found = []
    for path in paths:
        height, width = image_size(path)
        clean, degraded = partial(load_half, path, 1 - rainy), partial(load_half, path, rainy)
        found.append(Unread(path.name, (height, width // 2), clean, degraded, path.name))
    return found


def load_half(path: Path, side: int) -> np.ndarray:
    """The left (0) or right (1) half of an image."""
    image = load_image(path)
    return np.ascontiguousarray(np.split(image, 2, axis=1)[side])


def _edges(image: np.ndarray) -> float:
    return float(np.abs(np.diff(image.astype(float), axis=1)).mean())


def gopro_scenes(folder: Path) -> list[Unread]:
    """`GOPRO_Large/test/SCENE/{blur,sharp}`."""
    return scenes(folder / "test") if (folder / "test").is_dir() else scenes(folder)


def hide_folders(folder: Path) -> list[Unread]:
    """`HIDE_dataset/test/{test-close-ups,test-long-shot}`, the sharp images of all in `GT`."""
    blurred = [p for p in (folder / "test").glob("test-*") if p.is_dir()]
    if not blurred or not (folder / "GT").is_dir():
        return []
    inputs = [path for part in sorted(blurred) for path in list_images(part)]
    sharp = {path.name: path for path in list_images(folder / "GT")}  # of training images too
    return paired(inputs, [sharp[path.name] for path in inputs if path.name in sharp])


def realblur_list(camera: str) -> Layout:
    """RealBlur's scene folders, by the list of the test images."""
    name = f"RealBlur_{camera}_test_list.txt"

    def find(root: Path) -> list[Unread]:
        files = [path for path in (root / name, root / "RealBlur" / name) if path.is_file()]
        return listed(files[0]) if files else []

    return Layout(f"{name} beside the scene folders it lists", find)


def sidd_blocks(root: Path) -> list[Unread]:
    """SIDD's validation blocks: 40 images of 32 blocks, (40, 32, 256, 256, 3) in two MATLAB files."""
    found = []
    for folder in (root, *places(root, ("sidd",))):
        noisy, clean = (folder / f"Validation{kind}BlocksSrgb.mat" for kind in ("Noisy", "Gt"))
        if noisy.is_file() and clean.is_file():
            images, blocks, height, width, _ = _blocks(clean).shape
            if _blocks(noisy).shape != _blocks(clean).shape:
                raise ValueError(
                    f"SIDD's two files must have blocks of one shape. Got {_blocks(noisy).shape} and "
                    f"{_blocks(clean).shape} in {folder}. Download them anew."
                )
            for i in range(images):
                for k in range(blocks):
                    load = [partial(_block, path, i, k) for path in (clean, noisy)]
                    found.append(Unread(f"{i + 1:04}_{k + 1:02}", (height, width), *load))
            break
    return found


@lru_cache(2)
def _blocks(path: Path) -> np.ndarray:
    try:
        variables = {k: v for k, v in loadmat(path).items() if not k.startswith("__")}
    except UNREADABLE as error:
        raise ValueError(
            f"A file of blocks must be a MATLAB file up to version 7.2. Got {path}: {error}. Download it anew."
        ) from error
    found = list(variables.values())
    if len(found) != 1 or found[0].ndim != 5 or found[0].dtype != np.uint8:
        shapes = {name: (v.shape, str(v.dtype)) for name, v in variables.items()}
        raise ValueError(
            "A file of blocks must hold one uint8 array (images, blocks, height, width, 3). Got "
            f"{shapes} in {path}. Download it anew."
        )
    return found[0]


def _block(path: Path, image: int, block: int) -> np.ndarray:
    return _blocks(path)[image, block]
