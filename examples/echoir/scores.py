"""How good a restored image is: PSNR and SSIM, measured as the papers do.

Restored images are rounded to 8 bits first. The luma Y of video (16 to 235) gives a PSNR 1.3 to
1.4 dB above that of RGB for the same image, so both are kept apart by name.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
from degradations import Degradation
from photographs import Photograph
from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure


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
    _, similarity = structural_similarity_index_measure(
        image[None], target[None], data_range=1.0, return_full_image=True
    )
    # MATLAB's SSIM averages only where the 11 x 11 window lies inside the image.
    ssim = float(similarity[..., 5:-5, 5:-5].mean())
    return Score(psnr(image, target), psnr(luma(image), luma(target)), ssim)


def psnr(image: Tensor, target: Tensor) -> float:
    """10 log10(1 / mean squared error), in dB."""
    return float(-10 * (image - target).square().mean().log10())


def luma(image: Tensor) -> Tensor:
    """Y of MATLAB's rgb2ycbcr, (3, H, W) to (H, W)."""
    return (torch.tensor([65.481, 128.553, 24.966]) @ image.flatten(1) + 16).view(
        image.shape[1:]
    ) / 255


def mean(scores: Iterable[Score]) -> Score:
    """The mean of each figure over the images."""
    rows = [(s.psnr_rgb, s.psnr_y, s.ssim) for s in scores]
    return Score(*(sum(column) / len(rows) for column in zip(*rows, strict=True)))


def round8(image: Tensor) -> Tensor:
    """To the 256 values that a file can hold."""
    return (image.clamp(0, 1) * 255).round() / 255


def evaluate(
    photographs: Iterable[Photograph],
    degrade: Degradation,
    restore: Callable[[Tensor], Tensor],
    crop: int | None = None,
) -> list[Result]:
    """Degrades and restores photographs.

    Args:
        photographs: whole photographs.
        degrade: for those without an input of their own; its generator starts anew with each
            photograph, so that a result does not depend on the others.
        restore: maps (3, H, W) to (3, H, W).
        crop: use only so many central rows and columns.
    """
    results = []
    for photograph in photographs:
        target = _center(photograph.target, crop)
        if photograph.input is None:
            degraded = degrade(target, np.random.default_rng(0))
        else:
            degraded = _center(photograph.input, crop)
        image = _tensor(degraded)
        results.append(Result(photograph.name, image, round8(restore(image)), _tensor(target)))
    return results


def _center(image: np.ndarray, crop: int | None) -> np.ndarray:
    if crop is not None:
        top, left = (max(size - crop, 0) // 2 for size in image.shape[:2])
        image = image[top : top + crop, left : left + crop]
    return image.astype(np.float32) / 255


def _tensor(image: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))
