"""Lets the code of the pages import what draws their figures, as the tests do."""

import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = [str(ROOT / part) for part in ("docs/figures", "docs/tutorials", "examples/echoir")]


def on_config(config: Any) -> None:
    """Called by mkdocs before it reads a page."""
    sys.path += [folder for folder in FOLDERS if folder not in sys.path]
