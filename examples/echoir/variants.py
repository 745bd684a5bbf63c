"""What the ablations compare: the rows of the paper's Tables 4 to 6, and some more."""

from dataclasses import dataclass
from typing import Any, Literal

from methods import METHODS

Ablation = Literal["upsampler", "block", "strategy"]


@dataclass(frozen=True)
class Variant:
    """A row of the table.

    Attributes:
        labels: its first columns.
        net: what is different from the preset's network.
        method: how it is trained.
    """

    labels: tuple[str, ...]
    net: dict[str, Any]
    method: str

    @property
    def name(self) -> str:
        """For folders and files."""
        return "-".join(self.labels).replace(",", "").replace(" ", "-")


UPSAMPLERS: dict[str, dict[str, Any]] = {
    "pixel shuffle": {"upsampler": "pixel_shuffle"},
    "transposed convolution": {"upsampler": "transposed_conv"},
    "bilinear": {"upsampler": "bilinear"},
    "echo, sum": {"combine": "sum"},
    "echo, product": {"combine": "product"},
    "echo, input image": {"echo": "image"},
}
COLUMNS: dict[Ablation, tuple[str, ...]] = {
    "upsampler": ("upsampler",),
    "block": ("channel attention", "feed-forward"),
    "strategy": ("training", "upsampler"),
}


def variants(which: Ablation, method: str) -> list[Variant]:
    """The rows of an ablation; `method` trains all of the first two.

    The paper trains its upsamplers in one way that it does not name. So it leaves open whether its gain is the
    upsampler's or the training's, which `strategy` settles by training three of them in each way.
    """
    if which == "upsampler":  # Table 4
        return [Variant((label,), net, method) for label, net in UPSAMPLERS.items()]
    if which == "block":  # Table 5
        return [
            Variant(
                ("yes" if attention else "no", "gated" if gated else "plain"),
                {"channel_attention": attention, "feedforward": "gated" if gated else "mlp"},
                method,
            )
            for attention in (False, True)
            for gated in (False, True)
        ]
    return [  # Table 6, with Table 4's upsamplers
        Variant((strategy, label), UPSAMPLERS[label], strategy)
        for strategy in METHODS
        for label in ("pixel shuffle", "transposed convolution", "echo, sum")
    ]
