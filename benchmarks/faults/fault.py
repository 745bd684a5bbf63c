"""A fault, and what came of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


class Broken(Exception):  # noqa: N818  (told, not raised at users)
    """What happened is not what is promised."""


class Lost(Broken):
    """Something that had been reached is gone."""


class Skipped(Exception):  # noqa: N818  (no error)
    """The system does not let the fault be done."""


@dataclass(frozen=True)
class Fault:
    """Something that goes wrong.

    Attributes:
        name: What goes wrong.
        how: How it is done.
        do: Does it in an empty folder of its own; returns what happened, in words that are the same in every run.
            Raises `Lost`, `Broken` or `Skipped`.
    """

    name: str
    how: str
    do: Callable[[Path], str]


@dataclass(frozen=True)
class Outcome:
    """What came of a fault.

    Attributes:
        seen: What happened.
        verdict: "not lost", "LOST", "OTHERWISE" than promised, or "skipped".
    """

    seen: str
    verdict: str

    @property
    def is_good(self) -> bool:
        """Whether all is as promised, so far as the fault could be done."""
        return self.verdict in ("not lost", "skipped")


def outcome(fault: Fault, folder: Path) -> Outcome:
    """Do a fault, and look; an error that is not promised is an outcome too."""
    try:
        return Outcome(fault.do(folder), "not lost")
    except Skipped as reason:
        return Outcome(str(reason), "skipped")
    except Lost as lost:
        return Outcome(str(lost), "LOST")
    except Broken as broken:
        return Outcome(str(broken), "OTHERWISE")
    except Exception as error:  # noqa: BLE001  (a traceback is what nobody promised)
        return Outcome(f"{type(error).__name__}: {error}", "OTHERWISE")


def expect(holds: bool, seen: str, kind: type[Broken] = Broken) -> None:
    """Raises unless what is promised holds."""
    if not holds:
        raise kind(seen)


def message_of(kind: type[Exception], call: Callable[[], object], *words: str) -> str:
    """The name of the error that a call raises; its message must hold the words."""
    try:
        returned = call()
    except kind as error:
        missing = [word for word in words if word not in str(error)]
        expect(not missing, f"{type(error).__name__} that does not say {missing}: {error}")
        return type(error).__name__
    raise Broken(f"no {kind.__name__}, but {returned!r}")
