import folders
import numpy as np
import pytest
import torch
from degradations import degradation
from folders import load_folder
from pairs import match_pairs
from patches import PatchSampler, _density
from photographs import Photograph, Unread, bundled, image_size, list_images, load_image, split
from PIL import Image
from scenes import save, scene

CPU = torch.device("cpu")


def test_bundled_photographs_are_split_by_whole_images():
    parts = bundled()
    names = [{p.name for p in part} for part in (parts.train, parts.validation, parts.test)]
    assert all(names)
    assert sum(map(len, names)) == len(set.union(*names))


@pytest.mark.parametrize("seed", range(5))
def test_a_scene_is_on_one_side_of_the_split(seed):
    image = np.zeros((8, 8, 3), np.uint8)
    photographs = [Photograph(f"{i}", image, image, scene=f"{i // 3}") for i in range(30)]
    parts = split(photographs, validation=0.2, seed=seed)
    scenes = [{p.scene for p in part} for part in (parts.train, parts.validation, parts.test)]
    assert sum(map(len, scenes)) == len(set.union(*scenes)) == 10


def test_natural_order(folder):
    for i in (2, 10, 1):
        save(folder / f"x{i}.png", np.zeros((4, 4, 3), np.uint8))
    assert [p.stem for p in list_images(folder)][-3:] == ["x1", "x2", "x10"]


@pytest.mark.parametrize(
    ("inputs", "targets", "expected"),
    [
        (["1.png", "2.png"], ["1.png", "2.png"], ["1.png", "2.png"]),
        (["rain-001.png"], ["norain-001.png"], ["norain-001.png"]),
        (["7x2.png"], ["norain-7.png"], ["norain-7.png"]),
        (
            ["901_1.jpg", "901_14.jpg", "902_3.jpg"],
            ["901.jpg", "902.jpg"],
            ["901.jpg", "901.jpg", "902.jpg"],
        ),
        (["a_1.png", "a_2.png"], ["a_1.png", "a_2.png"], ["a_1.png", "a_2.png"]),
    ],
)
def test_pairing(tmp_path, inputs, targets, expected):
    pairs = match_pairs(
        [tmp_path / "in" / n for n in inputs], [tmp_path / "gt" / n for n in targets]
    )
    assert [target.name for _, target in pairs] == expected


def test_folder_of_pairs(folder, tmp_path):
    clean = np.random.default_rng(0).integers(0, 255, (20, 30, 3)).astype(np.uint8)
    save(tmp_path / "pairs" / "rainy" / "1.png", clean // 2)
    save(tmp_path / "pairs" / "gt" / "1.png", clean)
    (pair,) = load_folder(tmp_path / "pairs")
    assert np.array_equal(pair.input, clean // 2)
    assert np.array_equal(pair.target, clean)


def sampler(photographs, task="denoise"):
    return PatchSampler(photographs, degradation(task, 25.0), 16, CPU)


@pytest.mark.parametrize("task", ["denoise", "derain", "deblur"])
def test_batches_are_a_pure_function_of_the_key(folder, task):
    first, second = (sampler(load_folder(folder), task) for _ in range(2))
    first.batch(3, 0, 4)  # what was drawn before does not matter
    a, b = first.batch(3, 0, 5), second.batch(3, 0, 5)
    assert torch.equal(a.input, b.input)
    assert torch.equal(a.target, b.target)
    other = second.batch(3, 0, 6)
    assert not torch.equal(a.target, other.target)
    assert a.input.shape == (3, 3, 16, 16)
    assert a.input.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("task", ["denoise", "denoise-raw", "derain", "deblur"])
def test_batches_are_the_same_from_memory_and_from_disk(folder, task, monkeypatch):
    memory = load_folder(folder)
    monkeypatch.setattr(folders, "IN_MEMORY", 0)
    disk = load_folder(folder)
    assert all(isinstance(source, Photograph) for source in memory)
    assert all(isinstance(source, Unread) for source in disk)
    for key in range(3):
        a, b = (sampler(sources, task).batch(3, 0, key) for sources in (memory, disk))
        assert torch.equal(a.input, b.input)
        assert torch.equal(a.target, b.target)


def test_what_is_read_from_disk_is_not_kept(folder, monkeypatch):
    monkeypatch.setattr(folders, "IN_MEMORY", 0)
    reads = []
    monkeypatch.setattr(
        folders, "load_image", lambda path: (reads.append(path.name), load_image(path))[1]
    )
    patches = sampler(load_folder(folder))
    assert reads == []
    patches.batch(4, 0)
    patches.batch(4, 0)
    assert len(reads) == 8


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_the_head_of_a_file_tells_the_size_of_the_upright_image(suffix, orientation, tmp_path):
    path = tmp_path / f"a.{suffix}"
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(scene(np.random.default_rng(0), 20, 30)).save(path, exif=exif)
    assert image_size(path) == load_image(path).shape[:2]
    assert image_size(path) == ((30, 20) if orientation >= 5 else (20, 30))


def test_a_size_that_the_head_does_not_tell(tmp_path):
    image = np.zeros((8, 9, 3), np.uint8)
    with pytest.raises(ValueError, match=r"a must have the size .* \(8, 8\)\. Got \(8, 9\)"):
        Unread("a", (8, 8), lambda: image).read()


def test_patches_come_from_where_the_gradients_are():
    image = np.full((64, 64, 3), 100, np.uint8)
    image[40:60, 40:60] = np.random.default_rng(0).integers(0, 255, (20, 20, 3))
    target = sampler([Photograph("half flat", image)]).batch(64, 0).target
    assert (target.flatten(1).std(1) > 0.01).float().mean() > 0.95


def test_the_density_of_patches_is_the_gradient_energy_within_each():
    image = np.random.default_rng(0).integers(0, 255, (61, 77, 3)).astype(np.uint8)
    green = image[..., 1].astype(int)
    energy = np.zeros((64, 80))
    energy[:60, :76] = np.abs(np.diff(green, axis=0))[:, :76] + np.abs(np.diff(green, axis=1))[:60]
    # 20 pixels from a site on touch three blocks of 8.
    expected = [
        energy[top : top + 24, left : left + 24].sum() + 1e-3
        for top in range(0, 61 - 20 + 1, 8)
        for left in range(0, 77 - 20 + 1, 8)
    ]
    assert np.allclose(np.diff(_density(image, 20), prepend=0), expected)


@pytest.mark.parametrize("size", [(16, 16), (17, 40), (23, 31), (24, 24)])
def test_patches_reach_every_border(size):
    row, column = np.mgrid[: size[0], : size[1]]
    image = np.stack([row, column, row], -1).astype(np.uint8)
    patches = sampler([Photograph("position", image)])
    targets = (patches.batch(400, 0).target * 255).round().int()
    assert targets[:, 0].min() == 0
    assert targets[:, 0].max() == size[0] - 1
    assert targets[:, 1].min() == 0
    assert targets[:, 1].max() == size[1] - 1


def test_input_and_target_of_a_pair_are_cut_alike():
    clean = np.random.default_rng(0).integers(0, 200, (40, 40, 3)).astype(np.uint8)
    batch = sampler([Photograph("pair", clean, clean + 10)]).batch(8, 0)
    assert torch.allclose(batch.input - batch.target, torch.tensor(10 / 255))


@pytest.mark.parametrize("task", ["derain", "deblur"])
def test_degradations_do_harm_and_keep_the_range(task):
    clean = scene(np.random.default_rng(0), 64, 64).astype(np.float32) / 255
    harmed = degradation(task, 25.0)(clean, np.random.default_rng(0))
    assert harmed.shape == clean.shape
    assert harmed.dtype == np.float32
    assert 0.01 < np.abs(harmed - clean).mean() < 0.3


def test_missing_and_empty_folders(tmp_path):
    with pytest.raises(ValueError, match="must exist"):
        load_folder(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"Got .*, which is empty\. Name the folder"):
        load_folder(tmp_path)
    (tmp_path / "notes.txt").touch()
    (tmp_path / "album.png").mkdir()
    with pytest.raises(ValueError, match=r"which has other files or folders only\. Name the"):
        load_folder(tmp_path)


def test_truncated_image_is_named(folder):
    path = folder / "photo3.png"
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ValueError, match=r"readable as a whole. Got .*photo3.png"):
        load_folder(folder)


def test_pairs_that_do_not_match(tmp_path):
    image = np.zeros((8, 8, 3), np.uint8)
    save(tmp_path / "input" / "1.png", image)
    save(tmp_path / "input" / "2.png", image)
    with pytest.raises(ValueError, match="one of input"):
        load_folder(tmp_path)
    save(tmp_path / "target" / "1.png", image)
    with pytest.raises(ValueError, match=r"exactly one target .* Got 0 for .*2.png"):
        load_folder(tmp_path)
    save(tmp_path / "target" / "2.png", image[:4])
    with pytest.raises(ValueError, match=r"must have one size"):
        load_folder(tmp_path)
    save(tmp_path / "target" / "2.png", image)
    save(tmp_path / "target" / "3.png", image)
    with pytest.raises(ValueError, match=r"Every target .* Got none for .*3.png"):
        load_folder(tmp_path)


def test_too_few_photographs():
    photographs = [Photograph(name, np.zeros((8, 8, 3), np.uint8), scene=name) for name in "ab"]
    with pytest.raises(ValueError, match="three photographs or more"):
        split(photographs, validation=0.2, seed=0)


def test_patch_larger_than_a_photograph(folder):
    message = r"half as large as a patch \(121 x 121\).* Got photo0\.png .* lower --patch to 120\."
    with pytest.raises(ValueError, match=message):
        PatchSampler(load_folder(folder), degradation("denoise", 25.0), 121, CPU)


def test_a_photograph_a_little_smaller_than_a_patch_is_mirrored(monkeypatch, tmp_path):
    clean = np.random.default_rng(0).integers(0, 255, (20, 40, 3)).astype(np.uint8)
    save(tmp_path / "input" / "1.png", clean // 2)
    save(tmp_path / "target" / "1.png", clean)
    batches = []
    for limit in (folders.IN_MEMORY, 0):
        monkeypatch.setattr(folders, "IN_MEMORY", limit)
        patches = PatchSampler(load_folder(tmp_path), degradation("denoise", 25.0), 32, CPU)
        batches.append(patches.batch(4, 0))
    assert torch.equal(batches[0].target, batches[1].target)
    assert torch.equal((batches[0].target * 255).int() // 2, (batches[0].input * 255).round().int())
    mirrored = np.concatenate([clean, clean[:-13:-1]])  # 32 rows
    first = (batches[0].target[0] * 255).round().byte().permute(1, 2, 0).numpy()
    turned = [np.rot90(side, k) for side in (first, first[:, ::-1]) for k in range(4)]
    places = [mirrored[:, left : left + 32] for left in range(9)]
    assert any(np.array_equal(t, place) for t in turned for place in places)


def test_unknown_task_and_negative_noise():
    with pytest.raises(
        ValueError, match=r"one of denoise, denoise-raw, derain, deblur\. Got 'dehaze'"
    ):
        degradation("dehaze", 25.0)
    with pytest.raises(ValueError, match=r"sigma >= 0, .* Got sigma=-1"):
        degradation("denoise", -1.0)
