"""Measures trained weights on photographs they have not seen.

python examples/echoir/evaluate.py                                # those held out of the bundled ones
python examples/echoir/evaluate.py --weights W --data FOLDER      # one's own: clean images or pairs
"""

from dataclasses import dataclass
from pathlib import Path

import tyro
from console import fail_plainly, pick_device, score_table
from degradations import degradation
from folders import load_folder
from photographs import bundled
from rich.console import Console
from scores import evaluate
from tiles import restore
from weights import load_weights


@dataclass(frozen=True)
class Arguments:
    """Measures PSNR and SSIM of trained weights.

    Attributes:
        weights: file written by train.py.
        data: folder of clean images, which are degraded as in training, or of pairs; the bundled
            photographs that training held out, if none is given.
        device: `cpu`, `cuda`, ...; the fastest there is, by default.
        amp: compute in bfloat16.
        tile: largest size that is restored in one piece.
    """

    weights: Path = Path("runs/echoir/weights.safetensors")
    data: Path | None = None
    device: str | None = None
    amp: bool = False
    tile: int = 1024


def main(arguments: Arguments):
    device = pick_device(arguments.device)
    net, about = load_weights(arguments.weights, device)
    photographs = bundled().test if arguments.data is None else load_folder(arguments.data)
    results = evaluate(
        photographs,
        degradation(about["task"], about["sigma"]),
        lambda image: restore(net, image, device=device, amp=arguments.amp, tile=arguments.tile),
    )
    Console().print(
        score_table({"restored": results}, title=f"{arguments.weights}, {about['task']}")
    )


if __name__ == "__main__":
    with fail_plainly():
        main(tyro.cli(Arguments))
