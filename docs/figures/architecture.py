"""EchoIR's architecture as SVG, from the configuration that the network is built from."""

from model import PRESETS, EchoIRConfig

WIDTH, STEP, ROW, HEIGHT = 996, 50, 92, 46  # the picture; shift and distance of levels; a box
ECHO = "#e8710a"


def _box(
    x: float, y: float, width: float, first: str, second: str = "", *, echo: bool = False
) -> str:
    """A rectangle with one or two lines of text."""
    color = ECHO if echo else "currentColor"
    lines = [first, second] if second else [first]
    middle = y + HEIGHT / 2 + 4 - 8 * (len(lines) - 1)
    text = "".join(
        f'<text x="{x + width / 2}" y="{middle + 16 * i}" text-anchor="middle">{line}</text>'
        for i, line in enumerate(lines)
    )
    return f'<rect x="{x}" y="{y}" width="{width}" height="{HEIGHT}" rx="5" fill="none" stroke="{color}"/>{text}'


def _arrow(x1: float, y1: float, x2: float, y2: float, *, echo: bool = False) -> str:
    color, mark = (ECHO, "echo") if echo else ("currentColor", "plain")
    return (
        f'<path d="M{x1} {y1}L{x2} {y2}" fill="none" stroke="{color}" stroke-width="1.5" '
        f'marker-end="url(#arrow-{mark})"/>'
    )


def _label(x: float, y: float, text: str) -> str:
    return f'<text x="{x}" y="{y}" text-anchor="middle">{text}</text>'


def _arrowheads() -> str:
    return "".join(
        f'<marker id="arrow-{name}" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="7" markerHeight="7" '
        f'orient="auto"><path d="M0 0L8 4L0 8z" fill="{color}" stroke="none"/></marker>'
        for name, color in (("plain", "currentColor"), ("echo", ECHO))
    )


def drawing(config: EchoIRConfig = PRESETS["paper"]) -> str:
    """The encoder on the left, the decoder on the right, a row a resolution."""
    levels = len(config.blocks) - 1
    channels = [config.width * 2**level for level in range(levels + 1)]
    top = 28
    parts = [_arrowheads()]

    def blocks(number: int) -> str:
        return f"{number} blocks"

    for level in range(levels):
        y, shift = top + ROW * level, STEP * level
        size = "H × W" if level == 0 else f"H/{2**level} × W/{2**level}"
        middle, encoder, up, decoder = y + HEIGHT / 2, 110 + shift, 560 - shift, 690 - shift
        parts += [
            _box(encoder, y, 110, f"encoder {level + 1}", blocks(config.blocks[level])),
            _box(up, y, 106, "Echo-", "Upsampler", echo=True),
            _box(decoder, y, 110, f"decoder {level + 1}", blocks(config.blocks[level])),
            _arrow(encoder + 110, middle, up, middle, echo=True),
            _arrow(up + 106, middle, decoder, middle),
            _arrow(encoder + 80, y + HEIGHT, encoder + 80, y + ROW),
            _arrow(up + 80, y + ROW, up + 80, y + HEIGHT),
            _label((encoder + 110 + up) / 2, middle - 8, f"{channels[level]} channels"),
            _label((encoder + 110 + up) / 2, middle + 18, size),
        ]
    y = top + ROW * levels
    left, right = 110 + STEP * (levels - 1) + 60, 560 - STEP * (levels - 1) + 100
    parts.append(
        _box(
            left,
            y,
            right - left,
            f"middle: {blocks(config.blocks[-1])}",
            f"{channels[-1]} channels",
        )
    )
    middle = top + HEIGHT / 2
    parts += [
        _box(10, top, 74, "3×3 conv", f"{config.width} ch."),
        _arrow(84, middle, 110, middle),
        _box(820, top, 70, "final", blocks(config.final_blocks)),
        _arrow(800, middle, 820, middle),
        _box(912, top, 78, "3×3 conv", "+ image"),
        _arrow(890, middle, 912, middle),
    ]
    height = y + HEIGHT + 12
    return (
        f'<svg viewBox="0 0 {WIDTH} {height}" xmlns="http://www.w3.org/2000/svg" fill="currentColor" '
        f'font-size="14" role="img" aria-label="Architecture of EchoIR">{"".join(parts)}</svg>'
    )
