"""T2: logistic regression with an l2 weight for each feature, a hypergradient from a cold start."""

from __future__ import annotations

import torch
from sklearn.datasets import load_breast_cancer
from torch import Tensor
from torch.nn.functional import softplus

from speed.entries import table
from speed.race import Rules
from speed.t1_quadratic import steps
from speed.work import Work

TOLERANCE = 1e-3
LOG_WEIGHT = -3.0  # where x starts: weights of 0.05
NEWTON_STEPS = 50


def breast_cancer() -> tuple[Tensor, Tensor, int]:
    """Features, signs, and how many of the samples train."""
    features, labels = map(torch.tensor, load_breast_cancer(return_X_y=True))
    features = (features - features.mean(0)) / features.std(0)
    return features, 2.0 * labels - 1.0, 400


def synthetic() -> tuple[Tensor, Tensor, int]:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(25_000, 500, generator=generator, dtype=torch.float64)
    plane = torch.randn(500, generator=generator, dtype=torch.float64) / 500**0.5
    noise = torch.randn(25_000, generator=generator, dtype=torch.float64)
    return features, torch.sign(features @ plane + 0.5 * noise), 20_000


DATA = {"breast cancer, 400 x 30": breast_cancer, "synthetic, 20,000 x 500": synthetic}


def work(features: Tensor, signs: Tensor, training: int) -> tuple[Work, Tensor]:
    """The problem, and its hypergradient by Newton's method and a dense solve."""
    signed = features * signs[:, None]
    A, B = signed[:training], signed[training:]

    def upper(x: Tensor, y: Tensor) -> Tensor:
        return softplus(-(B @ y)).mean()

    def lower(x: Tensor, y: Tensor) -> Tensor:
        return softplus(-(A @ y)).mean() + 0.5 * (x.exp() * y**2).sum()

    x = torch.full((features.shape[1],), LOG_WEIGHT, dtype=torch.float64)
    weights, zero = x.exp(), torch.zeros_like(x)

    def curvature(y: Tensor) -> Tensor:
        p = torch.sigmoid(-(A @ y))
        return (A.T * (p * (1.0 - p))) @ A / len(A) + torch.diag(weights)

    y = zero
    for _ in range(NEWTON_STEPS):
        slope = weights * y - A.T @ torch.sigmoid(-(A @ y)) / len(A)
        if slope.norm() < 1e-13:
            break
        y = y - torch.linalg.solve(curvature(y), slope)
    upper_y = -(B.T @ torch.sigmoid(-(B @ y))) / len(B)
    truth = -weights * y * torch.linalg.solve(curvature(y), upper_y)
    # The curvature is largest at zero and at least that of the weights.
    bounds = float(weights.min()), float(torch.linalg.eigvalsh(curvature(zero))[-1])
    return Work(upper, lower, x, (zero,), *steps(*bounds), "Logistic", (A, B)), truth


def tables(rules: Rules) -> str:
    parts = [table(name, *work(*load()), TOLERANCE, rules) for name, load in DATA.items()]
    return "\n\n".join(parts)
