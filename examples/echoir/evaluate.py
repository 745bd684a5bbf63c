"""Measures trained weights: on photographs they have not seen, or on the papers' test sets.

python examples/echoir/evaluate.py                                # those held out of the bundled ones
python examples/echoir/evaluate.py --data FOLDER                  # one's own: clean images or pairs
python examples/echoir/evaluate.py --set rain100h gopro --data Datasets/test --json results.json
python examples/echoir/evaluate.py --set gaussian --sigma 50 --data CBSD68
python examples/echoir/evaluate.py --set dnd --data dnd_2017 --submission FOLDER
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from benchmark import Outcome, measure, results_table, save_json
from console import fail_plainly, pick_device, score_table
from degradations import degradation, one_sigma
from dnd import write_submission
from folders import load_folder
from photographs import bundled
from protocols import RGB
from rich.console import Console
from rich.progress import track
from scores import evaluate
from test_sets import SETS, gaussian_set
from tiles import restore
from torch import Tensor
from weights import load_weights

Name = Literal[(*SETS, "gaussian", "dnd")]  # type: ignore[valid-type]


@dataclass(frozen=True)
class Arguments:
    """Measures PSNR and SSIM of trained weights.

    Attributes:
        weights: file written by train.py.
        data: folder of clean images, which are degraded as in training, or of pairs; the bundled
            photographs that training held out, if none is given. With --set, the folder of the sets.
        sets: published test sets, each measured as the papers do; `gaussian` adds noise to the clean
            images of --data, and `dnd` writes the files that its server measures.
        sigma: noise to add, in units of 1 / 255; that of the training, by default, and 25 for
            weights that were trained for a range with 25 in it.
        json: file for the figures of every image; only with --set.
        submission: folder for the files that DND's server wants.
        device: `cpu`, `cuda`, ...; the fastest there is, by default.
        amp: compute in bfloat16.
        tile: largest size that is restored in one piece.
    """

    weights: Path = Path("runs/echoir/weights.safetensors")
    data: Path | None = None
    sets: Annotated[tuple[Name, ...], tyro.conf.arg(name="set")] = ()  # type: ignore[valid-type]
    sigma: float | None = None
    json: Path | None = None
    submission: Path | None = None
    device: str | None = None
    amp: bool = False
    tile: int = 1024


def main(a: Arguments):
    check(a)
    device = pick_device(a.device)
    net, about = load_weights(a.weights, device)
    sigma = one_sigma(about["sigma"]) if a.sigma is None else a.sigma

    def restored(image: Tensor) -> Tensor:
        return restore(net, image, device=device, amp=a.amp, tile=a.tile)

    if a.sets:
        check_sigma(a, "gaussian" in a.sets)
        published(a, about, sigma, restored)
        return
    photographs = bundled().test if a.data is None else load_folder(a.data)
    check_sigma(a, about["task"] == "denoise" and any(p.input is None for p in photographs))
    results = evaluate(photographs, degradation(about["task"], sigma), restored)
    Console().print(score_table({"restored": results}, title=f"{a.weights}, {about['task']}"))


def check(a: Arguments):
    """Refuses what cannot be meant, before anything is computed."""
    if a.sets and a.data is None:
        raise ValueError(
            "`--set` must come with the folder of the sets. Got none. Name it by --data."
        )
    if a.json and not a.sets:
        raise ValueError("`--json` must come with --set. Got none. Name a set, or leave it out.")
    if a.json and a.json.is_dir():
        raise ValueError(f"`--json` must be a file. Got {a.json}, a folder. Name a file in it.")
    if a.sigma is not None:
        degradation("denoise", a.sigma)  # refuses what no noise has
    if ("dnd" in a.sets) != (a.submission is not None):
        raise ValueError(
            "`--set dnd` and `--submission FOLDER` must come together: DND's targets are not public, so "
            f"files are written for its server. Got --set {' '.join(a.sets)}, --submission "
            f"{a.submission}. Give both or none."
        )


def check_sigma(a: Arguments, is_used: bool):
    """Refuses a sigma where there are pairs, or where something else than noise is to be undone."""
    if a.sigma is not None and not is_used:
        raise ValueError(
            "`--sigma` must come with noise to add: to clean images, with weights for denoising or --set "
            f"gaussian. Got {a.sigma} without. Leave it out."
        )


def published(a: Arguments, about: dict[str, Any], sigma: float, restored: Callable):
    """Measures the sets one by one, shows the table, and writes what was asked for."""
    console = Console()
    found = [find(name, a.data, sigma) for name in a.sets if name != "dnd"]  # all, before the work
    for photographs, outcome in found:
        rows = measure(photographs, outcome.protocol, restored)
        outcome.rows.extend(track(rows, outcome.name, total=len(photographs), console=console))
    outcomes = [outcome for _, outcome in found]
    if a.submission is not None:
        written = write_submission(a.data, a.submission, restored)
        count = sum(1 for _ in track(written, "DND", total=50, console=console))
        console.print(
            f"DND: {count} files for the server in {a.submission}; the paper reached 40.06 dB / 0.960",
            soft_wrap=True,
        )
    if outcomes:
        console.print(results_table(outcomes, title=f"{a.weights}, {about['task']}"))
    if a.json is not None:
        save_json(a.json, outcomes, about)


def find(name: str, root: Path, sigma: float) -> tuple[list, Outcome]:
    """The photographs of a set, and what is to be filled with their figures."""
    if name == "gaussian":
        return gaussian_set(root, sigma), Outcome(f"{root.name}, sigma {sigma:g}", RGB, [])
    one = SETS[name]
    return one.photographs(root), Outcome(one.name, one.protocol, [], one.images, one.paper)


if __name__ == "__main__":
    with fail_plainly():
        main(tyro.cli(Arguments))
