"""What the code of a page prints: a figure, the source of a function, what a tutorial printed."""

import html
import importlib
import inspect
from pathlib import Path

from matplotlib.figure import Figure
from plots import svg

MADE = Path(__file__).resolve().parents[1] / "assets" / "tutorials"  # by `make tutorials`
READABLE = 0.65  # pixels a point below which a figure scrolls instead of shrinking


def figure(drawing: Figure | str, caption: str) -> str:
    """A figure with its caption as HTML; drawn by matplotlib, or given as SVG."""
    text = drawing if isinstance(drawing, str) else svg(drawing)
    width = float(text.partition('viewBox="0 0 ')[2].split()[0])
    least = f"--least: {READABLE * width:.0f}px"
    return (
        f'<figure class="drawn" style="{least}"><div>{text}</div>'
        f"<figcaption>{caption}</figcaption></figure>"
    )


def made(name: str, caption: str) -> str:
    """The figure that a tutorial has made, as HTML."""
    return figure((MADE / f"{name}.svg").read_text("utf-8"), caption)


def printed(name: str) -> str:
    """What a tutorial has printed, as HTML."""
    return f"<pre><code>{html.escape((MADE / f'{name}.txt').read_text('utf-8'))}</code></pre>"


def source(module: str, *names: str) -> str:
    """The source of functions and classes of a tutorial, as Markdown."""
    parts = [inspect.getsource(getattr(importlib.import_module(module), name)) for name in names]
    return "```python\n" + "\n\n".join(parts) + "```"
