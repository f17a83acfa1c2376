"""What is read ahead comes in order, is read by threads meanwhile, and fails where it would have failed."""

import sys
import threading
from types import SimpleNamespace

import pytest

from dflash.host.ahead import ahead


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
        assert read.acquire(timeout=600)
    assert not read.acquire(timeout=0.05)
    steps.close()


def test_the_wait_is_what_the_caller_waited(monkeypatch):
    """By a clock that only reading moves, once the caller waits for it."""
    now, waiting = [0.0], threading.Event()

    def clock():
        seen = now[0]
        waiting.set()
        return seen

    def slow(step):
        waiting.wait(600)
        now[0] += 1.5
        return step

    monkeypatch.setattr(sys.modules["dflash.host.ahead"], "time", SimpleNamespace(perf_counter=clock))
    assert list(ahead(slow, 0, 1)) == [(0, 0, 1.5)]
    read = [threading.Event() for _ in range(2)]
    steps = ahead(lambda step: read[step].set(), 0, 2)
    next(steps)
    read[1].wait(600)
    assert next(steps)[2] == 0


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
