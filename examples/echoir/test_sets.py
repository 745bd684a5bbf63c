"""The test sets of the paper: where they lie, how they are measured, what the paper reached on them."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from folders import alone
from layouts import (
    Layout,
    folders_of_pairs,
    gopro_scenes,
    hide_folders,
    locate,
    realblur_list,
    sidd_blocks,
    side_by_side,
)
from photographs import Unread, list_images, load_image
from protocols import ALIGNED, RGB, Measured, Protocol, Y


@dataclass(frozen=True)
class TestSet:
    """A published test set.

    Attributes:
        name: as the papers write it.
        layouts: how it may lie on disk.
        protocol: how it is measured.
        images: how many the published set has, at most: some papers leave out two of Test100.
        paper: what the paper reports.
    """

    __test__ = False  # not a test of pytest's

    name: str
    layouts: tuple[Layout, ...]
    protocol: Protocol
    images: int
    paper: Measured

    def photographs(self, root: Path) -> list[Unread]:
        """The pairs under a root.

        Raises:
            ValueError: if they are not there in any known layout, or do not match.
        """
        return locate(root, self.layouts)


# Names of folders are compared without case, hyphens and underscores.
SETS = {
    "test100": TestSet(
        "Test100",
        (folders_of_pairs("Test100", "test_syn"), side_by_side("Test100", "test_syn")),
        Y,
        100,
        Measured(32.17, 0.939),
    ),
    "rain100h": TestSet(
        "Rain100H", (folders_of_pairs("Rain100H"),), Y, 100, Measured(31.58, 0.926)
    ),
    "rain100l": TestSet(
        "Rain100L", (folders_of_pairs("Rain100L"),), Y, 100, Measured(38.04, 0.993)
    ),
    "test2800": TestSet(
        "Test2800", (folders_of_pairs("Test2800", "Rain1400"),), Y, 2800, Measured(34.41, 0.953)
    ),
    "test1200": TestSet(
        "Test1200",
        (
            folders_of_pairs("Test1200", "DID-MDN-test"),
            side_by_side("Test1200", "DID-MDN-test"),
        ),
        Y,
        1200,
        Measured(33.66, 0.947),
    ),
    "gopro": TestSet(
        "GoPro",
        (
            folders_of_pairs("GoPro"),
            Layout("GOPRO_Large/test/SCENE/{blur,sharp}", gopro_scenes, ("gopro", "goprolarge")),
        ),
        RGB,
        1111,
        Measured(32.82, 0.962),
    ),
    "hide": TestSet(
        "HIDE",
        (
            folders_of_pairs("HIDE"),
            Layout(
                "HIDE_dataset/{test/test-close-ups,test/test-long-shot,GT}",
                hide_folders,
                ("hide", "hidedataset"),
            ),
        ),
        RGB,
        2025,
        Measured(31.18, 0.948),
    ),
    "realblur-r": TestSet(
        "RealBlur-R",
        (folders_of_pairs("RealBlur_R"), realblur_list("R")),
        ALIGNED,
        980,
        Measured(36.21, 0.958),
    ),
    "realblur-j": TestSet(
        "RealBlur-J",
        (folders_of_pairs("RealBlur_J"), realblur_list("J")),
        ALIGNED,
        980,
        Measured(28.94, 0.880),
    ),
    "sidd": TestSet(
        "SIDD",
        (Layout("Validation{Noisy,Gt}BlocksSrgb.mat, perhaps in SIDD", sidd_blocks),),
        RGB,
        1280,
        Measured(40.05, 0.962),
    ),
}
DERAINING = ("test100", "rain100h", "rain100l", "test2800", "test1200")
DERAINING_AVERAGE = Measured(33.97, 0.952)


def gaussian_set(folder: Path, sigma: float) -> list[Unread]:
    """Clean images of a folder with the noise of the papers, e.g. of CBSD68, Kodak24 or Urban100.

    NumPy's global generator is seeded with 0 before each image in public code (Restormer, MPRNet); the same
    numbers come from a generator of one's own. They are neither clipped nor rounded.
    """
    return [_noisy(alone(path), path, sigma) for path in list_images(folder)]


def _noisy(clean: Unread, path: Path, sigma: float) -> Unread:
    load = partial(_add_noise, path, sigma)
    return Unread(clean.name, clean.size, clean.target, load, clean.scene)


def _add_noise(path: Path, sigma: float) -> np.ndarray:
    clean = load_image(path)
    rng = np.random.RandomState(0)  # of the papers: another generator has other noise
    return (clean + rng.normal(0, sigma, clean.shape)).astype(np.float32)


def average(rows: Sequence[Measured]) -> Measured:
    """The mean of PSNR and of SSIM."""
    psnr, ssim = zip(*rows, strict=True)
    return Measured(sum(psnr) / len(rows), sum(ssim) / len(rows))
