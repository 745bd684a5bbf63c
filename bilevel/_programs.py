"""Where the compiled functions of a problem are kept."""

from __future__ import annotations

from typing import Any


class Programs(dict[Any, Any]):
    """Compiled functions by what they were compiled for; they stay in the process that made them."""

    def __reduce__(self) -> tuple[type[Programs], tuple[()]]:
        return Programs, ()
