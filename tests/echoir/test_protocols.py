import align
import by_hand
import numpy as np
import protocols
import pytest
import torch
from align import homography
from protocols import on_aligned, on_luma, on_rgb
from scenes import scene
from scipy import ndimage
from scipy.ndimage import gaussian_filter, map_coordinates
from scores import luma, psnr, round8, ssim
from skimage import metrics
from skimage.data import coffee


def noisy_pair(height=50, width=60, seed=0):
    rng = np.random.default_rng(seed)
    clean = scene(rng, height, width)
    noisy = (clean + rng.normal(0, 15, clean.shape)).clip(0, 255).round().astype(np.uint8)
    return noisy, clean


def tensor(image):
    return torch.from_numpy(image.transpose(2, 0, 1).astype(np.float32) / 255)


@pytest.mark.parametrize("seed", range(3))
def test_psnr_and_ssim_equal_scikit_image_and_the_formula(seed):
    noisy, clean = noisy_pair(seed=seed)
    a, b = tensor(noisy), tensor(clean)
    expected = metrics.peak_signal_noise_ratio(clean, noisy, data_range=255)
    assert psnr(a, b) == pytest.approx(expected, abs=1e-6)
    options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    expected = metrics.structural_similarity(
        clean, noisy, data_range=255, channel_axis=2, **options
    )
    assert ssim(a, b) == pytest.approx(expected, abs=1e-6)
    assert ssim(a, b) == pytest.approx(by_hand.ssim(noisy, clean), abs=1e-6)


# MATLAB's rgb2ycbcr of uint8 colors: white, black, red, green, blue, gray, and a mixture by its matrix.
MATLAB = {
    (255, 255, 255): 235,
    (0, 0, 0): 16,
    (255, 0, 0): 81,
    (0, 255, 0): 145,
    (0, 0, 255): 41,
    (128, 128, 128): 126,
    (10, 200, 100): 129,  # 16 + (65.481 * 10 + 128.553 * 200 + 24.966 * 100) / 255 = 129.19
}


@pytest.mark.parametrize(("color", "expected"), MATLAB.items())
def test_luma_equals_matlab(color, expected):
    image = tensor(np.full((2, 2, 3), color, np.uint8))
    exact = 16 + np.dot(color, [65.481, 128.553, 24.966]) / 255
    assert float(luma(image)[0, 0]) * 255 == pytest.approx(exact, abs=1e-5)
    assert round(float(luma(image)[0, 0]) * 255) == expected


def test_rounded_luma_equals_whole_numbers():
    """No color of a grid is off by a rounding."""
    colors = np.stack(np.meshgrid(*3 * [np.arange(0, 256, 5)]), -1).reshape(-1, 1, 3)
    found = (round8(luma(tensor(colors))) * 255).round().numpy()
    assert np.array_equal(found, by_hand.luma8(colors))


def test_deraining_is_measured_on_rounded_luma():
    noisy, clean = noisy_pair()
    expected = by_hand.figures(noisy, clean, "Y")
    assert on_luma(tensor(noisy), tensor(clean)) == pytest.approx(expected, abs=1e-6)


def smooth(height=120, width=150):
    noise = np.random.default_rng(0).normal(size=(height, width, 3))
    image = gaussian_filter(noise, (4, 4, 0))
    image = (image - image.min()) / (image.max() - image.min())
    return torch.from_numpy(image.transpose(2, 0, 1))


WARPS = {
    "identity": np.eye(3),
    "shift": [[1, 0, 1.4], [0, 1, -0.7], [0, 0, 1]],
    "rotation and scale": [[1.004, -0.006, 0.9], [0.006, 1.004, -0.5], [0, 0, 1]],
    "perspective": [[1.002, 0.003, -1.1], [-0.002, 0.998, 0.8], [2e-5, -1e-5, 1]],
}


@pytest.mark.parametrize("warp", WARPS.values(), ids=WARPS)
def test_a_homography_is_found_again(warp):
    warp = torch.as_tensor(warp, dtype=torch.float64)
    whole = smooth()
    inverse = torch.linalg.inv(warp)
    places = align._places(inverse, *whole.shape[1:]).numpy()
    # Splines, as OpenCV's and torch's cubic kernel moves edges by up to 0.05 pixels itself.
    moved = map_coordinates(whole.mean(0).numpy(), [places[..., 1], places[..., 0]], order=5)
    found = homography(whole.mean(0)[10:-10, 10:-10], torch.from_numpy(moved)[10:-10, 10:-10])
    shift = torch.tensor([[1, 0, 10], [0, 1, 10], [0, 0, 1]], dtype=torch.float64)
    expected = torch.linalg.inv(shift) @ warp @ shift
    corners = torch.tensor([[0, 0, 1], [129, 0, 1], [0, 99, 1], [129, 99, 1]], dtype=torch.float64)
    error = align._apply(found, corners) - align._apply(expected, corners)
    assert error.abs().max() < 0.05  # pixels


def test_alignment_undoes_a_shift_and_a_brightness():
    whole = smooth()
    target, shifted = whole[:, 10:-10, 10:-10], 0.9 * whole[:, 9:-11, 12:-8]
    before, after = on_rgb(shifted, target).psnr, on_aligned(shifted, target).psnr
    assert before < 25
    # The brightness is set before the shift is known, as in the published code: this bounds it.
    assert after > before + 8


@pytest.mark.parametrize(
    ("shift", "blur", "expected"),
    [
        ((0.6, -1.3), 0.7, (32.6259, 0.92458)),
        ((0.0, 0.0), 1.5, (27.6761, 0.82995)),
        ((-2.4, 0.9), 1.0, (30.3570, 0.89052)),
    ],
)
def test_aligned_figures_equal_those_of_the_published_evaluation(shift, blur, expected):
    # Expected: RealBlur's code with OpenCV 5.0, run on these images. OpenCV samples at 1/32 of a pixel.
    image = coffee()[60:276, 150:406] / 255
    moved = ndimage.shift(image, (*shift, 0), order=3, mode="mirror")
    moved = gaussian_filter(moved, (blur, blur, 0))
    moved += np.random.default_rng(0).normal(0, 0.01, moved.shape)
    pair = (moved.clip(0, 1) * 255).round() / 255, image
    first, second = (torch.from_numpy(i[8:-8, 8:-8].transpose(2, 0, 1).copy()) for i in pair)
    measured = on_aligned(first, second)
    assert measured.psnr == pytest.approx(expected[0], abs=0.003)
    assert measured.ssim == pytest.approx(expected[1], abs=2e-4)


def test_aligned_figures_are_means_over_the_known_pixels(monkeypatch):
    noisy, clean = noisy_pair()
    known = torch.zeros(50, 60, dtype=torch.bool)
    known[:40, 7:] = True
    monkeypatch.setattr(protocols, "align", lambda image, target: (image.double(), known))
    measured = on_aligned(tensor(noisy), tensor(clean))
    difference = (noisy.astype(float) - clean)[:40, 7:] / 255
    assert measured.psnr == pytest.approx(-10 * np.log10(np.mean(difference**2)), abs=1e-6)
    masked = [np.where(known.numpy()[..., None], i, 0) / 255 for i in (noisy, clean)]
    options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    _, full = metrics.structural_similarity(
        *masked, data_range=1, channel_axis=2, full=True, **options
    )
    assert measured.ssim == pytest.approx(full[5:40, 7:-5].mean(), abs=1e-6)


def test_images_that_cannot_be_aligned_are_left_as_they_are():
    black = torch.zeros(3, 40, 50)
    measured = on_aligned(black, tensor(noisy_pair(40, 50)[1]))
    assert np.isfinite(measured.psnr)
    assert torch.equal(homography(smooth()[0], -smooth()[0]), torch.eye(3, dtype=torch.float64))
