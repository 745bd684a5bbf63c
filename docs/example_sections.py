"""Reads `Example:` in a docstring as the section that Griffe calls `Examples:`.

Griffe takes the singular for a remark, and would set the prompts `>>>` as text.
"""

import re
from typing import Any

import griffe


class ExampleSections(griffe.Extension):
    """Renames the section before the docstring is parsed."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = re.sub(
                r"^Example:$", "Examples:", obj.docstring.value, flags=re.MULTILINE
            )
