"""What the code of a page prints: a figure, the source of a function, what a tutorial printed."""

import html
import importlib
import inspect
from pathlib import Path

from matplotlib.figure import Figure
from plots import svg

MADE = Path(__file__).resolve().parents[1] / "assets" / "tutorials"  # by `make tutorials`


def show(drawing: Figure | str, caption: str) -> None:
    """Prints a figure, drawn by matplotlib or given as SVG, with its caption."""
    text = drawing if isinstance(drawing, str) else svg(drawing)
    print(f'<figure class="drawn"><div>{text}</div><figcaption>{caption}</figcaption></figure>')


def show_made(name: str, caption: str) -> None:
    """Prints the figure that a tutorial has made."""
    show((MADE / f"{name}.svg").read_text("utf-8"), caption)


def show_printed(name: str) -> None:
    """Prints what a tutorial has printed."""
    print(f"<pre><code>{html.escape((MADE / f'{name}.txt').read_text('utf-8'))}</code></pre>")


def show_source(module: str, *names: str) -> None:
    """Prints the source of functions and classes of a tutorial, as Markdown."""
    parts = [inspect.getsource(getattr(importlib.import_module(module), name)) for name in names]
    print("```python\n" + "\n\n".join(parts) + "```")
