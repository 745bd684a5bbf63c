"""What tiles cost and what they change: memory on a photograph of 12 megapixels, PSNR and seams on those that fit.

    python benchmarks/large_images.py --weights runs/echoir/weights.safetensors

Memory is the peak of a process of its own that restores a JPEG by examples/echoir/restore.py, all of Python and torch
included. It depends on the network's size, not on its weights: the preset `small` is measured untrained.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "echoir"))

from degradations import degradation, one_sigma
from model import PRESETS, EchoIR
from photographs import bundled
from scores import psnr
from tiles import cut, restore
from weights import load_weights, save_weights

RESTORE = Path(__file__).parents[1] / "examples" / "echoir" / "restore.py"
CPU = torch.device("cpu")
SIZE = (3000, 4000)
TILES, OVERLAP = (128, 152, 176), 64  # small, for many borders


def peak(weights: Path, *options: str) -> tuple[float, float]:
    """GB and seconds of the CPU that restoring one photograph of 12 megapixels takes."""
    with tempfile.TemporaryDirectory() as folder:
        china = next(p.target for p in bundled().test if p.name == "china")
        image = Image.fromarray(china).resize(SIZE[::-1], Image.Resampling.BICUBIC)
        image.save(Path(folder, "photograph.jpg"), quality=95)
        words = [
            Path(folder, "photograph.jpg"),
            "--output",
            Path(folder, "out"),
            "--weights",
            weights,
        ]
        process = subprocess.Popen(
            [sys.executable, RESTORE, *words, *options], stdout=subprocess.DEVNULL
        )
        _, status, usage = os.wait4(process.pid, 0)
        if status:
            raise RuntimeError(f"restore.py failed with {status}")
        return usage.ru_maxrss * 1024 / 1e9, usage.ru_utime + usage.ru_stime


def at_borders(image: torch.Tensor, tile: int, align: int) -> tuple[float, float]:
    """Sums of the gradient across tile borders, and of the means of the 16 lines around each.

    Borders are where tiles begin, end, hand over to another, and are a quarter of the way there.
    """
    at = around = 0.0
    for turned in (image, image.mT):  # columns, rows
        slope = turned.diff(dim=2).abs().mean((0, 1))
        for a, b in pairwise(cut(turned.shape[2], tile, OVERLAP, align)):
            for share in (0, 0.25, 0.5, 0.75, 1):
                line = round(b.start + share * (a.stop - b.start))
                at += float(slope[line - 1])
                around += float(slope[max(line - 9, 0) : line + 8].mean())
    return at, around


def measure_memory(weights: Path, onnx: Path | None):
    print("12 megapixels: peak GB, seconds of CPU")
    with tempfile.TemporaryDirectory() as folder:
        small = Path(folder, "small.safetensors")
        save_weights(small, EchoIR(PRESETS["small"]), {})
        cases = {
            "given weights": (weights,),
            "given weights, local": (weights, "--statistics", "local"),
            "given weights, each tile's": (weights, "--statistics", "tile"),
        }
        if onnx:
            cases["onnxruntime"] = (onnx,)
        cases["preset small"] = (small,)
        for name, words in cases.items():
            print("  {:<27} {:.2f} {:6.0f}".format(name, *peak(*words)), flush=True)


def measure_borders(weights: Path):
    net, about = load_weights(weights, CPU)
    degrade = degradation(about["task"], one_sigma(about["sigma"]))
    print(f"overlap {OVERLAP}: tile, PSNR, less that in one piece, dB apart")
    for statistics in ("whole", "local", "tile"):
        align = 24 if statistics == "local" else 8
        sums = np.zeros((2, 2))
        for photograph in bundled().test:
            clean = photograph.target.astype(np.float32) / 255
            target = torch.from_numpy(clean).permute(2, 0, 1)
            degraded = degrade(clean, np.random.default_rng(0)).transpose(2, 0, 1)
            image = torch.from_numpy(np.ascontiguousarray(degraded))
            options = {"device": CPU, "statistics": statistics}
            whole = restore(net, image, tile=4096, **options)
            for tile in TILES:
                tiled = restore(net, image, tile=tile, overlap=OVERLAP, **options)
                sums += [at_borders(tiled, tile, align), at_borders(whole, tile, align)]
                print(
                    f"  {statistics:<6} {photograph.name:<8} {tile} {psnr(tiled, target):.3f} "
                    f"{psnr(tiled, target) - psnr(whole, target):+.4f} {psnr(tiled, whole):5.1f}",
                    flush=True,
                )
        tiled, whole = sums[:, 0] / sums[:, 1]
        print(
            f"  {statistics}: gradient across borders {tiled:.4f} of that around them; in one piece {whole:.4f}"
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--weights", type=Path, default=Path("runs/echoir/weights.safetensors"))
    parser.add_argument("--onnx", type=Path, help="the same, exported; measured too if it is given")
    a = parser.parse_args()
    torch.set_num_threads(1)
    measure_borders(a.weights)
    measure_memory(a.weights, a.onnx)


if __name__ == "__main__":
    main()
