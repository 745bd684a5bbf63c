"""PNG and TIFF of 16 bits a channel, which Pillow cuts to 8 where there is more than one."""

import struct
import zlib
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import tifffile
from PIL import Image

if TYPE_CHECKING:
    from image_file import ImageFile

# The text tags of a TIFF: description, maker, model, software, date, artist, copyright.
TEXTS = (270, 271, 272, 305, 306, 315, 33432)


def is_deep(path: Path, image: Image.Image) -> bool:
    """Whether a file's channels have 16 bits.

    Args:
        path: the file.
        image: the same, as Pillow opened it.
    """
    if image.format == "PNG":
        with path.open("rb") as file:
            return file.read(25)[24] == 16  # the header's bit depth
    if image.format == "TIFF":
        return set(image.tag_v2.get(258, ())) == {16}  # bits per sample
    return False


def read(path: Path, kind: str) -> np.ndarray:
    """The samples, (H, W, C), uint16; C is 1 or 3, and one more with alpha.

    Raises:
        OSError: if they cannot be decoded.
    """
    try:
        samples = _read_png(path) if kind == "PNG" else _read_tiff(path)
    except (RuntimeError, ValueError, tifffile.TiffFileError) as error:  # as both packages have it
        raise OSError(str(error)) from error
    return samples.reshape(*samples.shape[:2], -1)


def _read_png(path: Path) -> np.ndarray:
    return _imagecodecs().png_decode(path.read_bytes())


def _read_tiff(path: Path) -> np.ndarray:
    with tifffile.TiffFile(path) as file:
        page = file.pages[0]
        usual = tifffile.PHOTOMETRIC.MINISBLACK, tifffile.PHOTOMETRIC.RGB
        if page.dtype != np.uint16 or page.photometric not in usual:
            raise ValueError(f"{page.photometric.name} of {page.dtype}, not gray or RGB of uint16")
        samples = page.asarray()
        return np.moveaxis(samples, 0, -1) if page.axes == "SYX" else samples


def write(path: Path, samples: np.ndarray, image: "ImageFile"):
    """Writes (H, W, C), uint16, with the metadata of an image.

    A TIFF keeps resolution, profile and the text tags of its EXIF; a PNG keeps all of it.
    """
    squeezed = samples[..., 0] if samples.shape[2] == 1 else samples
    if image.format == "PNG":
        encoded = _imagecodecs().png_encode(squeezed)
        path.write_bytes(encoded[:33] + _chunks(image) + encoded[33:])  # behind the header
        return
    texts = [(tag, "s", 0, str(image.exif[tag]), True) for tag in TEXTS if tag in image.exif]
    tifffile.imwrite(
        path,
        squeezed,
        photometric="rgb" if samples.shape[2] >= 3 else "minisblack",
        planarconfig="contig" if samples.ndim > 2 else None,
        extrasamples=None if image.alpha is None else ["unassalpha"],
        compression="zlib",
        resolution=image.dpi,
        resolutionunit="inch" if image.dpi else None,
        iccprofile=image.icc_profile,
        extratags=texts,
        metadata=None,
        software=False,
    )


def _chunks(image: "ImageFile") -> bytes:
    """What a PNG says about its pixels, as chunks: profile, resolution, EXIF."""
    found = {}
    if image.icc_profile:
        found[b"iCCP"] = b"ICC profile\0\0" + zlib.compress(image.icc_profile)
    if image.dpi:
        found[b"pHYs"] = struct.pack(">IIB", *(round(float(d) / 0.0254) for d in image.dpi), 1)
    if image.exif:
        found[b"eXIf"] = image.exif.tobytes().removeprefix(b"Exif\0\0")
    return b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in found.items()
    )


def _imagecodecs():
    try:
        import imagecodecs
    except ImportError as error:
        raise OSError("16 bits need the package `imagecodecs`, or a TIFF") from error
    return imagecodecs
