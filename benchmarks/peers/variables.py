"""The variables of the work as the modules that the other libraries ask for."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from speed.work import Lower
from torch import Tensor, nn


class UpperVariable(nn.Module):
    """x as a module."""

    def __init__(self, x: Tensor) -> None:
        super().__init__()
        self.x = nn.Parameter(x.detach().clone())

    def forward(self) -> Tensor:
        return self.x


class LowerVariable(nn.Module):
    """y as a module, which is called with an objective."""

    def __init__(self, y: Lower) -> None:
        super().__init__()
        self.names = [f"y{i}" for i in range(len(y))]
        for name, leaf in zip(self.names, y, strict=True):
            self.register_parameter(name, nn.Parameter(leaf.detach().clone()))

    def forward(self, objective: Callable[..., Tensor], x: Tensor) -> Tensor:
        return objective(x, *(getattr(self, name) for name in self.names))


@torch.no_grad()
def fill(module: nn.Module, values: Sequence[Tensor]) -> None:
    """Set the parameters of a module."""
    for parameter, value in zip(module.parameters(), values, strict=True):
        parameter.copy_(value)


def values(module: nn.Module) -> Lower:
    """Copies of the parameters of a module."""
    return tuple(parameter.detach().clone() for parameter in module.parameters())
