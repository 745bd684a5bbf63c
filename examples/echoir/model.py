"""EchoIR (arXiv 2412.07225): an encoder-decoder of mixed attention blocks whose decoder grows by Echo-Upsamplers.

    image -> shallow -> encoder 1 -> 2 -> 3 -> middle
               |          |        |    |        |
               |          |        |    '-echo-- up 3 -> fuse -> decoder 3
               |          |        '------echo------------------ up 2 -> fuse -> decoder 2
               |          '---------------echo---------------------------------- up 1 -> ... -> final -> + image
               '- each level halves the resolution and doubles the channels

The encoder feature of a level is used twice: as the echo that guides the upsampler, and concatenated to its output.

    python examples/echoir/model.py            # the parameter and FLOP counts of the paper's configurations, as a table
    python examples/echoir/model.py --json     # the same for programs
"""

import json
from dataclasses import dataclass, replace
from typing import Annotated, Literal, get_args

import torch
import tyro
from blocks import Feedforward, MixedAttentionBlock, Spatial
from echo_upsampler import Combine, EchoUpsampler
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional

Upsampler = Literal["echo", "pixel_shuffle", "transposed_conv", "bilinear"]


@dataclass(frozen=True)
class EchoIRConfig:
    """What an EchoIR is made of. The defaults are the paper's network, found by fitting its published counts.

    Attributes:
        width: channels of the first level; level l has `width * 2**l`.
        blocks: mixed attention blocks of each level, from the finest to the middle; decoders mirror encoders.
        heads: attention heads of each level.
        final_blocks: blocks after the last decoder.
        expansion: hidden width of the gated feed-forward and of the guidance MLP, in units of their output.
        channel_attention: whether the blocks have channel attention (Table 5).
        feedforward: `"gated"` (GDFN) or `"mlp"` (Table 5).
        spatial: the gated feed-forward's 3x3 convolution, `"depthwise"` or `"dense"`.
        depthwise_qkv: a depthwise 3x3 convolution after the queries, keys and values.
        literal_scale: attention logits scaled by 1 / sqrt(d), as Eq. 1 prints it, instead of normalized.
        downsampler: `"conv"` (3x3, stride 2) or `"unshuffle"` (3x3, then pixels into channels).
        upsampler: `"echo"`, or an unguided one (Table 4).
        echo: what guides: the encoder's `"features"`, or the input `"image"`.
        combine: spatial and range kernel added (`"sum"`) or multiplied (`"product"`).
        radius: neighborhood of the Echo-Upsampler, in coarse pixels.
        skip: how an encoder feature joins the decoder: `"concat"` and a 1x1 convolution, `"add"`, or `"none"`.
        wide_decoder: keep the first level's concatenation at twice the width, as Restormer does.
        unshuffle: a stem that folds so many by so many pixels into channels before the first level, and unfolds them
            at the end: the whole network then works at a fraction of the resolution.
        bias: biases in the backbone's convolutions, which Restormer leaves out.
    """

    width: int = 48
    blocks: tuple[int, ...] = (4, 6, 6, 8)
    heads: tuple[int, ...] = (1, 2, 4, 8)
    final_blocks: int = 4
    expansion: float = 2.66
    channel_attention: bool = True
    feedforward: Feedforward = "gated"
    spatial: Spatial = "depthwise"
    depthwise_qkv: bool = False
    literal_scale: bool = False
    downsampler: Literal["conv", "unshuffle"] = "conv"
    upsampler: Upsampler = "echo"
    echo: Literal["features", "image"] = "features"
    combine: Combine = "sum"
    radius: int = 1
    skip: Literal["concat", "add", "none"] = "concat"
    wide_decoder: bool = False
    unshuffle: int = 1
    bias: bool = True

    def __post_init__(self):
        if len(self.blocks) != len(self.heads) or len(self.blocks) < 2:
            raise ValueError(
                "`EchoIRConfig(blocks=..., heads=...)` must have one number a level, for at least two levels. Got "
                f"blocks={self.blocks}, heads={self.heads}."
            )
        if self.upsampler not in get_args(Upsampler):
            raise ValueError(
                f"`EchoIRConfig(upsampler=...)` must be one of {', '.join(get_args(Upsampler))}. "
                f"Got upsampler={self.upsampler!r}."
            )
        if self.wide_decoder and self.skip != "concat":
            raise ValueError(
                '`EchoIRConfig(wide_decoder=True)` must have skip="concat": it is the concatenation that it keeps. '
                f"Got skip={self.skip!r}."
            )

    @property
    def multiple(self) -> int:
        """Heights and widths must be multiples of this; `EchoIR.forward` pads to it and crops."""
        return self.unshuffle * 2 ** (len(self.blocks) - 1)


PRESETS = {
    "paper": EchoIRConfig(),
    "small": EchoIRConfig(width=16, blocks=(1, 1, 1, 2), final_blocks=1),
    # Every part of the architecture at a quarter of the resolution, with dense convolutions: two
    # CPU cores train it in minutes.
    "cpu": EchoIRConfig(
        width=32,
        blocks=(1, 1, 1),
        heads=(1, 2, 4),
        final_blocks=1,
        expansion=1.0,
        spatial="dense",
        unshuffle=2,
    ),
}

# More blocks where they see most: the networks of the denoisers that the example holds.
PRESETS["cpu_deep"] = replace(PRESETS["cpu"], blocks=(3, 1, 1), final_blocks=2)
PRESETS["cpu_deeper"] = replace(PRESETS["cpu"], blocks=(4, 1, 1), final_blocks=4)

# The other reading of the paper: Restormer's backbone with echoes. It fits the parameter column to 0.1 % (30.28 M) and
# misses the FLOPs, which the preset above fits to 0.5 %.
PRESETS["restormer_wide"] = replace(
    PRESETS["paper"],
    wide_decoder=True,
    depthwise_qkv=True,
    downsampler="unshuffle",
    bias=False,
)

# The rows of the paper's Tables 4 and 5 that the counts are held against.
ABLATIONS = {
    "echo": PRESETS["paper"],
    "pixel_shuffle": replace(PRESETS["paper"], upsampler="pixel_shuffle"),
    "transposed_conv": replace(PRESETS["paper"], upsampler="transposed_conv"),
    "no_ca_no_gdfn": replace(PRESETS["paper"], channel_attention=False, feedforward="mlp"),
    "gdfn_only": replace(PRESETS["paper"], channel_attention=False),
    "ca_only": replace(PRESETS["paper"], feedforward="mlp"),
}


class EchoIR(nn.Module):
    """Restores images: (B, 3, H, W) in [0, 1] to the same, any H and W.

    Example:
        >>> net = EchoIR(PRESETS["small"])
        >>> net(torch.rand(1, 3, 20, 33)).shape
        torch.Size([1, 3, 20, 33])
    """

    def __init__(self, config: EchoIRConfig):
        super().__init__()
        self.config = config
        c, levels = config, len(config.blocks) - 1
        widths = [c.width * 2**level for level in range(levels + 1)]
        pixels = 3 * c.unshuffle**2
        last = widths[0] * (2 if c.wide_decoder else 1)

        def stage(level: int, blocks: int, width: int | None = None) -> nn.Sequential:
            return nn.Sequential(
                *(
                    MixedAttentionBlock(
                        width or widths[level],
                        c.heads[level],
                        channel_attention=c.channel_attention,
                        feedforward=c.feedforward,
                        expansion=c.expansion,
                        spatial=c.spatial,
                        depthwise_qkv=c.depthwise_qkv,
                        literal_scale=c.literal_scale,
                        bias=c.bias,
                    )
                    for _ in range(blocks)
                )
            )

        self.shallow = nn.Conv2d(pixels, widths[0], 3, padding=1, bias=c.bias)
        self.encoders = nn.ModuleList(stage(level, c.blocks[level]) for level in range(levels))
        self.downsamplers = nn.ModuleList(_downsampler(widths[level], c) for level in range(levels))
        self.middle = stage(levels, c.blocks[-1])
        # Indexed by the level they lead to, so 0 is the finest and is used last.
        self.upsamplers = nn.ModuleList(_upsampler(widths[level], c) for level in range(levels))
        self.fuses = nn.ModuleList(
            nn.Identity()
            if c.skip != "concat" or (level == 0 and c.wide_decoder)
            else nn.Conv2d(2 * widths[level], widths[level], 1, bias=c.bias)
            for level in range(levels)
        )
        self.decoders = nn.ModuleList(
            stage(level, c.blocks[level], last if level == 0 else None) for level in range(levels)
        )
        self.final = stage(0, c.final_blocks, last)
        self.reconstruction = nn.Conv2d(last, pixels, 3, padding=1, bias=c.bias)

    def forward(
        self, image: Tensor, *, features: bool = False
    ) -> Tensor | tuple[Tensor, list[Tensor]]:
        """The restored image, and the encoder features E_l where they are asked for."""
        height, width = image.shape[-2:]
        padded = pad(image, self.config.multiple)
        echoes, x = self.encode(padded)
        x = self.middle(x)
        for level in reversed(range(len(echoes))):
            x = self.upsample(level, x, self.echo(level, echoes, padded))
            if self.config.skip == "concat":
                x = torch.cat([x, echoes[level]], 1)
            elif self.config.skip == "add":
                x = x + echoes[level]
            x = self.decoders[level](self.fuses[level](x))
        residual = self.reconstruction(self.final(x))
        if self.config.unshuffle > 1:
            residual = functional.pixel_shuffle(residual, self.config.unshuffle)
        restored = image + residual[..., :height, :width]
        return (restored, echoes) if features else restored

    def encode(self, image: Tensor) -> tuple[list[Tensor], Tensor]:
        """The encoder features E_l, from the finest, and the input of the middle; sizes must be multiples."""
        x = (
            functional.pixel_unshuffle(image, self.config.unshuffle)
            if self.config.unshuffle > 1
            else image
        )
        x = self.shallow(x)
        echoes = []
        for encoder, downsampler in zip(self.encoders, self.downsamplers, strict=True):
            echoes.append(encoder(x))
            x = downsampler(echoes[-1])
        return echoes, x

    def echo(self, level: int, echoes: list[Tensor], image: Tensor) -> Tensor:
        """What guides the upsampler that leads to `level`."""
        if self.config.echo == "features":
            return echoes[level]
        return functional.avg_pool2d(image, self.config.unshuffle * 2**level)

    def upsample(self, level: int, x: Tensor, echo: Tensor) -> Tensor:
        """The upsampler that leads to `level`; only the Echo-Upsampler looks at the echo."""
        upsampler = self.upsamplers[level]
        return upsampler(x, echo) if self.config.upsampler == "echo" else upsampler(x)


def pad(image: Tensor, multiple: int) -> Tensor:
    """Extends an image to the right and below, by repeating its edge, to a multiple in height and width."""
    height, width = image.shape[-2:]
    return functional.pad(image, (0, -width % multiple, 0, -height % multiple), mode="replicate")


def _downsampler(width: int, c: EchoIRConfig) -> nn.Module:
    """Half the resolution, twice the channels."""
    if c.downsampler == "conv":
        return nn.Conv2d(width, 2 * width, 3, stride=2, padding=1, bias=c.bias)
    return nn.Sequential(
        nn.Conv2d(width, width // 2, 3, padding=1, bias=False), nn.PixelUnshuffle(2)
    )


def _upsampler(width: int, c: EchoIRConfig) -> nn.Module:
    """Twice the resolution, half the channels: 2 `width` to `width`."""
    if c.upsampler == "echo":
        return EchoUpsampler(
            2 * width,
            width if c.echo == "features" else 3,
            radius=c.radius,
            combine=c.combine,
            expansion=c.expansion,
        )
    if (
        c.upsampler == "pixel_shuffle"
    ):  # without bias, as in Restormer, where the paper takes it from
        return nn.Sequential(
            nn.Conv2d(2 * width, 4 * width, 3, padding=1, bias=False), nn.PixelShuffle(2)
        )
    if c.upsampler == "transposed_conv":
        return nn.ConvTranspose2d(2 * width, width, 2, stride=2, bias=c.bias)
    return nn.Sequential(
        nn.Conv2d(2 * width, width, 1, bias=c.bias), nn.Upsample(scale_factor=2, mode="bilinear")
    )


def count(config: EchoIRConfig, size: int = 256) -> dict[str, int]:
    """Parameters, and FLOPs of one forward pass on a `size` x `size` image, without allocating a weight.

    FLOPs are two for each multiply-add of convolutions and linear layers, and of the Echo-Upsamplers' core: one for the
    distance and one for the sum, for each neighbor, pixel and channel. The attention's products of q, k and v (13.3 G
    for the paper's network) are not counted: the published figures don't hold them either.
    """
    flops = 0

    def add(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor):
        nonlocal flops
        if isinstance(module, EchoUpsampler):
            flops += 2 * 2 * (2 * module.radius + 1) ** 2 * output.numel()
        elif isinstance(module, nn.ConvTranspose2d):
            flops += 2 * inputs[0].numel() * module.weight[0].numel()
        elif isinstance(module, nn.Conv2d | nn.Linear):
            flops += 2 * output.numel() * module.weight[0].numel()

    with torch.device("meta"), torch.no_grad():
        net = EchoIR(config)
        for module in net.modules():
            module.register_forward_hook(add)
        net(torch.empty(1, 3, size, size))
    return {"parameters": sum(p.numel() for p in net.parameters()), "flops": flops}


def main(as_json: Annotated[bool, tyro.conf.arg(name="json")] = False):
    """Prints the parameters and FLOPs of the paper's network and its ablations.

    Args:
        as_json: print JSON, for programs.
    """
    counts = {name: count(config) for name, config in ABLATIONS.items()}
    if as_json:
        print(json.dumps(counts))
        return
    table = Table("network", "parameters", "GFLOPs at 256 x 256")
    for name, row in counts.items():
        table.add_row(name, f"{row['parameters']:,}", f"{row['flops'] / 1e9:.2f}")
    Console().print(table)


if __name__ == "__main__":
    tyro.cli(main)
