"""How sure a speed-up is: its interval, what disturbed its rounds, and whether more of them are needed.

Reads seconds of two functions measured in turn, [rounds] or [rounds, prompts]. No jax, no clock.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.special import stdtrit

# Fewer rounds say nothing about their own noise.
LEAST_ROUNDS = 3
# Pairs that differ by more, as a fraction, and leave the speed-up less certain than this, are no measurement.
TOO_NOISY = 0.10
# Parts that many pairs are cut into: each is longer than most of what disturbs a machine.
_STRETCHES = 12
# A pair this many standard deviations off the others is an outlier.
_FAR = 5.0


def _pairs(baseline: np.ndarray, candidate: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both as float64 [rounds, prompts]. Raises ValueError when the shapes differ, since nothing is paired then."""
    if np.shape(baseline) != np.shape(candidate):
        raise ValueError(f"both must have the same rounds, got {np.shape(baseline)} and {np.shape(candidate)}")
    a, b = (np.asarray(x, np.float64).reshape(len(x), -1) for x in (baseline, candidate))
    return a, b


def _middle(values: np.ndarray) -> np.ndarray:
    """Mean of the middle half along the first axis: outliers don't move it, and it varies less than a median."""
    count = len(values)
    cut = max(count // 4, 1) if count >= LEAST_ROUNDS else 0
    return np.sort(values, axis=0)[cut : count - cut].mean(axis=0)


def _margin(deviation: float, count: int) -> float:
    """Half a 95% interval of a logarithm, from its bootstrap deviation over `count` things that were drawn.

    Percentiles of so few different values are too narrow below ten; Student's t holds from three on.
    """
    return float(stdtrit(count - 1, 0.975) * deviation)


def _off(ratios: np.ndarray) -> np.ndarray:
    """How far pairs are off their prompt's own ratio, log ratios [rounds, prompts] -> [pairs] in the order taken."""
    return (ratios - ratios.mean(axis=0)).ravel()


def _timing_margin(ratios: np.ndarray, draws: int, rng: np.random.Generator) -> float:
    """Half the 95% interval that the clock's noise leaves, log ratios [rounds, prompts].

    What disturbs a machine lasts for several pairs, and then neighbours resemble each other: stretches of pairs are
    drawn, not single ones.
    """
    rounds = len(ratios)
    off = _off(ratios) * math.sqrt(rounds / (rounds - 1))  # taking out a mean of few hides some of their deviation
    size = max(1, len(off) // _STRETCHES)
    count = len(off) // size
    stretches = off[len(off) - size * count :].reshape(count, size)
    chosen = rng.integers(0, count, (draws, count))
    deviation = float(np.std(_middle(stretches[chosen].reshape(draws, -1).T)))
    # Drawing with replacement costs a degree of freedom, cutting off the ends another.
    return _margin(deviation * math.sqrt(count / (count - 2)), count)


def _prompt_margin(seconds: tuple[np.ndarray, np.ndarray], draws: int, rng: np.random.Generator) -> float:
    """Half the 95% interval over other prompts of this kind, from seconds of each, [prompts] both."""
    prompts = len(seconds[0])
    times = rng.multinomial(prompts, np.full(prompts, 1 / prompts), draws)  # how often each is drawn
    deviation = float(np.std(np.log((times @ seconds[0]) / (times @ seconds[1]))))
    return _margin(deviation * math.sqrt(prompts / (prompts - 1)), prompts)


def acceptance_over_prompts(accept_lens: Sequence[Sequence[int]], draws: int = 2000, seed: int = 0) -> dict[str, Any]:
    """Both means of the acceptance length and their 95% intervals over prompts, from accept lengths of each.

    Pooled, every block weighs the same; by prompt, every prompt. Without three prompts there is no interval.
    """
    rows = [np.array(row) + 1.0 for row in accept_lens if row]
    names = ("acceptance_length_ci95", "acceptance_length_by_prompt", "acceptance_length_by_prompt_ci95")
    figures: dict[str, Any] = dict.fromkeys(names)
    if not rows:
        return figures
    sums, counts = np.array([row.sum() for row in rows]), np.array([len(row) for row in rows])
    figures["acceptance_length_by_prompt"] = float((sums / counts).mean())
    n = len(rows)
    if n < LEAST_ROUNDS:
        return figures
    times = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), draws)
    for mean, name, centre in (
        ((times @ sums) / (times @ counts), names[0], sums.sum() / counts.sum()),
        (times @ (sums / counts) / n, names[2], figures[names[1]]),
    ):
        margin = _margin(float(np.std(mean)) * math.sqrt(n / (n - 1)), n)
        figures[name] = (max(float(centre) - margin, 1.0), float(centre) + margin)
    return figures


def paired_seconds(baseline: np.ndarray, candidate: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What each prompt takes both ways, [prompts] each, from seconds [rounds, prompts] of both.

    A pair is taken one after the other and shares what disturbs the machine: their ratio is that of the middle half of
    a prompt's pairs.
    """
    level, half = _middle(np.log(baseline * candidate)) / 2, _middle(np.log(baseline / candidate)) / 2
    return np.exp(level + half), np.exp(level - half)


def ratio_interval(
    baseline: np.ndarray, candidate: np.ndarray, *, by_prompt: bool = True, draws: int = 2000, seed: int = 0
) -> tuple[float, float, float]:
    """How many times faster the candidate is, with its 95% bootstrap interval: (ratio, low, high).

    Seconds [rounds] or [rounds, prompts] of both, as `paired_seconds` takes them; the ratio is that of all prompts
    together. The interval is the clock's noise and, `by_prompt`, that of the choice of prompts: it then holds for other
    prompts of this kind, and not for these alone. Fewer than three rounds give (ratio, 0, inf). Raises ValueError when
    the shapes differ.
    """
    a, b = _pairs(baseline, candidate)
    seconds = paired_seconds(a, b)
    ratio = float(seconds[0].sum() / seconds[1].sum())
    if len(a) < LEAST_ROUNDS:
        return ratio, 0.0, math.inf
    rng = np.random.default_rng(seed)
    margin = _timing_margin(np.log(a / b), draws, rng)
    if by_prompt and a.shape[1] > 1:
        margin = math.hypot(margin, _prompt_margin(seconds, draws, rng))
    return ratio, ratio * math.exp(-margin), ratio * math.exp(margin)


def rounds_to_add(baseline: np.ndarray, candidate: np.ndarray, precision: float) -> int:
    """Rounds to take before asking again; 0 when the interval of these prompts is within `precision` of the ratio.

    Half as many as there are: each look is one more chance to stop at a lucky moment.
    """
    ratio, low, high = ratio_interval(baseline, candidate, by_prompt=False, draws=500)
    return 0 if high - low < precision * ratio else max(1, len(baseline) // 2)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Noise:
    """What disturbed the rounds, as seen in the speed-up of each pair.

    spread    standard deviation of a pair, a fraction of the speed-up; from the median absolute deviation
    within    half the 95% interval of these prompts, a fraction of the speed-up; inf for too few rounds to tell
    drift     second half of the pairs against the first, a fraction; 0.0 where chance explains it
    outliers  pairs far from the others
    pairs     their number
    """

    spread: float
    within: float
    drift: float
    outliers: int
    pairs: int

    @property
    def too_noisy(self) -> str | None:
        """Why these rounds measure nothing, or None; None also for rounds too few to tell."""
        if math.isinf(self.within):
            return None
        if abs(self.drift) > TOO_NOISY:
            return f"it drifted by {self.drift:+.0%} between the halves of its pairs (at most {TOO_NOISY:.0%})"
        # What differs much can still be known well, by enough rounds.
        if min(self.spread, self.within) > TOO_NOISY:
            return (
                f"its pairs differ by {self.spread:.0%}, which leaves the speed-up certain within {self.within:.0%} "
                f"(at most {TOO_NOISY:.0%})"
            )
        if 4 * self.outliers > self.pairs:
            return f"{self.outliers} of {self.pairs} pairs are outliers (at most a quarter)"
        return None


def _deviation(values: np.ndarray) -> float:
    """Standard deviation, robust to outliers, of values with median 0."""
    return float(1.4826 * np.median(np.abs(values)))


def noise(baseline: np.ndarray, candidate: np.ndarray) -> Noise:
    """What disturbed these rounds. Raises ValueError when the shapes differ."""
    a, b = _pairs(baseline, candidate)
    off = _off(np.log(a / b))
    off -= np.median(off)
    count, spread = len(off), _deviation(off)
    halves = off[: count // 2], off[(count + 1) // 2 :]
    drift = 0.0
    if count // 2 >= LEAST_ROUNDS:
        drift = float(np.median(halves[1]) - np.median(halves[0]))
        within = math.sqrt(sum(float(np.var(h, ddof=1)) for h in halves) / 2)
        # The error of a median is 1.25 times that of a mean.
        if abs(drift) <= stdtrit(count - 2, 0.999) * 1.25 * within * math.sqrt(2 / len(halves[0])):
            drift = 0.0
    # If most rounds were equal to the clock's tick, every other round would count as an outlier.
    far = int((np.abs(off) > max(_FAR * spread, 0.01)).sum()) if count > 2 * LEAST_ROUNDS else 0
    ratio, _, high = ratio_interval(a, b, by_prompt=False)
    return Noise(spread=math.expm1(spread), within=high / ratio - 1, drift=math.expm1(drift), outliers=far, pairs=count)


def known(low: float, high: float) -> tuple[float, float] | None:
    """An interval as it is reported: None where too few rounds gave one."""
    return (low, high) if math.isfinite(high) else None


# What `speedup_figures` gives if nothing was compared.
NO_SPEEDUP = dict.fromkeys(
    ("speedup_x", "speedup_x_ci95", "speedup_x_timing_ci95", "spread", "drift", "outliers", "too_noisy")
)


def speedup_figures(baseline: np.ndarray, candidate: np.ndarray) -> dict[str, Any]:
    """The speed-up of these rounds, both its intervals and its noise, by their names in `metrics`."""
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
