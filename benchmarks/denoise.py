"""Denoises crops of photographs by EchoIR, by CBM3D, by non-local means and by wavelets.

    python benchmarks/denoise.py                               # the denoiser that the example holds
    python benchmarks/denoise.py --weights FILE --data FOLDER  # other weights, other photographs

Crops of 256 x 256 pixels, side by side in the middle of each photograph. Gaussian noise of a seed for each crop,
neither clipped nor rounded; the restored crop is rounded to 8 bits before it is measured. CBM3D (`pip install
bm3d`), non-local means and wavelets (`pip install PyWavelets`) are told sigma; EchoIR is not. Prints PSNR and SSIM on
RGB, and the seconds a crop.
"""

from __future__ import annotations

import importlib
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
import tyro
from page import table

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "echoir"))

from console import fail_plainly
from degradations import degradation
from ensemble import self_ensemble
from jpeg import saved
from noise import noise
from photographs import bundled, list_images, load_image
from scores import channels_first, psnr, round8, ssim
from tiles import restore
from weights import DENOISER, JPEG_DENOISER, load_weights

CROP = 256
WINDOW = 64  # of local statistics: the patches of most training steps
Denoiser = Callable[[np.ndarray, float], np.ndarray]  # (H, W, 3) and sigma in [0, 1] to (H, W, 3)


@dataclass(frozen=True)
class Arguments:
    """Compares denoisers on crops of photographs.

    Attributes:
        weights: of EchoIR, trained to denoise; those that restore.py takes, if none are given.
        data: folder of clean photographs; those that come with packages and are held out, if none is given.
        sigmas: standard deviations of the noise, in units of 1 / 255.
        per_photograph: crops of one photograph at most.
        jpeg: quality at which the noisy crops are saved as JPEG first, colors at half the resolution as most
            JPEG files have them; not at all, if none is given.
    """

    weights: Path | None = None
    data: Path | None = None
    sigmas: tuple[float, ...] = (15.0, 25.0, 50.0)
    per_photograph: int = 2
    jpeg: int | None = None


def crops(a: Arguments) -> list[np.ndarray]:
    """Crops, float32 (256, 256, 3) in [0, 1].

    Raises:
        ValueError: if there are none.
    """
    if a.data is None:
        images = [photograph.read().target for photograph in bundled().test]
    else:
        images = [load_image(path) for path in sorted(list_images(a.data))]
    small = sum(min(image.shape[:2]) < CROP for image in images)
    if a.per_photograph < 1 or small == len(images):
        raise ValueError(
            f"There must be crops of {CROP} x {CROP} pixels. Got {len(images)} photographs, {small} of them "
            f"smaller, and --per-photograph {a.per_photograph}. Name larger ones by --data."
        )
    if small:
        print(f"left out: {small} photographs smaller than {CROP} x {CROP}")
    found: list[np.ndarray] = []
    for image in images:
        height, width = image.shape[:2]
        count = min(a.per_photograph, width // CROP)
        top, left = (height - CROP) // 2, (width - count * CROP) // 2
        for start in range(left, left + count * CROP, CROP):
            crop = image[top : top + CROP, start : start + CROP]
            if crop.shape[:2] == (CROP, CROP):
                found.append(crop.astype(np.float32) / 255)
    return found


def echoir(path: Path) -> dict[str, Denoiser]:
    """As restore.py runs it: by default, and with what it offers to those who have more time."""
    device = torch.device("cpu")
    net, _ = load_weights(path, device)
    whole = partial(restore, net, device=device, multiple=net.config.multiple)
    local = partial(whole, statistics="local", window=WINDOW)

    def denoiser(run: Callable[[torch.Tensor], torch.Tensor]) -> Denoiser:
        return lambda noisy, _: run(channels_first(noisy)).permute(1, 2, 0).numpy()

    return {
        "EchoIR": denoiser(whole),
        "EchoIR, local statistics": denoiser(local),
        "EchoIR, self-ensemble": denoiser(self_ensemble(whole)),
        "EchoIR, both": denoiser(self_ensemble(local)),
    }


def peers() -> dict[str, Denoiser]:
    """The denoisers that are not ours; CBM3D where its package is installed."""
    from skimage.restoration import denoise_nl_means, denoise_wavelet

    found: dict[str, Denoiser] = {}

    def wavelets(noisy: np.ndarray, sigma: float) -> np.ndarray:
        return denoise_wavelet(
            noisy, sigma=sigma, channel_axis=2, convert2ycbcr=True, rescale_sigma=True
        )

    def non_local_means(noisy: np.ndarray, sigma: float) -> np.ndarray:
        return denoise_nl_means(
            noisy,
            h=0.6 * sigma,
            sigma=sigma,
            patch_size=5,
            patch_distance=6,
            channel_axis=2,
            fast_mode=True,
        )

    found["non-local means"] = non_local_means
    if find_spec("pywt"):
        found["wavelets"] = wavelets
    if find_spec("bm3d"):
        found["CBM3D"] = importlib.import_module("bm3d").bm3d_rgb
    for name, package in (("wavelets", "PyWavelets"), ("CBM3D", "bm3d")):
        if name not in found:
            print(f"{name}: left out, for want of the package {package}")
    return found


def row(
    name: str,
    denoise: Denoiser,
    clean: list[np.ndarray],
    sigmas: tuple[float, ...],
    jpeg: int | None,
) -> list[str]:
    """PSNR and SSIM by sigma, means over the crops, and the seconds a crop."""
    cells, started = [name], time.perf_counter()
    for sigma in sigmas:
        figures: list[tuple[float, float]] = []
        for number, crop in enumerate(clean):
            noisy = noise(crop, np.random.default_rng(number), sigma)
            noisy = noisy if jpeg is None else saved(noisy, jpeg)
            restored = np.asarray(denoise(noisy, sigma / 255), np.float32)
            image, truth = map(channels_first, (restored, crop))
            rounded = round8(image) if name != "noisy" else image
            figures.append((psnr(rounded, truth), ssim(rounded, truth)))
        mean = np.mean(figures, axis=0)
        cells.append(f"{mean[0]:.2f} / {mean[1]:.3f}")
    seconds = (time.perf_counter() - started) / (len(sigmas) * len(clean))
    return [*cells, f"{seconds:.2f}" if name != "noisy" else ""]


def main(a: Arguments):
    torch.set_num_threads(1)
    if not a.sigmas:
        raise ValueError("`--sigmas` must be one number or more. Got none. Use e.g. 25.")
    for sigma in a.sigmas:
        degradation("denoise", sigma)  # refuses what no noise has
    clean, ours = crops(a), echoir(a.weights or (DENOISER if a.jpeg is None else JPEG_DENOISER))
    methods: dict[str, Denoiser] = {"noisy": lambda noisy, _: noisy, **peers(), **ours}
    rows: list[list[str]] = []
    for name, denoise in methods.items():
        rows.append(row(name, denoise, clean, a.sigmas, a.jpeg))
        print("  ".join(rows[-1]), flush=True)
    head = ["method", *(f"sigma {sigma:g}" for sigma in a.sigmas), "s a crop"]
    print(f"\n{len(clean)} crops\n\n{table(head, rows)}")


if __name__ == "__main__":
    with fail_plainly():
        main(tyro.cli(Arguments))
