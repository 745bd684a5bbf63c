"""Statistics of windows the size of a training patch, in place of those of the whole image.

A network trained on patches has met only statistics of patches; those of a photograph are of another
kind. *Improving Image Restoration by Revisiting Global Information Aggregation* (Chu et al., ECCV
2022) therefore computes them, at test time only, over windows of the training patch's size, so that every
pixel is restored with the statistics of its surroundings. Here channel attention's mean becomes that
of the window around each pixel; self-attention is computed in windows that overlap by half, whose
results are blended.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from blocks import Mean, SelfAttention
from parts import replaced
from torch import Tensor, arange, nn
from torch.nn import functional


@contextmanager
def local_statistics(net: nn.Module, window: int, multiple: int) -> Iterator[nn.Module]:
    """Within, a network uses local statistics; no one else should use it meanwhile.

    Args:
        net: the network.
        window: height and width of a window, in pixels of the image.
        multiple: what the network pads its input to.

    Raises:
        ValueError: if the window is too small to be halved at the coarsest level.
    """
    unit = 2 * multiple
    if window < unit or window % unit:
        below = max(window // unit, 1) * unit
        raise ValueError(
            f"A window of local statistics must be a multiple of {unit}, so that half of it is whole at "
            f"every level. Got window={window}. Use {below} or {below + unit}."
        )
    local = _Local(net, window, multiple)

    def make(part: nn.Module) -> nn.Module:
        kind = _LocalMean if isinstance(part, Mean) else _LocalAttention
        return kind(part, local.cells)

    with replaced(net, (SelfAttention, Mean), make):
        yield local


class _Local(nn.Module):
    """Notes the size of the image, by which its feature maps know theirs of the window."""

    def __init__(self, net: nn.Module, window: int, multiple: int):
        super().__init__()
        self.net, self.window, self.multiple = net, window, multiple

    def forward(self, image: Tensor) -> Tensor:
        self.height = -(-image.shape[2] // self.multiple) * self.multiple
        return self.net(image)

    def cells(self, x: Tensor) -> int:
        return self.window * x.shape[-2] // self.height


class _LocalMean(nn.Module):
    def __init__(self, _: nn.Module, cells: Callable[[Tensor], int]):
        super().__init__()
        self.cells = cells

    def forward(self, x: Tensor) -> Tensor:
        half = self.cells(x) // 2
        side = 2 * half + 1  # odd, to have a center
        for size, pad in (((side, 1), (half, 0)), ((1, side), (0, half))):
            x = functional.avg_pool2d(x, size, 1, pad, count_include_pad=False)
        return x  # (B, d, h, w)


class _LocalAttention(nn.Module):
    def __init__(self, attention: nn.Module, cells: Callable[[Tensor], int]):
        super().__init__()
        self.attention, self.cells = attention, cells

    def forward(self, x: Tensor) -> Tensor:
        batch, _, h, w = x.shape
        side = self.cells(x)
        step = side // 2
        height, width = (max(side, -(-size // step) * step) for size in (h, w))
        # Zeros add nothing to a Gram matrix, so they may fill the last windows.
        qkv = functional.pad(self.attention.project(x).flatten(1, 3), (0, width - w, 0, height - h))
        windows = qkv.unfold(2, side, step).unfold(3, side, step)  # (B, 3d, rows, columns, ...)
        count = windows.shape[2] * windows.shape[3]
        windows = windows.permute(0, 2, 3, 1, 4, 5).reshape(
            batch * count, 3, self.attention.heads, -1, side, side
        )
        out = self.attention.attend(windows).reshape(batch, count, -1, side * side)
        ramp = (arange(side, device=x.device, dtype=x.dtype) + 0.5).clamp(max=step)
        ramp = ramp.minimum(ramp.flip(0))
        weight = (ramp[:, None] * ramp).flatten()

        def overlay(columns: Tensor) -> Tensor:
            return functional.fold(columns, (height, width), side, stride=step)

        total = overlay((out * weight).permute(0, 2, 3, 1).flatten(1, 2))
        total = total / overlay(weight[None, :, None].expand(-1, -1, count))
        return self.attention.out(total[..., :h, :w])
