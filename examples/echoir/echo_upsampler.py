"""The Echo-Upsampler (EchoIR, Eqs. 4-6): joint bilateral upsampling whose guide is an encoder feature.

A pixel p of the fine grid is a weighted mean of the coarse pixels q around it. The weight of q has
two parts: how near q lies (the spatial kernel f), and how much the fine guide at p looks like the
coarse guide at q (the range kernel g). The guide is the *echo*: the encoder feature of the same
resolution, which still has the edges that downsampling lost.

`upsample_reference` reads like the equations. `upsample` gives the same numbers several times
faster: it cuts the image into tiles of 4 x 4 coarse (8 x 8 fine) pixels, so that every distance and
every weighted sum becomes a dense matrix product of a tile's fine pixels with the coarse pixels of
the tile and a halo of `radius` around it. Most of those products belong to pairs that are not
neighbors and are masked away; dense products are so much faster than gathering that this waste pays.
"""

import itertools
import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

Combine = Literal["sum", "product"]

# In coarse pixels: at radius 1, a tile pairs 64 fine with 36 coarse pixels; one pair in four counts.
TILE = 4
# The nearest coarse pixel is 0.35 away: exp(-0.125 / 0.02) = 2e-3 keeps the sum of weights above 0.
MIN_SPATIAL = 0.1


class EchoUpsampler(nn.Module):
    """Doubles the resolution and halves the channels of a feature map, guided by an echo.

    Args:
        channels: channels n of the coarse input; the output has n / 2.
        echo_channels: channels of the echo.
        radius: neighbors are the coarse pixels within `radius` rows and columns of the parent.
        combine: W = f + g (`"sum"`, the paper) or W = f g (`"product"`, the classic joint bilateral kernel).
        expansion: hidden width of the guidance MLP, in units of n / 2.

    Example:
        >>> upsampler = EchoUpsampler(8, echo_channels=4)
        >>> upsampler(torch.ones(1, 8, 3, 5), torch.randn(1, 4, 6, 10)).shape
        torch.Size([1, 4, 6, 10])
    """

    def __init__(
        self,
        channels: int,
        echo_channels: int,
        *,
        radius: int = 1,
        combine: Combine = "sum",
        expansion: float = 2.66,
    ):
        super().__init__()
        if channels % 2 or channels <= 0:
            raise ValueError(
                f"`EchoUpsampler(channels=...)` must be even and positive. Got channels={channels}."
            )
        if not 1 <= radius <= TILE:
            raise ValueError(
                f"`EchoUpsampler(radius=...)` must be from 1 to {TILE}. Got radius={radius}."
            )
        if combine not in ("sum", "product"):
            raise ValueError(
                f'`EchoUpsampler(combine=...)` must be "sum" or "product". Got combine={combine!r}.'
            )
        width = channels // 2
        hidden = int(expansion * width)
        self.radius = radius
        self.combine: Combine = combine
        # Halving the channels first equals halving them last, at a quarter of the cost: the weights are shared by
        # all channels and sum to one.
        self.reduce = nn.Conv2d(channels, width, 1)
        self.guide = nn.Sequential(
            nn.Conv2d(echo_channels, hidden, 1),
            nn.GELU(),
            nn.Conv2d(hidden, width, 1, bias=False),  # a bias would cancel in G[p] - G_l[q]
        )
        self.log_spatial = nn.Parameter(torch.tensor(math.log(0.5)))  # s_f: half a coarse pixel
        self.log_range = nn.Parameter(torch.tensor(0.0))  # s_g: one, in guide units per channel

    def forward(self, x: Tensor, echo: Tensor) -> Tensor:
        """Maps x (B, n, h, w) and its echo (B, e, 2h, 2w) to (B, n/2, 2h, 2w)."""
        return upsample(
            self.reduce(x),
            self.guide(echo),
            self.log_spatial.exp(),
            self.log_range.exp(),
            radius=self.radius,
            combine=self.combine,
        )


def upsample_reference(
    value: Tensor,
    guide: Tensor,
    spatial: Tensor,
    range_: Tensor,
    *,
    radius: int = 1,
    combine: Combine = "sum",
) -> Tensor:
    """Joint bilateral upsampling, written as the equations are: one neighbor of all pixels after the other.

    Args:
        value: v, the coarse values, (B, C, h, w).
        guide: G, the fine guide, (B, D, 2h, 2w).
        spatial: s_f, width of the spatial kernel in coarse pixels; at least 0.1 is used.
        range_: s_g, width of the range kernel.
        radius: half-width of the neighborhood, in coarse pixels.
        combine: `"sum"` or `"product"` of the two kernels.

    Returns:
        The fine values, (B, C, 2h, 2w).
    """
    batch, channels, h, w = value.shape
    side = 2 * radius + 1

    def neighbors(coarse: Tensor) -> Iterator[Tensor]:  # K times (B, C, h, 1, w, 1)
        padded = functional.pad(coarse, (radius, radius, radius, radius))
        for y, x in itertools.product(range(side), range(side)):
            yield padded[:, :, y : y + h, None, x : x + w, None]

    # Fine pixels are (h, 2, w, 2): those of a coarse one stand together, and meet its neighbors by broadcasting.
    offset = torch.arange(-radius, radius + 1, dtype=value.dtype, device=value.device)
    # The two of each axis lie a quarter of a coarse pixel before and behind the center.
    lean = torch.tensor([-0.25, 0.25], dtype=value.dtype, device=value.device)
    apart = (offset[:, None] - lean) ** 2  # (side, 2)
    distance = apart[:, None, None, :, None, None] + apart[None, :, None, None, None, :]
    distance = distance.flatten(0, 1)  # (K, 1, 2, 1, 2)
    log_f = -distance / (2 * spatial.clamp(min=MIN_SPATIAL) ** 2)

    coarse_guide = functional.avg_pool2d(guide, 2)
    fine_guide = guide.reshape(batch, -1, h, 2, w, 2)
    squares = [((fine_guide - near) ** 2).sum(1) for near in neighbors(coarse_guide)]
    log_g = -torch.stack(squares, 1) / (2 * range_**2 * guide.shape[1])  # (B, K, h, 2, w, 2)

    inside = torch.cat(list(neighbors(torch.ones_like(value[:, :1]))), 1) > 0  # (B, K, h, 1, w, 1)
    if combine == "sum":
        weights = (log_f.exp() + log_g.exp()) * inside
        weights = weights / weights.sum(1, keepdim=True)
    else:  # a softmax of the logarithms: the naive product is 0 / 0 where all guides differ much
        weights = (log_f + log_g).masked_fill(~inside, -torch.inf).softmax(1)
    # Each weight is shared by all channels, (B, 1, h, 2, w, 2).
    pairs = zip(weights.unbind(1), neighbors(value), strict=True)
    out = sum(weight[:, None] * near for weight, near in pairs)
    return out.reshape(batch, channels, 2 * h, 2 * w)


def upsample(
    value: Tensor,
    guide: Tensor,
    spatial: Tensor,
    range_: Tensor,
    *,
    radius: int = 1,
    combine: Combine = "sum",
) -> Tensor:
    """Joint bilateral upsampling by dense products on tiles; arguments and result as `upsample_reference`.

    Raises:
        ValueError: if the guide is not exactly twice as large as the values.
    """
    batch, channels, h, w = value.shape
    if guide.shape[0] != batch or guide.shape[-2:] != (2 * h, 2 * w):
        raise ValueError(
            "`upsample(guide=...)` must have the batch and twice the height and width of `value`. Got guide of "
            f"shape {tuple(guide.shape)} for value of shape {tuple(value.shape)}. Pad the image to a multiple of 8."
        )
    # Distances are differences of large numbers: bfloat16 would lose them, so the core runs in float32 or more.
    dtype = torch.promote_types(value.dtype, torch.float32)
    with _full_precision(value.device):
        v, g = value.to(dtype), guide.to(dtype)
        coarse_guide = functional.avg_pool2d(g, 2)
        # Padding up to whole tiles; the tiles' halo is padded too. What it is filled with is masked.
        down, right = -h % TILE, -w % TILE
        query = _fine_tiles(functional.pad(g, (0, 2 * right, 0, 2 * down)))  # (B, T, 64, D)
        pad = (radius, radius + right, radius, radius + down)
        stack = _halo_tiles(
            functional.pad(torch.cat([coarse_guide, v], 1), pad), radius
        )  # (B, T, N, D + C)
        key, content = stack.split([g.shape[1], channels], -1)
        mask, distance = _geometry(h, w, radius, v)
        out, _ = _TileFilter.apply(
            query,
            key,
            content,
            mask,
            distance,
            0.5 * spatial.to(dtype).clamp(min=MIN_SPATIAL) ** -2,
            0.5 * range_.to(dtype) ** -2 / g.shape[1],
            combine == "product",
        )
        rows, columns = (h + down) // TILE, (w + right) // TILE
        out = out.view(batch, rows, columns, 2 * TILE, 2 * TILE, channels).permute(0, 5, 1, 3, 2, 4)
        out = out.reshape(batch, channels, 2 * (h + down), 2 * (w + right))
    return out[..., : 2 * h, : 2 * w].to(value.dtype)


def _full_precision(device: torch.device) -> AbstractContextManager:
    """No autocast within, on devices that have it."""
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def _fine_tiles(fine: Tensor) -> Tensor:
    """(B, D, H, W) -> (B, T, 64, D): the 8 x 8 fine pixels of each tile."""
    batch, channels, height, width = fine.shape
    side = 2 * TILE
    tiles = fine.view(batch, channels, height // side, side, width // side, side)
    return tiles.permute(0, 2, 4, 3, 5, 1).reshape(batch, -1, side * side, channels)


def _halo_tiles(coarse: Tensor, radius: int) -> Tensor:
    """(B, C, h + 2 radius, w + 2 radius) -> (B, T, N, C): each tile's coarse pixels and those of its halo."""
    side = TILE + 2 * radius
    tiles = coarse.unfold(2, side, TILE).unfold(3, side, TILE)  # (B, C, rows, columns, side, side)
    return tiles.permute(0, 2, 3, 4, 5, 1).reshape(
        coarse.shape[0], -1, side * side, coarse.shape[1]
    )


def _geometry(h: int, w: int, radius: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Which pairs of a tile are neighbors inside the image, (T, 64, N), and how far apart all are, (64, N)."""
    p = torch.arange(2 * TILE, device=like.device)  # a tile's fine rows
    q = torch.arange(-radius, TILE + radius, device=like.device)  # its coarse rows, halo included
    near = (p[:, None] // 2 - q).abs() <= radius  # (8, side)
    apart = (q - (0.5 * p[:, None].to(like.dtype) - 0.25)) ** 2  # (8, side)

    def inside(size: int) -> Tensor:  # along one axis, (tiles, 8, side)
        start = TILE * torch.arange(-(-size // TILE), device=like.device)[:, None, None]
        coarse, parent = start + q, start + p[:, None] // 2
        # A pixel of the padding itself keeps its neighbors: an empty row would be 0 / 0. It is cropped away.
        return near & (((coarse >= 0) & (coarse < size)) | (parent >= size))

    def outer(
        rows: Tensor, columns: Tensor
    ) -> Tensor:  # (a, 8, side) x (b, 8, side) -> (a b, 64, N)
        grid = rows[:, None, :, None, :, None], columns[None, :, None, :, None, :]
        pairs = grid[0] & grid[1] if rows.dtype == torch.bool else grid[0] + grid[1]
        return pairs.reshape(rows.shape[0] * columns.shape[0], p.numel() ** 2, q.numel() ** 2)

    return outer(inside(h), inside(w)), outer(apart[None], apart[None])[0]


def _ranges(query, key, mask, distance, inv_f, inv_g, product: bool) -> Tensor:
    """The part of the weights W that moves with g, (B, T, 64, N): all of them, before normalization, or g."""
    squares = (query**2).sum(-1, keepdim=True) + (key**2).sum(-1)[..., None, :]
    log_g = (squares - 2 * query @ key.mT) * -inv_g  # -|G[p] - G_l[q]|^2 / (2 s_g^2 D)
    if product:
        logits = (log_g - distance * inv_f).masked_fill(~mask, -torch.inf)
        return (logits - logits.detach().amax(-1, keepdim=True)).exp()
    return log_g.exp() * mask


def _spatial(distance: Tensor, inv_f: Tensor) -> Tensor:
    """The spatial kernel of all pairs of a tile, (64, N)."""
    return (-distance * inv_f).exp()


class _TileFilter(torch.autograd.Function):
    """The weighted mean of `value` on every tile, with its gradient by hand.

    Plain autograd keeps five times as much and takes half as long again. `inv_f` and `inv_g` are
    1 / (2 s_f^2) and 1 / (2 s_g^2 D).
    """

    @staticmethod
    def forward(query, key, value, mask, distance, inv_f, inv_g, product):
        ranges = _ranges(query, key, mask, distance, inv_f, inv_g, product)
        weights = ranges if product else ranges + _spatial(distance, inv_f) * mask
        return weights @ value / weights.sum(-1, keepdim=True), ranges

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, product = inputs
        out, ranges = output
        ctx.product = product
        ctx.mark_non_differentiable(ranges)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, out, ranges)

    @staticmethod
    def backward(ctx, grad, *_):
        if grad is None:
            return (None,) * 8
        *tensors, out, ranges = ctx.saved_tensors
        query, key, value, mask, distance, inv_f, inv_g = tensors
        with _full_precision(query.device):
            if torch.is_grad_enabled():
                # A second derivative is wanted, but to autograd the saved weights are constants.
                ranges = _ranges(query, key, mask, distance, inv_f, inv_g, ctx.product)
            spatial = _spatial(distance, inv_f)
            weights = ranges if ctx.product else ranges + spatial * mask
            grad = grad / weights.sum(-1, keepdim=True)
            d_value = weights.mT @ grad
            del weights  # as large as all that is kept: the peak would be here
            # Less the mean: what raises all weights of a pixel alike changes nothing.
            d_weights = grad @ value.mT - (grad * out).sum(-1, keepdim=True)
            d_log_f = (d_weights * (ranges if ctx.product else spatial * mask)).sum((0, 1))
            d_log_g = d_weights * ranges
            del d_weights
            rows, columns = d_log_g.sum(-1, keepdim=True), d_log_g.sum(-2)[..., None]
            from_key, from_query = d_log_g @ key, d_log_g.mT @ query
            d_query = 2 * inv_g * (from_key - rows * query)
            d_key = 2 * inv_g * (from_query - columns * key)
            d_inv_f = -(d_log_f * distance).sum()
            # The sum of d_log_g |p - q|^2, from products that are at hand.
            d_inv_g = (query * (2 * from_key - rows * query)).sum() - (columns * key**2).sum()
        return d_query, d_key, d_value, None, None, d_inv_f, d_inv_g, None
