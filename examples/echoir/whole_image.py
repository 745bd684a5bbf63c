"""What a network sums over a whole image, gathered from tiles of it.

Two parts of a mixed attention block look at all pixels: self-attention at the products of its queries
and keys (`Gram`), channel attention at means (`Mean`). A tile by itself has other statistics than the
image it was cut from, and is restored a little differently. But both are sums over pixels: those of
the image are the sums of those of its tiles. So one pass over the tiles adds them up, and the next
restores every tile with them.

The first pass is not exact: its deeper blocks see features that were made with the tiles' own
statistics. What that leaves is far below a rounding to 8 bits (README), and each further pass makes one more
block exact.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from blocks import Gram, Mean
from parts import replaced
from torch import Tensor, nn


@dataclass(frozen=True)
class Statistics:
    """Sums over the pixels of an image, or of a part of one.

    Attributes:
        pixels: how many of the image (a feature map has fewer), a scalar.
        sums: one for each `Gram` and `Mean`, in the order of the network's modules.
    """

    pixels: Tensor
    sums: tuple[Tensor, ...]

    def __add__(self, other: "Statistics") -> "Statistics":
        sums = (a + b for a, b in zip(self.sums, other.sums, strict=True))
        return Statistics(self.pixels + other.pixels, tuple(sums))


class Measured(nn.Module):
    """A network that says what it sums over a part of its input, and takes an image's sums instead."""

    def __init__(self, net: nn.Module, tile: "_Tile"):
        super().__init__()
        self.net, self._tile = net, tile

    def forward(
        self, image: Tensor, core: Tensor | None = None, given: Statistics | None = None
    ) -> tuple[Tensor, Statistics | None]:
        """Restores a tile.

        Args:
            image: the tile, (1, 3, h, w).
            core: top, bottom, left and right of the part that is measured; none by default. Tiles
                overlap and are wrong near their borders, cores are neither.
            given: statistics of the image. Where they are left out, or have no pixels, the core's
                own are used; where that is left out too, those of the whole tile.

        Returns:
            The restored tile, and the statistics of its core.
        """
        tile = self._tile
        tile.start(image, core, given)
        restored = self.net(image)
        return restored, None if core is None else Statistics(tile.pixels, tuple(tile.sums))


@contextmanager
def measured(net: nn.Module) -> Iterator[Measured]:
    """Measures a network for a while; no one else should use it meanwhile."""
    tile = _Tile()

    def make(pool: nn.Module) -> nn.Module:
        tile.pools += 1
        return _Pool(pool, tile, tile.pools - 1)

    with replaced(net, (Gram, Mean), make):
        yield Measured(net, tile)


class _Tile:
    """What the pools of a network have to know about the tile at hand, and what they tell about it."""

    def __init__(self):
        self.pools = 0

    def start(self, image: Tensor, core: Tensor | None, given: Statistics | None):
        self.size, self.core, self.given = image.shape[2:], core, given
        self.sums = [image.new_zeros(())] * self.pools
        self.pixels = None if core is None else self.inside(image[0, 0]).sum(dtype=torch.float32)

    def inside(self, like: Tensor) -> Tensor:
        """One where the core is and zero elsewhere, at the resolution of a feature map, (h, w)."""
        axes = []
        for i, size in enumerate(self.size):
            cells = like.shape[i - 2]
            centers = (torch.arange(cells, device=like.device) + 0.5) * (size / cells)
            axes.append((centers > self.core[2 * i]) & (centers < self.core[2 * i + 1]))
        return (axes[0][:, None] & axes[1]).to(like.dtype)


class _Pool(nn.Module):
    """A `Gram` or `Mean` of a tile's core, or of the image where that is given."""

    def __init__(self, pool: nn.Module, tile: _Tile, index: int):
        super().__init__()
        self.pool, self.tile, self.index = pool, tile, index

    def forward(self, x: Tensor) -> Tensor:
        tile, mean = self.tile, isinstance(self.pool, Mean)
        if tile.core is None and tile.given is None:
            return self.pool(x)
        cells = x.shape[-2] * x.shape[-1]
        if tile.core is None:
            sums, pixels = tile.given.sums[self.index], tile.given.pixels
        else:
            own = self.pool(x * tile.inside(x))
            own = own.to(torch.promote_types(own.dtype, torch.float32))
            own = own * cells if mean else own
            tile.sums[self.index] = own
            sums, pixels = own, tile.pixels
            if tile.given is not None:
                known = tile.given.pixels > 0
                sums = torch.where(known, tile.given.sums[self.index], own)
                pixels = torch.where(known, tile.given.pixels, pixels)
        # A feature map has `cells` where the tile has h w pixels.
        return sums / (pixels * (cells / (tile.size[0] * tile.size[1]))) if mean else sums
