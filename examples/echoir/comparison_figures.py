"""Figures that compare restored photographs: enlarged crops, and what is left wrong."""

from dataclasses import dataclass

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from scores import psnr
from torch import Tensor
from torch.nn import functional

HEIGHT, WIDTH = 1.7, 2.1  # inches of one image


@dataclass(frozen=True)
class Comparison:
    """One photograph, before and after each method; images are (3, H, W) in [0, 1]."""

    name: str
    target: Tensor
    input: Tensor
    restored: dict[str, Tensor]

    def versions(self) -> dict[str, Tensor]:
        """The input and what each method made of it."""
        return {"input": self.input} | self.restored


def draw_crops(comparisons: list[Comparison], box: int) -> Figure:
    """A row a photograph: all of it with a box, then the box's content before, after and in truth.

    PSNR is that of the whole photograph.

    The box is where the photograph has most detail, so nobody chose it to please.
    """
    columns = len(comparisons[0].restored) + 3
    figure, axes = _grid(len(comparisons), columns)
    for row, comparison in zip(axes, comparisons, strict=True):
        top, left = most_detailed(comparison.target, box)
        place = ..., slice(top, top + box), slice(left, left + box)
        _show(row[0], comparison.target, comparison.name)
        row[0].add_patch(Rectangle((left, top), box, box, fill=False, color="red", linewidth=1))
        for axis, (name, image) in zip(row[1:], comparison.versions().items(), strict=False):
            _show(axis, image[place], f"{name}, {psnr(image, comparison.target):.2f} dB")
        _show(row[-1], comparison.target[place], "truth")
    return figure


def draw_differences(comparisons: list[Comparison]) -> Figure:
    """A row a photograph: its truth, and the absolute error of each version in one color scale for all."""
    errors = [
        {name: (image - c.target).abs().mean(0) for name, image in c.versions().items()}
        for c in comparisons
    ]
    # Up to what all but a hundredth of the restored pixels stay below: the input may saturate.
    restored = [error.flatten() for row in errors for name, error in row.items() if name != "input"]
    highest = float(np.quantile(torch.cat(restored).numpy(), 0.99))
    figure, axes = _grid(len(comparisons), len(errors[0]) + 1)
    for row, comparison, error in zip(axes, comparisons, errors, strict=True):
        _show(row[0], comparison.target, comparison.name)
        for axis, (name, values) in zip(row[1:], error.items(), strict=True):
            shown = axis.imshow(values.numpy(), cmap="magma", vmin=0, vmax=highest)
            axis.set_title(f"{name}, mean {values.mean():.3f}", fontsize=8)
    bar = figure.colorbar(shown, ax=axes, shrink=0.8)
    bar.set_label("absolute error, in units of white", fontsize=8)
    bar.ax.tick_params(labelsize=7)
    return figure


def most_detailed(image: Tensor, box: int) -> tuple[int, int]:
    """Top and left of the box, with height and width `box`, in which the gradient is largest."""
    gray = image.mean(0)
    detail = gray.diff(dim=0)[:, :-1].abs() + gray.diff(dim=1)[:-1].abs()
    side = min(box, *detail.shape)
    means = functional.avg_pool2d(detail[None, None], side, 1)[0, 0]
    return divmod(int(means.argmax()), means.shape[1])


def _grid(rows: int, columns: int) -> tuple[Figure, np.ndarray]:
    figure = Figure(figsize=(WIDTH * columns, HEIGHT * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    return figure, axes


def _show(axis: Axes, image: Tensor, title: str):
    axis.imshow(image.clamp(0, 1).permute(1, 2, 0).numpy(), interpolation="nearest")
    axis.set_title(title, fontsize=8)
