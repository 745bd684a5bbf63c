"""Restores images of any size: large ones in overlapping tiles whose borders are blended."""

from dataclasses import dataclass
from itertools import product
from math import ceil, lcm
from typing import Literal, Protocol

import torch
from local_statistics import local_statistics
from model import pad
from torch import Tensor, nn
from whole_image import Statistics, measured

Scope = Literal["whole", "local", "tile"]  # what the statistics are of


class Network(Protocol):
    """What `whole_image.Measured` and an exported network have in common."""

    def __call__(
        self, image: Tensor, core: Tensor | None = None, given: Statistics | None = None
    ) -> tuple[Tensor, Statistics | None]: ...


@dataclass(frozen=True)
class Span:
    """A tile along one axis.

    Attributes:
        start: first pixel.
        stop: one behind the last.
        core: where the part begins and ends that no other tile has.
        weight: of the pixels, (stop - start,); those of all tiles add up to one.
    """

    start: int
    stop: int
    core: tuple[int, int]
    weight: Tensor


def cut(size: int, tile: int, overlap: int, align: int = 1) -> list[Span]:
    """Cuts 0..size into spans of length `tile` that share `overlap` or more, and start at multiples of `align`.

    Over the middle half of what two spans share, the weight passes from one to the other. A span's
    outer quarter has none, as it lacks surroundings to look at.

    Raises:
        ValueError: if the tiles cannot overlap so.
    """
    stride = (tile - overlap) // align * align
    if not 0 <= overlap <= tile // 2 or stride == 0:
        raise ValueError(
            f"Tiles must overlap by at most half their size, and be {align} pixels larger than the "
            f"overlap. Got tile={tile}, overlap={overlap}. Use e.g. tile=512, overlap=64."
        )
    gaps = max(0, ceil((size - tile) / stride))
    starts = (
        [ceil(i * (size - tile) / gaps / align) * align for i in range(gaps + 1)] if gaps else [0]
    )
    stops = [min(start + tile, size) for start in starts]
    middles = [(a + b) // 2 // align * align for a, b in zip(starts[1:], stops, strict=False)]
    edges = [0, *middles, size]

    def rise(i: int, at: Tensor) -> Tensor:  # from zero to one where span i begins
        if not 0 < i <= gaps:
            return torch.full_like(at, float(i == 0))
        shared = stops[i - 1] - starts[i]
        return ((at - starts[i] - shared / 4) / max(shared / 2, 0.5)).clamp(0, 1)

    spans = []
    for i, (start, stop) in enumerate(zip(starts, stops, strict=True)):
        at = torch.arange(start, stop) + 0.5
        spans.append(Span(start, stop, (edges[i], edges[i + 1]), rise(i, at) - rise(i + 1, at)))
    return spans


def restore(
    net: nn.Module,
    image: Tensor,
    *,
    device: torch.device,
    amp: bool = False,
    tile: int = 512,
    overlap: int = 64,
    statistics: Scope = "whole",
    window: int = 48,
    multiple: int = 8,
) -> Tensor:
    """Restores one image, (3, H, W).

    Args:
        net: maps (1, 3, h, w) to the same.
        image: values about [0, 1].
        device: where the network is.
        amp: compute in bfloat16 where that is safe.
        tile: images larger than this are cut into tiles of this size, which bounds the memory.
        overlap: pixels that neighboring tiles share, over which they are blended.
        statistics: of the `"whole"` image, gathered in a first pass over the tiles, which gives what the
            image in one piece would; of `"local"` windows around each pixel; or of each `"tile"`.
        window: height and width of the local windows; the training patches' size is best.
        multiple: what the network pads its input to. Tiles start at multiples of it, so that all are
            downsampled on one grid.

    Raises:
        ValueError: if the tiles cannot overlap so.
    """
    options = {"tile": tile, "overlap": overlap, "multiple": multiple}
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=amp):
        if statistics == "local":
            options["align"] = lcm(multiple, window // 2)  # all tiles have one set of windows
            with local_statistics(net, window, multiple) as local:
                return restore_with(
                    lambda part, *_: (local(part.to(device)), None), image, **options
                )
        with measured(net) as network:
            return restore_with(
                lambda part, *known: network(part.to(device), *known),
                image,
                whole=statistics == "whole",
                **options,
            )


def restore_with(
    network: Network,
    image: Tensor,
    *,
    tile: int,
    overlap: int,
    multiple: int,
    align: int | None = None,
    whole: bool = False,
) -> Tensor:
    """Restores one image by whatever can restore a tile; arguments as of `restore`.

    Args:
        network: restores a tile, and measures it where that is asked.
        image: (3, H, W).
        tile: height and width of the tiles.
        overlap: pixels that they share.
        multiple: the image is padded to it.
        align: tiles start at multiples of it; `multiple` by default.
        whole: gather the statistics of the whole image first.
    """
    padded = pad(image[None], multiple)
    rows, columns = (cut(size, tile, overlap, align or multiple) for size in padded.shape[2:])
    given = None
    if whole and len(rows) * len(columns) > 1:
        for y, x in product(rows, columns):
            core = [edge - y.start for edge in y.core] + [edge - x.start for edge in x.core]
            part = padded[..., y.start : y.stop, x.start : x.stop]
            _, found = network(part, torch.tensor(core))
            given = found if given is None else given + found
    total = torch.zeros_like(padded[0])
    for y, x in product(rows, columns):
        place = ..., slice(y.start, y.stop), slice(x.start, x.stop)
        restored, _ = network(padded[place], None, given)
        total[place] += restored[0].float().cpu() * (y.weight[:, None] * x.weight)
    return total[:, : image.shape[1], : image.shape[2]]
