"""Restores images: removes noise, with the weights that lie beside it, or does what others were trained to.

    python examples/echoir/restore.py PHOTO.jpg                      # to restored/PHOTO.jpg
    python examples/echoir/restore.py PHOTO.jpg FOLDER 'ALBUM/**/*.tif' --output clean
    python examples/echoir/restore.py PHOTO.jpg --self-ensemble      # better, eight times the time
    python examples/echoir/restore.py PHOTO.jpg --weights runs/echoir/weights.safetensors    # or .onnx

Images of the same names, formats, bit depths and metadata come out. Exit codes: 0 all are restored,
1 some could not be (the rest is), 2 a mistake in the arguments, 74 the memory did not suffice.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import torch
import tyro
from console import fail_plainly, pick_device
from ensemble import self_ensemble
from image_file import read_image, write_image
from inputs import Job, find_jobs, left_out
from onnx_network import OnnxNetwork
from rich.console import Console
from rich.progress import track
from tiles import Scope, restore, restore_with
from torch import Tensor
from weights import DENOISER, JPEG_DENOISER, load_weights

FAILED = 1
Restorer = Callable[[Tensor], Tensor]  # maps (3, H, W) in [0, 1] to the same


@dataclass(frozen=True)
class Arguments:
    """Restores images.

    Attributes:
        inputs: image files, folders of them (not of their subfolders), or patterns with *, ? and **.
        output: folder for the restored images; made if it does not exist.
        weights: file written by train.py, or by export.py, which onnxruntime runs. By default those of blind
            denoisers, for noise of sigma 5 to 50: one for JPEG files, which blur the noise, one for others.
        device: `cpu`, `cuda`, ...; the fastest there is, by default.
        amp: compute in bfloat16.
        tile: larger images are cut into tiles of this size; lower it if memory runs out.
        overlap: pixels shared by neighboring tiles, over which they are blended.
        statistics: what tiles know of the image: `whole`, as if it were in one piece; `local`, windows of
            the training patches' size; `tile`, only themselves, in half the time.
        window: height and width of the windows of `local`; 48 by default.
        self_ensemble: the mean over eight flips and rotations.
    """

    inputs: tyro.conf.Positional[tuple[str, ...]]
    output: Path = Path("restored")
    weights: Path | None = None
    device: str | None = None
    amp: bool = False
    tile: int = 512
    overlap: int = 64
    statistics: Scope = "whole"
    window: int | None = None
    self_ensemble: bool = False


def main(a: Arguments):
    jobs = find_jobs(a.inputs, a.output)
    restorer = restorers(a)
    restorer("PNG")  # what is wrong with the arguments shows now
    make_folder(a.output)
    console, problems = Console(), Console(stderr=True, soft_wrap=True, highlight=False)
    if others := left_out(a.inputs):
        console.print(others, markup=False, highlight=False, soft_wrap=True)
    done = 0
    for job in track(jobs, "restoring", console=console):
        try:
            restore_file(job, restorer)
            done += 1
        except ValueError as error:  # of this file: the others may be well
            problems.print(str(error), markup=False)
    console.print(f"{done} of {len(jobs)} restored in {a.output}", markup=False, soft_wrap=True)
    if done < len(jobs):
        sys.exit(FAILED)


def restorers(a: Arguments) -> Callable[[str], Restorer]:
    """By the format of a file, the function that restores its image; weights are loaded when one needs them."""

    @cache
    def with_weights(weights: Path) -> Restorer:
        function = load(a, weights)
        if a.self_ensemble:
            function = self_ensemble(function)
        function(torch.zeros(3, 8, 8))
        return function

    return lambda kind: with_weights(a.weights or (JPEG_DENOISER if kind == "JPEG" else DENOISER))


def load(a: Arguments, weights: Path) -> Restorer:
    """The function that restores an image with such weights, as the arguments want it."""
    if a.window is not None and a.statistics != "local":
        raise ValueError(
            "`--window` must come with --statistics local, which alone has windows. Got --window "
            f"{a.window} with --statistics {a.statistics}. Add it, or leave --window out."
        )
    tiles = {"tile": a.tile, "overlap": a.overlap}
    if weights.suffix == ".onnx":
        if a.statistics == "local" or a.amp or a.device not in (None, "cpu"):
            raise ValueError(
                "An exported network must run as it was exported: on the CPU, in float32, without "
                f"local statistics. Got device={a.device}, amp={a.amp}, statistics={a.statistics}. "
                "Use the weights that it was exported from."
            )
        network = OnnxNetwork(weights)
        whole = a.statistics == "whole"
        return partial(restore_with, network, whole=whole, multiple=network.multiple, **tiles)
    device = pick_device(a.device)
    net, _ = load_weights(weights, device)
    chosen = {"statistics": a.statistics, "multiple": net.config.multiple}
    if a.window is not None:
        chosen["window"] = a.window
    return partial(restore, net, device=device, amp=a.amp, **tiles, **chosen)


def restore_file(job: Job, restorer: Callable[[str], Restorer]):
    """Restores one file into another; nothing is written where it cannot be."""
    image = read_image(job.source)
    make_folder(job.target.parent)
    write_image(job.target, image.restored(restorer(image.format)))


def make_folder(folder: Path):
    """Makes a folder, unless it is there.

    Raises:
        ValueError: if that is not allowed, or a file has the name.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"The output must be a folder that can be made. Got {folder}: {error.strerror}. Name another."
        ) from error


if __name__ == "__main__":
    with fail_plainly():
        main(tyro.cli(Arguments))
