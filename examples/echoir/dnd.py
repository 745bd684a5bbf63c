"""The Darmstadt Noise Dataset: its targets are not public, so what one measures is sent to its server.

50 photographs in MATLAB files of version 7.3, which are HDF5: `info.mat` with 20 boxes of each, and
`images_srgb/0001.mat` to `0050.mat` with `InoisySRGB`, values in [0, 1]. The server wants one file for each
photograph, with the cell array `Idenoised` of the 20 restored boxes, `israw` and `eval_version` (Ploetz and
Roth, "Benchmarking denoising algorithms with real photographs", CVPR 2017, and the code that comes with it).
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from scipy.io import savemat
from scores import channels_first
from torch import Tensor

EVAL_VERSION = "1.0"


def write_submission(
    root: Path, folder: Path, restore: Callable[[Tensor], Tensor]
) -> Iterator[Path]:
    """Restores the boxes of all photographs and writes the files for the server.

    Args:
        root: the folder of `info.mat` and `images_srgb`, or the one above it.
        folder: for the files; made if it does not exist.
        restore: maps (3, H, W) in [0, 1] to the same; clipped here, but not rounded.

    Yields:
        Each file, when it is complete.

    Raises:
        ValueError: if the data are not there, or the package h5py is not.
    """
    root = _locate(root)
    photographs = read_boxes(root / "info.mat")
    for number in range(1, len(photographs) + 1):
        _present(root, number)  # before hours of work, not after
    folder.mkdir(parents=True, exist_ok=True)
    for number, boxes in enumerate(photographs, 1):
        noisy = read_photograph(_present(root, number))
        restored = np.empty(len(boxes), object)  # a cell array in MATLAB
        for k, (top, left, bottom, right) in enumerate(boxes):
            clean = restore(channels_first(noisy[top:bottom, left:right])).clamp(0, 1)
            restored[k] = clean.permute(1, 2, 0).numpy().astype(np.float32)
        path = folder / f"{number:04}.mat"
        savemat(path, {"Idenoised": restored, "israw": False, "eval_version": EVAL_VERSION})
        yield path


def read_boxes(path: Path) -> list[np.ndarray]:
    """For each photograph its boxes, (20, 4): top, left, bottom, right, as slices have them."""
    with _open(path) as file:
        try:
            references = np.asarray(file["info"]["boundingboxes"]).ravel()
            boxes = [np.asarray(file[reference]).T.astype(int) for reference in references]
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(
                f"DND's info.mat must hold info.boundingboxes. Got {path}: {error}. Download it anew."
            ) from error
    for box in boxes:  # MATLAB counts from one and includes the last
        box[:, :2] -= 1
    return boxes


def read_photograph(path: Path) -> np.ndarray:
    """The noisy photograph, float32, (H, W, 3) in [0, 1]."""
    with _open(path) as file:
        if "InoisySRGB" not in file:
            raise ValueError(
                f"A photograph of DND must hold InoisySRGB. Got {path} with {', '.join(file)}. "
                "Name the folder that holds images_srgb, not images_raw."
            )
        return np.asarray(file["InoisySRGB"], np.float32).T  # MATLAB's order of axes is the reverse


def _locate(root: Path) -> Path:
    candidates = [root, *(root / name for name in ("dnd_2017", "DND", "Datasets/test/DND"))]
    for place in candidates:
        if (place / "info.mat").is_file() and (place / "images_srgb").is_dir():
            return place
    entries = sorted(p.name for p in root.iterdir()) if root.is_dir() else []
    raise ValueError(
        "DND must lie under `--data` as info.mat and images_srgb/0001.mat ..., perhaps in dnd_2017 or DND. "
        f"Got {root}, which holds {', '.join(entries[:8]) or 'nothing'}. Unpack it there, or name its folder."
    )


def _present(root: Path, number: int) -> Path:
    path = root / "images_srgb" / f"{number:04}.mat"
    if not path.is_file():
        raise ValueError(f"DND must be complete. Got no {path}. Download it anew.")
    return path


def _open(path: Path):
    try:
        import h5py
    except ImportError as error:
        raise ValueError(
            "DND's files are HDF5, which the package h5py reads. Got none installed. Install it by "
            "`pip install h5py`, or all that the example uses by `pip install -e '.[example]'`."
        ) from error
    try:
        return h5py.File(path, "r")
    except OSError as error:
        raise ValueError(
            f"A file of DND must be a MATLAB file of version 7.3. Got {path}: {error}. Download it anew."
        ) from error
