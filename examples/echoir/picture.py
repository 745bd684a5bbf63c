"""The picture at the end: for each photograph, input, restored image, truth, and what is left wrong."""

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from scores import Result, psnr
from torch import Tensor

SIZE, GAP, LINE = 256, 6, 18  # pixels: a crop, the space between two, the line of text below
ERROR = 0.2  # the error, in units of white, that the brightest color of the map stands for


def save_grid(path: Path, results: list[Result]):
    """Writes a PNG with one row a photograph, cropped to its center."""
    width, height = 4 * (SIZE + GAP) + GAP, len(results) * (SIZE + LINE + GAP) + GAP
    grid = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(grid)
    for row, result in enumerate(results):
        error = (result.restored - result.target).abs().mean(0)
        columns = [
            (f"{result.name}: input {psnr(result.input, result.target):.2f} dB", result.input),
            (f"restored {psnr(result.restored, result.target):.2f} dB", result.restored),
            ("truth", result.target),
            (f"error, up to {ERROR:.0%} of white", _heat(error)),
        ]
        top = GAP + row * (SIZE + LINE + GAP)
        for column, (label, image) in enumerate(columns):
            left = GAP + column * (SIZE + GAP)
            grid.paste(_center(image), (left, top))
            draw.text((left, top + SIZE + 3), label, fill="black")
    grid.save(path)


def _center(image: Tensor) -> Image.Image:
    pixels = (image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
    whole = Image.fromarray(np.ascontiguousarray(pixels))
    left, top = ((size - SIZE) // 2 for size in whole.size)
    return whole.crop((left, top, left + SIZE, top + SIZE))


def _heat(error: Tensor) -> Tensor:
    """(H, W) to (3, H, W): black, red, yellow, white."""
    scaled = 3 * (error / ERROR).clamp(0, 1)
    return (scaled - scaled.new_tensor([0.0, 1.0, 2.0])[:, None, None]).clamp(0, 1)
