"""Cases of one workload, in turn: each group of prompts is decoded by every case, and greedily in their middle.

So greedy decoding is timed once for all of them, and no further from any than half a group's turn: what disturbs the
machine for longer disturbs both sides of every pair. A case that fails leaves, and the others go on.
"""

import dataclasses
import gc
import re
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import TypeVar

import jax

from dflash.decoding.decode import RequestError, compiled_decoder
from dflash.greedy import Greedy
from dflash.paired import PairedRun

# Rounds that come before those that count.
WARMUP = 1
T = TypeVar("T")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Failure:
    """Why a case could not be measured: one sentence without folders, and where in the code if that may be a bug."""

    sentence: str
    trace: str = ""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether host or device had too little memory."""
    return isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error)


def _sentence(error: BaseException) -> str:
    first = next(iter(str(error).strip().splitlines()), "")
    told = re.sub(r"(?:/[\w.+@-]+)+/", "", first)[:300]
    kind = "out of memory" if is_out_of_memory(error) else type(error).__name__
    return f"{kind}: {told}" if told else kind


def attempt(action: Callable[[], T]) -> T | Failure:
    """What the action gives, or why it failed. Whatever happens to one case, the others are to be measured."""
    try:
        return action()
    except Exception as error:
        out_of_memory = is_out_of_memory(error)
        known = out_of_memory or isinstance(error, RequestError)
        trace = "" if known else "".join(traceback.format_exception(error))
        failure = Failure(sentence=_sentence(error), trace=trace)
    # Out here nothing holds the error any more, nor what its frames held.
    if out_of_memory:
        compiled_decoder.cache_clear()
        jax.clear_caches()
    gc.collect()
    return failure


def take_turns(
    greedy: Greedy,
    cases: Mapping[str, Callable[[], PairedRun]],
    *,
    rounds: int,
    precision: float,
    time_limit_s: float,
    baseline: bool = True,
) -> dict[str, PairedRun | Failure]:
    """Makes and measures every case: a round of warm-up, then at least `rounds`.

    Cases whose interval is wider than `precision` of the speed-up take more of them, for `time_limit_s` a case at most.
    With `baseline` False greedy decoding is left out.
    """
    made: dict[str, PairedRun | Failure] = {name: attempt(make) for name, make in cases.items()}

    def running(names: Iterable[str]) -> dict[str, PairedRun]:
        return {name: run for name in names if isinstance(run := made[name], PairedRun)}

    def decode(names: Iterable[str], group: int) -> None:
        for name, run in running(names).items():
            if (failed := attempt(partial(run.decode, group))) is not None:
                made[name] = failed

    def take(names: Sequence[str]) -> None:
        """A round of these cases."""
        middle = len(names) // 2
        for group in range(len(greedy.groups)):
            decode(names[:middle], group)
            if baseline and running(names) and (failed := attempt(partial(greedy.decode, group))) is not None:
                said = dataclasses.replace(failed, sentence=f"its greedy baseline: {failed.sentence}")
                made.update(dict.fromkeys(running(names), said))
            decode(names[middle:], group)
        for run in running(names).values():
            run.pair()

    names = list(cases)
    for _ in range(WARMUP + rounds):
        take(names)
        names.reverse()
    deadline = time.monotonic() + time_limit_s * len(running(names))
    while time.monotonic() < deadline:
        wanted = {name: run.rounds_to_add(rounds, precision) for name, run in running(names).items()}
        names = [name for name, more in wanted.items() if more]
        for _ in range(max(wanted.values(), default=0)):
            take(names)
            names.reverse()
            rounds += 1
            if time.monotonic() >= deadline:
                break
        if not names:
            break
    return made
