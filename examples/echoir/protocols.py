"""How each benchmark measures: which channels, rounded where, aligned or not.

All take images rounded to 8 bits, (3, H, W) in [0, 1], and measure to the very border: none of these
benchmarks cuts one off, and SSIM is averaged where its window lies inside the image.

- `RGB` (GoPro, HIDE, SIDD, Gaussian noise): PSNR of the mean squared error over the three channels, SSIM
  as the mean of the three. MATLAB's `ssim`, called on a color image as some public code does, slides a
  window over the channels too and gives other values.
- `Y` (deraining): on the luma of MATLAB's `rgb2ycbcr`, which rounds it to 8 bits for 8-bit images.
- `RGB, aligned` (RealBlur): see `align.py`; errors are summed over the known pixels and divided by their
  number, SSIM is averaged over them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from align import align
from scores import WINDOW, luma, psnr, round8, ssim, ssim_map
from torch import Tensor


class Measured(NamedTuple):
    """PSNR in dB and SSIM."""

    psnr: float
    ssim: float


@dataclass(frozen=True)
class Protocol:
    """A way to measure, and what to call it.

    Attributes:
        name: for tables.
        measure: maps the restored image and the target to the figures.
    """

    name: str
    measure: Callable[[Tensor, Tensor], Measured]


def on_rgb(image: Tensor, target: Tensor) -> Measured:
    """On the three channels."""
    return Measured(psnr(image, target), ssim(image, target))


def on_luma(image: Tensor, target: Tensor) -> Measured:
    """On Y, rounded."""
    return on_rgb(round8(luma(image))[None], round8(luma(target))[None])


def on_aligned(image: Tensor, target: Tensor) -> Measured:
    """On the three channels, where the aligned image is known."""
    aligned, known = align(image, target)
    aligned, target = aligned * known, target.double() * known
    error = (aligned - target).square().sum() / (3 * known.sum())
    inside = slice(WINDOW, -WINDOW)
    similarity = ssim_map(aligned, target)[inside, inside][known[inside, inside].numpy()]
    return Measured(float(-10 * torch.log10(error)), float(similarity.mean()))


RGB = Protocol("RGB", on_rgb)
Y = Protocol("Y", on_luma)
ALIGNED = Protocol("RGB, aligned", on_aligned)
