"""What bi-level optimization is, in one picture: the lower problem moves y, the upper one x."""

import numpy as np
import torch
from matplotlib.figure import Figure
from plots import panels
from torch import Tensor

import bilevel as bl

COLORS = ("tab:blue", "tab:orange", "tab:green")
DECISIONS = (-1.4, -0.2, 1.5)  # values of x that are shown


def upper(x: Tensor, y: Tensor, data: None = None) -> Tensor:
    return (y - 1.0) ** 2 + 0.15 * (x - 1.5) ** 2


def lower(x: Tensor, y: Tensor, data: None = None) -> Tensor:
    return (y - 1.6 * torch.sin(x)) ** 2 + 0.1 * y**4


PROBLEM = bl.BilevelProblem(upper, lower)


def answer(x: float) -> bl.Estimate:
    """y, F and the hypergradient at x."""
    zero = torch.tensor(0.0, dtype=torch.float64)
    return bl.hypergradient(PROBLEM, zero + x, zero, bl.Implicit())


def drawing() -> Figure:
    """Left f over y for three x, in the middle the plane, right F along the lower solutions."""
    xs, ys = np.linspace(-2.6, 2.6, 60), torch.linspace(-2.3, 2.3, 120, dtype=torch.float64)
    answers = [answer(float(x)) for x in xs]
    figure, (slices, plane, reduced) = panels(3)
    figure.set_size_inches(12.6, 4.2)
    X, Y = np.meshgrid(xs, ys.numpy())
    heights = upper(torch.from_numpy(X), torch.from_numpy(Y)).numpy()
    plane.contour(X, Y, heights, levels=12, colors="gray", linewidths=0.6)
    plane.plot(xs, [float(a.y) for a in answers], color="black", linewidth=2)
    reduced.plot(xs, [a.value for a in answers], color="black", linewidth=2)
    for x, color in zip(DECISIONS, COLORS, strict=True):
        found = answer(x)
        y, slope = float(found.y), float(found.grad)
        f = lower(torch.tensor(x, dtype=torch.float64), ys)
        slices.plot(ys, f, color=color, label=f"x = {x}")
        slices.plot(y, lower(torch.tensor(x), torch.tensor(y)), "o", color=color)
        start = -2.1 if y > 0 else 2.1
        plane.annotate(
            "", (x, y), (x, start), arrowprops={"arrowstyle": "->", "color": color, "lw": 1.5}
        )
        plane.plot(x, y, "o", color=color)
        near = np.array([-0.45, 0.45])
        reduced.plot(x + near, found.value + slope * near, color=color, linewidth=2)
        reduced.plot(x, found.value, "o", color=color)
    slices.set(title="Lower problem: for each x, the best y", xlabel="y", ylabel="f(x, y)")
    slices.set_ylim(-0.3, 8)
    slices.legend(frameon=False)
    plane.set(title="All lower solutions, and contours of F", xlabel="x", ylabel="y")
    reduced.set(title="Upper problem: F along them", xlabel="x", ylabel="F(x, y(x))")
    return figure
