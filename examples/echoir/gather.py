"""Makes a folder of training photographs from folders of large ones.

    python examples/echoir/gather.py /usr/share/backgrounds /usr/share/wallpapers --output photographs
    python examples/echoir/gather.py /usr/share/wallpapers --leave-out '*Honeywave*' --bundled --output photographs

Each photograph is shrunk to a short side of 720 pixels, which removes the blocks of JPEG and the noise of
the sensor: what a network is to learn must not be in its targets. Left out: links, images smaller than
that, copies of one another at other sizes, and flat graphics.
"""

import sys
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro
from photographs import bundled
from PIL import Image

ENDINGS = (".jpg", ".jpeg", ".png")
FLAT = 1.5  # mean difference of neighboring pixels, of 255, below which an image is a graphic
SAME = 6.0  # mean difference of two thumbnails, of 255, below which they show one photograph


@dataclass(frozen=True)
class Arguments:
    """Makes a folder of training photographs from folders of large ones.

    Attributes:
        folders: where to look, in all subfolders.
        output: folder to write to, as PNG.
        short_side: of the photographs written, in pixels.
        leave_out: patterns (* and ?) of paths to leave out, graphics that pass for photographs.
        bundled: write the photographs too that train.py learns from without --data.
    """

    folders: Annotated[tuple[Path, ...], tyro.conf.Positional]
    output: Path
    short_side: int = 720
    leave_out: tuple[str, ...] = ()
    bundled: bool = False


def gather(a: Arguments) -> list[str]:
    """Writes the photographs, and returns their names in order."""
    for folder in a.folders:
        if not folder.is_dir():
            raise ValueError(f"A folder to gather from must exist. Got {folder}. Check its name.")
    a.output.mkdir(parents=True, exist_ok=True)
    every = (path for folder in a.folders for path in folder.rglob("*") if is_image(path))
    found = sorted(p for p in every if not any(fnmatch(str(p), out) for out in a.leave_out))
    thumbnails: list[np.ndarray] = []
    names: list[str] = []
    for path in found:
        with Image.open(path) as opened:
            if min(opened.size) < a.short_side:
                continue
            image = opened.convert("RGB")
        thumbnail = np.asarray(image.resize((16, 16), Image.Resampling.BOX), np.float32)
        if any(np.abs(thumbnail - other).mean() < SAME for other in thumbnails):
            continue
        scale = a.short_side / min(image.size)
        size = (round(image.width * scale), round(image.height * scale))
        image = image.resize(size, Image.Resampling.LANCZOS, reducing_gap=3.0)
        if np.abs(np.diff(np.asarray(image, np.float32), axis=1)).mean() < FLAT:
            continue
        thumbnails.append(thumbnail)
        names.append(f"{len(names):03d}-{path.stem}.png")
        image.save(a.output / names[-1])
    if a.bundled:
        photographs = bundled()
        for photograph in photographs.train + photographs.validation:
            names.append(f"{photograph.name}.png")
            Image.fromarray(photograph.read().target).save(a.output / names[-1])
    return names


def is_image(path: Path) -> bool:
    return path.suffix.lower() in ENDINGS and path.is_file() and not path.is_symlink()


if __name__ == "__main__":
    names = gather(tyro.cli(Arguments))
    print(f"{len(names)} photographs")
    sys.exit(0 if names else 2)
