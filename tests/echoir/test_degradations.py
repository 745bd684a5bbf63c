import numpy as np
import pytest
from degradations import degradation, one_sigma
from jpeg import saved, sometimes_saved
from motion import REACH, convolve, linear_kernel, shake_kernel, trajectory
from noise import blind_noise, noise
from rain import Layer, compose
from scenes import scene
from sensor import demosaic, develop, linearize, random_strength, retake, shot_and_read

TASKS = ["denoise", "denoise-raw", "derain", "deblur"]


def rng(seed=0):
    return np.random.default_rng(seed)


def gray(value, size=200):
    return np.full((size, size, 3), value, np.float32)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("sigma", [25.0, (5.0, 50.0)])
def test_equal_seeds_give_equal_images_and_others_do_not(task, sigma):
    clean = scene(rng(), 48, 64).astype(np.float32) / 255
    before = clean.copy()
    degrade = degradation(task, sigma)
    first, second, other = (degrade(clean, rng(seed)) for seed in (1, 1, 2))
    assert np.array_equal(first, second)
    assert not np.array_equal(first, other)
    assert np.array_equal(clean, before)
    assert first.shape == clean.shape
    assert first.dtype == np.float32


def test_noise_is_neither_clipped_nor_rounded_and_has_its_sigma():
    noisy = noise(gray(1), rng(), 25.0)
    assert noisy.max() > 1
    # 120,000 values: the deviation's own standard error is 0.2 %
    assert (noisy - 1).std() * 255 == pytest.approx(25, rel=0.01)
    assert (noisy - 1).mean() * 255 == pytest.approx(0, abs=0.3)


def test_blind_noise_covers_its_range_evenly():
    sigmas = [blind_noise(gray(0.5, 100), rng(i), 5, 50).std() * 255 for i in range(300)]
    assert min(sigmas) == pytest.approx(5, abs=1)
    assert max(sigmas) == pytest.approx(50, abs=1)
    assert np.mean(sigmas) == pytest.approx(27.5, abs=2.5)  # three standard errors of 45 / sqrt(12)


@pytest.mark.parametrize(
    ("sigma", "expected"),
    [(15.0, 15.0), (15, 15.0), ((5.0, 50.0), 25.0), ([30, 50], 40.0), ((0.0, 10.0), 5.0)],
)
def test_the_sigma_to_measure_with(sigma, expected):
    assert one_sigma(sigma) == expected


@pytest.mark.parametrize("sigma", [-1.0, (50.0, 5.0), (-5.0, 5.0), float("nan")])
def test_impossible_sigmas(sigma):
    with pytest.raises(ValueError, match=r"sigma >= 0, or a range .* the lower first"):
        degradation("denoise", sigma)


@pytest.mark.parametrize("level", [0.0, 0.1, 0.5, 1.0])
def test_variance_of_a_sensor_is_affine_in_the_light(level):
    shot, read = 0.01, 0.0004
    noisy = shot_and_read(gray(level), rng(), shot, read)
    assert noisy.mean() == pytest.approx(level, abs=0.001)
    assert noisy.var() == pytest.approx(shot * level + read, rel=0.02)


def test_strengths_of_sensors_lie_where_cameras_do():
    shots, reads = np.log([random_strength(rng(i)) for i in range(500)]).T
    assert np.log(1e-4) <= shots.min() <= shots.max() <= np.log(0.012)
    slope, offset = np.polyfit(shots, reads, 1)
    assert slope == pytest.approx(2.18, abs=0.03)
    assert offset == pytest.approx(1.20, abs=0.2)
    assert (reads - slope * shots - offset).std() == pytest.approx(0.26, abs=0.03)


def test_development_is_undone():
    levels = np.linspace(0, 1, 1001, dtype=np.float32)
    assert np.abs(develop(linearize(levels)) - levels).max() < 1e-6
    assert linearize(np.float32(0.5)) == pytest.approx(0.21404, abs=1e-5)  # sRGB's published value


@pytest.mark.parametrize("mosaic", [False, True])
def test_a_sensor_without_noise_takes_the_same_picture(mosaic):
    clean = gray(0.5, 30) * np.array([1.0, 0.5, 1.5], np.float32)
    gains = np.array([2.0, 1.0, 1.7], np.float32)
    taken = retake(clean, rng(), shot=0.0, read=0.0, gains=gains, mosaic=mosaic)
    assert np.abs(taken - clean).max() < 1e-6


def test_demosaicing_keeps_what_was_sensed_and_is_exact_on_a_slope():
    row, column = np.mgrid[:20, :22].astype(np.float32)
    slope = np.stack([row + column, 2 * row, 3 * column], -1)
    inside = (slice(2, -2), slice(2, -2))
    assert np.abs(demosaic(slope) - slope)[inside].max() < 1e-5
    image = rng().random((20, 22, 3), np.float32)
    out = demosaic(image)
    for channel, r, c in ((0, 0, 0), (1, 0, 1), (1, 1, 0), (2, 1, 1)):
        assert np.array_equal(out[r::2, c::2, channel], image[r::2, c::2, channel])


def test_demosaicing_correlates_the_noise_of_neighbors():
    noisy = shot_and_read(gray(0.3), rng(), 0.0, 0.01)
    red = demosaic(noisy)[..., 0] - 0.3
    assert (red[:, 1:] * red[:, :-1]).mean() / red.var() > 0.4
    assert abs((noisy[:, 1:, 0] - 0.3) * (noisy[:, :-1, 0] - 0.3)).mean() < 0.01


@pytest.mark.parametrize("seed", range(20))
def test_kernels_sum_to_one_and_are_centered(seed):
    for kernel in (
        shake_kernel(rng(seed), 6.0 + 4 * seed),
        linear_kernel(24.0, 0.3 * seed),
    ):
        assert kernel.shape == (2 * REACH + 1, 2 * REACH + 1)
        assert kernel.sum() == pytest.approx(1, abs=1e-6)
        assert kernel.min() >= 0
        rows, columns = np.nonzero(kernel)
        assert abs(rows.min() + rows.max() - 2 * REACH) <= 1
        assert abs(columns.min() + columns.max() - 2 * REACH) <= 1


def test_a_linear_kernel_is_as_long_as_asked_and_points_where_asked():
    kernel = linear_kernel(10.0, 0.0)
    assert np.count_nonzero(kernel) == 11
    assert np.count_nonzero(kernel[REACH]) == 11
    assert np.allclose(kernel[REACH, REACH - 4 : REACH + 5], 0.1, atol=0.01)
    assert np.allclose(linear_kernel(10.0, np.pi / 2), kernel.T, atol=1e-6)


@pytest.mark.parametrize("seed", range(5))
def test_a_trajectory_has_steps_of_one_length(seed):
    steps = np.linalg.norm(np.diff(trajectory(rng(seed), 20.0), axis=0), axis=1)
    assert np.allclose(steps, 20 / 199)


def test_convolution_equals_scipy():
    from scipy import ndimage

    image, kernel = rng().random((50, 61, 3), np.float32), rng(1).random((25, 25), np.float32)
    kernel /= kernel.sum()
    expected = [ndimage.convolve(image[..., c], kernel, mode="reflect") for c in range(3)]
    assert np.abs(convolve(image, kernel) - np.stack(expected, -1)).max() < 1e-6


def test_blur_adds_the_noise_of_a_sensor_and_keeps_a_constant():
    blurred = degradation("deblur", 25.0)(gray(0.5), rng())
    assert blurred.mean() == pytest.approx(0.5, abs=1e-3)
    assert blurred.std() == pytest.approx(0.01, rel=0.02)


def layer(**changes):
    return Layer(
        **{"angle": np.pi / 2, "length": 16, "width": 1, "cover": 0.1, "brightness": 0.5} | changes
    )


def test_streaks_cover_what_they_should_and_fall_as_they_should():
    sparse = layer(cover=0.02).streaks((300, 300), rng())
    assert (sparse > 0.1).mean() == pytest.approx(0.02, rel=0.25)
    assert sparse.mean() == pytest.approx(
        0.02 * 0.5, rel=0.25
    )  # what is covered, by the brightness
    down = np.abs(np.diff(sparse, axis=0)).mean()
    across = np.abs(np.diff(sparse, axis=1)).mean()
    assert down < across / 4
    level = layer(angle=0.0, cover=0.02).streaks((300, 300), rng())
    assert np.abs(np.diff(level, axis=1)).mean() < np.abs(np.diff(level, axis=0)).mean() / 4


def test_rain_is_the_model_of_its_paper():
    clean = scene(rng(), 40, 50).astype(np.float32) / 255
    veiled = compose(clean, rng(), [], transmission=0.8, light=0.9)
    assert np.allclose(veiled, 0.8 * clean + 0.2 * 0.9)
    layers = [layer(), layer(angle=1.2, width=2)]
    shared = rng(3)
    expected = clean + sum(one.streaks((40, 50), shared) for one in layers)[..., None]
    rainy = compose(clean, rng(3), layers, transmission=0.8, light=0.9)
    assert np.allclose(rainy, (0.8 * expected + 0.18).clip(0, 1), atol=1e-6)


def test_rain_brightens_and_stays_in_range():
    for seed in range(10):
        rainy = degradation("derain", 0.0)(gray(0.3, 80), rng(seed))
        assert rainy.min() >= 0.2
        assert rainy.max() <= 1
        assert rainy.mean() > 0.3


def test_jpeg_files_halve_the_resolution_of_colors_and_so_blur_their_noise():
    noisy = noise(gray(0.5), rng(), 25.0)
    full, half = (saved(noisy, 95, subsampling) for subsampling in ("4:4:4", "4:2:0"))
    assert np.abs(full - noisy).mean() < 0.02
    # The mean of 2 x 2 independent pixels has half the deviation, and between such means the decoder interpolates by
    # weights 3/4 and 1/4 along each axis: which keeps 5/8 of the variance.
    red = [(image[..., 0] - image.mean(-1)).std() for image in (noisy, full, half)]
    assert red[1] == pytest.approx(red[0], rel=0.05)
    assert red[2] == pytest.approx(red[0] / 2 * 5 / 8, rel=0.1)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_a_share_of_the_patches_is_saved(share):
    """What a file holds is whole numbers of 1 / 255."""
    degrade = sometimes_saved(degradation("denoise", 25.0), share)
    images = [degrade(gray(0.5, 16), rng(seed)) for seed in range(300)]
    whole = np.mean(
        [np.allclose(image * 255, (image * 255).round(), atol=1e-3) for image in images]
    )
    assert whole == pytest.approx(share, abs=0.09)  # three standard errors
    assert all(image.dtype == np.float32 for image in images)
