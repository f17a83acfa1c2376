"""The cost model: a block's cost in one-token steps explains the speed-up, and says which block size to use.

    speedup_x = acceptance_length / (T_verify(B) / T_1 + T_draft(B) / T_1)

Its terms are timed alone, in dflash.measuring.steps; here is only arithmetic.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np

from dflash.measuring.result import Advice, BlockSizeAdvice, Decode
from dflash.metrics import predicted_speedup

# A speed-up further from the prediction than this, as a fraction, is unexplained.
EXPLAINED_WITHIN = 0.10


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class StepTimes:
    """The three terms of the cost model in seconds, measured in turn; and the interval of T_verify(B) / T_1.

    `step_s` is a median. The others are `step_s` times the median ratio to the one-token step of the same round.
    """

    step_s: float
    verify_s: Mapping[int, float]
    draft_s: Mapping[int, float]
    context: int
    batch: int
    verify_ratio_ci95: Mapping[int, tuple[float, float]] = dataclasses.field(default_factory=dict)

    def verify_ratio(self, block_size: int) -> float:
        """T_verify(B) / T_1; interpolated if B was not timed."""
        return _between(self.verify_s, block_size) / self.step_s

    def verify_interval(self, block_size: int) -> tuple[float, float]:
        """The interval of T_verify(B) / T_1; 0 to infinity where it has none."""
        return self.verify_ratio_ci95.get(block_size, (0.0, math.inf))

    def cheapest_verify(self) -> int:
        """The timed size whose verify step surely costs least: by the upper end of its interval."""
        return min(self.verify_s, key=lambda size: (self.verify_interval(size)[1], self.verify_s[size]))

    def draft_ratio(self, block_size: int) -> float:
        """T_draft(B) / T_1; interpolated if B was not timed."""
        return _between(self.draft_s, block_size) / self.step_s

    def block_ratio(self, block_size: int) -> float:
        """(T_verify(B) + T_draft(B)) / T_1: a block's cost in one-token steps, and the tokens that break even."""
        return self.verify_ratio(block_size) + self.draft_ratio(block_size)


def _between(seconds: Mapping[int, float], size: int) -> float:
    sizes = sorted(seconds)
    if not sizes or not sizes[0] <= size <= sizes[-1]:
        raise ValueError(f"a block size must lie between those that were timed, {sizes}; got {size}")
    return float(np.interp(size, sizes, [seconds[s] for s in sizes]))


def sizes_to_time(block_size: int) -> list[int]:
    """Block sizes whose steps are timed so that every size from 2 up to this one can be predicted."""
    return [s for s in (2, 4, 8, 16, 32, 64, 128) if s < block_size] + [block_size]


def advice(times: StepTimes, accept_rate_per_pos: Sequence[float]) -> Advice:
    """What each block size from 2 to len(accept_rate_per_pos) + 1 would give, and the best of them.

    A smaller block is assumed to be accepted as the first slots of the measured one are. `best_block_size` 1 is plain
    greedy decoding: no block size is predicted to be faster.
    """
    rows = []
    for size in range(2, len(accept_rate_per_pos) + 2):
        length = 1 + float(sum(accept_rate_per_pos[: size - 1]))
        verify_s, draft_s = _between(times.verify_s, size), _between(times.draft_s, size)
        rows.append(
            BlockSizeAdvice(
                block_size=size,
                acceptance_length=length,
                break_even_acceptance_length=times.block_ratio(size),
                predicted_speedup_x=predicted_speedup(length, times.step_s, verify_s, draft_s),
                timed=size in times.verify_s and size in times.draft_s,
            )
        )
    best = max(rows, key=lambda row: row.predicted_speedup_x, default=None)
    if best is None or best.predicted_speedup_x <= 1:
        return Advice(best_block_size=1, best_predicted_speedup_x=1.0, by_block_size=rows)
    return Advice(
        best_block_size=best.block_size, best_predicted_speedup_x=best.predicted_speedup_x, by_block_size=rows
    )


def time_shares(verify_ratio: float, draft_ratio: float, block_ratio: float) -> dict[str, float]:
    """Percent of a measured block's time in the verify step, the draft step, and the loop around them (commit, reads).

    All ratios are in one-token steps. If the steps alone take longer than the block, the loop's share is 0.
    """
    whole = max(block_ratio, verify_ratio + draft_ratio)
    verify, draft = 100 * verify_ratio / whole, 100 * draft_ratio / whole
    return {"verify": verify, "draft": draft, "loop": 100 - verify - draft}


def residual(measured: float, predicted: float) -> float:
    """How far the measured speed-up is above the prediction (negative: below), as a fraction of the prediction."""
    return measured / predicted - 1


def is_explained(measured: tuple[float, float], predicted: float) -> bool:
    """Whether the terms may account for a speed-up that lies in this interval."""
    low, high = measured
    return residual(low, predicted) <= EXPLAINED_WITHIN and residual(high, predicted) >= -EXPLAINED_WITHIN


def advice_line(case: Decode) -> str | None:
    """A case's advice in one line, or None where it has none."""
    advised, shares = case.advice, case.time_shares
    if not advised or not shares:
        return None
    best = advised.best_block_size
    choice = (
        f"best block size {best} ({advised.best_predicted_speedup_x:.2f} x predicted)"
        if best > 1
        else "no block size is predicted to be faster than greedy decoding"
    )
    experts = ""
    if case.experts_awake_verify is not None:
        experts = (
            f"; experts awake {case.experts_awake_verify:.1f} of {case.experts}, "
            f"{case.experts_awake_verify_expected:.1f} expected"
        )
    return (
        f"{choice}; with {case.block_size} it breaks even at acceptance_length "
        f"{case.break_even_acceptance_length:.2f}, and has {case.acceptance_length:.2f}; time: "
        + ", ".join(f"{name} {percent:.0f}%" for name, percent in shares.items())
        + experts
    )
