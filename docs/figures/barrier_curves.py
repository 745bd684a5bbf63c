"""The barrier and its first two derivatives, for weights that fall."""

import torch
from matplotlib.figure import Figure
from plots import legend, panels

import bilevel as bl

WEIGHTS = (1.0, 0.4, 0.16)
KAPPA = 1.0


def drawing() -> Figure:
    """P, P' and P'' over zeta."""
    barrier = bl.barriers.log_rational(KAPPA)
    zeta = torch.linspace(-3.0, -0.01, 400, dtype=torch.float64)
    figure, axes = panels(3)
    figure.set_size_inches(12.6, 3.9)
    curves = {
        "P": (barrier.value, 5.0),
        "P'": (barrier.derivative, 5.0),
        "P''": (barrier.second_derivative, 8.0),
    }
    for place, (name, (function, highest)) in zip(axes, curves.items(), strict=True):
        for sigma in WEIGHTS:
            place.plot(zeta, function(zeta, sigma), label=f"σ = {sigma}")
        place.axvline(-KAPPA, color="black", linestyle=":", label="ζ = −κ: the branches meet")
        place.set(title=name, xlabel="ζ", ylim=(0.0, highest))
    legend(figure, columns=4)
    return figure
