"""The arguments of train.py, whole configurations of them, and what becomes of them on disk."""

import argparse
import hashlib
import json
import math
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from console import pick_device
from degradations import Task, degradation
from model import PRESETS
from objectives import Lower
from stages import PerStage, plan
from whole_file import replacing

Polynomial = tuple[float, float, float]  # start, power, scale: start / (1 + step / scale) ** power
POSITIVE = {  # with good values
    "minutes": "7.5",
    "steps": "1000",
    "stages": "800 200",
    "patch": "48",
    "batch": "4",
    "lower_batch": "2",
    "lr": "2e-3",
    "lr_end": "2e-5",
    "max_norm": "0.2",
    "look_every": "100",
    "threads": "1",
}


@dataclass(frozen=True)
class Arguments:
    """Trains EchoIR with ASBLO.

    Attributes:
        config: start from a whole configuration: `paper`, the paper's protocol, for GPUs and days, or
            `small`, the same in shape, for a CPU and an hour. Further arguments override it.
        task: what to undo; for other degradations give pairs by --data.
        sigma: noise of the denoising task, in units of 1 / 255; two numbers train a blind denoiser,
            for all between them.
        jpeg: share of the patches that are saved as JPEG after they are degraded, as photographs often are.
        data: folder of clean images, or of pairs (subfolders input and target, or as GoPro, SIDD and
            RealBlur have them: see folders.py); the photographs that come with scikit-image and
            scikit-learn, if none is given.
        output: folder for all that is written.
        preset: size of the network.
        init: weights to start from, written by an earlier training of the same preset, or of one with fewer
            blocks: those added change nothing at first.
        lower: what the lower level minimizes.
        alpha: weight of the echo loss in --lower both.
        mu: schedule of ASBLO's weight of |z|^2 / 2, in units of the problem: start, power and scale of
            start / (1 + step / scale) ** power. The library's own, if none is given; so for the next.
        theta: likewise, of the weight of |y|^2 / 2.
        barrier: likewise, of the weight sigma of the barrier.
        epsilon: likewise, of the slack.
        minutes: time to train; ignored if --steps or --stages is given.
        steps: upper steps to train.
        stages: steps of each stage, in each of which patches and batches may have sizes of their own;
            with --steps only their shares count.
        patch: height and width of the training patches; one number, or one for each stage. Photographs
            that are smaller, down to half of it, are mirrored at a border.
        batch: patches a step for F, likewise. The smallest that trains well: many small steps are
            better than few large ones when minutes count.
        lower_batch: patches a step for f, likewise, which is evaluated twice and has few parameters
            to teach.
        lr: highest learning rate, of both levels.
        lr_end: learning rate at the end of the cosine; a hundredth of the highest, if none is given.
        warmup: steps in which the learning rate rises.
        hold: share of the run until which it then stays at the highest.
        max_norm: longer gradients are shortened to this. By default twice the usual length: one bad
            batch must not spoil Adam's moments.
        ema: decay of the moving average of the weights, which is what is measured and saved.
        look_every: steps between two measurements of the PSNR on central crops of the photographs held
            out, by which the best weights are kept.
        val_share: share of D_val in the training photographs of --data. The upper variable, 98 %
            of the `cpu` preset, learns from it; the rest is D_tr, for the upsamplers.
        compare: train the same network by single-level AdamW too, as long as ASBLO took.
        device: `cpu`, `cuda`, ...; the fastest there is, by default.
        amp: compute in bfloat16; by default where it surely pays: on GPUs, and CPUs with AMX. CPUs with
            AVX512_BF16 gain with large batches only. Losses, weights and Adam's moments stay in
            float32, so no scaling of the gradients is needed.
        compile: compile the network; the start takes minutes longer, so for long runs.
        threads: of the CPU. Two runs are equal only at equal threads. One by default: the `cpu`
            preset's tensors are small, and a second thread gains a fifth on an idle machine but
            costs a factor of twenty on a busy one.
        seed: of weights, patches and noise.
        resume: go on with the run in --output, with the arguments it was started with; others are refused.
    """

    config: Literal["paper", "small"] | None = None
    task: Task = "denoise"
    sigma: float | tuple[float, float] = 25.0
    jpeg: float = 0.0
    data: Path | None = None
    output: Path = Path("runs/echoir")
    preset: Literal[tuple(PRESETS)] = "cpu"
    init: Path | None = None
    lower: Lower = "restoration"
    alpha: float = 0.1
    mu: Polynomial | None = None
    theta: Polynomial | None = None
    barrier: Polynomial | None = None
    epsilon: Polynomial | None = None
    minutes: float = 7.5
    steps: int | None = None
    stages: tuple[int, ...] = ()
    patch: PerStage = 48
    batch: PerStage = 4
    lower_batch: PerStage = 2
    lr: float = 2e-3
    lr_end: float | None = None
    warmup: int = 50
    hold: float = 0.0
    max_norm: float = 0.2
    ema: float = 0.999
    look_every: int = 100
    val_share: float = 2 / 3
    compare: bool = False
    device: str | None = None
    amp: bool | None = None
    compile: bool = False
    threads: int = 1
    seed: int = 0
    resume: bool = False


PAPER = Arguments(
    config="paper",
    preset="paper",
    lower="both",
    stages=(92_000, 64_000, 48_000, 36_000, 36_000, 24_000),
    patch=(144, 160, 192, 224, 320, 336),
    batch=(6, 5, 4, 2, 1, 1),
    lower_batch=(6, 5, 4, 2, 1, 1),
    lr=3e-4,
    lr_end=1e-6,
    warmup=0,
    hold=92 / 300,  # the first stage
    look_every=4000,
)
# A hundredth of the steps and a third of the patch; fewer steps want larger ones.
SMALL = replace(
    PAPER,
    config="small",
    preset="small",
    stages=(920, 640, 480, 360, 360, 240),
    patch=(48, 56, 64, 72, 104, 112),
    lr=1e-3,
    lr_end=1e-3 / 300,
    warmup=50,
    look_every=200,
)
CONFIGS = {"paper": PAPER, "small": SMALL}


def defaults(words: Sequence[str] | None) -> Arguments:
    """What the arguments on a command line override: `--config`'s, or the usual ones."""
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--config", "--train.config", dest="config")
    name = early.parse_known_args(words)[0].config
    return CONFIGS.get(name, Arguments())  # an unknown name is refused by the full parser


def settle(a: Arguments) -> Arguments:
    """The arguments to run with: checked, or those of the run that is to go on."""
    saved = a.output / "arguments.json"
    if a.resume:
        if not saved.is_file():
            raise ValueError(
                f"`--resume` must find a run to go on with. Got {a.output}, which has none. Start "
                "one without --resume, or name its folder by --output."
            )
        try:
            known = json.loads(saved.read_text())
            digest = _digest(known)
            if known.pop("sha256", digest) != digest:
                raise ValueError("its checksum is another")
            known |= {name: Path(known[name]) for name in ("data", "init") if known.get(name)}
            known |= {k: tuple(v) for k, v in known.items() if isinstance(v, list)}
            return Arguments(**known, output=a.output, resume=True)
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(
                f"`--resume` must find the arguments of the run. Got {saved}, which is damaged: {error}. "
                "Write it anew from another run's, or start without --resume."
            ) from error
    check(a)
    amp = fast_bfloat16(pick_device(a.device)) if a.amp is None else a.amp
    return replace(a, steps=a.steps or sum(a.stages) or None, amp=amp)


def agree(given: Arguments, own: Arguments):
    """Refuses to go on with a run by other arguments than its own.

    Args:
        given: those of the command line; where it has none, the run's.
        own: those of the run.
    """

    def plain(value: Any) -> Any:
        return value.resolve() if isinstance(value, Path) else value

    others = "; ".join(
        f"{_flag(name)} {value}, where the run has {getattr(own, name)}"
        for name, value in vars(given).items()
        if plain(value) != plain(getattr(own, name))
    )
    if others:
        raise ValueError(
            f"`--resume` must go on with the arguments of the run in {own.output}. Got {others}. Leave "
            "that out; or, for another run, name another --output and leave out --resume."
        )


def check(a: Arguments):
    """Refuses numbers out of their range."""
    for name, good in POSITIVE.items():
        value = getattr(a, name)
        if value is not None and not all(
            0 < v < math.inf for v in (value if isinstance(value, tuple) else [value])
        ):
            raise ValueError(
                f"`{_flag(name)}` must be positive and finite. Got {value}. Use e.g. {_flag(name)} {good}, or "
                "leave it out."
            )
    if not 0 < a.val_share < 1:
        raise ValueError(
            f"`--val-share` must be above 0 and below 1. Got {a.val_share}. Use e.g. 0.67."
        )
    for name in ("ema", "hold"):
        if not 0 <= getattr(a, name) < 1:
            raise ValueError(
                f"`--{name}` must be at least 0 and below 1. Got {getattr(a, name)}. Use 0 for none."
            )
    if not 0 <= a.jpeg <= 1:
        raise ValueError(
            f"`--jpeg` must be a share, from 0 to 1. Got {a.jpeg}. Use e.g. 0.5, or leave it out."
        )
    if not 0 <= a.alpha < math.inf:
        raise ValueError(f"`--alpha` must be finite and at least 0. Got {a.alpha}. Use e.g. 0.1.")
    if not 0 <= a.seed < 2**63:
        raise ValueError(f"`--seed` must be at least 0 and below 2^63. Got {a.seed}. Use e.g. 0.")
    if a.warmup < 0:
        raise ValueError(f"`--warmup` must be at least 0. Got {a.warmup}. Use 0 for none.")
    for name in ("mu", "theta", "barrier", "epsilon"):
        known = getattr(a, name)
        if known and not (min(known[0], known[2]) > 0 and all(map(math.isfinite, known))):
            raise ValueError(
                f"`--{name}` must have a start and a scale above 0. Got {known}. Use e.g. 1 2 100."
            )
    degradation(a.task, a.sigma)
    uses = {"sigma": ("--task denoise", a.task == "denoise")}
    uses |= {"alpha": ("--lower both", a.lower == "both")}
    for name, (use, is_used) in uses.items():
        if not is_used and getattr(a, name) != getattr(Arguments, name):
            raise ValueError(
                f"`--{name}` must come with {use}: nothing else looks at it. Got {getattr(a, name)} "
                f"without. Give {use} too, or leave --{name} out."
            )
    plan(a.stages, a.steps, patch=a.patch, batch=a.batch, lower_batch=a.lower_batch)


def start_anew(a: Arguments, methods: Sequence[str]):
    """Clears what an earlier run left in --output, and notes the arguments for --resume."""
    note = a.output / "arguments.json"
    note.unlink(missing_ok=True)  # first: killed from here on, that run must not go on from nothing
    for method in methods:
        shutil.rmtree(a.output / method, ignore_errors=True)
    a.output.mkdir(parents=True, exist_ok=True)
    kept = asdict(a) | {name: _absolute(getattr(a, name)) for name in ("data", "init")}
    del kept["output"], kept["resume"]
    with replacing(note) as file:
        file.write_text(json.dumps(kept | {"sha256": _digest(kept)}))


def _flag(name: str) -> str:
    """As on the command line."""
    return f"--{name.replace('_', '-')}"


def _digest(kept: dict[str, Any]) -> str:
    """Of the arguments, which a damaged byte must not change into others."""
    rest = {name: value for name, value in kept.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _absolute(path: Path | None) -> str | None:
    return path and str(path.resolve())


def fast_bfloat16(device: torch.device) -> bool:
    """Whether bfloat16 pays: it does on GPUs and on CPUs with matrix units, elsewhere it costs."""
    if device.type == "cpu":
        capabilities = getattr(torch.cpu, "get_capabilities", dict)()  # not in older versions
        return bool(capabilities.get("amx_bf16"))
    return device.type == "cuda" and torch.cuda.is_bf16_supported()
