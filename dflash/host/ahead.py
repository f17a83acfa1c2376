"""Reading ahead: threads fetch the next items while the caller works on the current one."""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")


def ahead(read: Callable[[int], Item], first: int, last: int, depth: int = 2) -> Iterator[tuple[int, Item, float]]:
    """Yields each of first..last-1 with the result of `read` and the seconds that the caller had to wait for it.

    `depth` numbers are read at a time, each by a thread, so `read` of one must not depend on another.
    """
    with ThreadPoolExecutor(depth) as pool:
        pending = [pool.submit(read, n) for n in range(first, min(first + depth, last))]
        for number in range(first, last):
            start = time.perf_counter()
            ready = pending.pop(0).result()
            waited = time.perf_counter() - start
            if number + depth < last:
                pending.append(pool.submit(read, number + depth))
            yield number, ready, waited
