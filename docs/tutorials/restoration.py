"""EchoIR from data to figure: a network that removes noise, trained by ASBLO on photographs.

    python docs/tutorials/restoration.py          # three minutes on one core; writes restoration.svg

The network is cut in two: the lower variable y are the parameters of the Echo-Upsamplers, 2 % of all, and the
upper variable x are the others. The lower level restores patches of the training photographs, the upper level those
of the validation photographs, and y has to be a solution of the lower one. The network, its data and its two
objectives are those of `examples/echoir`, whose `train.py` is this with a clock, checkpoints, an average of the
weights, and more steps.

`main` trains for STEPS steps on three photographs that come with scikit-image and scikit-learn, and restores one
that no level has seen.
"""

import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from matplotlib.figure import Figure
from plots import panels, save

import bilevel as bl

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples" / "echoir"))

from degradations import degradation
from model import PRESETS, EchoIR
from objectives import objectives
from patches import PatchSampler
from photographs import Split, bundled
from scores import Result, evaluate
from stages import learning_rate
from tiles import restore

SIGMA = 25.0  # of the noise, in units of 1 / 255
STEPS = 600
PATCH = 48
VALIDATION_PATCHES, TRAINING_PATCHES = 4, 2  # of a step
LR, WARMUP = 2e-3, 50
EVERY = 50  # steps between two points of the curve
CROP = 160  # pixels of the photograph that are shown
CPU = torch.device("cpu")
NOISE = degradation("denoise", SIGMA)


def batches(photographs: Split, steps: int) -> Iterator[bl.Batch]:
    """Patches for F and for f, from different photographs."""
    upper = PatchSampler(photographs.validation, NOISE, PATCH, CPU)
    lower = PatchSampler(photographs.train, NOISE, PATCH, CPU)
    for step in range(steps):
        yield bl.Batch(
            upper=upper.batch(VALIDATION_PATCHES, step, 0),
            lower=lower.batch(TRAINING_PATCHES, step, 1),
        )


def solver(steps: int) -> bl.ASBLO:
    """One AdamW for each of z, y and x, at a rate that rises shortly and falls to a hundredth."""
    rate = learning_rate(LR, LR / 100, lambda step: step / steps, warmup=WARMUP)
    adamw = bl.optim.Torch(torch.optim.AdamW, lr=rate, weight_decay=1e-4)
    return bl.ASBLO(
        value_optimizer=adamw, lower_optimizer=adamw, upper_optimizer=adamw, max_multiplier=5.0
    )


def train(net: EchoIR, photographs: Split, steps: int) -> Iterator[bl.State]:
    """The states of the training; each step's weights are put into the network."""
    upper, lower = objectives("restoration")
    problem, x0, y0 = bl.from_module(
        net, lower=["upsamplers.*"], upper_loss=upper, lower_loss=lower, per_sample=True
    )
    for state in bl.iterate(problem, solver(steps), x0, y0, batches(photographs, steps)):
        bl.update_module(net, state)
        yield state


def judge(net: EchoIR, photographs: Split) -> Result:
    """The center of a photograph that no level has seen, before and after."""
    (result,) = evaluate(photographs.test[:1], NOISE, partial(restore, net, device=CPU), CROP)
    return result


def psnr(result: Result) -> tuple[float, float]:
    """Of the noisy and of the restored photograph, in dB."""
    before, after = result.scores()
    return before.psnr_rgb, after.psnr_rgb


def drawing(result: Result, curve: list[tuple[int, float]]) -> Figure:
    """The photograph before and after, and the PSNR over the steps."""
    figure, (noisy, restored, axes) = panels(3)
    images = {"noisy": (noisy, result.input), "restored": (restored, result.restored)}
    for (name, (place, image)), decibel in zip(images.items(), psnr(result), strict=True):
        place.imshow(image.clamp(0, 1).permute(1, 2, 0).numpy(), interpolation="nearest")
        place.set(title=f"{name}, {decibel:.1f} dB", xticks=[], yticks=[])
    axes.plot(*zip(*curve, strict=True), marker="o")
    axes.set(title="A photograph held out", xlabel="steps", ylabel="PSNR, dB")
    return figure


def main(steps: int = STEPS, output: Path = Path("restoration.svg")) -> None:
    """Trains, prints what is reached, and draws it."""
    torch.manual_seed(0)
    net, photographs = EchoIR(PRESETS["cpu"]), bundled()
    curve: list[tuple[int, float]] = []
    for state in train(net, photographs, steps):
        if state.step % EVERY == 0:
            curve.append((state.step, psnr(judge(net, photographs))[1]))
            measured = ", ".join(
                f"{name} {state.metrics[name]:.4f}" for name in ("upper", "lower", "value_gap")
            )
            print(f"step {state.step:4}: {measured}, PSNR {curve[-1][1]:.2f} dB")
    result = judge(net, photographs)
    before, after = psnr(result)
    print(f"{result.name}: {before:.2f} dB with noise, {after:.2f} dB restored")
    save(drawing(result, curve), output)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*map(int, sys.argv[1:]))
