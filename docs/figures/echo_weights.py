"""The weights of the trained denoiser's Echo-Upsamplers around the strongest edge of a photograph."""

import numpy as np
import torch
from degradations import degradation
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from photographs import bundled
from scores import evaluate
from weight_figure import calls, strongest_edge
from weights import DENOISER, load_weights

CROP, SIGMA = 256, 25.0
AROUND = 5  # coarse pixels shown to each side of the pixel


def drawing() -> Figure:
    """A row an Echo-Upsampler: the surroundings of a pixel, and the weights of its coarse neighbors."""
    net, _ = load_weights(DENOISER, torch.device("cpu"))
    noise = degradation("denoise", SIGMA)
    (seen,) = evaluate(bundled().test[:1], noise, lambda image: image, CROP)
    found = calls(net, seen.input)
    row, column = strongest_edge(seen.target)
    figure = Figure(figsize=(11, 2.9 * len(found)), layout="constrained")
    rows = figure.subplots(len(found), 4, squeeze=False)
    for axes, level in zip(rows, sorted(found, reverse=True), strict=True):
        call, side = found[level], net.config.unshuffle * 2**level  # pixels of a fine one
        fine = row // side, column // side
        parent, radius = (fine[0] // 2, fine[1] // 2), call.upsampler.radius
        axes[0].imshow(seen.target.permute(1, 2, 0).numpy())
        reach = 2 * side * AROUND
        axes[0].set(xlim=(column - reach, column + reach), ylim=(row + reach, row - reach))
        frames = (
            ([2 * side * (p - radius) - 0.5 for p in parent], 2 * side * (2 * radius + 1), "white"),
            ([side * p - 0.5 for p in fine], side, "red"),
        )
        for (top, left), length, color in frames:
            frame = Rectangle((left, top), length, length, fill=False, color=color, linewidth=1.5)
            axes[0].add_patch(frame)
        axes[0].set_title(f"{seen.name}, upsampler to level {level}", fontsize=10)
        near = tuple(slice(max(p - radius, 0), p + radius + 1) for p in parent)
        kernels = {
            "spatial kernel f": call.weights(fine, g=False)[near],
            "range kernel g": call.weights(fine, f=False)[near],
            f"as used: {call.upsampler.combine}": call.weights(fine)[near],
        }
        highest = max(float(weights.max()) for weights in kernels.values())
        for place, (title, weights) in zip(axes[1:], kernels.items(), strict=True):
            place.imshow(weights.numpy(), cmap="viridis", vmin=0.0, vmax=highest)
            place.set_title(title, fontsize=10)
            for (i, j), weight in np.ndenumerate(weights.numpy()):
                color = "#101010" if weight > 0.6 * highest else "#f5f5f5"
                place.text(
                    j, i, f"{weight:.3f}", color=color, ha="center", va="center", gid="on-color"
                )
        for place in axes:
            place.set(xticks=[], yticks=[])
    return figure
