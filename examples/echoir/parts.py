"""Puts other parts into a network for a while, such as pools that look at more or less than the tile at hand."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def replaced(
    net: nn.Module, kinds: tuple[type[nn.Module], ...], make: Callable[[nn.Module], nn.Module]
) -> Iterator[None]:
    """Within, the parts of these kinds are replaced; on leaving, each is put back.

    Args:
        net: the network, changed in place.
        kinds: classes of parts.
        make: maps a part to what takes its place; called in the order of `net.modules()`.
    """
    places = [
        (parent, name, part)
        for parent in net.modules()
        for name, part in parent.named_children()
        if isinstance(part, kinds)
    ]
    for parent, name, part in places:
        setattr(parent, name, make(part).train(part.training))
    try:
        yield
    finally:
        for parent, name, part in places:
            setattr(parent, name, part)
