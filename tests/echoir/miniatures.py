"""Every published data set in miniature, as its layout has it: a few small images each.

A builder writes the files under a root and returns what they show: a list of (name, input, target).
"""

import numpy as np
from scenes import save, scene

HEIGHT, WIDTH = 40, 48


def pairs(count, seed=0):
    """Clean scenes and noisy ones; noise adds edges, as rain does."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        clean = scene(rng, HEIGHT, WIDTH)
        degraded = (clean + rng.normal(0, 20, clean.shape)).clip(0, 255).round().astype(np.uint8)
        found.append((degraded, clean))
    return found


def shifted(count):
    """Clean scenes, and what a second camera saw a pixel beside them, through a veil.

    In a flat frame and far from white, so that neither a border nor clipping tells the two apart: the
    shift aligns them exactly, and what is left is the veil.
    """
    rng = np.random.default_rng(0)
    found = []
    for i in range(count):
        clean = np.full((HEIGHT, WIDTH, 3), 90, np.uint8)
        clean[6:-6, 6:-6] = scene(rng, HEIGHT - 12, WIDTH - 12) // 2
        beside = np.roll(clean, ((1, 0), (0, -1), (1, 1))[i % 3], (0, 1))
        found.append((beside + np.uint8(30), clean))
    return found


def collection(name, below="Datasets/test", show=pairs):
    """Restormer's collection: `Datasets/test/NAME/{input,target}`."""

    def build(root):
        made = []
        for i, (degraded, clean) in enumerate(show(3), 1):
            save(root / below / name / "input" / f"{i}.png", degraded)
            save(root / below / name / "target" / f"{i}.png", clean)
            made.append((f"{i}.png", degraded, clean))
        return made

    return build


def side_by_side(name, rainy):
    def build(root):
        made = []
        for i, (degraded, clean) in enumerate(pairs(3), 1):
            halves = (degraded, clean) if rainy == "left" else (clean, degraded)
            save(root / name / f"{i}.png", np.concatenate(halves, 1))
            made.append((f"{i}.png", degraded, clean))
        return made

    return build


def rain1400(root):
    made = []
    for scene_number, (_, clean) in enumerate(pairs(2), 901):
        save(root / "Rain1400" / "ground_truth" / f"{scene_number}.png", clean)
        for i in range(1, 15):
            degraded = (clean // 2 + 5 * i).astype(np.uint8)
            save(root / "Rain1400" / "rainy_image" / f"{scene_number}_{i}.png", degraded)
            made.append((f"{scene_number}_{i}.png", degraded, clean))
    return made


def gopro(part):
    def build(root):
        made = []
        for i, (degraded, clean) in enumerate(pairs(4)):
            name, number = ("GOPR0384_11_00", "GOPR0385_11_01")[i // 2], f"{i:06}.png"
            save(root / "GOPRO_Large" / part / name / "blur" / number, degraded)
            save(root / "GOPRO_Large" / part / name / "blur_gamma" / number, clean // 3)
            save(root / "GOPRO_Large" / part / name / "sharp" / number, clean)
            made.append((f"{name}/{number}", degraded, clean))
        return made

    return build


def hide(root):
    made = []
    for i, (degraded, clean) in enumerate(pairs(3)):
        part = "test-close-ups" if i < 2 else "test-long-shot"
        save(root / "HIDE_dataset" / "test" / part / f"{i}fromGOPR.png", degraded)
        save(root / "HIDE_dataset" / "GT" / f"{i}fromGOPR.png", clean)
        made.append((f"{i}fromGOPR.png", degraded, clean))
    save(root / "HIDE_dataset" / "GT" / "of_a_training_image.png", clean)
    return made


def realblur(camera, part="test"):
    folder = {
        "J": "RealBlur-J_ECC_IMCORR_centroid_itensity_ref",
        "R": "RealBlur-R_BM3D_ECC_IMCORR_centroid_itensity_ref",
    }[camera]

    def build(root):
        made, lines = [], []
        for i, (degraded, clean) in enumerate(shifted(3), 1):
            where = f"{folder}/scene{i // 2:03}"
            save(root / where / "blur" / f"blur_{i}.png", degraded)
            save(root / where / "gt" / f"gt_{i}.png", clean)
            lines.append(f"{where}/gt/gt_{i}.png {where}/blur/blur_{i}.png ")
            made.append((f"scene{i // 2:03}/blur_{i}.png", degraded, clean))
        (root / f"RealBlur_{camera}_{part}_list.txt").write_text("\n".join(lines) + "\n")
        return made

    return build


def sidd_blocks(root):
    from scipy.io import savemat

    images, blocks = 2, 3
    made = pairs(images * blocks)
    shape = (images, blocks, HEIGHT, WIDTH, 3)
    for kind, side in (("Noisy", 0), ("Gt", 1)):
        name = f"Validation{kind}BlocksSrgb"
        array = np.stack([pair[side] for pair in made]).reshape(shape)
        (root / "SIDD").mkdir(exist_ok=True)
        savemat(root / "SIDD" / f"{name}.mat", {name: array})
    return [(f"{i // 3 + 1:04}_{i % 3 + 1:02}", *pair) for i, pair in enumerate(made)]


def sidd_medium(root):
    made = []
    folders = ["0001_001_S6_00100_00060_3200_L", "0002_001_S6_00100_00020_3200_N"]
    for i, (degraded, clean) in enumerate(pairs(4)):
        folder, number = folders[i // 2], f"{10 + i % 2:03}"
        place = root / "SIDD_Medium_Srgb" / "Data" / folder
        save(place / f"{folder[:4]}_NOISY_SRGB_{number}.PNG", degraded)
        save(place / f"{folder[:4]}_GT_SRGB_{number}.PNG", clean)
        made.append((f"{folder}/{folder[:4]}_NOISY_SRGB_{number}.PNG", degraded, clean))
    return made


def dnd(root, count=2):
    """MATLAB's version 7.3 is HDF5, its axes in reverse and its cells references."""
    import h5py

    rng = np.random.default_rng(0)
    (root / "dnd_2017" / "images_srgb").mkdir(parents=True)
    made = []
    with h5py.File(root / "dnd_2017" / "info.mat", "w") as file:
        references = file.create_dataset("info/boundingboxes", (1, count), h5py.ref_dtype)
        for i in range(count):
            photograph = rng.random((70, 90, 3), np.float32)
            boxes = [
                (1 + k, 1 + 2 * k, 32 + k, 40 + 2 * k) for k in range(20)
            ]  # from one, inclusive
            stored = file.create_dataset(f"#refs#/{i}", data=np.array(boxes, float).T)
            references[0, i] = stored.ref
            with h5py.File(root / "dnd_2017" / "images_srgb" / f"{i + 1:04}.mat", "w") as image:
                image["InoisySRGB"] = photograph.T
            crops = [photograph[a - 1 : c, b - 1 : d] for a, b, c, d in boxes]
            made.append(crops)
    return made


# Every layout of every test set with public targets, as what `evaluate.py --set` calls it and its builder.
LAYOUTS = [
    ("test100", collection("Test100")),
    ("test100", side_by_side("Test100", rainy="right")),
    ("test100", side_by_side("test_syn", rainy="left")),
    ("rain100h", collection("Rain100H")),
    ("rain100l", collection("Rain100L", below="test")),
    ("test2800", collection("Test2800", below=".")),
    ("test2800", rain1400),
    ("test1200", collection("Test1200")),
    ("test1200", side_by_side("DID-MDN-test", rainy="left")),
    ("gopro", collection("GoPro")),
    ("gopro", gopro("test")),
    ("hide", collection("HIDE")),
    ("hide", hide),
    ("realblur-r", collection("RealBlur_R", show=shifted)),
    ("realblur-r", realblur("R")),
    ("realblur-j", collection("RealBlur_J", show=shifted)),
    ("realblur-j", realblur("J")),
    ("sidd", sidd_blocks),
]
