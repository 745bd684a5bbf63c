"""A deep network that begins as the function of a shallower one."""

from dataclasses import replace

import pytest
import torch
from growth import can_grow, grown
from model import EchoIR, EchoIRConfig

SMALL = EchoIRConfig(width=8, blocks=(1, 1), heads=(1, 2), final_blocks=1, spatial="dense")
LARGE = replace(SMALL, blocks=(3, 2), final_blocks=2)


def test_begins_as_the_same_function_and_learns_in_every_new_block():
    small, image = EchoIR(SMALL), torch.rand(2, 3, 16, 24)
    large = grown(small, LARGE)
    torch.testing.assert_close(large(image), small(image))
    assert sum(p.numel() for p in large.parameters()) > sum(p.numel() for p in small.parameters())
    large(image).square().mean().backward()
    stages = large.encoders[0], large.decoders[0], large.middle, large.final
    for block in (block for stage in stages for block in stage[1:]):
        assert block.attention.out.weight.grad.abs().max() > 0
        assert block.feedforward.narrow.weight.grad.abs().max() > 0


@pytest.mark.parametrize(
    "other",
    [
        replace(LARGE, width=16),
        replace(LARGE, blocks=(3, 0)),
        replace(LARGE, final_blocks=0),
        replace(LARGE, blocks=(1, 1, 1), heads=(1, 2, 4)),
        replace(LARGE, combine="product"),
    ],
    ids=str,
)
def test_only_blocks_may_be_added(other):
    assert can_grow(SMALL, LARGE)
    assert not can_grow(SMALL, other)
