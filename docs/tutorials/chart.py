"""Line charts as SVG text, for pages: text and axes take the color of the page, so that both palettes can read them."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape

WIDTH, HEIGHT = 420, 320  # of a panel, pixels
LEFT, RIGHT, TOP, BOTTOM = 62, 14, 28, 46  # margins of a panel
LEGEND = 20  # height of a row of the legend
ENTRY = 190  # width of an entry of the legend
COLORS = ("#3f6fd1", "#d1603f", "#3f9e5f", "#9a5fc4", "#b08b1e", "#3fa7b5", "#c4527f", "#7a7a7a")

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Panel:
    """One pair of axes.

    Attributes:
        title: Above the axes.
        x: What the horizontal axis shows.
        y: What the vertical axis shows.
        lines: Points by name, joined by a line.
        dots: Points by name, not joined.
        levels: Heights by name, drawn as dashed lines across the panel.
        log_x: Whether the horizontal axis is logarithmic.
        labels: Names of the positions 0, 1, ... of the horizontal axis, instead of numbers.
    """

    title: str
    x: str
    y: str
    lines: Mapping[str, Points] = field(default_factory=dict)
    dots: Mapping[str, Points] = field(default_factory=dict)
    levels: Mapping[str, float] = field(default_factory=dict)
    log_x: bool = False
    labels: Sequence[str] = ()


def figure(*panels: Panel) -> str:
    """The panels side by side above one legend, as the text of an SVG file."""
    names = list(dict.fromkeys(n for p in panels for n in (*p.lines, *p.dots, *p.levels)))
    colors = {name: COLORS[i % len(COLORS)] for i, name in enumerate(names)}
    width = WIDTH * len(panels)
    columns = max(1, (width - LEFT) // ENTRY)
    height = HEIGHT + LEGEND * math.ceil(len(names) / columns)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" '
        'font-family="sans-serif" font-size="12" fill="currentColor">'
    ]
    for i, panel in enumerate(panels):
        parts += [f'<g transform="translate({i * WIDTH} 0)">', *_panel(panel, colors), "</g>"]
    for i, name in enumerate(names):
        x, y = LEFT + ENTRY * (i % columns), HEIGHT + LEGEND * (i // columns)
        parts.append(f'<rect x="{x}" y="{y}" width="12" height="12" fill="{colors[name]}"/>')
        parts.append(_text(x + 18, y + 10, name, "start"))
    return "\n".join([*parts, "</svg>\n"])


def _panel(panel: Panel, colors: Mapping[str, str]) -> list[str]:
    points = [p for line in (*panel.lines.values(), *panel.dots.values()) for p in line]
    heights = [y for _, y in points] + list(panel.levels.values())
    scale = math.log10 if panel.log_x else float
    low_x, high_x = _range([scale(x) for x, _ in points])
    low_y, high_y = _range(heights)

    def across(x: float) -> float:
        return LEFT + (scale(x) - low_x) / (high_x - low_x) * (WIDTH - LEFT - RIGHT)

    def up(y: float) -> float:
        return HEIGHT - BOTTOM - (y - low_y) / (high_y - low_y) * (HEIGHT - TOP - BOTTOM)

    middle = (LEFT + WIDTH - RIGHT) / 2
    floor = HEIGHT - BOTTOM
    parts = [
        _text(middle, 16, panel.title, "middle", 'font-weight="bold"'),
        _text(middle, HEIGHT - 8, panel.x, "middle"),
        _text(
            0, 0, panel.y, "middle", f'transform="translate(14 {(TOP + floor) / 2}) rotate(-90)"'
        ),
        f'<path d="M{LEFT} {TOP}V{floor}H{WIDTH - RIGHT}" fill="none" stroke="currentColor"/>',
    ]
    for y in _ticks(low_y, high_y):
        parts.append(_line([(LEFT, up(y)), (WIDTH - RIGHT, up(y))], "currentColor", "opacity=0.15"))
        parts.append(_text(LEFT - 6, up(y) + 4, f"{y:g}", "end"))
    for x, name in _marks(panel, low_x, high_x):
        parts.append(_text(across(x), floor + 16, name, "middle"))
    for name, y in panel.levels.items():
        ends = [(LEFT, up(y)), (WIDTH - RIGHT, up(y))]
        parts.append(_line(ends, colors[name], "stroke-dasharray=6 stroke-width=2"))
    for name, line in panel.lines.items():
        places = [(across(x), up(y)) for x, y in line]
        parts.append(_line(places, colors[name], "stroke-width=2"))
    for name, dots in panel.dots.items():
        parts += [
            f'<circle cx="{across(x):.1f}" cy="{up(y):.1f}" r="4" fill="{colors[name]}"/>'
            for x, y in dots
        ]
    return parts


def _range(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    margin = 0.05 * (high - low) or 0.5
    return low - margin, high + margin


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers between `low` and `high`, three to seven."""
    rough = (high - low) / 7
    unit = 10.0 ** math.floor(math.log10(rough))
    step = unit * min((m for m in (1, 2, 5, 10) if m * unit >= rough), default=10)
    return [round(i * step, 12) for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _marks(panel: Panel, low: float, high: float) -> list[tuple[float, str]]:
    """The marks of the horizontal axis."""
    if panel.labels:
        return [(float(i), name) for i, name in enumerate(panel.labels)]
    if not panel.log_x:
        return [(x, f"{x:g}") for x in _ticks(low, high)]
    factors = (1, 2, 5) if high - low < 3 else (1,)
    marks = [m * 10.0**e for e in range(math.floor(low), math.ceil(high)) for m in factors]
    return [(x, f"{x:g}") for x in marks if low <= math.log10(x) <= high]


def _line(points: Points, color: str, style: str) -> str:
    path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
    attributes = " ".join('{}="{}"'.format(*item.split("=")) for item in style.split())
    return f'<path d="{path}" fill="none" stroke="{color}" {attributes}/>'


def _text(x: float, y: float, text: str, anchor: str, attributes: str = "") -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" {attributes}>{escape(text)}</text>'
    )
