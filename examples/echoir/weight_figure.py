"""The weights that an Echo-Upsampler gives the neighbors of one pixel, on a photograph."""

from dataclasses import dataclass

import numpy as np
import torch
from comparison_figures import Comparison
from echo_upsampler import Combine, EchoUpsampler, upsample_reference
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from model import EchoIR, pad
from torch import Tensor

AROUND = 6  # coarse pixels shown to each side of the chosen one
# Text on the colors of the weights, in a group `on-color` that a page tells from the text on its own color.
DARK, LIGHT = "#101010", "#f5f5f5"
EVERYWHERE = 1e6  # a width at which a kernel is one for all neighbors


@dataclass(frozen=True)
class Call:
    """What one Echo-Upsampler was given."""

    upsampler: EchoUpsampler
    value: Tensor
    guide: Tensor

    def weights(self, pixel: tuple[int, int], *, f: bool = True, g: bool = True) -> Tensor:
        """The weights that make up one fine pixel, (h, w); they add up to one.

        The output is linear in the values, so its derivative is the weights: no second formula of
        them is needed, and none can differ.

        Args:
            pixel: row and column on the fine grid.
            f: with the spatial kernel.
            g: with the range kernel.
        """
        up = self.upsampler
        one = torch.zeros_like(self.value[:, :1]).requires_grad_()
        width_f = up.log_spatial.exp() if f else torch.tensor(EVERYWHERE)
        width_g = up.log_range.exp() if g else torch.tensor(EVERYWHERE)
        # A kernel alone is the product with one that is the same everywhere.
        combine: Combine = up.combine if f and g else "product"
        with torch.enable_grad():
            out = upsample_reference(
                one,
                self.guide,
                width_f.detach(),
                width_g.detach(),
                radius=up.radius,
                combine=combine,
            )
            return torch.autograd.grad(out[0, 0, pixel[0], pixel[1]], one)[0][0, 0]


def draw_weights(
    net: EchoIR,
    method: str,
    comparison: Comparison,
    level: int,
    pixel: tuple[int, int] | None,
) -> Figure:
    """The surroundings of a pixel, and the weights of the spatial kernel, of the range kernel, and of both.

    Args:
        net: the network.
        method: what trained it.
        comparison: the photograph, whose degraded version the network sees.
        level: of the Echo-Upsampler, 0 is the finest.
        pixel: row and column in the photograph; on its strongest edge by default.

    Raises:
        ValueError: if there is no such Echo-Upsampler, or the pixel is outside the photograph.
    """
    call = calls(net, comparison.input)
    if level not in call:
        raise ValueError(
            f"`--level` must be that of an Echo-Upsampler, one of {sorted(call)}. Got {level}. Use 0, the "
            "finest."
        )
    size = comparison.target.shape[1:]
    row, column = pixel or strongest_edge(comparison.target)
    if not (0 <= row < size[0] and 0 <= column < size[1]):
        raise ValueError(
            f"`--pixel` must be a row and a column within {tuple(size)}. Got {(row, column)}. Use smaller "
            "ones, or leave it out for the strongest edge."
        )
    figure = Figure(figsize=(11, 3.2), layout="constrained")
    side = net.config.unshuffle * 2**level
    axes = list(figure.subplots(1, 4))
    draw_row(axes, call[level], comparison.target, side, (row, column))
    axes[0].set_title(f"{comparison.name}: pixel and neighborhood", fontsize=9)
    figure.suptitle(f"{method}: Echo-Upsampler to level {level}", fontsize=10)
    return figure


def draw_row(axes: list[Axes], call: Call, photograph: Tensor, side: int, pixel: tuple[int, int]):
    """A photograph around a pixel, then the weights of each kernel and of both.

    Args:
        axes: four.
        call: of the Echo-Upsampler.
        photograph: (3, H, W) in [0, 1].
        side: the photograph's pixels that a fine pixel of the Echo-Upsampler is wide.
        pixel: row and column in the photograph.
    """
    row, column = pixel
    fine = row // side, column // side
    parent = fine[0] // 2, fine[1] // 2
    axes[0].imshow(photograph.permute(1, 2, 0).numpy())
    reach = 2 * side * AROUND
    axes[0].set(xlim=(column - reach, column + reach), ylim=(row + reach, row - reach))
    radius = call.upsampler.radius
    corner = [2 * side * (p - radius) - 0.5 for p in parent]
    width = 2 * side * (2 * radius + 1)
    frames = ((corner, width, "white"), ([side * p - 0.5 for p in fine], side, "red"))
    for (top, left), length, color in frames:
        frame = Rectangle((left, top), length, length, fill=False, color=color, linewidth=1.5)
        axes[0].add_patch(frame)

    near = tuple(slice(max(p - radius, 0), p + radius + 1) for p in parent)
    kernels = {
        "spatial kernel f": call.weights(fine, g=False)[near],
        "range kernel g": call.weights(fine, f=False)[near],
        f"weights W, {call.upsampler.combine}": call.weights(fine)[near],
    }
    highest = max(float(weights.max()) for weights in kernels.values())
    for axis, (title, weights) in zip(axes[1:], kernels.items(), strict=True):
        axis.imshow(weights.numpy(), cmap="viridis", vmin=0, vmax=highest)
        axis.set_title(title, fontsize=9)
        for (y, x), weight in np.ndenumerate(weights.numpy()):
            color = DARK if weight > 0.6 * highest else LIGHT
            axis.text(x, y, f"{weight:.3f}", color=color, ha="center", va="center", gid="on-color")
    for axis in axes:
        axis.set(xticks=[], yticks=[])


def calls(net: EchoIR, image: Tensor) -> dict[int, Call]:
    """What each Echo-Upsampler is given when an image, (3, H, W), is restored; by level."""
    found: dict[int, Call] = {}

    def note(level: int, upsampler: EchoUpsampler):
        def hook(_: EchoUpsampler, inputs: tuple[Tensor, Tensor]):
            x, echo = inputs
            found[level] = Call(upsampler, upsampler.reduce(x).cpu(), upsampler.guide(echo).cpu())

        return upsampler.register_forward_pre_hook(hook)

    ups = enumerate(net.upsamplers)
    hooks = [note(level, up) for level, up in ups if isinstance(up, EchoUpsampler)]
    device = next(net.parameters()).device
    try:
        with torch.no_grad():
            net(pad(image[None], net.config.multiple).to(device))
    finally:
        for hook in hooks:
            hook.remove()
    return found


def strongest_edge(image: Tensor) -> tuple[int, int]:
    """Row and column of the largest gradient, a little away from the border."""
    gray = image.mean(0)
    edge = (gray[2:, 1:-1] - gray[:-2, 1:-1]) ** 2 + (gray[1:-1, 2:] - gray[1:-1, :-2]) ** 2
    margin = min(32, min(edge.shape) // 4)
    inside = edge[margin:-margin, margin:-margin]
    row, column = divmod(int(inside.argmax()), inside.shape[1])
    return row + margin + 1, column + margin + 1
