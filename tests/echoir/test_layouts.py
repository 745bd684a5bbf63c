import crops
import numpy as np
import pytest
from folders import load_folder
from layouts import halves
from miniatures import (
    LAYOUTS,
    collection,
    gopro,
    hide,
    pairs,
    realblur,
    sidd_blocks,
    sidd_medium,
    side_by_side,
)
from photographs import Unread, split
from scenes import save
from test_sets import SETS, gaussian_set


def same(found, made):
    assert [source.name for source in found] == [name for name, _, _ in made]
    for source, (_, degraded, clean) in zip(found, made, strict=True):
        photograph = source.read()
        assert source.size == clean.shape[:2]
        assert np.array_equal(photograph.input, degraded)
        assert np.array_equal(photograph.target, clean)


@pytest.mark.parametrize(("name", "build"), LAYOUTS)
def test_every_test_set_is_found_in_each_of_its_layouts(name, build, tmp_path):
    made = build(tmp_path)
    found = SETS[name].photographs(tmp_path)
    same(found, made)
    assert all(
        isinstance(source, Unread) for source in found
    )  # 2,800 images are not held in memory


def test_the_folder_of_a_set_itself_may_be_named(tmp_path):
    made = collection("Rain100L")(tmp_path)
    same(SETS["rain100l"].photographs(tmp_path / "Datasets/test/Rain100L"), made)
    with pytest.raises(ValueError, match="must lie under"):  # of another set: no guess
        SETS["rain100h"].photographs(tmp_path / "Datasets/test/Rain100L")


@pytest.mark.parametrize("name", SETS)
def test_a_wrong_layout_says_what_was_looked_for_and_what_was_found(name, tmp_path):
    collection("Set12")(tmp_path)
    save(tmp_path / "readme.png", np.zeros((4, 4, 3), np.uint8))
    with pytest.raises(ValueError, match="must lie under `--data` as one of: ") as error:
        SETS[name].photographs(tmp_path)
    message = str(error.value)
    assert SETS[name].layouts[0].looks in message
    assert "which holds Datasets/, readme.png. Unpack the set there" in message
    with pytest.raises(ValueError, match="must exist"):
        SETS[name].photographs(tmp_path / "nowhere")


def test_sides_are_told_apart_by_all_files_together(tmp_path):
    made = side_by_side("Test100", rainy="right")(tmp_path)
    quiet = np.zeros((40, 48, 3), np.uint8)
    quiet[::2] = quiet[:, ::2] = 255  # one clean half with more edges than its rainy one
    save(tmp_path / "Test100" / "4.png", np.concatenate([quiet, quiet // 2], 1))
    found = halves(tmp_path / "Test100")
    same(found[:3], made)
    assert np.array_equal(found[3].read().target, quiet)


def test_an_odd_width_is_no_pair(tmp_path):
    save(tmp_path / "Test100" / "1.png", np.zeros((4, 7, 3), np.uint8))
    with pytest.raises(ValueError, match=r"must have an even width\. Got .*1.png"):
        SETS["test100"].photographs(tmp_path)


def test_a_missing_target_is_named(tmp_path):
    hide(tmp_path)
    (tmp_path / "HIDE_dataset" / "GT" / "1fromGOPR.png").unlink()
    with pytest.raises(ValueError, match=r"exactly one target .* Got 0 for .*1fromGOPR.png"):
        SETS["hide"].photographs(tmp_path)


def test_a_list_with_a_broken_line_is_named(tmp_path):
    realblur("J")(tmp_path)
    file = tmp_path / "RealBlur_J_test_list.txt"
    file.write_text(file.read_text() + "one_path_only.png\n")
    with pytest.raises(
        ValueError, match=r"lines of two paths, .* Got 1 in line 4 of .*J_test_list"
    ):
        SETS["realblur-j"].photographs(tmp_path)
    file.write_text("a/gt/1.png a/blur/1.png\n")
    with pytest.raises(ValueError, match=r"readable as a whole\. Got .*blur/1.png"):
        SETS["realblur-j"].photographs(tmp_path)


def test_blocks_that_are_none(tmp_path):
    from scipy.io import savemat

    sidd_blocks(tmp_path)
    savemat(tmp_path / "SIDD" / "ValidationNoisyBlocksSrgb.mat", {"x": np.zeros((2, 2))})
    with pytest.raises(ValueError, match=r"one uint8 array .* Got .*'x': .*\(2, 2\)"):
        SETS["sidd"].photographs(tmp_path)


def test_a_damaged_file_of_blocks_is_named(tmp_path):
    sidd_blocks(tmp_path)
    path = tmp_path / "SIDD" / "ValidationGtBlocksSrgb.mat"
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(ValueError, match=r"MATLAB file up to version 7.2\. Got .*ValidationGt"):
        SETS["sidd"].photographs(tmp_path)


def test_gaussian_noise_is_that_of_public_code(tmp_path):
    clean = pairs(1)[0][1]
    save(tmp_path / "1.png", clean)
    (source,) = gaussian_set(tmp_path, 50.0)
    np.random.seed(0)  # noqa: NPY002  (as public code has it)
    expected = clean / 255 + np.random.normal(0, 50 / 255, clean.shape)  # noqa: NPY002
    assert np.allclose(source.read().input / 255, expected, atol=1e-6)


TRAINING = [
    ("Datasets/train/Rain13K", collection("Rain13K", below="Datasets/train")),
    ("GOPRO_Large/train", gopro("train")),
    ("SIDD_Medium_Srgb", sidd_medium),
    ("RealBlur_J_train_list.txt", realblur("J", "train")),
    ("RealBlur_R_train_list.txt", realblur("R", "train")),
]


@pytest.mark.parametrize(("below", "build"), TRAINING)
def test_every_training_set_is_found(below, build, tmp_path):
    made = build(tmp_path)
    same(load_folder(tmp_path / below), made)


def test_scenes_of_a_training_set(tmp_path):
    gopro("train")(tmp_path)
    sidd_medium(tmp_path)
    scenes = {source.scene for source in load_folder(tmp_path / "GOPRO_Large" / "train")}
    assert scenes == {"GOPR0384_11_00", "GOPR0385_11_01"}
    # Two instances of one scene: the second number tells the scene.
    assert {source.scene for source in load_folder(tmp_path / "SIDD_Medium_Srgb")} == {"001"}


def test_no_more_is_held_out_than_can_be_looked_at():
    image = np.zeros((8, 8, 3), np.uint8)
    load = lambda: image  # noqa: E731
    many = [Unread(f"{i}", (8, 8), load, scene=f"{i}") for i in range(1000)]
    assert len(split(many, validation=0.5, seed=0).test) == 24
    few_scenes = [Unread(f"{i}", (8, 8), load, scene=f"{i % 10}") for i in range(1000)]
    test = split(few_scenes, validation=0.5, seed=0).test
    assert 20 <= len(test) <= 24
    assert len({source.scene for source in test}) == 1


def test_crops_cover_their_images_and_keep_scenes_together(tmp_path):
    made = gopro("train")(tmp_path)
    train = tmp_path / "GOPRO_Large" / "train"
    crops.main(crops.Arguments(train, tmp_path / "crops", size=32, overlap=8))
    found = load_folder(tmp_path / "crops")
    assert len(found) == 4 * len(made)  # 40 x 48 in crops of 32 x 32
    assert {source.scene for source in found} == {"GOPR0384_11_00", "GOPR0385_11_01"}
    for name, degraded, clean in made:
        again = np.zeros_like(clean), np.zeros_like(clean)
        prefix = name.replace("/", "-").replace(".", "-")
        for source in found:
            stem = source.name.split("/")[1]
            if stem.startswith(prefix):
                top, left = map(int, stem.removesuffix(".png").split("-at-")[1].split("-"))
                for whole, crop in zip(again, (source.input, source.target), strict=True):
                    whole[top : top + 32, left : left + 32] = crop
        assert np.array_equal(again[0], degraded)
        assert np.array_equal(again[1], clean)
    with pytest.raises(ValueError, match="must not exist"):
        crops.main(crops.Arguments(train, tmp_path / "crops"))
    with pytest.raises(ValueError, match=r"must hold pairs .* Got none in"):
        crops.main(crops.Arguments(tmp_path / "GOPRO_Large", tmp_path / "others"))


def test_crops_must_be_larger_than_their_overlap(tmp_path):
    with pytest.raises(ValueError, match=r"less than their size\. Got --size 32, --overlap 32"):
        crops.main(crops.Arguments(tmp_path, tmp_path / "crops", size=32, overlap=32))
