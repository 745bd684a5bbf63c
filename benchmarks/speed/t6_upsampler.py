"""T6: the Echo-Upsampler, forward and backward, against the same equations by unfold and against unguided layers."""

from __future__ import annotations

import sys
from functools import partial
from itertools import product
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, pad, unfold

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "echoir"))

from echo_upsampler import EchoUpsampler

from speed.race import FLOOR, OURS, Contender, Result, Rules, Run, answers, mebibytes, race, rows
from speed.work import Answer, relative_error

SIDE = 64  # of the coarse image
CASES = tuple(product((48, 96), (1, 2)))  # channels after upsampling, radius


def by_unfold(layer: EchoUpsampler, x: Tensor, echo: Tensor) -> Tensor:
    """Eqs. 4-6 with the K neighbors of all pixels gathered at once."""
    v, G, r = layer.reduce(x), layer.guide(echo), layer.radius
    side, (h, w) = 2 * r + 1, v.shape[-2:]

    def neighbors(coarse: Tensor) -> Tensor:  # (B, C, K, h, 1, w, 1)
        columns = unfold(pad(coarse, (r, r, r, r)), side)
        return columns.view(*coarse.shape[:2], side**2, h, 1, w, 1)

    offset, lean = torch.arange(-r, r + 1.0), torch.tensor([-0.25, 0.25])
    apart = (offset[:, None] - lean) ** 2
    distance = (apart[:, None, :, None] + apart[None, :, None, :]).view(side**2, 1, 2, 1, 2)
    f = torch.exp(-distance / (2 * layer.log_spatial.exp() ** 2))
    fine = G.view(*G.shape[:2], 1, h, 2, w, 2)
    squares = ((fine - neighbors(avg_pool2d(G, 2))) ** 2).sum(1)
    g = torch.exp(-squares / (2 * layer.log_range.exp() ** 2 * G.shape[1]))
    W = (f + g) * neighbors(torch.ones_like(v[:, :1]))[:, 0]
    out = (W[:, None] * neighbors(v)).sum(2) / W.sum(1)[:, None]
    return out.reshape(*v.shape[:2], 2 * h, 2 * w)


def contenders(channels: int, radius: int) -> list[Contender]:
    torch.manual_seed(0)
    layer = EchoUpsampler(2 * channels, channels, radius=radius)
    x = torch.randn(1, 2 * channels, SIDE, SIDE, requires_grad=True)
    echo = torch.randn(1, channels, 2 * SIDE, 2 * SIDE, requires_grad=True)
    cotangent = torch.randn(1, channels, 2 * SIDE, 2 * SIDE)
    shuffle = nn.Sequential(nn.Conv2d(2 * channels, 4 * channels, 3, padding=1), nn.PixelShuffle(2))
    transposed = nn.ConvTranspose2d(2 * channels, channels, 2, stride=2)

    def timed(forward: partial[Tensor]) -> Run:
        def run() -> Answer:
            return Answer(torch.autograd.grad(forward(), inputs, cotangent, allow_unused=True)[0])

        inputs = [x, *([echo] if forward.args[-1] is echo else [])]
        inputs += [p for module in (layer, shuffle, transposed) for p in module.parameters()]
        return run

    ways = {
        (FLOOR, "joint bilateral, unfold"): partial(by_unfold, layer, x, echo),
        (OURS, "Echo-Upsampler"): partial(layer, x, echo),
        ("torch", "pixel shuffle, unguided"): partial(shuffle, x),
        ("torch", "transposed conv, unguided"): partial(transposed, x),
    }
    return [Contender(*who, partial(timed, forward)) for who, forward in ways.items()]


def tables(rules: Rules) -> str:
    parts = []
    for channels, radius in CASES:
        results = race(contenders(channels, radius), rules)
        truth = answers(results)["joint bilateral, unfold"].value

        def extra(result: Result, answer: Answer, truth: Tensor = truth) -> list[str]:
            guided = "unguided" not in result.contender.method
            apart = f"{relative_error(answer.value, truth):.0e}" if guided else ""
            return [mebibytes(result), apart]

        about = f"{channels} channels, radius {radius}, {SIDE} x {SIDE} to twice that\n\n"
        parts.append(about + rows(results, extra, ("MiB", "apart")))
    return "\n\n".join(parts)
