"""Photographs: those that come with installed packages, or a folder of one's own, split by whole images.

A folder holds either clean photographs, to be degraded synthetically, or pairs in two subfolders:
one of `input, rain, rainy, blur, lq, noisy` and one of `target, gt, norain, sharp, clean, hq`.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp"}
INPUTS = ("input", "rain", "rainy", "blur", "lq", "noisy")
TARGETS = ("target", "gt", "norain", "sharp", "clean", "hq")

Image.MAX_IMAGE_PIXELS = (
    200_000_000  # a 200-megapixel photograph is real, a larger one is an attack
)

# The color photographs: CC0 or public domain, but china and flower are CC BY 2.0 by danielbuechele
# and vultilion. The gray ones are left out: trained with those five too, the same network restores
# the three below 0.2 dB worse.
SKIMAGE = ("astronaut", "chelsea", "coffee", "rocket")
SKLEARN = ("china", "flower")
# D_val gets most of what is left after the test, for nearly the whole network learns from it. The
# test photographs differ in texture: a cat's fur, a building, a still life.
BUNDLED_TRAIN, BUNDLED_VALIDATION = ("flower",), ("astronaut", "rocket")
BUNDLED_TEST = ("chelsea", "china", "coffee")


@dataclass(frozen=True)
class Photograph:
    """A clean photograph, and its degraded version where the data hold one.

    Attributes:
        name: where it comes from, for tables and messages.
        target: the clean image, uint8, (H, W, 3).
        input: the degraded image, or None if it is to be synthesized.
        scene: photographs of one scene (several inputs to one target) stay on one side of a split.
    """

    name: str
    target: np.ndarray
    input: np.ndarray | None = None
    scene: str = ""


@dataclass(frozen=True)
class Split:
    """Disjoint sets of whole photographs: D_tr, D_val, and those that no training step sees."""

    train: tuple[Photograph, ...]
    validation: tuple[Photograph, ...]
    test: tuple[Photograph, ...]


def bundled() -> Split:
    """The photographs of scikit-image and scikit-learn; none is downloaded."""
    import skimage.data
    from sklearn.datasets import load_sample_image

    images = {name: getattr(skimage.data, name)() for name in SKIMAGE}
    images |= {name: load_sample_image(f"{name}.jpg") for name in SKLEARN}

    def of(names: Sequence[str]) -> tuple[Photograph, ...]:
        return tuple(Photograph(name, images[name]) for name in names)

    return Split(of(BUNDLED_TRAIN), of(BUNDLED_VALIDATION), of(BUNDLED_TEST))


def load_image(path: Path) -> np.ndarray:
    """Reads an image as uint8 RGB, (H, W, 3).

    Raises:
        ValueError: if the file is not an image, or a truncated one.
    """
    try:
        with Image.open(path) as image:
            image.load()  # `open` alone accepts a truncated file
            return np.array(ImageOps.exif_transpose(image).convert("RGB"))  # upright
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(
            f"An input image must be readable as a whole. Got {path}: {error}. "
            "Replace the file or take it out of the folder."
        ) from error


def list_images(folder: Path) -> list[Path]:
    """The images of a folder, in natural order (2 before 10).

    Raises:
        ValueError: if there is none.
    """
    if not folder.is_dir():
        raise ValueError(f"A data folder must exist. Got {folder}. Check the path.")
    paths = [path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES]
    if not paths:
        raise ValueError(
            f"A data folder must hold images ({', '.join(sorted(SUFFIXES))}). Got none in {folder}. "
            "Name the folder that holds the files themselves."
        )
    return sorted(paths, key=_natural)


def load_folder(folder: Path) -> list[Photograph]:
    """The photographs of a folder, as pairs where it has an input and a target subfolder."""
    inputs = [folder / name for name in INPUTS if (folder / name).is_dir()]
    targets = [folder / name for name in TARGETS if (folder / name).is_dir()]
    if not inputs and not targets:
        return [Photograph(p.name, load_image(p), scene=p.name) for p in list_images(folder)]
    if len(inputs) != 1 or len(targets) != 1:
        raise ValueError(
            f"A folder of pairs must hold one of {', '.join(INPUTS)} and one of {', '.join(TARGETS)}."
            f" Got {[p.name for p in inputs + targets]} in {folder}. Rename or remove subfolders."
        )
    photographs = []
    for degraded, clean in match_pairs(list_images(inputs[0]), list_images(targets[0])):
        photograph = Photograph(degraded.name, load_image(clean), load_image(degraded), clean.name)
        if photograph.input.shape != photograph.target.shape:
            raise ValueError(
                "The two images of a pair must have one size. Got "
                f"{degraded}: {photograph.input.shape[:2]}, {clean}: {photograph.target.shape[:2]}."
                " Crop or replace one of them."
            )
        photographs.append(photograph)
    return photographs


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


def split(photographs: Sequence[Photograph], *, validation: float, seed: int) -> Split:
    """Splits photographs into D_tr, D_val and test, by scene: no two sets share one.

    Args:
        photographs: what there is.
        validation: share of D_val in what is left after the test set, a tenth.
        seed: of the shuffle.

    Raises:
        ValueError: if there are too few scenes to have one in every set.
    """
    scenes = sorted({photograph.scene for photograph in photographs})
    if len(scenes) < 3:
        raise ValueError(
            "Training must have three photographs or more: D_tr, D_val and the test set each take "
            f"whole ones. Got {len(scenes)}. Add photographs to the folder."
        )
    shuffled = [scenes[i] for i in np.random.default_rng(seed).permutation(len(scenes))]
    tested = max(1, len(scenes) // 10)
    rest = len(scenes) - tested
    held = tested + min(max(1, round(validation * rest)), rest - 1)

    def of(chosen: Sequence[str]) -> tuple[Photograph, ...]:
        return tuple(p for p in photographs if p.scene in chosen)

    return Split(of(shuffled[held:]), of(shuffled[tested:held]), of(shuffled[:tested]))


def _natural(path: Path) -> list[tuple[int, str]]:
    """Sorts digits as numbers and the rest as text."""
    parts = re.split(r"(\d+)", path.name)
    return [(int(part), "") if part.isdigit() else (-1, part) for part in parts]


def _bare(path: Path) -> str:
    stem = re.sub(r"^(no)?rain-", "", path.stem)
    return re.sub(r"(x\d+|_([1-9]|1[0-4]))$", "", stem)
