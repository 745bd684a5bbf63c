"""Image files with all that a restored copy must keep: bit depth, alpha, gray, metadata.

What the camera noted by EXIF as "to be rotated" is rotated, and the note removed: rain falls
downwards in what the network was trained on, and many programs ignore the note.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import deep_color
import numpy as np
import torch
from photographs import DAMAGED
from PIL import Image
from torch import Tensor
from whole_file import replacing

ORIENTATION = 0x0112  # EXIF's tag
NESTED = (0x8769, 0x8825)  # those of the camera's settings, and of the place
# How a TIFF lays out its pixels: size, depth, compression, strips, tiles, color profile. They are of
# the file that was read, and Pillow would believe them of the one it writes.
LAYOUT = (*range(254, 260), 262, 266, 273, *range(277, 280), 284, 317, 320, *range(322, 326))
LAYOUT += (338, 339, 347, 34675)

# How Pillow writes 8 bits of each format. JPEG's chroma stays at full resolution: it has been restored.
FORMATS = {
    "JPEG": {"quality": 95, "subsampling": 0},
    "PNG": {},
    "WEBP": {"quality": 95},
    "TIFF": {},  # uncompressed: Pillow writes EXIF's nested tags into no other
    "BMP": {},
}


@dataclass(frozen=True)
class ImageFile:
    """An image, upright, and what its file holds besides.

    Attributes:
        pixels: (H, W, 3), or (H, W, 1) if gray; uint8 or uint16.
        alpha: opacity, (H, W) of the same type, if there is one.
        format: Pillow's name of the file's format, whatever its suffix says.
        exif: EXIF without its orientation.
        icc_profile: color profile, if there is one.
        dpi: resolution for printing, if it is known.
    """

    pixels: np.ndarray
    alpha: np.ndarray | None
    format: str
    exif: Image.Exif
    icc_profile: bytes | None = None
    dpi: tuple[float, float] | None = None

    def restored(self, restore: Callable[[Tensor], Tensor]) -> "ImageFile":
        """The same with other pixels; alpha is left as it is.

        Args:
            restore: maps (3, H, W) in [0, 1] to the same.
        """
        white = float(np.iinfo(self.pixels.dtype).max)
        image = torch.from_numpy(self.pixels.astype(np.float32)).permute(2, 0, 1).div_(white)
        restored = restore(image.expand(3, -1, -1))
        if self.pixels.shape[2] == 1:
            restored = restored.mean(0, keepdim=True)
        pixels = restored.clamp(0, 1).mul_(white).round_().permute(1, 2, 0).numpy()
        return replace(self, pixels=pixels.astype(self.pixels.dtype))


class UnfitError(ValueError):
    """The image is whole, but of a kind that is not restored."""


def read_image(path: Path) -> ImageFile:
    """Reads an image of 8 or 16 bits a channel.

    Raises:
        ValueError: if the file is no image, damaged, of several frames, or of another kind.
    """
    try:
        with Image.open(path) as image:
            exif = image.getexif()
            for tag in NESTED:
                exif.get_ifd(tag)  # now, since loading may close the file
            orientation = exif.get(ORIENTATION, 1)
            image.load()  # `open` alone accepts a truncated file
            return _read(path, image, orientation)
    except UnfitError:
        raise
    except DAMAGED as error:
        raise ValueError(
            f"An image must be readable as a whole. Got {path}: {error}. Replace or leave it out."
        ) from error


def _read(path: Path, image: Image.Image, orientation: int) -> ImageFile:
    # An MPO is a JPEG with a preview, or with a second eye's view.
    kind = "JPEG" if image.format == "MPO" else image.format
    if kind not in FORMATS or (getattr(image, "n_frames", 1) > 1 and image.format != "MPO"):
        raise UnfitError(
            f"An image must be a single one, as {', '.join(FORMATS)}. Got {path}: {image.format} of "
            f"{getattr(image, 'n_frames', 1)} frames. Convert it."
        )
    if image.mode in ("I", "F"):
        raise UnfitError(
            f"An image must have integers of 8 or 16 bits. Got {path}, of 32 bits. Convert it."
        )
    exif, profile = image.getexif(), image.info.get("icc_profile")
    if deep_color.is_deep(path, image):
        samples = deep_color.read(path, kind)
    else:
        if image.mode not in ("1", "L", "LA", "P", "PA", "RGB", "RGBA"):
            profile = None  # it describes inks, say, and what follows is RGB
        gray, clear = image.mode in ("1", "L", "LA"), image.has_transparency_data
        mode = ("L" if gray else "RGB") + ("A" if clear else "")
        samples = np.array(image.convert(mode)).reshape(image.height, image.width, -1)
        orientation = exif.get(ORIENTATION, 1)  # Pillow has already turned a TIFF
    samples = _upright(samples, orientation)
    for tag in (ORIENTATION, *LAYOUT):
        exif.pop(tag, None)
    colors = 1 if samples.shape[2] < 3 else 3
    alpha = samples[..., colors] if samples.shape[2] > colors else None
    return ImageFile(samples[..., :colors], alpha, kind, exif, profile, image.info.get("dpi"))


def write_image(path: Path, image: ImageFile):
    """Writes an image in its format, whatever the suffix; the file is complete or as it was.

    Raises:
        ValueError: if it cannot be written.
    """
    samples = image.pixels
    if image.alpha is not None:
        samples = np.concatenate([samples, image.alpha[..., None]], 2)
    try:
        with replacing(path) as file:
            if samples.dtype == np.uint16:
                deep_color.write(file, np.ascontiguousarray(samples), image)
            else:
                options = {"exif": image.exif, "icc_profile": image.icc_profile, "dpi": image.dpi}
                known = {name: value for name, value in options.items() if value}
                squeezed = samples[..., 0] if samples.shape[2] == 1 else samples
                picture = Image.fromarray(np.ascontiguousarray(squeezed))
                picture.save(file, format=image.format, **FORMATS[image.format], **known)
    except OSError as error:
        raise ValueError(
            f"The output must be a file that can be written. Got {path}: {error.strerror or error}. "
            "Name another folder."
        ) from error


def _upright(samples: np.ndarray, orientation: int) -> np.ndarray:
    """Undoes EXIF's orientation 1 to 8: 5 to 8 are transposed, and each may be mirrored."""
    if orientation in (5, 6, 7, 8):
        samples = samples.transpose(1, 0, 2)
    if orientation in (3, 4, 7, 8):
        samples = samples[::-1]
    if orientation in (2, 3, 6, 7):
        samples = samples[:, ::-1]
    return samples
