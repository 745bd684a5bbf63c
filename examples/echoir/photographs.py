"""Photographs: read, or yet on disk; those that come with packages; the split by whole images."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pairs import natural
from PIL import ExifTags, Image, ImageOps

SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp"}
TESTED = 24  # photographs held out at most: they are looked at while training goes on

# Pillow refuses twice as many, and only warns up to there: a 200-megapixel photograph is real, a larger
# one is an attack.
Image.MAX_IMAGE_PIXELS = 100_000_000
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
# What Pillow raises where a file is damaged or made to exhaust the memory.
DAMAGED = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)

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

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        return self.target.shape[:2]

    def read(self) -> "Photograph":
        """Itself, for it has been read."""
        return self


@dataclass(frozen=True)
class Unread:
    """A photograph on disk, which is read each time it is needed.

    Attributes:
        name: as of `Photograph`.
        size: height and width.
        target: reads the clean image.
        input: reads the degraded one, or is None if it is to be synthesized.
        scene: as of `Photograph`.
    """

    name: str
    size: tuple[int, int]
    target: Callable[[], np.ndarray]
    input: Callable[[], np.ndarray] | None = None
    scene: str = ""

    def read(self) -> Photograph:
        """The photograph.

        Raises:
            ValueError: as `load_image` does, or if an image has another size than its file's head
                says.
        """
        images = [load() for load in (self.target, self.input) if load is not None]
        for image in images:
            if image.shape[:2] != self.size:
                raise ValueError(
                    f"{self.name} must have the size that the head of its file says, {self.size}. "
                    f"Got {image.shape[:2]}. Save it anew: a viewer's turn may stand in its EXIF data."
                )
        return Photograph(self.name, *images, scene=self.scene)


Source = Photograph | Unread


@dataclass(frozen=True)
class Split:
    """Disjoint sets of whole photographs: D_tr, D_val, and those that no training step sees."""

    train: tuple[Source, ...]
    validation: tuple[Source, ...]
    test: tuple[Source, ...]


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
    except DAMAGED as error:
        raise _unreadable(path, error) from error


def image_size(path: Path) -> tuple[int, int]:
    """Height and width as `load_image` would have them, from the head of the file alone.

    Raises:
        ValueError: if the file is not an image.
    """
    try:
        with Image.open(path) as image:
            width, height = image.size
            # A PNG has its EXIF data behind the pixels, where looking for them would decode all.
            # Pillow has turned the size of a TIFF already.
            known = image.format != "TIFF" and (image.format != "PNG" or "exif" in image.info)
            turned = known and image.getexif().get(ExifTags.Base.Orientation, 1) >= 5
            return (width, height) if turned else (height, width)
    except DAMAGED as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> ValueError:
    return ValueError(
        f"An input image must be readable as a whole. Got {path}: {error}. "
        "Replace the file or take it out of the folder."
    )


def list_images(folder: Path) -> list[Path]:
    """The images of a folder, in natural order (2 before 10).

    Raises:
        ValueError: if there is none.
    """
    if not folder.is_dir():
        raise ValueError(f"A data folder must exist. Got {folder}. Check the path.")
    content = list(folder.iterdir())
    paths = [path for path in content if is_image(path)]
    if not paths:
        found = "has other files or folders only" if content else "is empty"
        raise ValueError(
            f"A data folder must hold images ({', '.join(sorted(SUFFIXES))}). Got {folder}, which {found}. "
            "Name the folder that holds the images themselves."
        )
    return sorted(paths, key=natural)


def is_image(path: Path) -> bool:
    """Whether there is a file that has the name of an image."""
    return path.suffix.lower() in SUFFIXES and path.is_file()


def split(photographs: Sequence[Source], *, validation: float, seed: int) -> Split:
    """Splits photographs into D_tr, D_val and test, by scene: no two sets share one.

    Args:
        photographs: what there is.
        validation: share of D_val in what is left after the test set, a tenth of the scenes but no
            more than 24, and no more than 24 photographs of them.
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
    tested = min(max(1, len(scenes) // 10), TESTED)
    rest = len(scenes) - tested
    held = tested + min(max(1, round(validation * rest)), rest - 1)

    def of(chosen: Sequence[str]) -> tuple[Source, ...]:
        names = set(chosen)
        return tuple(p for p in photographs if p.scene in names)

    test = of(shuffled[:tested])
    test = test[:: -(-len(test) // TESTED)]  # evenly, where a scene has many
    return Split(of(shuffled[held:]), of(shuffled[tested:held]), test)
