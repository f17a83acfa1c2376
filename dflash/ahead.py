"""Reading ahead: what is worked on next is fetched by threads while the caller works on what it has."""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")


def ahead(read: Callable[[int], Item], first: int, last: int, depth: int = 2) -> Iterator[tuple[int, Item, float]]:
    """Numbers first..last-1 with what `read` gives for each, and how many seconds the caller had to wait for it.

    `depth` of them are read at a time, by as many threads: `read` of one number must not depend on another's.
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
