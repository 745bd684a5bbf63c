"""The papers' figures by their definitions, in NumPy, for images of 0 to 255; nothing here is the example's."""

from itertools import product

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from scipy import ndimage


def luma8(image):
    """MATLAB's rgb2ycbcr of a uint8 image, in whole numbers, whose halves no processor rounds: (H, W, 3) to (H, W)."""
    thousandths = image.astype(np.int64) @ [65_481, 128_553, 24_966]
    return (thousandths + 255 * 16_500) // 255_000


def psnr(image, target):
    return 10 * np.log10(255**2 / np.mean((image.astype(float) - target) ** 2))


def ssim_map(first, second):
    """Wang et al. (2004), window by window: (H, W) to (H - 10, W - 10)."""
    offsets = np.arange(-5, 6)
    weight = np.exp(-(offsets**2) / (2 * 1.5**2))
    weight = np.outer(weight, weight) / weight.sum() ** 2
    a, b = (sliding_window_view(i.astype(float), (11, 11)) for i in (first, second))

    def mean(windows):
        return (windows * weight).sum((-1, -2))

    ma, mb = mean(a), mean(b)
    va, vb, both = mean(a * a) - ma**2, mean(b * b) - mb**2, mean(a * b) - ma * mb
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    return (2 * ma * mb + c1) * (2 * both + c2) / ((ma**2 + mb**2 + c1) * (va + vb + c2))


def ssim(first, second):
    """The mean over the channels: (H, W, 3)."""
    return np.mean([ssim_map(first[..., c], second[..., c]) for c in range(first.shape[2])])


def figures(image, target, protocol):
    """PSNR and SSIM under one of the three protocols."""
    if protocol == "Y":
        image, target = luma8(image)[..., None], luma8(target)[..., None]
    elif protocol == "RGB, aligned":
        return max(_shifted(image, target, shift) for shift in product((-1, 0, 1), repeat=2))
    return psnr(image, target), ssim(image, target)


def _shifted(image, target, shift):
    """After one brightness for both and a shift of whole pixels, over the pixels that are known."""
    image, target = image.astype(float), target.astype(float)
    image = image * (image * target).sum() / (image**2).sum()
    moved = ndimage.shift(image, (*shift, 0), order=0, cval=np.nan)
    known = ~np.isnan(moved[..., 0])
    moved, target = (np.where(known[..., None], i, 0) for i in (moved, target))
    maps = [ssim_map(moved[..., c], target[..., c])[known[5:-5, 5:-5]] for c in range(3)]
    return psnr(moved[known], target[known]), np.mean(maps)
