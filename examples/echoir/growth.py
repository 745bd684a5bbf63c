"""Starts a deep network from the weights of a shallower one, of which it is at first the same function.

Every block adds to what it gets. One whose two sums begin at zero changes nothing, and takes part as training goes on:
the idea of Net2Net (arXiv 1511.05641), which is cheaper than to train the deep network from nothing.
"""

from dataclasses import replace

import torch
from blocks import MixedAttentionBlock
from model import EchoIR, EchoIRConfig
from torch import nn


def can_grow(small: EchoIRConfig, large: EchoIRConfig) -> bool:
    """Whether `large` is `small`, or `small` with blocks added at the end of stages, and nothing else."""
    return (
        len(small.blocks) == len(large.blocks)
        and replace(large, blocks=small.blocks, final_blocks=small.final_blocks) == small
        and all(a <= b for a, b in zip(small.blocks, large.blocks, strict=True))
        and small.final_blocks <= large.final_blocks
    )


@torch.no_grad()
def grown(small: EchoIR, config: EchoIRConfig) -> EchoIR:
    """A network of more blocks that restores every image as `small` does.

    Args:
        small: the trained network.
        config: of the network wanted; `can_grow(small.config, config)`.
    """
    net = EchoIR(config)
    net.load_state_dict(small.state_dict(), strict=False)
    known = small.state_dict().keys()
    for name, block in net.named_modules():
        if isinstance(block, MixedAttentionBlock) and f"{name}.norm1.weight" not in known:
            for last in (block.attention.out, block.feedforward.narrow):
                for parameter in last.parameters():
                    nn.init.zeros_(parameter)
    return net
