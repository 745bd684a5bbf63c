"""The two objectives: restore photographs (upper, on D_val), upsample without loss (lower, on D_tr).

    min over beta   F(beta, omega) = restoration loss on D_val
    subject to      omega in argmin f(beta, .) on D_tr

omega are the Echo-Upsamplers' parameters, beta all others. The paper states the goals but prints
neither loss; the choices are explained in this example's README.
"""

from collections.abc import Callable
from functools import partial
from typing import Literal, get_args

import torch
from model import EchoIR, pad
from patches import Patches
from processes import ALONE
from torch import Tensor

Lower = Literal["echo", "restoration", "both"]
Objective = Callable[[EchoIR, Patches], Tensor]
Mean = Callable[[Tensor], Tensor]  # of what several processes have found


def restoration_loss(net: EchoIR, patches: Patches) -> Tensor:
    """The mean absolute error of each patch, (B,).

    It is less afraid of edges than the square, and trains to a higher PSNR.
    """
    return _error(net(patches.input), patches)


def echo_loss(net: EchoIR, patches: Patches, mean: Mean = ALONE.mean) -> Tensor:
    """How much of each patch's encoder features E_l is lost when downsampled and echoed back, (B,).

        sum over levels of |EU(down(E_l); E_l) - E_l|^2 / |E_l|^2

    The denominator, a mean over the batch, that of all processes, is held constant: otherwise scaling
    the features up would lower the loss.
    """
    image = pad(patches.input, net.config.multiple)
    return _lost(net, net.encode(image)[0], image, mean)


def both_losses(net: EchoIR, patches: Patches, mean: Mean = ALONE.mean) -> tuple[Tensor, Tensor]:
    """The restoration and the echo loss, from one pass through the encoder."""
    restored, echoes = net(patches.input, features=True)
    image = pad(patches.input, net.config.multiple)
    return _error(restored, patches), _lost(net, echoes, image, mean)


def _error(restored: Tensor, patches: Patches) -> Tensor:
    return (restored.float() - patches.target).abs().mean((1, 2, 3))


def _lost(net: EchoIR, echoes: list[Tensor], image: Tensor, mean: Mean) -> Tensor:
    loss = image.new_zeros(len(image))
    for level, feature in enumerate(echoes):
        coarse = net.downsamplers[level](feature)
        back = net.upsample(level, coarse, net.echo(level, echoes, image))
        lost = (back.float() - feature.float()).square().mean((1, 2, 3))
        loss = loss + lost / mean(feature.detach().float().square().mean())
    return loss


def objectives(
    lower: Lower, *, alpha: float = 0.1, amp: bool = False, mean: Mean = ALONE.mean
) -> tuple[Objective, Objective]:
    """F, one number, and f, one for each patch, as functions of the network and a batch.

    ASBLO lives on the small difference f(x, y) - f(x, z), which is exact patch by patch.

    Args:
        lower: what f is: the `"echo"` loss, the `"restoration"` loss, or `"both"`,
            restoration + alpha echo.
        alpha: weight of the echo loss in `"both"`.
        amp: compute in bfloat16 where that is safe.
        mean: over the processes that share a batch.

    Raises:
        ValueError: if `lower` is none of the three, or alpha is negative.
    """
    if lower not in get_args(Lower):
        raise ValueError(
            f"`objectives(lower=...)` must be one of {', '.join(get_args(Lower))}. Got {lower!r}."
        )
    if alpha < 0:
        raise ValueError(f"`objectives(alpha=...)` must be at least 0. Got alpha={alpha}.")

    def both(net: EchoIR, patches: Patches) -> Tensor:
        restoration, echo = both_losses(net, patches, mean)
        return restoration + alpha * echo

    echo = partial(echo_loss, mean=mean)
    f: Objective = {"echo": echo, "restoration": restoration_loss, "both": both}[lower]

    def upper(net: EchoIR, patches: Patches) -> Tensor:
        with torch.autocast(patches.input.device.type, torch.bfloat16, enabled=amp):
            return restoration_loss(net, patches).mean()

    def lower_(net: EchoIR, patches: Patches) -> Tensor:
        with torch.autocast(patches.input.device.type, torch.bfloat16, enabled=amp):
            return f(net, patches)

    return upper, lower_
