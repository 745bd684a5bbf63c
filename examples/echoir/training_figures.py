"""Figures of how training went: curves from metrics.jsonl, and the kernel widths it ended with."""

import json
from collections.abc import Sequence
from pathlib import Path

from echo_upsampler import EchoUpsampler
from matplotlib.figure import Figure
from model import EchoIR

# What is drawn of metrics.jsonl, where a method logs it.
CURVES = {
    "psnr": "PSNR of held-out crops, dB",
    "upper": "upper loss F",
    "lower": "lower loss f",
    "value_gap": "value gap f(x, y) - f(x, z)",
    "slack": "slack left to the barrier",
    "multiplier": "multiplier of the barrier",
}
NOISY = ("upper", "lower")  # of one batch: drawn pale, and their running mean upon it
LOGARITHMIC = ("upper", "lower", "slack")
WINDOW = 21  # rows of the running mean


def draw_training(logs: dict[str, Path]) -> Figure:
    """Curves of each method, over seconds.

    Args:
        logs: metrics.jsonl of each method.
    """
    figure = Figure(figsize=(10, 5.5), layout="constrained")
    rows = {method: _rows(path) for method, path in logs.items()}
    for axis, (key, title) in zip(figure.subplots(2, 3).flat, CURVES.items(), strict=True):
        for i, (method, logged) in enumerate(rows.items()):
            points = [(row["seconds"], row[key]) for row in logged if key in row]
            if not points:
                continue
            times, values = zip(*points, strict=True)
            if key in NOISY:
                axis.plot(times, values, color=f"C{i}", alpha=0.3, linewidth=1)
                values = _smooth(values)
            axis.plot(times, values, color=f"C{i}", linewidth=1.3, label=method)
        if axis.lines:
            axis.legend(fontsize=7)
        if axis.lines and key in LOGARITHMIC:
            axis.set_yscale("log")
        axis.set_title(title, fontsize=9)
        axis.set_xlabel("seconds", fontsize=8)
        axis.tick_params(which="both", labelsize=7)
    return figure


def draw_widths(nets: dict[str, EchoIR]) -> Figure:
    """s_f and s_g of every Echo-Upsampler, by the level it leads to."""
    figure = Figure(figsize=(7, 3), layout="constrained")
    titles = ("s_f: spatial kernel, coarse pixels", "s_g: range kernel, guide per channel")
    for axis, name, title in zip(
        figure.subplots(1, 2), ("log_spatial", "log_range"), titles, strict=True
    ):
        for i, (method, net) in enumerate(nets.items()):
            found = {
                level: float(getattr(up, name).detach().exp())
                for level, up in enumerate(net.upsamplers)
                if isinstance(up, EchoUpsampler)
            }
            axis.plot(found.keys(), found.values(), "o-", color=f"C{i}", label=method)
            for level, width in found.items():
                axis.annotate(f" {width:.2f}", (level, width), fontsize=7)
        axis.set_title(title, fontsize=9)
        axis.set_xlabel("level, 0 is the finest", fontsize=8)
        axis.set_xticks(range(max(len(net.upsamplers) for net in nets.values())))
        axis.tick_params(labelsize=7)
        axis.margins(x=0.2)
        axis.set_ylim(0, 1.25 * axis.dataLim.ymax)
        axis.legend(fontsize=7)
    return figure


def _rows(path: Path) -> list[dict[str, float]]:
    if not path.is_file():
        raise ValueError(
            f"A method must have its log. Got {path}, which does not exist. Keep the run's folder whole."
        )
    return [json.loads(line) for line in path.read_text().splitlines()]


def _smooth(values: Sequence[float]) -> list[float]:
    """The mean of the rows around each."""
    half = WINDOW // 2
    parts = [values[max(0, i - half) : i + half + 1] for i in range(len(values))]
    return [sum(part) / len(part) for part in parts]
