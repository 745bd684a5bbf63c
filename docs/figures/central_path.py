"""ASBLO on its central path: a problem of two variables whose lower level has many basins.

F = (x - 2)^2 + (y - 4)^2,  f = sin(x + y - 2): the lower solutions are the lines x + y = 2 - pi/2 + 2 pi k, and the
bi-level solution is the point of the nearest line, x = 3 pi/4, that is nearest to (2, 4).
"""

import math

import numpy as np
import torch
from matplotlib.figure import Figure
from plots import legend, panels
from torch import Tensor

import bilevel as bl

SOLUTION = (0.75 * math.pi, 2.0 + 0.75 * math.pi)
START = (0.5, 0.5)
STAGES = 3


def upper(x: Tensor, y: Tensor, data: None = None) -> Tensor:
    return (x - 2.0) ** 2 + (y - 4.0) ** 2


def lower(x: Tensor, y: Tensor, data: None = None) -> Tensor:
    return torch.sin(x + y - 2.0)


def walk() -> list[bl.State]:
    """The states of a run, one a stage."""
    x0, y0 = torch.tensor(START, dtype=torch.float64)
    problem = bl.BilevelProblem(upper, lower)
    return list(bl.iterate(problem, bl.ASBLO(), x0, y0))


def drawing() -> Figure:
    """For each of the first stages, where the gap stays below its slack, and how far the run has come."""
    states = walk()
    x = torch.linspace(-1.0, 5.0, 240, dtype=torch.float64)
    y = torch.linspace(0.0, 6.0, 240, dtype=torch.float64)
    X, Y = torch.meshgrid(x, y, indexing="xy")
    figure, axes = panels(STAGES)
    figure.set_size_inches(12.6, 4.9)
    barrier = bl.barriers.log_rational
    for k, (place, state) in enumerate(zip(axes, states, strict=False)):
        m = state.metrics
        # The gap that ASBLO bounds has the ridge on both sides, so its value function is a minimum over y.
        ridged = lower(X, Y) + 0.5 * m["mu"] * Y**2
        zeta = ridged - ridged.min(0).values - m["epsilon"]
        height = upper(X, Y) + barrier(1.0).value(zeta, m["sigma"])
        place.contourf(X, Y, zeta, levels=[-1e9, 0.0], colors=["tab:blue"], alpha=0.2)
        finite = height.isfinite()
        levels = np.quantile(height[finite], (0.02, 0.1, 0.25, 0.5))
        place.contour(
            X,
            Y,
            height.masked_fill(~finite, math.nan),
            levels=levels,
            colors="tab:blue",
            linewidths=0.8,
        )
        for line in range(-1, 3):
            total = 2.0 - 0.5 * math.pi + 2.0 * math.pi * line
            place.plot(x, total - x, color="black", linewidth=1.2, label="lower solutions")
        path = [START, *((float(s.x), float(s.y)) for s in states[: k + 1])]
        place.plot(*zip(*path, strict=True), "o-", color="tab:red", label="ASBLO, a point a stage")
        place.plot(*SOLUTION, "*", color="tab:green", markersize=12, label="solution")
        place.set(title=f"stage {k}: λ = {m['multiplier']:.0f}, slack {m['epsilon']:.2g}")
        place.set(xlim=(-1, 5), ylim=(0, 6), xlabel="x", ylabel="y", aspect="equal")
    legend(figure, columns=3)
    return figure
