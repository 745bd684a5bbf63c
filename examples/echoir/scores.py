"""How good a restored image is: PSNR and SSIM, measured as the papers do.

Restored images are rounded to 8 bits first. The luma Y of video (16 to 235) gives a PSNR 1.3 to
1.4 dB above that of RGB for the same image, so both are kept apart by name. SSIM is scikit-image's,
with the settings under which it equals the authors' MATLAB code (Wang et al., IEEE TIP 13 (2004)).
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
from degradations import Degradation
from photographs import Source
from skimage.metrics import structural_similarity
from torch import Tensor

WINDOW = 5  # pixels that SSIM's 11 x 11 window reaches from its center


@dataclass(frozen=True)
class Score:
    """PSNR in dB on RGB and on luma, and SSIM on RGB."""

    psnr_rgb: float
    psnr_y: float
    ssim: float


@dataclass(frozen=True)
class Result:
    """One photograph, before and after; images are (3, H, W) in [0, 1]."""

    name: str
    input: Tensor
    restored: Tensor
    target: Tensor

    def scores(self) -> tuple[Score, Score]:
        """The scores of the input and of the restored image."""
        return score(self.input, self.target), score(self.restored, self.target)


def score(image: Tensor, target: Tensor) -> Score:
    """Compares two images, (3, H, W)."""
    return Score(psnr(image, target), psnr(luma(image), luma(target)), ssim(image, target))


def psnr(image: Tensor, target: Tensor) -> float:
    """10 log10(1 / mean squared error), in dB."""
    return float(-10 * (image.double() - target.double()).square().mean().log10())


def ssim(image: Tensor, target: Tensor) -> float:
    """The mean structural similarity, over pixels and channels; (C, H, W) in [0, 1].

    As in MATLAB's code, only where the window lies inside the image.
    """
    inside = (slice(WINDOW, -WINDOW), slice(WINDOW, -WINDOW))
    return float(ssim_map(image, target)[inside].mean())


def ssim_map(image: Tensor, target: Tensor) -> np.ndarray:
    """The structural similarity of each pixel and channel, (H, W, C)."""
    first, second = (i.double().permute(1, 2, 0).numpy() for i in (image, target))
    _, similarity = structural_similarity(
        first,
        second,
        data_range=1.0,
        channel_axis=2,
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
        full=True,
    )
    return similarity


def luma(image: Tensor) -> Tensor:
    """Y of MATLAB's rgb2ycbcr, 16 / 255 to 235 / 255; (3, H, W) to (H, W)."""
    weights = torch.tensor([65.481, 128.553, 24.966], dtype=torch.float64)
    return ((weights @ image.double().flatten(1) + 16) / 255).view(image.shape[1:])


def mean(scores: Iterable[Score]) -> Score:
    """The mean of each figure over the images."""
    rows = [(s.psnr_rgb, s.psnr_y, s.ssim) for s in scores]
    return Score(*(sum(column) / len(rows) for column in zip(*rows, strict=True)))


def round8(image: Tensor) -> Tensor:
    """To the 256 values that a file can hold."""
    return (image.clamp(0, 1) * 255).round() / 255


def evaluate(
    photographs: Iterable[Source],
    degrade: Degradation,
    restore: Callable[[Tensor], Tensor],
    crop: int | None = None,
) -> list[Result]:
    """Degrades and restores photographs.

    Args:
        photographs: whole photographs, which are read one by one.
        degrade: for those without an input of their own; its generator starts anew with each
            photograph, so that a result does not depend on the others.
        restore: maps (3, H, W) to (3, H, W).
        crop: use only so many central rows and columns.
    """
    results = []
    for source in photographs:
        photograph = source.read()
        target = _center(photograph.target, crop)
        if photograph.input is None:
            degraded = degrade(target, np.random.default_rng(0))
        else:
            degraded = _center(photograph.input, crop)
        image = channels_first(degraded)
        results.append(
            Result(photograph.name, image, round8(restore(image)), channels_first(target))
        )
    return results


def _center(image: np.ndarray, crop: int | None) -> np.ndarray:
    if crop is not None:
        top, left = (max(size - crop, 0) // 2 for size in image.shape[:2])
        image = image[top : top + crop, left : left + crop]
    return image.astype(np.float32) / 255


def channels_first(image: np.ndarray) -> Tensor:
    """(H, W, C) of any numbers to (C, H, W) of float32."""
    return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1), np.float32))
