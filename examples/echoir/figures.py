"""Draws what a run of train.py has learned.

    python examples/echoir/figures.py                              # of runs/echoir, into runs/echoir/figures
    python examples/echoir/figures.py --data FOLDER --name PHOTO   # on photographs of one's own

    crops.png         side by side, enlarged where the photograph has most detail: input, each method, truth
    differences.png   what each leaves wrong, all in one color scale
    training.png      PSNR, losses, value gap and barrier over time and steps
    widths.png        the learned s_f and s_g of every Echo-Upsampler
    weights.png       the weights that one Echo-Upsampler gives the neighbors of one pixel

Needs the extras `example` and `plot`: `pip install -e '.[example,plot]'`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import tyro
from comparison_figures import Comparison, draw_crops, draw_differences
from console import fail_plainly, pick_device
from degradations import Degradation, degradation, one_sigma
from folders import load_folder
from model import EchoIR
from photographs import Source, bundled
from scores import evaluate
from tiles import restore
from training_figures import draw_training, draw_widths
from weight_figure import draw_weights
from weights import load_weights


@dataclass(frozen=True)
class Arguments:
    """Draws what a run of train.py has learned.

    Attributes:
        run: the run's folder; each method with weights in it is drawn.
        output: folder for the figures; `figures` in the run's folder by default.
        data: folder of clean images or of pairs; the bundled photographs held out, by default.
        name: of the photograph that weights.png is drawn on; the first, by default.
        level: of the Echo-Upsampler in weights.png; 0 is the finest.
        pixel: row and column in the photograph that weights.png looks at; on its strongest edge, by default.
        box: height and width of what crops.png enlarges.
        device: `cpu`, `cuda`, ...; the fastest there is, by default.
    """

    run: Path = Path("runs/echoir")
    output: Path | None = None
    data: Path | None = None
    name: str | None = None
    level: int = 0
    pixel: tuple[int, int] | None = None
    box: int = 72
    device: str | None = None


def main(a: Arguments):
    if a.box < 1:
        raise ValueError(f"`--box` must be above 0, in pixels. Got {a.box}. Use e.g. 72.")
    device = pick_device(a.device)
    loaded = load_run(a.run, device)
    nets = {method: net for method, (net, _) in loaded.items()}
    _, about = next(iter(loaded.values()))
    photographs = bundled().test if a.data is None else load_folder(a.data)
    comparisons = compare(
        nets, photographs, degradation(about["task"], one_sigma(about["sigma"])), device
    )
    method, net = next(iter(nets.items()))
    figures = {
        "crops": draw_crops(comparisons, a.box),
        "differences": draw_differences(comparisons),
        "training": draw_training({name: a.run / name / "metrics.jsonl" for name in nets}),
        "widths": draw_widths(nets),
        "weights": draw_weights(net, method, pick(comparisons, a.name), a.level, a.pixel),
    }
    output = a.output or a.run / "figures"
    output.mkdir(parents=True, exist_ok=True)
    for name, figure in figures.items():
        figure.savefig(output / f"{name}.png", dpi=150)
        print(output / f"{name}.png")


def load_run(folder: Path, device: torch.device) -> dict[str, tuple[EchoIR, dict[str, Any]]]:
    """The network of each method in a run's folder, and what is known about it.

    Raises:
        ValueError: if there is none.
    """
    paths = sorted(folder.glob("*/weights.safetensors"))
    if not paths:
        raise ValueError(
            f"`--run` must be the folder of a finished run. Got {folder}, in which no method has weights. "
            "Train first, with `python examples/echoir/train.py`."
        )
    return {path.parent.name: load_weights(path, device) for path in paths}


def compare(
    nets: dict[str, EchoIR],
    photographs: Sequence[Source],
    degrade: Degradation,
    device: torch.device,
) -> list[Comparison]:
    """Restores photographs by each method."""
    results = [
        evaluate(photographs, degrade, partial(restore, net, device=device))
        for net in nets.values()
    ]
    return [
        Comparison(
            rows[0].name,
            rows[0].target,
            rows[0].input,
            {name: result.restored for name, result in zip(nets, rows, strict=True)},
        )
        for rows in zip(*results, strict=True)
    ]


def pick(comparisons: list[Comparison], name: str | None) -> Comparison:
    """The photograph of a name, or the first.

    Raises:
        ValueError: if there is none of it.
    """
    found = [c for c in comparisons if name in (None, c.name)]
    if not found:
        raise ValueError(
            f"`--name` must be one of {', '.join(c.name for c in comparisons)}. Got {name!r}. Use "
            "one of these, or leave it out for the first."
        )
    return found[0]


if __name__ == "__main__":
    with fail_plainly():
        main(tyro.cli(Arguments))
