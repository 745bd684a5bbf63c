"""Cuts a data set of large images into crops, which are read in a hundredth of the time.

python examples/echoir/crops.py SIDD_Medium_Srgb sidd-crops
python examples/echoir/train.py --task denoise --data sidd-crops

A photograph is decoded whole for each patch that is drawn from it: a second for the 16 megapixels of SIDD
and their input, 20 milliseconds for a crop of 512 x 512. Crops overlap a little, so that patches may lie
anywhere; those of a scene stay together, so that no scene is on two sides of a split.
"""

import re
from dataclasses import dataclass
from pathlib import Path

import tyro
from console import fail_plainly
from folders import find_pairs
from PIL import Image
from rich.console import Console
from rich.progress import track


@dataclass(frozen=True)
class Arguments:
    """Cuts a data set into crops.

    Attributes:
        data: folder of pairs, in a layout that train.py knows.
        output: folder for the crops, SCENE/{input,target}/*.png; must not exist.
        size: height and width of a crop.
        overlap: pixels that two neighbors share at least.
    """

    data: tyro.conf.Positional[Path]
    output: tyro.conf.Positional[Path]
    size: int = 512
    overlap: int = 96


def main(a: Arguments):
    if not 0 <= a.overlap < a.size:
        raise ValueError(
            f"Crops must overlap by less than their size. Got --size {a.size}, --overlap {a.overlap}. "
            "Use e.g. 512 and 96."
        )
    if a.output.exists():
        raise ValueError(
            f"The output folder must not exist, so that no old crops stay in it. Got {a.output}. "
            "Name another, or remove it."
        )
    console, count = Console(), 0
    for source in track(find_pairs(a.data), "cutting", console=console):
        photograph = source.read()
        scene, name = (re.sub(r"\W+", "-", word) for word in (source.scene, source.name))
        for top, bottom in spans(source.size[0], a.size, a.overlap):
            for left, right in spans(source.size[1], a.size, a.overlap):
                for kind in ("input", "target"):
                    path = a.output / scene / kind / f"{name}-at-{top}-{left}.png"
                    path.parent.mkdir(parents=True, exist_ok=True)
                    crop = getattr(photograph, kind)[top:bottom, left:right]
                    Image.fromarray(crop).save(path, compress_level=1)
                count += 1
    console.print(f"{count} pairs of crops in {a.output}", soft_wrap=True)


def spans(size: int, crop: int, overlap: int) -> list[tuple[int, int]]:
    """Cuts 0..size into the fewest spans of length `crop` that share `overlap` or more."""
    if size <= crop:
        return [(0, size)]
    count = -(-(size - overlap) // (crop - overlap))
    starts = [round(i * (size - crop) / (count - 1)) for i in range(count)]
    return [(start, start + crop) for start in starts]


if __name__ == "__main__":
    with fail_plainly():
        main(tyro.cli(Arguments))
