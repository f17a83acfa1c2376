"""Cases of one workload, in turn: each group of prompts is decoded by every case, with greedy decoding in the middle.

So greedy decoding is timed once for all of them, next to the first and no further from any than half a group's turn:
what disturbs the machine for longer disturbs both sides of every pair. A case that fails leaves, and the others go on.
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

from dflash.decoding.decode import RequestError, forget_compiled
from dflash.host import stopping
from dflash.measuring.greedy import Greedy
from dflash.measuring.paired import PairedRun

T = TypeVar("T")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Failure:
    """Why a case could not be measured: one sentence without paths, and a traceback if it may be a bug."""

    sentence: str
    trace: str = ""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether host or device had too little memory."""
    return isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error)


def sentence_of(error: BaseException) -> str:
    """What failed in one line, without folders."""
    first = next(iter(str(error).strip().splitlines()), "")
    line = re.sub(r"(?:/[\w.+@-]+)+/", "", first)[:300]
    kind = "out of memory" if is_out_of_memory(error) else type(error).__name__
    return f"{kind}: {line}" if line else kind


def attempt(action: Callable[[], T]) -> T | Failure:
    """The result of the action, or why it failed: one case's failure must not stop the others."""
    try:
        return action()
    except Exception as error:
        stopping.insist()  # this may be what became of a signal
        out_of_memory = is_out_of_memory(error)
        known = out_of_memory or isinstance(error, RequestError)
        trace = "" if known else "".join(traceback.format_exception(error))
        failure = Failure(sentence=sentence_of(error), trace=trace)
    # Outside the handler nothing refers to the error any more, or to what its frames held.
    if out_of_memory:
        forget_compiled()
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
    """Makes and measures every case, the most important first: the first group to warm up, then at least `rounds`.

    Cases whose interval is wider than `precision` of the speed-up take more rounds, for at most `time_limit_s` per
    case. With `baseline` False greedy decoding is left out.
    """
    made: dict[str, PairedRun | Failure] = {name: attempt(make) for name, make in cases.items()}

    def running(names: Iterable[str]) -> dict[str, PairedRun]:
        return {name: run for name in names if isinstance(run := made[name], PairedRun)}

    def decode(names: Iterable[str], group: int) -> None:
        for name, run in running(names).items():
            if (failure := attempt(partial(run.decode, group))) is not None:
                made[name] = failure

    def take(names: Sequence[str], groups: int, turn: int) -> None:
        """Groups of these cases: the first of them next to greedy decoding, before and after it in turn."""
        for group in range(groups):
            present = [name for name, run in running(names).items() if group < run.groups]
            sides = present[turn % 2 :: 2], present[1 - turn % 2 :: 2]
            decode(reversed(sides[1]), group)
            if baseline and running(names) and (failure := attempt(partial(greedy.decode, group))) is not None:
                failure = dataclasses.replace(failure, sentence=f"its greedy baseline: {failure.sentence}")
                made.update(dict.fromkeys(running(names), failure))
            decode(sides[0], group)

    def take_round(names: Sequence[str], turn: int) -> None:
        take(names, max((run.groups for run in running(names).values()), default=0), turn)
        for run in running(names).values():
            run.pair()

    names = list(cases)
    take(names, 1, 1)
    for turn in range(rounds):
        take_round(names, turn)
    deadline = time.monotonic() + time_limit_s * sum(not run.brief for run in running(names).values())
    while time.monotonic() < deadline:
        wanted = {name: run.rounds_to_add(rounds, precision) for name, run in running(names).items()}
        names = [name for name, more in wanted.items() if more]
        for _ in range(max(wanted.values(), default=0)):
            take_round(names, rounds)
            rounds += 1
            if time.monotonic() >= deadline:
                break
        if not names:
            break
    return made
