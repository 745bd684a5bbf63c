"""Prepares the next batches while a step is computed."""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from typing import TypeVar

T = TypeVar("T")
AHEAD = 2  # batches: one being made, one that waits


def prefetch(batch: Callable[[int], T], first: int) -> Iterator[T]:
    """The batches of all steps from `first` on, in order, each made before it is asked for.

    Args:
        batch: the batch of a step, a pure function of it. An error in it is raised when that batch is
            asked for.
        first: step to begin with.
    """
    with ThreadPoolExecutor(1) as worker:
        waiting = deque(worker.submit(batch, step) for step in range(first, first + AHEAD))
        try:
            for step in count(first + AHEAD):
                made = waiting.popleft().result()
                waiting.append(worker.submit(batch, step))
                yield made
        finally:
            worker.shutdown(wait=False, cancel_futures=True)
