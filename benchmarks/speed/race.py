"""Contenders take turns in one process, so that a slow minute of the machine hits all alike."""

from __future__ import annotations

import gc
import math
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median

from page import table

from bilevel.diagnostics import LiveMemory
from speed.work import Answer

FLOOR = "by hand"
OURS = "bilevel"
PEERS = {
    "TorchOpt": "torchopt",
    "Betty": "betty",
    "BOAT": "boat",
    "higher": "higher",
    "JAX": "jax",
    "JAXopt": "jaxopt",
    "benchopt": "benchopt",
}
LEAST = 0.02  # seconds that a measurement lasts, so that the clock's own cost does not show
Run = Callable[[], Answer]


@dataclass(frozen=True)
class Rules:
    """Of all races.

    Attributes:
        repeats: rounds.
        with_peers: whether the other libraries take part.
    """

    repeats: int = 7
    with_peers: bool = True


class MissedError(Exception):
    """A contender does not reach the accuracy that is asked of all."""


@dataclass(frozen=True)
class Contender:
    """One way to do the work of a table.

    Attributes:
        library: `FLOOR`, `OURS`, or a peer.
        method: the same words for the same algorithm.
        prepare: makes what is timed; it may fail, and the table then says how.
    """

    library: str
    method: str
    prepare: Callable[[], Run]


@dataclass(frozen=True)
class Result:
    """Of one contender; without seconds it did not run, for the reason given."""

    contender: Contender
    seconds: tuple[float, ...]
    answer: Answer | None
    reason: str = ""


def race(contenders: Sequence[Contender], rules: Rules) -> list[Result]:
    """Time all of them, turn by turn, after a round that pays for caches."""
    if not rules.with_peers:
        contenders = [c for c in contenders if c.library not in PEERS]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # few steps leave the lower problem unsolved, as is meant
        return _race(contenders, rules.repeats)


def _race(contenders: Sequence[Contender], repeats: int) -> list[Result]:
    runs: dict[int, tuple[Run, Answer, int]] = {}
    reasons: dict[int, str] = {}
    for i, contender in enumerate(contenders):
        try:
            run = contender.prepare()
            began = time.process_time()
            answer = run()
            seconds = time.process_time() - began
            if seconds < LEAST:  # the first call was no measure
                seconds = clocked(run, 1)
        except Exception as error:  # noqa: BLE001  # others' code fails as it likes, and the table says how
            reasons[i] = reason(error)
        else:
            runs[i] = run, answer, max(1, math.ceil(LEAST / seconds))
    times: dict[int, list[float]] = {i: [] for i in runs}
    with frozen():
        for _ in range(repeats):
            for i, (run, _, number) in runs.items():
                times[i].append(timed(run, number))
    return [
        Result(contender, tuple(times[i]), runs[i][1])
        if i in runs
        else Result(contender, (), None, reasons[i])
        for i, contender in enumerate(contenders)
    ]


@contextmanager
def frozen() -> Iterator[None]:
    """Keep what there is from the garbage collector, which else walks through all of torch before each measurement."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def timed(run: Run, number: int) -> float:
    """Seconds of one of `number` calls, without a collection of garbage among them."""
    gc.collect()
    gc.disable()
    spent = clocked(run, number)
    gc.enable()
    return spent


def clocked(run: Run, number: int) -> float:
    """Seconds of one of `number` calls: those of the processor, which other programs hardly lengthen."""
    began = time.process_time()
    for _ in range(number):
        run()
    return (time.process_time() - began) / number


def reason(error: Exception) -> str:
    """The first line of what a contender says of its failure."""
    lines = str(error).strip().splitlines()
    text = lines[0].replace("|", "/") if lines else ""
    return text if isinstance(error, MissedError) else f"{type(error).__name__}: {text}"


def tuned(
    make: Callable[[int], Run],
    error: Callable[[Answer], float],
    tolerance: float,
    candidates: Sequence[int],
) -> Run:
    """The first of `make(candidate)` whose error is within the tolerance.

    It looks at the last of each four first, and then at those before it where it serves. It gives up where the error
    has stopped to fall.

    Raises:
        MissedError: none is.
    """
    errors: list[float] = []

    def serves(run: Run) -> bool:
        errors.append(error(run()))
        return errors[-1] <= tolerance

    for start in range(0, len(candidates), 4):
        *before, last = candidates[start : start + 4]
        run = make(last)
        if serves(run):
            return next(filter(serves, map(make, before)), run)
        if min(errors) > 0.9 * min(errors[:-3], default=math.inf):
            break  # three such looks have gained next to nothing, and the next ones take longer
    raise MissedError(f"misses {tolerance:.0e}: its relative error is {min(errors):.0e}")


def answers(results: Sequence[Result]) -> dict[str, Answer]:
    """By method, the answer of the first contender that ran."""
    found: dict[str, Answer] = {}
    for result in results:
        if result.answer is not None:
            found.setdefault(result.contender.method, result.answer)
    return found


def ratio(result: Result, floor: Result) -> float:
    """The median over the rounds of the seconds over those of the floor in the same round."""
    return median(a / b for a, b in zip(result.seconds, floor.seconds, strict=True))


def factor(of_floor: float) -> str:
    """A ratio with two decimals, or two digits where those would be zeros."""
    return f"{of_floor:.2f}" if of_floor >= 0.1 else f"{of_floor:.2g}"


def rows(
    results: Sequence[Result],
    extra: Callable[[Result, Answer], list[str]],
    columns: Sequence[str],
    floor: str = FLOOR,
) -> str:
    """The results as a table; the ratios are to the fastest version of the floor.

    Args:
        results: of a race.
        extra: the cells of further columns.
        columns: their heads.
        floor: the library that is the measure of all.
    """
    hands = [r for r in results if r.seconds and r.contender.library == floor]
    fastest = min(hands, key=lambda result: median(result.seconds))
    twins = {result.contender.method: result for result in hands}
    lines = []
    for result in results:
        who = [result.contender.library, result.contender.method]
        answer = result.answer
        if answer is None:
            lines.append([*who, result.reason, *[""] * (5 + len(columns))])
            continue
        twin = twins.get(result.contender.method)
        lines.append(
            [
                *who,
                milliseconds(median(result.seconds)),
                f"{milliseconds(min(result.seconds))} to {milliseconds(max(result.seconds))}",
                factor(ratio(result, fastest)),
                "" if twin is None else factor(ratio(result, twin)),
                "" if answer.gradients is None else str(answer.gradients),
                "" if answer.hvps is None else str(answer.hvps),
                *extra(result, answer),
            ]
        )
    head = ["library", "method", "ms", "spread", "ratio", "same method", "gradients", "HVPs"]
    return table([*head, *columns], lines)


def mebibytes(result: Result) -> str:
    """Of the tensors that one more run makes, as many as live at a time."""
    run = result.contender.prepare()
    with LiveMemory() as live:
        run()
    return f"{live.peak / 2**20:.0f}"


def cold(answer: Answer) -> str:
    """The seconds of a first call that compiled."""
    return "" if answer.cold is None else digits(answer.cold, 2)


def milliseconds(seconds: float) -> str:
    return digits(1e3 * seconds, 3)


def digits(number: float, count: int) -> str:
    """So many digits, or those before the point."""
    return f"{number:.{count}g}" if number < 10**count - 0.5 else f"{number:.0f}"
