import threading
import time

import pytest
from prefetch import AHEAD, prefetch


def test_batches_come_in_order_and_are_made_before_they_are_asked_for():
    made = []
    batches = prefetch(lambda step: made.append(step) or step**2, 5)
    assert [next(batches) for _ in range(4)] == [25, 36, 49, 64]
    deadline = time.monotonic() + 10
    while len(made) < 4 + AHEAD:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    assert made == [5, 6, 7, 8, 9, 10]
    batches.close()


def test_an_error_comes_with_its_batch_not_before():
    def batch(step):
        if step == 2:
            raise ValueError("damaged")
        return step

    batches = prefetch(batch, 0)
    assert [next(batches), next(batches)] == [0, 1]
    with pytest.raises(ValueError, match="damaged"):
        next(batches)


def test_no_thread_is_left():
    before = threading.active_count()
    batches = prefetch(lambda step: step, 0)
    next(batches)
    assert threading.active_count() == before + 1
    batches.close()
    assert threading.active_count() == before
