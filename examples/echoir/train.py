"""Trains EchoIR to restore photographs, by bi-level optimization with ASBLO.

    python examples/echoir/train.py                        # bundled photographs, noise, about 8 minutes on 2 cores
    python examples/echoir/train.py --compare              # then single-level AdamW for the same time
    python examples/echoir/train.py --task derain --data FOLDER --minutes 60 --preset small
    python examples/echoir/train.py --resume               # go on after Ctrl-C, SIGTERM or a power failure

Ends with a table of PSNR and SSIM on photographs that training has not seen, and writes to --output:
picture.png, weights.safetensors and metrics.jsonl, and a folder for each method. Exit codes: 0 done, 1 diverged,
2 a mistake in the arguments or the data, 75 stopped by a signal and saved.
"""

import copy
import json
import math
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import torch
import tyro
from console import fail_plainly, pick_device, score_table
from degradations import Task, degradation, one_sigma
from folders import load_folder
from model import PRESETS, EchoIR
from objectives import Lower, objectives
from patches import PatchSampler
from photographs import Split, bundled, split
from picture import save_grid
from rich.console import Console
from run import Interrupted, Run
from scores import Result, evaluate, mean
from single_level import SingleLevel
from tiles import restore
from weights import save_weights

import bilevel as bl

METHODS = ("asblo", "single-level")
DIVERGED = 1
STOPPED = 75  # EX_TEMPFAIL: not an error, try again (with --resume)
MAX_NORM = 0.2  # twice the usual norm of the gradient: one bad batch must not spoil Adam's moments
MAX_MULTIPLIER = 5.0  # lambda pulls f(x, y) and f(x, z) apart as it grows, faster than z can follow
CROP = 256  # pixels of a held-out photograph that the progress line's PSNR is measured on


@dataclass(frozen=True)
class Arguments:
    """Trains EchoIR with ASBLO.

    Attributes:
        task: what to undo; for other degradations give pairs by --data.
        sigma: noise of the denoising task, in units of 1 / 255; two numbers train a blind denoiser,
            for all between them.
        data: folder of clean images, or of pairs (subfolders input and target, or as GoPro, SIDD and
            RealBlur have them: see folders.py); the photographs that come with scikit-image and
            scikit-learn, if none is given.
        output: folder for all that is written.
        preset: size of the network.
        lower: what the lower level minimizes.
        alpha: weight of the echo loss in --lower both.
        minutes: time to train; ignored if --steps is given.
        steps: upper steps to train.
        patch: height and width of the training patches.
        batch: patches a step for F. The smallest that trains well: many small steps are better
            than few large ones when minutes count.
        lower_batch: patches a step for f, which is evaluated twice and has few parameters to teach.
        lr: highest learning rate, of both levels.
        val_share: share of D_val in the training photographs of --data. The upper variable, 98 %
            of the `cpu` preset, learns from it; the rest is D_tr, for the upsamplers.
        compare: train the same network by single-level AdamW too, as long as ASBLO took.
        device: `cpu`, `cuda`, ...; the fastest there is, by default.
        amp: compute in bfloat16 where the device has units for it.
        compile: compile the network; the start takes minutes longer, so for long runs.
        threads: of the CPU. Two runs are equal only at equal threads. One by default: the `cpu`
            preset's tensors are small, and a second thread gains a fifth on an idle machine but
            costs a factor of twenty on a busy one.
        seed: of weights, patches and noise.
        resume: go on with the run in --output, with the arguments it was started with.
    """

    task: Task = "denoise"
    sigma: float | tuple[float, float] = 25.0
    data: Path | None = None
    output: Path = Path("runs/echoir")
    preset: Literal[tuple(PRESETS)] = "cpu"  # type: ignore[valid-type]
    lower: Lower = "restoration"
    alpha: float = 0.1
    minutes: float = 7.5
    steps: int | None = None
    patch: int = 48
    batch: int = 4
    lower_batch: int = 2
    lr: float = 2e-3
    val_share: float = 2 / 3
    compare: bool = False
    device: str | None = None
    amp: bool = True
    compile: bool = False
    threads: int = 1
    seed: int = 0
    resume: bool = False


def settle(a: Arguments) -> Arguments:
    """The arguments to run with: checked, or those of the run that is to go on."""
    saved = a.output / "arguments.json"
    if a.resume:
        if not saved.is_file():
            raise ValueError(
                f"`--resume` must find a run to go on with. Got {a.output}, which has none. Start "
                "one without --resume, or name its folder by --output."
            )
        known = json.loads(saved.read_text())
        known["data"] = known["data"] and Path(known["data"])
        return Arguments(**known, output=a.output, resume=True)
    for name in ("minutes", "steps", "patch", "batch", "lower_batch", "lr", "threads"):
        value = getattr(a, name)
        if value is not None and value <= 0:
            raise ValueError(
                f"`--{name.replace('_', '-')}` must be positive. Got {value}. Leave it out, perhaps."
            )
    if not 0 < a.val_share < 1:
        raise ValueError(
            f"`--val-share` must be above 0 and below 1. Got {a.val_share}. Use e.g. 0.67."
        )
    return replace(a, amp=a.amp and fast_bfloat16(pick_device(a.device)))


def start_anew(a: Arguments):
    """Clears what an earlier run left in --output, and notes the arguments for --resume."""
    for method in METHODS:
        shutil.rmtree(a.output / method, ignore_errors=True)
    a.output.mkdir(parents=True, exist_ok=True)
    kept = asdict(a) | {"data": a.data and str(a.data.resolve())}
    del kept["output"], kept["resume"]
    (a.output / "arguments.json").write_text(json.dumps(kept))


def fast_bfloat16(device: torch.device) -> bool:
    """Whether bfloat16 pays: it does on GPUs and on CPUs with matrix units, elsewhere it costs."""
    if device.type == "cpu":
        capabilities = getattr(torch.cpu, "get_capabilities", dict)()  # not in older versions
        return bool(capabilities.get("amx_bf16"))
    return device.type == "cuda" and torch.cuda.is_bf16_supported()


def load_split(a: Arguments) -> Split:
    """Whole photographs for D_tr, D_val and the test."""
    if a.data is None:
        return bundled()
    return split(load_folder(a.data), validation=a.val_share, seed=a.seed)


def new_network(a: Arguments, device: torch.device) -> EchoIR:
    """The network at its start, a function of the seed alone."""
    torch.manual_seed(a.seed)
    return EchoIR(PRESETS[a.preset]).to(device, memory_format=torch.channels_last)


def methods(
    a: Arguments,
    data: Split,
    net: EchoIR,
    device: torch.device,
    restored: Callable[..., list[Result]],
) -> dict[str, Run]:
    """ASBLO, and the single-level baseline where it is to be compared with."""
    degrade = degradation(a.task, a.sigma)
    training = PatchSampler(data.train, degrade, a.patch, device)
    validation = PatchSampler(data.validation, degrade, a.patch, device)
    everything = PatchSampler(data.train + data.validation, degrade, a.patch, device)
    upper, lower = objectives(a.lower, alpha=a.alpha, amp=a.amp)
    if a.compile:  # a copy: whole photographs, each of its own size, would be compiled one by one
        net = copy.deepcopy(net)
        net.compile(dynamic=False)
    problem, x0, y0 = bl.from_module(
        net, lower=["upsamplers.*"], upper_loss=upper, lower_loss=lower, per_sample=True
    )

    def two_levels(step: int) -> bl.Batch:
        return bl.Batch(
            upper=validation.batch(a.batch, a.seed, step, 0),
            lower=training.batch(a.lower_batch, a.seed, step, 1),
        )

    def one_level(step: int) -> bl.Batch:
        patches = everything.batch(a.batch, a.seed, step, 0)
        return bl.Batch(upper=patches, lower=patches)

    def adamw(done: Callable[[int], float]) -> bl.optim.Torch:
        lr = warm_cosine(a.lr, done)
        return bl.optim.Torch(torch.optim.AdamW, lr=lr, max_norm=MAX_NORM, weight_decay=1e-4)

    def asblo(done: Callable[[int], float]) -> bl.Solver:
        return bl.ASBLO(
            value_optimizer=adamw(done),
            lower_optimizer=adamw(done),
            upper_optimizer=adamw(done),
            max_multiplier=MAX_MULTIPLIER,
        )

    def single_level(done: Callable[[int], float]) -> bl.Solver:
        return SingleLevel(adamw(done))

    def psnr(state: bl.State) -> float:
        return mean(result.scores()[1] for result in restored(state, CROP)).psnr_rgb

    runs = {"asblo": (asblo, two_levels)}
    if a.compare:
        runs["single-level"] = (single_level, one_level)
    return {
        name: Run(name, problem, solver, x0, y0, batch, psnr, a.output / name, device)
        for name, (solver, batch) in runs.items()
    }


def warm_cosine(highest: float, done: Callable[[int], float]) -> bl.Schedule:
    """Fifty steps up, for Adam's moments to settle, then half a cosine down to a hundredth."""

    def lr(step: int) -> float:
        rise = min(1.0, (step + 1) / 50)
        return highest * rise * (0.505 + 0.495 * math.cos(math.pi * done(step)))

    return lr


def main(arguments: Arguments, console: Console):
    """Trains, measures, and writes what a user wants to keep."""
    a = settle(arguments)
    torch.set_num_threads(a.threads)
    device = pick_device(a.device)
    data = load_split(a)
    degrade = degradation(a.task, one_sigma(a.sigma))
    net = new_network(a, device)

    def restored(state: bl.State, crop: int | None = None) -> list[Result]:
        bl.update_module(net, state)
        tile = crop or 1024  # in one piece, unless a photograph is very large
        return evaluate(
            data.test,
            degrade,
            lambda image: restore(net, image, device=device, amp=a.amp, tile=tile),
            crop,
        )

    runs = methods(a, data, net, device, restored)
    if not a.resume:
        start_anew(a)
    results: dict[str, list[Result]] = {}
    seconds = 60 * a.minutes
    for name, run in runs.items():
        done = run.train(console, seconds=seconds, steps=a.steps, resume=a.resume)
        results[name] = restored(done.average)
        about = {
            "method": name,
            "task": a.task,
            "sigma": a.sigma,
            "data": str(a.data or "bundled"),
            "steps": done.state.step,
            "seconds": round(done.seconds, 1),
            "psnr_rgb": mean(r.scores()[1] for r in results[name]).psnr_rgb,
        }
        save_weights(run.folder / "weights.safetensors", net, about)
        save_grid(run.folder / "picture.png", results[name])
        console.print(f"{name}: {done.state.step} steps in {done.seconds:.0f} s")
        seconds = done.seconds  # the baseline gets what ASBLO took
    for file in ("weights.safetensors", "picture.png", "metrics.jsonl"):
        shutil.copy(a.output / "asblo" / file, a.output / file)
    console.print(score_table(results, title=f"photographs held out, {a.task}"))
    console.print(f"picture: {a.output / 'picture.png'}", soft_wrap=True)
    console.print(f"weights: {a.output / 'weights.safetensors'}", soft_wrap=True)


def command_line(words: Sequence[str] | None = None):
    """Runs `main` with arguments from the command line, and exits with a code that says how it went."""
    console = Console()
    with fail_plainly():
        try:
            main(tyro.cli(Arguments, args=words), console)
        except Interrupted as interrupted:
            console.print(f"{interrupted}; go on with --resume", soft_wrap=True)
            sys.exit(STOPPED)
        except bl.BilevelError as error:
            console.print(str(error), markup=False, soft_wrap=True)
            sys.exit(DIVERGED)


if __name__ == "__main__":
    command_line()
