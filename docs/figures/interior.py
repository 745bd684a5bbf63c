"""Why the set {y : f < v} needs a slack: f over y, f* and v, where 0 is a lower solution and where not."""

import torch
from matplotlib.figure import Figure
from plots import legend, panels

MU, EPSILON = 0.5, 0.15


def drawing() -> Figure:
    r"""The first lower variable of the example, $f = y^2 / 2 - x y$, at x = 0 and at x = 1."""
    y = torch.linspace(-1.2, 2.2, 400, dtype=torch.float64)
    figure, axes = panels(2)
    for place, x in zip(axes, (0.0, 1.0), strict=True):
        f = 0.5 * y**2 - x * y
        lowest = -0.5 * x**2
        v = -0.5 * x**2 / (1.0 + MU)  # min f + MU / 2 y^2, at y = x / (1 + MU)
        place.plot(y, f, color="black", label="f(x, y)")
        bounds = {"v without slack": (v, "tab:red"), "v with ε": (v + EPSILON, "tab:blue")}
        for name, (bound, color) in bounds.items():
            place.axhline(bound, color=color, linestyle="--", label=name)
            inside = f < bound
            if inside.any():
                height = torch.full_like(y[inside], bound)
                place.fill_between(y[inside], f[inside], height, color=color, alpha=0.25)
        place.plot(x, lowest, "o", color="black", label="lower solution")
        empty = " (0 solves it: no interior)" if x == 0.0 else ""
        place.set(title=f"x = {x:g}{empty}", xlabel="y", ylim=(-0.65, 0.6))
    legend(figure, columns=4)
    return figure
