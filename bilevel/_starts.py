"""Several starts of one run, and the best of the answers."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import replace
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from bilevel import _tree
from bilevel._errors import (
    BilevelError,
    BilevelWarning,
    InfeasibleError,
    NonFiniteError,
    StructureError,
    UnboundedError,
    check_count,
)
from bilevel._solution import Evaluations, Solution, State, Status
from bilevel._types import Tree

_RADII = (0.5, 1.0, 2.0, 4.0)  # of the perturbed starts, in units of each variable


def starting_points(x0: Tree, y0: Tree, starts: Any, batches: object) -> list[tuple[Tree, Tree]]:
    """The given start, and those after it: `starts` is their number, or an iterable of pairs (x, y)."""
    if isinstance(starts, bool | str) or not isinstance(starts, Integral | Iterable):
        raise TypeError(
            "`solve(starts=...)` must be an instance of `int` or `Iterable`. "
            f"Got {type(starts).__name__}. Pass a whole number, e.g. 8, or a list of pairs (x0, y0)."
        )
    if batches is not None:
        raise ValueError(
            "`solve(starts=...)` needs the full batch, whose answers can be certified and compared. "
            "Got batches. Leave out one of them."
        )
    if isinstance(starts, Iterable):
        return [(x0, y0), *_checked([*starts], x0, y0)]
    check_count("solve", "starts", starts, "Raise it, or leave it out.")
    generator = torch.Generator().manual_seed(0)  # the same starts at every call
    pairs = [(x0, y0)]
    for number in range(1, starts):
        radius = _RADII[(number - 1) % len(_RADII)]
        pairs.append((_perturbed(x0, radius, generator), _perturbed(y0, radius, generator)))
    return pairs


def _checked(starts: list[Any], x0: Tree, y0: Tree) -> list[tuple[Tree, Tree]]:
    """The further starts, each a pair like (x0, y0)."""
    mend = "Pass a list of pairs like (x0, y0), or a number of starts."
    if not starts:
        raise ValueError(
            "`solve(starts=...)` must hold at least one pair (x, y). Got none. Leave it out for the one start."
        )
    for name, part in (("x0", x0), ("y0", y0)):
        _tree.check_variable(part, name)
    for number, pair in enumerate(starts):
        where = f"solve(starts=...)[{number}]"
        kind = type(pair).__name__
        if kind not in ("tuple", "list") or len(pair) != 2:
            got = f"a {kind} of {len(pair)}" if kind in ("tuple", "list") else f"one {kind}"
            raise StructureError(f"`{where}` must be a pair (x, y). Got {got}. {mend}")
        for part, like, name in zip(pair, (x0, y0), ("x", "y"), strict=True):
            _tree.check_like(part, like, f"{where}, {name}", mend)
    return starts


def _perturbed(tree: Tree, radius: float, generator: torch.Generator) -> Tree:
    """The tree with noise of `radius` times its root mean square, or times one if that is smaller."""
    size = radius * max(1.0, _tree.rms(tree))

    def moved(leaf: Tensor) -> Tensor:
        return leaf.detach() + size * _tree.normal_like(leaf, generator)

    return _tree.map_leaves(moved, tree)


class _Watched:
    """The callback of the user, with what it answered and the last state it saw."""

    def __init__(self, callback: Callable[[State], object] | None) -> None:
        self._callback = callback
        self.asked = False
        self.evaluations = Evaluations()

    def __call__(self, state: State) -> bool:
        self.evaluations = state.evaluations
        self.asked = self._callback is not None and bool(self._callback(state))
        return self.asked


def best_of(
    pairs: list[tuple[Tree, Tree]],
    run: Callable[..., Solution],
    name: str,
    callback: Callable[[State], object] | None,
    throw: bool,
) -> Solution:
    """The best of the answers from all starts; the warnings of the others are not of interest.

    Args:
        pairs: The starts.
        run: Solves from the start of a number, with a callback, and throws nothing that is a status.
        name: The solver, for messages.
        callback: Called with each state of each run; a true answer ends all.
        throw: Raise where every start failed.
    """
    started = time.perf_counter()
    found: list[Solution] = []
    errors: list[BilevelError] = []
    evaluations, tried = Evaluations(), 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", BilevelWarning)
        for tried, (x0, y0) in enumerate(pairs, 1):
            watched = _Watched(callback)
            try:
                found.append(run(tried - 1, x0, y0, watched))
                evaluations += found[-1].evaluations
            except (NonFiniteError, InfeasibleError, UnboundedError) as error:
                errors.append(error)
                evaluations += watched.evaluations  # up to its last state: more is not known
            if watched.asked:
                break
    if not found:
        raise errors[0]
    best = min(found, key=_rank)  # the first of equals
    trusted = sum(_is_trusted(one) for one in found)
    note = f"the best of {tried} starts, {trusted} of them certified"
    message = "; ".join(filter(None, (best.message, note)))
    if throw and best.status.is_failure:  # it ranks behind all that did not fail
        raise best.status.error(f"{name} failed from every start: {message}")
    if best.status is Status.CONVERGED and not _is_trusted(best):
        warnings.warn(message, BilevelWarning, stacklevel=3)
    seconds = time.perf_counter() - started
    return replace(best, evaluations=evaluations, seconds=seconds, message=message)


def _is_trusted(run: Solution) -> bool:
    return run.certificate is not None and run.certificate.is_trusted


def _rank(run: Solution) -> tuple[bool, bool, bool, float]:
    value = run.upper if math.isfinite(run.upper) else math.inf
    return run.status.is_failure, not _is_trusted(run), run.certificate is None, value
