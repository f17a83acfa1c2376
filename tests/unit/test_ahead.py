"""What is read ahead comes in order, is read by threads meanwhile, and fails where it would have failed."""

import threading
import time

import pytest

from dflash.ahead import ahead


@pytest.mark.parametrize("depth", [1, 2, 5, 50])
@pytest.mark.parametrize(("first", "last"), [(0, 7), (3, 7), (6, 7), (7, 7)])
def test_reading_ahead_keeps_the_order(first, last, depth):
    asked = []

    def read(step):
        asked.append(step)
        return step

    steps = [(step, item) for step, item, _ in ahead(read, first, last, depth)]
    assert steps == [(s, s) for s in range(first, last)]
    assert sorted(asked) == list(range(first, last))


def test_items_are_read_while_the_caller_works():
    read = threading.Semaphore(0)

    def item(step):
        read.release()
        return step

    steps = ahead(item, 0, 9, depth=3)
    next(steps)
    for _ in range(4):  # the first, and three ahead of the one that is worked on
        assert read.acquire(timeout=30)
    assert not read.acquire(timeout=0.05)
    steps.close()


def test_the_wait_is_what_the_caller_waited():
    def slow(step):
        time.sleep(0.05)
        return step

    waits = [waited for _, _, waited in ahead(slow, 0, 3, depth=1)]
    assert min(waits) > 0.02
    steps = ahead(slow, 0, 2)
    next(steps)
    time.sleep(0.3)
    assert next(steps)[2] < 0.03


@pytest.mark.parametrize("depth", [1, 3])
def test_a_fault_while_reading_ahead_is_raised_at_its_step(depth):
    def read(step):
        if step == 4:
            raise OSError("the disk is gone")
        return step

    steps = ahead(read, 0, 9, depth)
    assert [next(steps)[0] for _ in range(4)] == [0, 1, 2, 3]
    with pytest.raises(OSError, match="the disk is gone"):
        next(steps)
