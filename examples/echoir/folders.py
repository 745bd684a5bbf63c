"""The photographs of a folder, in the layouts in which people and public data sets have them.

| layout | as in |
|---|---|
| `FOLDER/*.png` | clean photographs of one's own, to be degraded synthetically |
| `FOLDER/{input,target}/*.png` | Rain13K, and pairs of one's own; other names below |
| `FOLDER/SCENE/{blur,sharp}/*.png` | GoPro: `GOPRO_Large/train`; what crops.py writes |
| `FOLDER/Data/SCENE/*_{NOISY,GT}_SRGB_*.PNG` | SIDD: `SIDD_Medium_Srgb` |
| a text file of lines `TARGET INPUT` | RealBlur: `RealBlur_J_train_list.txt` |

A folder that is too large for the memory is read as its photographs are needed.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from pairs import match_pairs
from photographs import Source, Unread, image_size, list_images, load_image

INPUTS = ("input", "rain", "rainy", "rainy_image", "blur", "lq", "noisy")
TARGETS = ("target", "gt", "norain", "ground_truth", "sharp", "clean", "hq")
IN_MEMORY = 512 * 2**20  # bytes of pixels up to which a folder is read at once, and checked by it


def load_folder(folder: Path) -> list[Source]:
    """The photographs of a folder: see above for how they may lie in it.

    Raises:
        ValueError: if the folder holds none, or pairs that do not match.
    """
    return read_if_small(_pairs(folder) or [alone(path) for path in list_images(folder)])


def find_pairs(folder: Path) -> list[Unread]:
    """The pairs of a folder, or of a list.

    Raises:
        ValueError: if there are none, or they do not match.
    """
    if found := _pairs(folder):
        return found
    raise ValueError(
        f"The data must hold pairs in one of the layouts of folders.py. Got none in {folder}. Name the "
        "folder that holds e.g. input and target."
    )


def _pairs(folder: Path) -> list[Unread]:
    if folder.is_file():
        return listed(folder)
    return subfolders(folder) or scenes(folder) or phones(folder)


def subfolders(folder: Path) -> list[Unread]:
    """The pairs of `folder/{input,target}`, or of subfolders of those other names."""
    inputs = [folder / name for name in INPUTS if (folder / name).is_dir()]
    targets = [folder / name for name in TARGETS if (folder / name).is_dir()]
    if not inputs and not targets:
        return []
    if len(inputs) != 1 or len(targets) != 1:
        raise ValueError(
            f"A folder of pairs must hold one of {', '.join(INPUTS)} and one of {', '.join(TARGETS)}."
            f" Got {[p.name for p in inputs + targets]} in {folder}. Rename or remove subfolders."
        )
    return paired(list_images(inputs[0]), list_images(targets[0]))


def scenes(folder: Path) -> list[Unread]:
    """The pairs of `folder/SCENE/{blur,sharp}`, as GoPro has them; scenes stay whole in a split."""
    if not folder.is_dir():
        return []
    return [
        replace(found, name=f"{scene.name}/{found.name}", scene=scene.name)
        for scene in sorted(path for path in folder.iterdir() if path.is_dir())
        for found in subfolders(scene)
    ]


def phones(folder: Path) -> list[Unread]:
    """The pairs of `folder/Data/SCENE/*_{NOISY,GT}_SRGB_*.PNG`, as SIDD Medium has them."""
    found = []
    for degraded in sorted(folder.glob("Data/*/*_NOISY_SRGB_*")):
        clean = degraded.with_name(degraded.name.replace("_NOISY_", "_GT_"))
        name = f"{degraded.parent.name}/{degraded.name}"
        # 0001_003_S6_...: instance, scene, phone; a scene was taken with many phones and lights
        scene = "".join(degraded.parent.name.split("_")[1:2]) or degraded.parent.name
        found.append(pair(degraded, clean, name, scene))
    return found


def listed(file: Path) -> list[Unread]:
    """The pairs of RealBlur's lists: a line has the paths of the target and of the input.

    Raises:
        ValueError: if it is no such list, or leads out of its folder: it may come from anybody.
    """
    found = []
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except ValueError as error:
        raise ValueError(
            f"A list of pairs must be text in UTF-8. Got {file}: {error}. Name another file."
        ) from error
    for number, line in enumerate(lines, 1):
        for word in map(Path, line.split()):
            if word.is_absolute() or ".." in word.parts:
                raise ValueError(
                    "A list of pairs must have paths below its own folder. "
                    f"Got {word} in line {number} of {file}. Put the list above its images."
                )
        paths = [file.parent / word for word in line.split()]
        if len(paths) not in (0, 2):
            raise ValueError(
                "A list of pairs must have lines of two paths, the target's and the input's, relative "
                f"to its folder. Got {len(paths)} in line {number} of {file}. Correct the line."
            )
        if paths:
            clean, degraded = paths
            scene = degraded.parent.parent.name
            found.append(pair(degraded, clean, f"{scene}/{degraded.name}", scene))
    return found


def alone(path: Path) -> Unread:
    """A clean image, to be degraded synthetically."""
    return Unread(path.name, image_size(path), partial(load_image, path), scene=path.name)


def paired(inputs: Sequence[Path], targets: Sequence[Path]) -> list[Unread]:
    """The pairs of two lists of files whose names match."""
    return [pair(degraded, clean) for degraded, clean in match_pairs(inputs, targets)]


def pair(degraded: Path, clean: Path, name: str | None = None, scene: str | None = None) -> Unread:
    """Two files that show the same.

    Args:
        degraded: the input.
        clean: the target.
        name: that of the input, by default.
        scene: the target, by default: inputs that share it stay together.

    Raises:
        ValueError: if they differ in size.
    """
    sizes = image_size(degraded), image_size(clean)
    if sizes[0] != sizes[1]:
        raise ValueError(
            "The two images of a pair must have one size. Got "
            f"{degraded}: {sizes[0]}, {clean}: {sizes[1]}. Crop or replace one of them."
        )
    return Unread(
        name or degraded.name,
        sizes[0],
        partial(load_image, clean),
        partial(load_image, degraded),
        scene or clean.name,
    )


def read_if_small(photographs: list[Unread]) -> list[Source]:
    """All of them, read now if they fit the memory, so that a damaged file is found at the start."""
    pixels = sum(p.size[0] * p.size[1] * (1 if p.input is None else 2) for p in photographs)
    return [p.read() for p in photographs] if 3 * pixels <= IN_MEMORY else list(photographs)
