import numpy as np
import pytest
import tifffile
from image_file import read_image, write_image
from PIL import Image, ImageCms, ImageOps
from scenes import scene

PROFILE = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
ARTIST, MODEL, EXPOSURE, CAMERA, ORIENTATION = 0x013B, 0x0110, 0x829A, 0x8769, 0x0112


def pattern(channels, kind=np.uint8):
    """Every sample another, in every byte, so that a swapped or lost one is seen."""
    rng = np.random.default_rng(0)
    shape = (13, 17, channels) if channels > 1 else (13, 17)
    return rng.integers(0, np.iinfo(kind).max, shape, dtype=kind, endpoint=True)


def tags(orientation=1):
    exif = Image.Exif()
    exif[ARTIST], exif[MODEL], exif[ORIENTATION] = "Ansel", "Graflex", orientation
    exif[CAMERA] = exif.get_ifd(CAMERA)  # or a TIFF would go without it
    exif[CAMERA][EXPOSURE] = 0.25
    return exif


def unchanged(image):
    return image


def copy(path, tmp_path, restore=unchanged):
    target = tmp_path / f"copy-{path.name}"
    image = read_image(path)
    write_image(target, image.restored(restore))
    assert [p for p in tmp_path.iterdir() if "unfinished" in p.name] == []
    return target


MODES = {"L": 1, "LA": 2, "RGB": 3, "RGBA": 4}
HELD = [(suffix, mode) for suffix in ("png", "tif") for mode in MODES]
HELD += [("bmp", "L"), ("bmp", "RGB")]  # Pillow reads no alpha from it


@pytest.mark.parametrize(("suffix", "mode"), HELD)
def test_eight_bits_and_alpha_are_kept(suffix, mode, tmp_path):
    channels = MODES[mode]
    path = tmp_path / f"image.{suffix}"
    Image.fromarray(pattern(channels)).save(path)
    with Image.open(copy(path, tmp_path)) as image:
        assert image.mode == mode
        np.testing.assert_array_equal(np.array(image), pattern(channels))


def test_alpha_is_not_restored(tmp_path):
    path = tmp_path / "image.png"
    Image.fromarray(pattern(4)).save(path)
    copied = np.array(Image.open(copy(path, tmp_path, lambda image: image * 0)))
    assert not copied[..., :3].any()
    np.testing.assert_array_equal(copied[..., 3], pattern(4)[..., 3])


def test_a_palette_becomes_color_and_its_hole_alpha(tmp_path):
    path = tmp_path / "image.png"
    indices = Image.fromarray(np.array([[0, 1], [2, 1]], np.uint8), "P")
    indices.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    indices.save(path, transparency=1)
    with Image.open(copy(path, tmp_path)) as image:
        assert image.mode == "RGBA"
        assert np.array(image)[..., 3].tolist() == [[255, 0], [255, 0]]
        assert image.getpixel((0, 1)) == (0, 0, 255, 255)


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_png_of_sixteen_bits(channels, tmp_path):
    imagecodecs = pytest.importorskip("imagecodecs", reason="reads PNGs of 16 bits")
    path = tmp_path / "image.png"
    path.write_bytes(imagecodecs.png_encode(pattern(channels, np.uint16)))
    copied = copy(path, tmp_path)
    np.testing.assert_array_equal(
        imagecodecs.png_decode(copied.read_bytes()), pattern(channels, np.uint16)
    )


def test_png_of_sixteen_bits_keeps_its_metadata(tmp_path):
    imagecodecs = pytest.importorskip("imagecodecs", reason="reads PNGs of 16 bits")
    source, path = tmp_path / "eight.png", tmp_path / "image.png"
    Image.fromarray(pattern(3)).save(source, exif=tags(6), icc_profile=PROFILE, dpi=(300, 300))
    content, deep = source.read_bytes(), imagecodecs.png_encode(pattern(3, np.uint16))
    end = content.index(b"IDAT") - 4
    path.write_bytes(deep[:33] + content[33:end] + deep[33:])
    copied = copy(path, tmp_path)
    with Image.open(copied) as image:
        image.load()
        assert image.size == (13, 17)
        assert image.info["icc_profile"] == PROFILE
        assert image.info["dpi"] == pytest.approx((300, 300), abs=0.01)
        assert image.getexif()[ARTIST] == "Ansel"
        assert ORIENTATION not in image.getexif()
    upright = np.rot90(pattern(3, np.uint16), -1)
    np.testing.assert_array_equal(imagecodecs.png_decode(copied.read_bytes()), upright)


@pytest.mark.parametrize("planar", ["contig", "separate"])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_tiff_of_sixteen_bits(channels, planar, tmp_path):
    path = tmp_path / "image.tif"
    samples = pattern(channels, np.uint16)
    stored = np.moveaxis(samples, -1, 0) if channels > 1 and planar == "separate" else samples
    tifffile.imwrite(
        path,
        stored,
        photometric="rgb" if channels > 1 else "minisblack",
        planarconfig=planar if channels > 1 else None,
        extrasamples=["unassalpha"] if channels == 4 else None,
        iccprofile=PROFILE,
        resolution=(300, 300),
        resolutionunit="inch",
        extratags=[(ARTIST, "s", 0, "Ansel", True)],
    )
    with tifffile.TiffFile(copy(path, tmp_path)) as file:
        page = file.pages[0]
        np.testing.assert_array_equal(page.asarray(), samples)
        assert page.iccprofile == PROFILE
        assert page.tags["Artist"].value == "Ansel"
        assert page.tags["XResolution"].value == (300, 1)
        assert len(page.extrasamples) == (channels == 4)


def test_sixteen_bits_are_used(tmp_path):
    """A change of a 65535th is kept: nothing on the way has fewer bits."""
    path = tmp_path / "image.tif"
    tifffile.imwrite(path, pattern(3, np.uint16) // 2, photometric="rgb")
    copied = tifffile.imread(copy(path, tmp_path, lambda image: image + 1 / 65535))
    np.testing.assert_array_equal(copied, pattern(3, np.uint16) // 2 + 1)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_deep_tiffs_are_turned_upright(orientation, tmp_path):
    path, eight = tmp_path / "image.tif", tmp_path / "eight.png"
    tag = (ORIENTATION, "H", 1, orientation, True)
    tifffile.imwrite(path, pattern(3).astype(np.uint16), photometric="rgb", extratags=[tag])
    Image.fromarray(pattern(3)).save(eight, exif=tags(orientation))
    with Image.open(eight) as image:
        expected = np.array(ImageOps.exif_transpose(image))
    with tifffile.TiffFile(copy(path, tmp_path)) as file:
        np.testing.assert_array_equal(file.pages[0].asarray(), expected)
        assert "Orientation" not in file.pages[0].tags


@pytest.mark.parametrize("suffix", ["png", "tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_photographs_are_turned_upright(orientation, suffix, tmp_path):
    path = tmp_path / f"image.{suffix}"
    Image.fromarray(pattern(3)).save(path, exif=tags(orientation))
    with Image.open(path) as image:
        image.load()  # which turns a TIFF
        expected = np.array(ImageOps.exif_transpose(image))
    with Image.open(copy(path, tmp_path)) as image:
        np.testing.assert_array_equal(np.array(image), expected)
        assert ORIENTATION not in image.getexif()


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
def test_metadata_are_kept(suffix, tmp_path):
    path = tmp_path / f"image.{suffix}"
    options = {"exif": tags(8), "icc_profile": PROFILE, "dpi": (300, 300)}
    Image.fromarray(scene(np.random.default_rng(0), 20, 30)).save(path, **options)
    with Image.open(copy(path, tmp_path)) as image:
        assert image.size == (20, 30)
        assert image.info["icc_profile"] == PROFILE
        exif = image.getexif()
        assert exif[ARTIST] == "Ansel"
        assert exif[MODEL] == "Graflex"
        assert exif.get_ifd(CAMERA)[EXPOSURE] == 0.25
        assert exif.get(ORIENTATION, 1) == 1
        if suffix != "webp":
            assert image.info["dpi"] == pytest.approx((300, 300), abs=0.01)


def test_format_follows_the_content_not_the_suffix(tmp_path):
    path = tmp_path / "image.jpg"
    Image.fromarray(pattern(4)).save(path, format="PNG")
    with Image.open(copy(path, tmp_path)) as image:
        assert image.format == "PNG"
        np.testing.assert_array_equal(np.array(image), pattern(4))


def test_gray_is_restored_as_gray_color(tmp_path):
    path = tmp_path / "image.png"
    Image.fromarray(pattern(1)).save(path)

    def restore(image):
        assert image.shape == (3, 13, 17)
        return image * image.new_tensor([0.0, 0.5, 1.0])[:, None, None]

    copied = np.array(Image.open(copy(path, tmp_path, restore))).astype(float)
    assert np.abs(copied - 0.5 * pattern(1)).max() <= 0.5


def test_images_that_cannot_be_read(tmp_path):
    whole = tmp_path / "whole.png"
    Image.fromarray(pattern(3)).save(whole)
    broken = tmp_path / "broken.png"
    broken.write_bytes(whole.read_bytes()[:200])
    text = tmp_path / "text.png"
    text.write_text("no image")
    film = tmp_path / "film.gif"
    frames = [Image.fromarray(pattern(1) // (i + 1)) for i in range(3)]
    frames[0].save(film, save_all=True, append_images=frames[1:])
    pages = tmp_path / "pages.tif"
    frames[0].save(pages, save_all=True, append_images=frames[1:])
    numbers = tmp_path / "numbers.tif"
    Image.fromarray(pattern(1).astype(np.float32)).save(numbers)
    for path in (broken, text, film, pages, numbers):
        with pytest.raises(ValueError, match=path.name):
            read_image(path)


def test_a_tiff_that_was_cut_off(tmp_path):
    path = tmp_path / "image.tif"
    tifffile.imwrite(path, pattern(3, np.uint16), photometric="rgb")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"image\.tif"):
        read_image(path)
