"""The paper's ablations, one command each: Tables 4 to 6 at a scale of one's choice, and what they leave open.

    python examples/echoir/ablate.py upsampler           # six ways up: what does the Echo-Upsampler gain?
    python examples/echoir/ablate.py block               # channel attention and gated feed-forward, on and off
    python examples/echoir/ablate.py strategy            # four ways to train, times three upsamplers
    python examples/echoir/ablate.py strategy --seeds 5  # two more seeds than before
    python examples/echoir/ablate.py upsampler --train.config paper --steps 100000 --train.data Rain13K

Each variant is trained as train.py does it, twice: for equal steps and for equal time. A table in Markdown and all
single trainings in JSON stand in --output/NAME, and are written anew after each. The same command goes on where it was
stopped. Exit codes: 0 done, 2 a mistake in the arguments or the data, 75 stopped by a signal and saved.
"""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch
import tyro
from ablation_table import Row, markdown
from arguments import Arguments as Training
from arguments import defaults, settle
from console import fail_plainly, pick_device
from lab import Lab, Results
from methods import METHODS
from rich.console import Console
from train import exit_codes, load_split
from variants import COLUMNS, Ablation, Variant, variants

# What the ablation sets itself.
OWN = ("output", "minutes", "steps", "compare", "resume", "init", "seed", "look_every")
# Steps and minutes of a training: with three seeds about half an hour on one core.
SCALES = {"upsampler": (400, 0.75), "block": (500, 1.0), "strategy": (200, 0.4)}

Budgets = dict[str, tuple[int, int]]  # of each variant, the steps for equal steps and equal time


@dataclass(frozen=True)
class Arguments:
    """Trains variants of one network on the same photographs, each several times.

    Attributes:
        which: vary the upsampler, the parts of the block, or the way of training.
        steps: of a training for equal steps.
        minutes: of a training for equal time. A variant gets the steps that fit in by its own seconds a
            step, measured before, all variants taking turns: what else the machine does changes no
            result.
        seeds: how many, from 0 on.
        method: trains the variants of `upsampler` and `block`.
        output: folder, to which the ablation's name is appended.
        train: what all trainings share, as of train.py.
    """

    which: tyro.conf.Positional[Ablation]
    steps: int | None = None
    minutes: float | None = None
    seeds: int = 3
    method: Literal[tuple(METHODS)] = "asblo"
    output: Path = Path("runs/echoir-ablations")
    train: Training = field(default_factory=Training)


def scaled(a: Arguments) -> Arguments:
    """The arguments, checked, with nothing left open.

    Raises:
        ValueError: if they are out of range, or are the ablation's own.
    """
    usual = defaults(["--config", str(a.train.config)])
    for name in OWN:
        if getattr(a.train, name) != getattr(usual, name):
            raise ValueError(
                f"`--train.{name.replace('_', '-')}` must be left to the ablation, which has --steps, "
                f"--minutes, --seeds and --output. Got {getattr(a.train, name)}. Take it out."
            )
    steps, minutes = SCALES[a.which]
    a = replace(
        a,
        steps=steps if a.steps is None else a.steps,
        minutes=minutes if a.minutes is None else a.minutes,
    )
    for name, usual in {"steps": steps, "minutes": minutes, "seeds": 3}.items():
        if not 0 < getattr(a, name) < math.inf:
            raise ValueError(
                f"`--{name}` must be positive and finite. Got {getattr(a, name)}. Use e.g. {usual}, or "
                "leave it out."
            )
    return replace(a, train=settle(replace(a.train, steps=a.steps)))


def main(arguments: Arguments, console: Console):
    """Makes the trainings that are not there yet, and the table of all."""
    a = scaled(arguments)
    torch.set_num_threads(a.train.threads)
    lab = Lab(a.train, a.output / a.which, load_split(a.train), pick_device(a.train.device))
    lab.folder.mkdir(parents=True, exist_ok=True)
    shared = json.loads(json.dumps(asdict(a.train), default=str))
    settings = {"which": a.which, "steps": a.steps, "minutes": a.minutes, "method": a.method}
    settings |= {f"train.{name}": value for name, value in shared.items() if name not in OWN}
    results = Results(lab.folder / "results.json", settings)
    rows = variants(a.which, a.method)
    if not results.costs:
        results.costs = lab.costs(rows)
        results.write()
    fitting = {name: 60 * a.minutes / cost["step_seconds"] for name, cost in results.costs.items()}
    budgets = {name: (a.steps, max(1, round(steps))) for name, steps in fitting.items()}
    every = list(trainings(rows, a.seeds, budgets))
    for number, (variant, seed, steps) in enumerate(every, 1):
        if results.find(variant.name, seed, steps) is None:
            console.print(f"{number} of {len(every)}: {variant.name}, seed {seed}, {steps} steps")
            results.runs.append(lab.train(variant, seed, steps, console))
            results.write()
            write_table(a, lab.folder, rows, results, budgets)
    path = write_table(a, lab.folder, rows, results, budgets)
    console.print(path.read_text(), markup=False, highlight=False, soft_wrap=True)
    console.print(f"table: {path}", soft_wrap=True)


def trainings(
    rows: Sequence[Variant], seeds: int, budgets: Budgets
) -> Iterator[tuple[Variant, int, int]]:
    """All of them, one seed after the other, so that what is there can be compared at any time."""
    for seed in range(seeds):
        for variant in rows:
            for steps in dict.fromkeys(budgets[variant.name]):  # once, where both are equal
                yield variant, seed, steps


def write_table(
    a: Arguments, folder: Path, rows: Sequence[Variant], results: Results, budgets: Budgets
) -> Path:
    """With what is known so far."""

    def of(variant: Variant) -> Row:
        both = budgets[variant.name]
        found = [[results.find(variant.name, s, steps) for s in range(a.seeds)] for steps in both]
        return Row(
            labels=variant.labels,
            **results.costs[variant.name],
            budgets=both,
            runs=tuple([run for run in runs if run] for runs in found),
        )

    path = folder / "table.md"
    path.write_text(markdown(COLUMNS[a.which], [of(variant) for variant in rows], a.minutes))
    return path


def command_line(words: Sequence[str] | None = None):
    """Runs `main` with arguments from the command line, and exits with a code that says how it went."""
    console = Console()
    with fail_plainly(), exit_codes(console, "the same command"):
        usual = Arguments(which=tyro.MISSING, train=defaults(words))
        main(tyro.cli(Arguments, args=words, default=usual), console)


if __name__ == "__main__":
    command_line()
