"""T1: a hypergradient of a quadratic with condition number 100, from a cold start."""

from __future__ import annotations

import torch
from torch import Tensor

from speed.entries import table
from speed.race import Rules
from speed.work import Work

CONDITION = 100.0
CASES = ((100, 1e-3), (100, 1e-6), (1000, 1e-3), (1000, 1e-6))  # variables, relative error


def work(n: int) -> tuple[Work, Tensor]:
    """f = y'Hy/2 - x'y with eigenvalues from 1 to 100, and the hypergradient in closed form."""
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))[0]
    eigenvalues = torch.logspace(0, 1, n, base=CONDITION, dtype=torch.float64)
    hessian = (basis * eigenvalues) @ basis.T
    target = torch.randn(n, generator=generator, dtype=torch.float64)

    def upper(x: Tensor, y: Tensor) -> Tensor:
        return 0.5 * ((y - target) ** 2).sum()

    def lower(x: Tensor, y: Tensor) -> Tensor:
        return 0.5 * y @ (hessian @ y) - y @ x

    x, zero = torch.ones(n, dtype=torch.float64), torch.zeros(n, dtype=torch.float64)
    truth = torch.linalg.solve(hessian, torch.linalg.solve(hessian, x) - target)
    data = hessian, target, torch.zeros((), dtype=torch.float64)
    return Work(upper, lower, x, (zero,), *steps(1.0, CONDITION), "Quadratic", data), truth


def steps(smallest: float, largest: float) -> tuple[float, float]:
    """The learning rate and the momentum that are best for a Hessian between two eigenvalues."""
    low, high = smallest**0.5, largest**0.5
    return (2.0 / (low + high)) ** 2, ((high - low) / (high + low)) ** 2


def tables(rules: Rules) -> str:
    parts = [table(f"{n} variables", *work(n), tolerance, rules) for n, tolerance in CASES]
    return "\n\n".join(parts)
