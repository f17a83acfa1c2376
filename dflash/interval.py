"""How sure a speed-up is: its interval, what disturbed its rounds, and whether more of them are needed.

Reads seconds of two functions measured in turn, [rounds] or [rounds, prompts]. No jax, no clock.
"""

import dataclasses
import math
from typing import Any

import numpy as np
from scipy.special import stdtrit

# Fewer rounds say nothing of their own noise.
LEAST_ROUNDS = 3
# Rounds that differ by more, as a fraction, and leave the speed-up less certain than this, are no measurement.
TOO_NOISY = 0.10
# Parts that many short rounds are cut into: each is longer than most of what disturbs a machine.
_STRETCHES = 12
# A round this many standard deviations off the others is an outlier.
_FAR = 5.0


def _pairs(baseline: np.ndarray, candidate: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both as float64 [rounds, prompts]. Raises ValueError when the shapes differ: nothing is paired then."""
    if np.shape(baseline) != np.shape(candidate):
        raise ValueError(f"both must have the same rounds, got {np.shape(baseline)} and {np.shape(candidate)}")
    a, b = (np.asarray(x, np.float64).reshape(len(x), -1) for x in (baseline, candidate))
    return a, b


def _margin(drawn: tuple[np.ndarray, np.ndarray], count: int) -> float:
    """Half a 95% interval of log(a / b), from bootstrap medians of both [draws]: Student's t times their deviation.

    Percentiles of so few different medians are too narrow below ten rounds; this holds from three on.
    """
    return float(stdtrit(count - 1, 0.975) * np.std(np.log(drawn[0] / drawn[1])))


def ratio_interval(
    baseline: np.ndarray, candidate: np.ndarray, *, by_prompt: bool = True, draws: int = 2000, seed: int = 0
) -> tuple[float, float, float]:
    """Ratio of median seconds baseline / candidate with its 95% bootstrap interval: (ratio, low, high).

    What a round of several prompts took is their sum. Rounds are drawn in pairs, which is the noise of the clock, and,
    `by_prompt`, prompts too: the interval is then that of other prompts of this kind, and not of these alone. Fewer
    than three rounds give (ratio, 0, inf). Raises ValueError when the shapes differ.
    """
    a, b = _pairs(baseline, candidate)
    count, prompts = a.shape
    sums = a.sum(axis=1), b.sum(axis=1)
    ratio = float(np.median(sums[0]) / np.median(sums[1]))
    if count < LEAST_ROUNDS:
        return ratio, 0.0, math.inf
    rng = np.random.default_rng(seed)
    chosen = rng.integers(0, count, (draws, count))
    margin = _margin((np.median(sums[0][chosen], axis=1), np.median(sums[1][chosen], axis=1)), count)
    if by_prompt and prompts > 1:
        # How often each prompt is drawn: [prompts, draws].
        times = rng.multinomial(prompts, np.full(prompts, 1 / prompts), draws).T
        margin = math.hypot(margin, _margin((np.median(a @ times, axis=0), np.median(b @ times, axis=0)), prompts))
    return ratio, ratio * math.exp(-margin), ratio * math.exp(margin)


def pair_ratio_interval(
    baseline: np.ndarray, candidate: np.ndarray, *, draws: int = 500, seed: int = 0
) -> tuple[float, float, float]:
    """Median of baseline / candidate over rounds of one short call each, [rounds], and its 95% interval.

    Gives (ratio, low, high). For calls so short that what disturbs a machine lasts for many of them: a pair shares it,
    which its ratio takes out, and neighbouring pairs resemble each other, so that stretches of rounds are drawn and not
    single ones. Fewer rounds than stretches give (ratio, 0, inf). Raises ValueError when the shapes differ.
    """
    a, b = _pairs(baseline, candidate)
    ratios = np.log(a.sum(axis=1) / b.sum(axis=1))
    ratio, size = math.exp(np.median(ratios)), len(ratios) // _STRETCHES
    if not size:
        return ratio, 0.0, math.inf
    stretches = ratios[len(ratios) - size * _STRETCHES :].reshape(_STRETCHES, size)
    chosen = np.random.default_rng(seed).integers(0, _STRETCHES, (draws, _STRETCHES))
    drawn = np.median(stretches[chosen].reshape(draws, -1), axis=1)
    margin = float(stdtrit(_STRETCHES - 1, 0.975) * np.std(drawn))
    return ratio, ratio * math.exp(-margin), ratio * math.exp(margin)


def rounds_to_add(baseline: np.ndarray, candidate: np.ndarray, precision: float) -> int:
    """0 when the interval of these prompts is narrower than `precision` of the ratio, else rounds to take before

    asking again: half as many as there are, since each look is one more chance to stop at a lucky moment.
    """
    ratio, low, high = ratio_interval(baseline, candidate, by_prompt=False, draws=500)
    return 0 if high - low < precision * ratio else max(1, len(baseline) // 2)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Noise:
    """What disturbed the rounds, all as seen in the speed-up of each pair.

    spread    standard deviation over rounds, a fraction of the speed-up; from the median absolute deviation
    within    half the 95% interval of these prompts, a fraction of the speed-up; inf for too few rounds to tell
    drift     second half of the rounds against the first, a fraction; 0.0 where chance explains it
    outliers  rounds far from the others
    rounds    of so many
    """

    spread: float
    within: float
    drift: float
    outliers: int
    rounds: int

    @property
    def too_noisy(self) -> str | None:
        """Why these rounds measure nothing, or None; None also for rounds too few to tell."""
        if self.rounds < LEAST_ROUNDS:
            return None
        if abs(self.drift) > TOO_NOISY:
            return f"it drifted by {self.drift:+.0%} between the halves of its rounds (at most {TOO_NOISY:.0%})"
        # What differs much can still be known well, by enough rounds.
        if min(self.spread, self.within) > TOO_NOISY:
            return (
                f"its rounds differ by {self.spread:.0%}, which leaves the speed-up certain within {self.within:.0%} "
                f"(at most {TOO_NOISY:.0%})"
            )
        if 4 * self.outliers > self.rounds:
            return f"{self.outliers} of {self.rounds} rounds are outliers (at most a quarter)"
        return None


def _deviation(values: np.ndarray) -> float:
    """Standard deviation that outliers do not move; values have median 0."""
    return float(1.4826 * np.median(np.abs(values)))


def noise(baseline: np.ndarray, candidate: np.ndarray) -> Noise:
    """What disturbed these rounds. Raises ValueError when the shapes differ."""
    a, b = _pairs(baseline, candidate)
    ratios = np.log(a.sum(axis=1) / b.sum(axis=1))
    count = len(ratios)
    off = ratios - np.median(ratios)
    spread = _deviation(off)
    halves = ratios[: count // 2], ratios[(count + 1) // 2 :]
    drift = 0.0
    if count // 2 >= LEAST_ROUNDS:
        drift = float(np.median(halves[1]) - np.median(halves[0]))
        within = math.sqrt(sum(float(np.var(h, ddof=1)) for h in halves) / 2)
        # The error of a median is 1.25 times that of a mean.
        if abs(drift) <= stdtrit(count - 2, 0.999) * 1.25 * within * math.sqrt(2 / len(halves[0])):
            drift = 0.0
    # Rounds that are equal to the tick of the clock would make every other one far.
    far = int((np.abs(off) > max(_FAR * spread, 0.01)).sum()) if count > 2 * LEAST_ROUNDS else 0
    ratio, _, high = ratio_interval(a, b, by_prompt=False)
    return Noise(
        spread=math.expm1(spread), within=high / ratio - 1, drift=math.expm1(drift), outliers=far, rounds=count
    )


def known(low: float, high: float) -> list[float] | None:
    """An interval as it is reported: None where too few rounds gave one."""
    return [low, high] if math.isfinite(high) else None


# What `speedup_figures` gives, where nothing was compared.
NO_SPEEDUP = dict.fromkeys(
    ("speedup_x", "speedup_x_ci95", "speedup_x_timing_ci95", "spread", "drift", "outliers", "too_noisy")
)


def speedup_figures(baseline: np.ndarray, candidate: np.ndarray) -> dict[str, Any]:
    """The speed-up of these rounds, both its intervals and what disturbed it, by their names in `metrics`."""
    ratio, *by_prompt = ratio_interval(baseline, candidate)
    disturbed = noise(baseline, candidate)
    return {
        "speedup_x": ratio,
        "speedup_x_ci95": known(*by_prompt),
        "speedup_x_timing_ci95": known(ratio / (1 + disturbed.within), ratio * (1 + disturbed.within)),
        "spread": disturbed.spread,
        "drift": disturbed.drift,
        "outliers": disturbed.outliers,
        "too_noisy": disturbed.too_noisy,
    }
