"""The mixed attention block (MAB) of EchoIR, Eqs. 1-3: channel-transposed self-attention, channel attention, gated FFN.

    y = x + CA(SA(LN(x))),    out = y + FFN(LN(y))

Every block maps (B, d, H, W) to (B, d, H, W). What it sums over all pixels goes through a `Gram` or a `Mean`, modules
without parameters, so that statistics.py can sum over an image of which only a tile is in memory.
"""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

Feedforward = Literal["gated", "mlp"]
Spatial = Literal["depthwise", "dense"]


class LayerNorm(nn.Module):
    """Normalizes the channels of each pixel."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(
            0, 2, 3, 1
        )  # a view; contiguous where x is channels-last, which is what the norm reads fastest
        return functional.layer_norm(x, x.shape[-1:], self.weight, self.bias).permute(0, 3, 1, 2)


class Gram(nn.Module):
    """The products of all pairs of rows, summed over the pixels: (..., r, h, w) to (..., r, r)."""

    def forward(self, rows: Tensor) -> Tensor:
        rows = rows.flatten(-2)
        return rows @ rows.mT


class Mean(nn.Module):
    """The mean over the pixels: (B, d, h, w) to (B, d, 1, 1)."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3), keepdim=True)


class SelfAttention(nn.Module):
    """SA: attention between channels, not pixels, so that its cost is linear in the image's size.

    Queries and keys have unit norm over the pixels and each head learns a temperature. The literal 1 / sqrt(d) of Eq. 1
    (`literal_scale`) sums over all pixels: the logits grow with the image and the softmax saturates.
    """

    def __init__(
        self, width: int, heads: int, *, bias: bool, depthwise_qkv: bool, literal_scale: bool
    ):
        super().__init__()
        if width % heads:
            raise ValueError(
                f"The width of a block must be a multiple of its heads. Got width={width}, heads={heads}."
            )
        self.heads = heads
        self.literal_scale = literal_scale
        self.qkv = nn.Conv2d(width, 3 * width, 1, bias=bias)
        self.depthwise = (
            nn.Conv2d(3 * width, 3 * width, 3, padding=1, groups=3 * width, bias=bias)
            if depthwise_qkv
            else nn.Identity()
        )
        self.gram = Gram()
        self.temperature = nn.Parameter(torch.ones(heads, 1, 1))
        self.out = nn.Conv2d(width, width, 1, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.attend(self.project(x)).flatten(1, 2))

    def project(self, x: Tensor) -> Tensor:
        """Queries, keys and values: (B, d, h, w) to (B, 3, heads, c, h, w)."""
        qkv = self.depthwise(self.qkv(x))
        return qkv.reshape(x.shape[0], 3, self.heads, -1, *x.shape[2:])

    def attend(self, qkv: Tensor) -> Tensor:
        """The mixed values, (B, heads, c, h, w)."""
        each, size = qkv.shape[3], qkv.shape[4:]
        # One product of all rows of q and k holds q k^T, and on its diagonal their squared norms: cheaper than to
        # normalize the rows, which are as long as the image.
        gram = self.gram(qkv[:, :2].transpose(1, 2).flatten(2, 3))  # (B, heads, 2c, 2c)
        logits = gram[..., :each, each:]  # (B, heads, c, c)
        if self.literal_scale:
            logits = logits / each**0.5
        else:
            norms = gram.diagonal(dim1=-2, dim2=-1).clamp(min=1e-12).sqrt()
            logits = logits / (norms[..., :each, None] * norms[..., None, each:])
        attention = (logits * self.temperature).softmax(-1)
        return (attention.to(qkv.dtype) @ qkv[:, 2].flatten(-2)).unflatten(-1, size)


class ChannelAttention(nn.Module):
    """CA: scales each channel by a number in (0, 1) computed from the means of all."""

    def __init__(self, width: int):
        super().__init__()
        self.mean = Mean()
        self.expand = nn.Linear(width, 2 * width)
        self.reduce = nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        # The means are (B, d, 1, 1), or (B, d, h, w) where each pixel has its own (local_statistics.py).
        means = self.mean(x).permute(0, 2, 3, 1)
        scale = self.reduce(functional.gelu(self.expand(means))).sigmoid()
        return x * scale.permute(0, 3, 1, 2)


class GatedFeedforward(nn.Module):
    """GDFN: one half, through GELU, gates the other, after a 3x3 convolution that looks around.

    `spatial="dense"` folds the 1x1 and the depthwise 3x3 convolution into one dense 3x3: more arithmetic, which matrix
    units do for free, and far less memory traffic, which is what a CPU waits for.
    """

    def __init__(self, width: int, hidden: int, *, bias: bool, spatial: Spatial):
        super().__init__()
        both = 2 * hidden
        self.widen = (
            nn.Conv2d(width, both, 3, padding=1, bias=bias)
            if spatial == "dense"
            else nn.Sequential(
                nn.Conv2d(width, both, 1, bias=bias),
                nn.Conv2d(both, both, 3, padding=1, groups=both, bias=bias),
            )
        )
        self.narrow = nn.Conv2d(hidden, width, 1, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.widen(x).chunk(2, 1)
        return self.narrow(functional.gelu(gate) * value)


class MLP(nn.Module):
    """The ablation's feed-forward: two layers, nothing spatial."""

    def __init__(self, width: int, hidden: int, *, bias: bool):
        super().__init__()
        self.widen = nn.Conv2d(width, hidden, 1, bias=bias)
        self.narrow = nn.Conv2d(hidden, width, 1, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.narrow(functional.gelu(self.widen(x)))


class MixedAttentionBlock(nn.Module):
    """MAB (Eqs. 1-3)."""

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        channel_attention: bool = True,
        feedforward: Feedforward = "gated",
        expansion: float = 2.66,
        spatial: Spatial = "depthwise",
        depthwise_qkv: bool = False,
        literal_scale: bool = False,
        bias: bool = True,
    ):
        super().__init__()
        self.norm1 = LayerNorm(width)
        self.attention = SelfAttention(
            width, heads, bias=bias, depthwise_qkv=depthwise_qkv, literal_scale=literal_scale
        )
        self.channel_attention = ChannelAttention(width) if channel_attention else nn.Identity()
        self.norm2 = LayerNorm(width)
        if feedforward == "gated":
            self.feedforward: nn.Module = GatedFeedforward(
                width, int(expansion * width), bias=bias, spatial=spatial
            )
        else:
            # 64, 128, 256, 512 for 48, 96, 192, 384: the hidden widths that fit the ablation's parameter counts.
            self.feedforward = MLP(width, width * 4 // 3, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.channel_attention(self.attention(self.norm1(x)))
        return x + self.feedforward(self.norm2(x))
