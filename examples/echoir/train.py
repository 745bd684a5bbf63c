"""Trains EchoIR to restore photographs, by bi-level optimization with ASBLO.

    python examples/echoir/train.py                        # bundled photographs, noise, about 8 minutes on 2 cores
    python examples/echoir/train.py --compare              # then single-level AdamW for the same time
    python examples/echoir/train.py --task derain --data FOLDER --minutes 60 --preset small
    python examples/echoir/train.py --config paper --task derain --data Datasets/train/Rain13K
    python examples/echoir/train.py --init runs/echoir/weights.safetensors --data MY_PHOTOGRAPHS --lr 5e-4
    python examples/echoir/train.py --resume               # go on after Ctrl-C, SIGTERM or a power failure
    torchrun --nproc-per-node 2 examples/echoir/train.py   # processes that share each batch, on CPUs or GPUs

On another number of processes the patches of every step are the same, and the weights up to the rounding of
sums; to the last bit they are on as many processes and threads.
Ends with a table of PSNR and SSIM on photographs that training has not seen, and writes to --output:
picture.png, weights.safetensors (the last), best.safetensors and metrics.jsonl, and a folder for each method.
Exit codes: 0 done, 1 diverged, 2 a mistake in the arguments or the data, 74 the disk or the memory did not
suffice, 75 stopped by a signal and saved, or without an answer from another process.
"""

import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import torch
import tyro
from arguments import Arguments, agree, defaults, settle, start_anew
from console import fail_plainly, pick_device, score_table
from degradations import degradation, one_sigma
from folders import load_folder
from growth import can_grow, grown
from methods import METHODS, training_runs
from model import PRESETS, EchoIR, EchoIRConfig
from photographs import Split, bundled, split
from picture import save_grid
from processes import Processes, joined
from rich.console import Console
from run import Interrupted
from scores import Result, evaluate, mean
from tiles import restore
from weights import load_weights, save_weights
from whole_file import replacing

import bilevel as bl

DIVERGED = 1
STOPPED = 75  # EX_TEMPFAIL: not an error, try again (with --resume)


def load_split(a: Arguments) -> Split:
    """Whole photographs for D_tr, D_val and the test.

    Raises:
        ValueError: if pairs are to be degraded, which come with their inputs.
    """
    if a.data is None:
        return bundled()
    photographs = load_folder(a.data)
    for name in ("sigma", "jpeg"):
        value = getattr(a, name)
        if value != getattr(Arguments, name) and all(p.input is not None for p in photographs):
            raise ValueError(
                f"`--{name}` must come with clean photographs, which are degraded by it. Got {value} with "
                f"the pairs of {a.data}. Leave --{name} out."
            )
    return split(photographs, validation=a.val_share, seed=a.seed)


def new_network(a: Arguments, config: EchoIRConfig, device: torch.device) -> EchoIR:
    """The network at its start: a function of the seed alone, or the weights of `--init`.

    Raises:
        ValueError: if those are of a configuration that more blocks do not make `config`.
    """
    torch.manual_seed(a.seed)
    if a.init is None:
        return EchoIR(config).to(device, memory_format=torch.channels_last)
    net, _ = load_weights(a.init, device)
    if not can_grow(net.config, config):
        wanted, known = asdict(config), asdict(net.config)
        fits = [name for name, preset in PRESETS.items() if preset == net.config]
        different = ", ".join(
            f"{k}={known[k]} instead of {wanted[k]}" for k in known if known[k] != wanted[k]
        )
        raise ValueError(
            f"`--init` must hold weights of --preset {a.preset}, or of one with fewer blocks. "
            f"Got {a.init}, which has {different}. "
            + (f"Use --preset {fits[0]}." if fits else "Name other weights.")
        )
    return grown(net, config).to(device, memory_format=torch.channels_last)


def restorer(a: Arguments, data: Split, net: EchoIR, device: torch.device):
    """A function that restores the photographs held out with the weights of a state, or their centers."""
    degrade = degradation(a.task, one_sigma(a.sigma))

    def restored(state: bl.State, crop: int | None = None) -> list[Result]:
        bl.update_module(net, state)
        tile = crop or 1024  # in one piece, unless a photograph is very large
        return evaluate(
            data.test,
            degrade,
            lambda image: restore(net, image, device=device, amp=bool(a.amp), tile=tile),
            crop,
        )

    return restored


def main(arguments: Arguments, console: Console):
    """Trains, alone or with the other processes that torchrun has started."""
    a = settle(arguments)
    torch.set_num_threads(a.threads)
    with joined(pick_device(a.device)) as (processes, device):
        console.quiet = not processes.is_first
        train(a, processes, device, console)


def train(a: Arguments, processes: Processes, device: torch.device, console: Console):
    """Trains, measures, and writes what a user wants to keep."""
    data = load_split(a)
    net = new_network(a, PRESETS[a.preset], device)
    restored = restorer(a, data, net, device)

    def about(name: str, state: bl.State, psnr: float) -> dict[str, Any]:
        return {
            "method": name,
            "task": a.task,
            "sigma": a.sigma,
            "data": a.data.name if a.data else "bundled",
            "steps": state.step,
            "psnr_rgb": psnr,
        }

    def keep(name: str, state: bl.State, psnr: float):
        bl.update_module(net, state)
        facts = about(name, state, psnr) | {"psnr_rgb_of": "central crops"}
        save_weights(a.output / name / "best.safetensors", net, facts)

    methods = ("asblo", "single-level") if a.compare else ("asblo",)
    runs = training_runs(
        a, methods, data, net, device, restored=restored, keep=keep, processes=processes
    )
    processes.agree(False, 0.0)  # all have read --init, perhaps from a folder that is now cleared
    if processes.is_first and not a.resume:
        start_anew(a, tuple(METHODS))
    console.print(
        f"{device}, {'bfloat16 where that is safe' if a.amp else 'float32'}, --preset {a.preset}"
    )
    results: dict[str, list[Result]] = {}
    seconds = 60 * a.minutes
    for name, run in runs.items():
        done = run.train(console, seconds=seconds, steps=a.steps, resume=a.resume)
        seconds = done.seconds  # the baseline gets what ASBLO took
        if not processes.is_first:
            continue
        results[name] = restored(done.average)
        psnr = mean(r.scores()[1] for r in results[name]).psnr_rgb
        facts = about(name, done.state, psnr) | {"seconds": round(done.seconds, 1)}
        save_weights(run.folder / "weights.safetensors", net, facts)
        save_grid(run.folder / "picture.png", results[name])
        console.print(f"{name}: {done.state.step} steps in {done.seconds:.0f} s")
    if not processes.is_first:
        return
    for file in ("weights.safetensors", "best.safetensors", "picture.png", "metrics.jsonl"):
        with replacing(a.output / file) as copy:
            shutil.copy(a.output / "asblo" / file, copy)
    console.print(score_table(results, title=f"photographs held out, {a.task}"))
    console.print(f"picture: {a.output / 'picture.png'}", soft_wrap=True)
    console.print(f"weights: {a.output / 'weights.safetensors'}", soft_wrap=True)


@contextmanager
def exit_codes(console: Console, again: str) -> Iterator[None]:
    """Leaves with a code of its own where a signal came or training diverged."""
    try:
        yield
    except Interrupted as interrupted:
        console.print(f"{interrupted}; go on with {again}", soft_wrap=True)
        sys.exit(STOPPED)
    except KeyboardInterrupt:  # before the first step, or while the result is measured
        console.print(f"stopped; go on with {again}", soft_wrap=True)
        sys.exit(STOPPED)
    except ConnectionError as error:  # each process says so: the first may be the one that is gone
        Console(stderr=True).print(f"{error} Go on with {again}.", markup=False, soft_wrap=True)
        sys.exit(STOPPED)
    except bl.BilevelError as error:
        console.print(str(error), markup=False, soft_wrap=True)
        sys.exit(DIVERGED)


def command_line(words: Sequence[str] | None = None):
    """Runs `main` with arguments from the command line, and exits with a code that says how it went."""
    console = Console()
    with fail_plainly(), exit_codes(console, "--resume"):
        a = tyro.cli(Arguments, args=words, default=defaults(words))
        if a.resume:
            own = settle(a)
            agree(tyro.cli(Arguments, args=words, default=own), own)
        main(a, console)


if __name__ == "__main__":
    command_line()
