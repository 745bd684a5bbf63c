"""The weights of the trained denoiser's Echo-Upsamplers around the strongest edge of a photograph."""

import torch
from degradations import degradation
from matplotlib.figure import Figure
from photographs import bundled
from scores import evaluate
from weight_figure import calls, draw_row, strongest_edge
from weights import DENOISER, load_weights

CROP, SIGMA = 256, 25.0


def drawing() -> Figure:
    """A row an Echo-Upsampler: the surroundings of a pixel, and the weights of its coarse neighbors."""
    net, _ = load_weights(DENOISER, torch.device("cpu"))
    noise = degradation("denoise", SIGMA)
    (seen,) = evaluate(bundled().test[:1], noise, lambda image: image, CROP)
    found = calls(net, seen.input)
    figure = Figure(figsize=(11, 2.9 * len(found)), layout="constrained")
    rows = figure.subplots(len(found), 4, squeeze=False)
    for axes, level in zip(rows, sorted(found, reverse=True), strict=True):
        side = net.config.unshuffle * 2**level
        draw_row(list(axes), found[level], seen.target, side, strongest_edge(seen.target))
        axes[0].set_title(f"{seen.name}, upsampler to level {level}", fontsize=9)
    return figure
