"""Restores images with trained weights.

    python examples/echoir/restore.py PHOTO.jpg FOLDER --output restored

Files and folders in, images of the same names out.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from console import fail_plainly, pick_device
from photographs import list_images, load_image
from PIL import Image
from rich.console import Console
from rich.progress import track
from scores import round8
from tiles import restore
from weights import load_weights


@dataclass(frozen=True)
class Arguments:
    """Restores images.

    Attributes:
        inputs: image files, or folders of them.
        output: folder for the restored images; made if it does not exist.
        weights: file written by train.py.
        device: `cpu`, `cuda`, ...; the fastest there is, by default.
        amp: compute in bfloat16.
        tile: larger images are cut into tiles of this size; lower it if memory runs out.
        overlap: pixels shared by neighboring tiles, over which their seams are blended.
    """

    inputs: tyro.conf.Positional[tuple[Path, ...]]
    output: Path
    weights: Path = Path("runs/echoir/weights.safetensors")
    device: str | None = None
    amp: bool = False
    tile: int = 512
    overlap: int = 64


def main(arguments: Arguments):
    device = pick_device(arguments.device)
    paths = collect(arguments.inputs, arguments.output)
    net, _ = load_weights(arguments.weights, device)
    arguments.output.mkdir(parents=True, exist_ok=True)
    console = Console()
    for path in track(paths, "restoring", console=console):
        image = torch.from_numpy(load_image(path).astype(np.float32) / 255).permute(2, 0, 1)
        restored = restore(
            net,
            image,
            device=device,
            amp=arguments.amp,
            tile=arguments.tile,
            overlap=arguments.overlap,
        )
        pixels = (round8(restored) * 255).byte().permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(arguments.output / path.name, quality=95)
    console.print(f"{len(paths)} restored in {arguments.output}")


def collect(inputs: tuple[Path, ...], output: Path) -> list[Path]:
    """The files that are meant, each with a name of its own.

    Raises:
        ValueError: if there is none, two would have one output, or one would overwrite itself.
    """
    if not inputs:
        raise ValueError("There must be an image or a folder to restore. Got none. Name one.")
    paths = []
    for path in inputs:
        paths += list_images(path) if path.is_dir() else [path]
    named: dict[str, Path] = {}
    for path in paths:
        if path.name in named:
            raise ValueError(
                "Input images must have different names, because the outputs keep them. Got "
                f"{named[path.name]} and {path}. Restore them into two folders."
            )
        if path.resolve().parent == output.resolve():
            raise ValueError(
                f"The output folder must not be the input's. Got {path} and --output {output}: "
                "the original would be lost. Name another folder."
            )
        named[path.name] = path
    return paths


if __name__ == "__main__":
    with fail_plainly():
        main(tyro.cli(Arguments))
