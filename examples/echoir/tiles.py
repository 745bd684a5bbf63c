"""Restores images of any size: large ones in overlapping tiles whose seams are blended."""

from collections.abc import Callable

import torch
from torch import Tensor


def restore(
    net: Callable[[Tensor], Tensor],
    image: Tensor,
    *,
    device: torch.device,
    amp: bool = False,
    tile: int = 512,
    overlap: int = 64,
) -> Tensor:
    """Restores one image, (3, H, W); the network itself pads to its multiple and crops.

    Args:
        net: maps (1, 3, h, w) to the same.
        image: values about [0, 1].
        device: where the network is.
        amp: compute in bfloat16 where that is safe.
        tile: images larger than this are cut into tiles of this size, which bounds the memory.
        overlap: pixels that neighboring tiles share. The weight of a tile falls to zero over them,
            so that no seam shows.

    Raises:
        ValueError: if the tiles cannot overlap so.
    """
    if not 0 <= overlap <= tile // 2:
        raise ValueError(
            f"Tiles must overlap by at most half their size. Got tile={tile}, overlap={overlap}. "
            "Use e.g. tile=512, overlap=64."
        )
    total = torch.zeros_like(image)
    weight = torch.zeros_like(image[:1])
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=amp):
        for top, bottom in spans(image.shape[1], tile, overlap):
            for left, right in spans(image.shape[2], tile, overlap):
                part = image[None, :, top:bottom, left:right].to(device)
                window = _ramp(bottom - top, overlap)[:, None] * _ramp(right - left, overlap)
                total[:, top:bottom, left:right] += net(part)[0].float().cpu() * window
                weight[:, top:bottom, left:right] += window
    return total / weight


def spans(size: int, tile: int, overlap: int) -> list[tuple[int, int]]:
    """Cuts 0..size into the fewest spans of length `tile` that share `overlap` or more."""
    if size <= tile:
        return [(0, size)]
    count = -(-(size - overlap) // (tile - overlap))
    starts = [round(i * (size - tile) / (count - 1)) for i in range(count)]
    return [(start, start + tile) for start in starts]


def _ramp(size: int, overlap: int) -> Tensor:
    """Rises to one over `overlap` pixels and falls likewise; dividing by the sum undoes it at edges."""
    distance = torch.arange(1, size + 1).minimum(torch.arange(size, 0, -1))
    return (distance / (overlap + 1)).clamp(max=1)
