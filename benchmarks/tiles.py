"""What tiles cost and what they change: memory on a photograph of 12 megapixels, PSNR and seams on those that fit.

    python benchmarks/tiles.py --weights runs/echoir/weights.safetensors

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

EXAMPLE = Path(__file__).parents[1] / "examples" / "echoir"
sys.path.insert(0, str(EXAMPLE))

from degradations import degradation, one_sigma  # noqa: E402
from model import PRESETS, EchoIR  # noqa: E402
from photographs import bundled  # noqa: E402
from scores import psnr  # noqa: E402
from tiles import cut, restore  # noqa: E402
from weights import load_weights, save_weights  # noqa: E402

CPU = torch.device("cpu")
SIZE = (3000, 4000)
TILE, OVERLAP = 128, 64  # small, for many borders


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
            [sys.executable, EXAMPLE / "restore.py", *words, *options], stdout=subprocess.DEVNULL
        )
        _, status, usage = os.wait4(process.pid, 0)
        if status:
            raise RuntimeError(f"restore.py failed with {status}")
        return usage.ru_maxrss * 1024 / 1e9, usage.ru_utime + usage.ru_stime


def borders(size: int, align: int) -> list[int]:
    """Columns at which tiles begin, end, hand over to another, and are halfway there."""
    found = []
    for a, b in pairwise(cut(size, TILE, OVERLAP, align)):
        found += [round(b.start + share * (a.stop - b.start)) for share in (0, 0.25, 0.5, 0.75, 1)]
    return found


def prominence(image: torch.Tensor, columns: list[int]) -> float:
    """The mean gradient across columns, in units of that of the 16 columns around each."""
    slope = image.diff(dim=2).abs().mean((0, 1))
    at = torch.stack([slope[c - 1] for c in columns]).mean()
    around = torch.stack([slope[max(c - 9, 0) : c + 8].mean() for c in columns]).mean()
    return float(at / around)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--weights", type=Path, default=Path("runs/echoir/weights.safetensors"))
    parser.add_argument("--onnx", type=Path, help="the same, exported; measured too if it is given")
    a = parser.parse_args()
    torch.set_num_threads(1)

    print("12 megapixels: peak GB, seconds of CPU")
    with tempfile.TemporaryDirectory() as folder:
        small = Path(folder, "small.safetensors")
        save_weights(small, EchoIR(PRESETS["small"]), {})
        cases = {
            "given weights": (a.weights,),
            "given weights, local": (a.weights, "--statistics", "local"),
        }
        cases |= {
            "given weights, each tile's": (a.weights, "--statistics", "tile"),
            "small": (small,),
        }
        if a.onnx:
            cases["onnxruntime"] = (a.onnx,)
        for name, words in cases.items():
            print("  {:<27} {:.2f} {:6.0f}".format(name, *peak(*words)), flush=True)

    net, about = load_weights(a.weights, CPU)
    degrade = degradation(about["task"], one_sigma(about["sigma"]))
    print(
        "tiles of 128, overlap 64: PSNR, less that in one piece, dB apart, prominence of borders, and in one piece"
    )
    for photograph in bundled().test:
        target = torch.from_numpy(photograph.target.astype(np.float32) / 255).permute(2, 0, 1)
        degraded = degrade(photograph.target.astype(np.float32) / 255, np.random.default_rng(0))
        image = torch.from_numpy(np.ascontiguousarray(degraded.transpose(2, 0, 1)))
        for statistics in ("whole", "local", "tile"):
            columns = borders(image.shape[2], 24 if statistics == "local" else 8)
            options = {"device": CPU, "statistics": statistics}
            whole = restore(net, image, tile=4096, **options)
            tiled = restore(net, image, tile=TILE, overlap=OVERLAP, **options)
            print(
                f"  {photograph.name:<8} {statistics:<6} {psnr(tiled, target):.3f} "
                f"{psnr(tiled, target) - psnr(whole, target):+.4f} {psnr(tiled, whole):5.1f} "
                f"{prominence(tiled, columns):.4f} {prominence(whole, columns):.4f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
