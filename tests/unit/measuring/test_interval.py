"""Intervals on synthetic timings with a known truth: they cover it, raise no false alarm, and find a slow-down."""

import math
import re

import numpy as np
import pytest

from dflash.measuring.baselines import TOLERANCE
from dflash.measuring.interval import (
    NO_SPEEDUP,
    Noise,
    acceptance_over_prompts,
    noise,
    ratio_interval,
    rounds_to_add,
    speedup_figures,
)

DRAWS = 1000


def drawn_rounds(rng, rounds, prompts, ratio, spread=0.0):
    """Seconds of two functions whose true ratio is known, on a machine that drifts from round to round."""
    common = np.exp(rng.normal(0, 0.2, prompts) + rng.normal(0, 0.15, (rounds, 1)))
    timing = np.exp(rng.normal(0, 0.05, (2, rounds, prompts)))
    per_prompt = np.exp(rng.normal(-(spread**2) / 2, spread, prompts))
    return ratio * common * timing[0] * per_prompt, common * timing[1]


def steady(rng, rounds):
    return np.exp(rng.normal(0, 0.03, (2, rounds)))


def spiked(rng, rounds):
    """A tenth of the rounds takes half as long again."""
    return steady(rng, rounds) * np.where(rng.random((2, rounds)) < 0.1, 1.5, 1)


def skewed(rng, rounds):
    """Never faster than the machine can, often slower."""
    return 1 + 0.05 * rng.exponential(1, (2, rounds))


@pytest.mark.parametrize(("rounds", "prompts", "spread"), [(3, 1, 0), (5, 1, 0), (15, 1, 0), (9, 4, 0.05), (5, 8, 0.1)])
def test_interval_holds_the_truth(rounds, prompts, spread):
    rng = np.random.default_rng(7)
    held = 0
    for _ in range(DRAWS):
        _, low, high = ratio_interval(*drawn_rounds(rng, rounds, prompts, 2.5, spread), draws=300)
        held += low <= 2.5 <= high
    assert held / DRAWS >= 0.93


@pytest.mark.parametrize("rounds", [3, 5, 30])
@pytest.mark.parametrize("timing", [steady, spiked, skewed], ids=lambda f: f.__name__)
def test_interval_of_one_prompt_holds_the_truth(timing, rounds):
    rng = np.random.default_rng(8)
    held = 0
    for _ in range(DRAWS):
        _, low, high = ratio_interval(*timing(rng, rounds), draws=300)
        held += low <= 1 <= high
    assert 0.93 <= held / DRAWS < 1


def test_interval_holds_the_truth_when_its_width_ends_the_run():
    """Rounds are added until it is narrow: stopping at a lucky moment must not cost its coverage."""
    rng = np.random.default_rng(9)
    held, taken = 0, []
    for _ in range(DRAWS):
        baseline, candidate = steady(rng, 48)
        rounds = 5
        while rounds < 48 and (more := rounds_to_add(baseline[:rounds], candidate[:rounds], 0.05)):
            rounds = min(48, rounds + more)
        _, low, high = ratio_interval(baseline[:rounds], candidate[:rounds], draws=300)
        held += low <= 1 <= high
        taken.append(rounds)
    assert held / DRAWS >= 0.93
    assert 5 < np.mean(taken) < 48


def alarms(slow_down):
    """Of runs of 30 rounds with 3% noise, how many have their upper end under the gate's floor."""
    rng = np.random.default_rng(10)
    floor = 1 - TOLERANCE
    under = 0
    for _ in range(DRAWS):
        baseline, candidate = steady(rng, 30)
        under += ratio_interval(baseline, (1 + slow_down) * candidate, draws=500)[2] < floor
    return under / DRAWS


def test_equal_pairs_raise_no_alarm():
    assert alarms(0.0) <= 0.01


def test_a_slow_down_of_five_percent_is_found():
    assert alarms(0.05) >= 0.95


def test_drift_does_not_widen_the_interval():
    rng = np.random.default_rng(1)
    drift = np.linspace(1, 5, 20)
    baseline, candidate = drift * 3 * rng.normal(1, 0.01, 20), drift * rng.normal(1, 0.01, 20)
    ratio, low, high = ratio_interval(baseline, candidate)
    assert ratio == pytest.approx(3, rel=0.02)
    assert high - low < 0.03 * 3 * 2


@pytest.mark.parametrize("lasting", [1, 5, 20])
def test_interval_of_short_calls_holds_the_truth_where_noise_lasts(lasting):
    """What disturbs one of the two for some rounds is no news in each of them."""
    rng = np.random.default_rng(11)
    held = 0
    for _ in range(DRAWS):
        disturbed = np.repeat(rng.normal(0, 0.03, 480 // lasting), lasting)
        drift = np.linspace(0, 0.5, 480)
        baseline, candidate = np.exp(drift + disturbed + rng.normal(0, 0.02, 480)), np.exp(drift)
        _, low, high = ratio_interval(1.2 * baseline, candidate, draws=200)
        held += low <= 1.2 <= high
    assert 0.93 <= held / DRAWS < 1


def test_a_slow_down_of_short_calls_is_found_through_bursts():
    """A tenth of the time one of the two is half as fast again: the ratio is that of the rest."""
    rng = np.random.default_rng(12)
    candidate = np.exp(rng.normal(0, 0.03, 360))
    candidate[100:136] *= 1.5
    ratio, low, high = ratio_interval(np.ones(360), candidate)
    assert 1 / ratio == pytest.approx(1, abs=0.01)
    assert high / low < 1.04


@pytest.mark.parametrize("rounds", [2, 9])
def test_figures_hold_both_intervals_and_what_disturbed_them(rounds):
    pair = drawn_rounds(np.random.default_rng(4), rounds, 6, 2.0, spread=0.3)
    figures, disturbed = speedup_figures(*pair), noise(*pair)
    assert figures.keys() == NO_SPEEDUP.keys()
    assert figures["spread"] == disturbed.spread
    assert figures["outliers"] == disturbed.outliers
    told = [figures["speedup_x_ci95"], figures["speedup_x_timing_ci95"]]
    if rounds < 3:
        assert told == [None, None]
        return
    for by_prompt, interval in zip((True, False), told, strict=True):
        assert (figures["speedup_x"], *interval) == pytest.approx(ratio_interval(*pair, by_prompt=by_prompt))


def test_both_means_of_the_acceptance_length_and_their_intervals():
    told = acceptance_over_prompts([[0, 0], [1, 1, 1, 1], [], [3]])
    assert told["acceptance_length_by_prompt"] == pytest.approx((1 + 2 + 4) / 3)
    low, high = told["acceptance_length_ci95"]
    assert 1 <= low < 14 / 7 < high  # pooled: 2 + 8 + 4 tokens of 7 blocks
    low, high = told["acceptance_length_by_prompt_ci95"]
    assert 1 <= low < 7 / 3 < high
    assert acceptance_over_prompts([[0, 0], [1]])["acceptance_length_ci95"] is None
    assert set(acceptance_over_prompts([[], []]).values()) == {None}


@pytest.mark.parametrize("name", ["acceptance_length_ci95", "acceptance_length_by_prompt_ci95"])
def test_the_interval_over_prompts_holds_the_truth(name):
    """Prompts drawn from one kind of text: their true mean is within the interval in about 95 of 100 draws."""
    rng, held = np.random.default_rng(3), 0
    for draw in range(200):
        chances = rng.beta(4, 4, 12)
        rows = [rng.binomial(7, chance, 20).tolist() for chance in chances]
        low, high = acceptance_over_prompts(rows, draws=400, seed=draw)[name]
        held += low <= 1 + 7 / 2 <= high
    assert 180 <= held <= 199


def test_swapped_roles_give_the_reciprocal():
    a, b = drawn_rounds(np.random.default_rng(2), 9, 4, 1.7)
    ratio, low, high = ratio_interval(a, b)
    assert low < ratio < high
    assert ratio_interval(b, a) == pytest.approx((1 / ratio, 1 / high, 1 / low))
    assert ratio_interval(a, a) == (1, 1, 1)


def test_prompts_that_differ_widen_the_interval_by_prompt_only():
    a, b = drawn_rounds(np.random.default_rng(3), 9, 6, 2.0, spread=0.3)
    ratio, low, high = ratio_interval(a, b)
    same, timing_low, timing_high = ratio_interval(a, b, by_prompt=False)
    assert same == ratio
    assert (high / low) > 1.2 * (timing_high / timing_low)


def test_too_few_rounds_have_no_interval():
    for rounds in (1, 2):
        assert ratio_interval(np.full(rounds, 6.0), np.full(rounds, 2.0)) == pytest.approx((3, 0, math.inf))
        assert rounds_to_add(np.full(rounds, 6.0), np.full(rounds, 2.0), 0.5) == 1


def test_one_column_is_one_prompt():
    flat = ratio_interval(np.array([6.0, 8.0, 7.0]), np.array([2.0, 4.0, 2.0]))
    assert ratio_interval([[6.0], [8.0], [7.0]], [[2.0], [4.0], [2.0]]) == flat


def test_the_interval_is_the_same_every_time():
    a, b = drawn_rounds(np.random.default_rng(3), 5, 2, 2.0)
    assert ratio_interval(a, b) == ratio_interval(a, b)


@pytest.mark.parametrize("function", [ratio_interval, noise])
def test_rounds_that_are_no_pairs_are_refused(function):
    with pytest.raises(ValueError, match=r"rounds, got \(3,\) and \(2,\)"):
        function(np.ones(3), np.ones(2))


def test_rounds_are_added_until_the_interval_is_narrow():
    rng = np.random.default_rng(4)
    baseline, candidate = steady(rng, 30)
    assert rounds_to_add(baseline[:10], candidate[:10], 0.02) == 5
    assert rounds_to_add(baseline, candidate, 0.10) == 0


def ones_but(rounds, **places):
    seconds = np.ones(rounds)
    for place, value in places.items():
        seconds[int(place[1:])] = value
    return seconds


def test_noise_is_quiet_on_honest_rounds():
    """Of 1000 runs of each length hardly any is called drifting or too noisy."""
    rng = np.random.default_rng(5)
    for rounds in (3, 6, 10, 30):
        found = [noise(*steady(rng, rounds)) for _ in range(DRAWS)]
        assert sum(n.drift != 0 for n in found) <= 0.01 * DRAWS, rounds
        assert sum(n.too_noisy is not None for n in found) <= 0.02 * DRAWS, rounds
        if rounds == 30:
            assert np.mean([n.spread for n in found]) == pytest.approx(0.03 * 2**0.5, rel=0.1)


def test_a_machine_that_drifts_as_a_whole_is_no_drift():
    rng = np.random.default_rng(6)
    slower = np.linspace(1, 2, 20)
    baseline, candidate = steady(rng, 20) * slower
    assert noise(baseline, candidate).drift == 0


def test_drift_of_the_speed_up():
    rng = np.random.default_rng(7)
    baseline, candidate = steady(rng, 20)
    candidate[10:] *= 1.2
    seen = noise(baseline, candidate)
    assert seen.drift == pytest.approx(1 / 1.2 - 1, abs=0.05)
    assert re.match(rf"it drifted by {re.escape(f'{seen.drift:+.0%}')} .*\(at most 10%\)$", seen.too_noisy)


def test_outliers():
    rng = np.random.default_rng(8)
    baseline, candidate = steady(rng, 20)
    candidate[[3, 9]] *= 2
    seen = noise(baseline, candidate)
    assert (seen.outliers, seen.pairs, seen.too_noisy) == (2, 20, None)
    assert noise(ones_but(10, r4=1.001), np.ones(10)).outliers == 0
    assert noise(ones_but(10, r4=1.1), np.ones(10)).outliers == 1


def test_rounds_that_contradict_each_other():
    rng = np.random.default_rng(9)
    baseline, candidate = np.exp(rng.normal(0, 0.3, (2, 20)))
    assert noise(baseline, candidate).too_noisy.startswith("its pairs differ by ")
    quiet = {"spread": 0.01, "within": 0.01, "drift": 0.0, "outliers": 0}
    assert Noise(**quiet | {"outliers": 3}, pairs=10).too_noisy.startswith("3 of 10 pairs are outliers ")
    assert Noise(spread=0.1, within=0.2, drift=-0.1, outliers=5, pairs=20).too_noisy is None


def test_rounds_that_differ_say_something_when_they_are_many():
    rng = np.random.default_rng(9)
    baseline, candidate = np.exp(rng.normal(0, 0.2, (2, 200)))
    assert noise(baseline[:6], candidate[:6]).too_noisy.startswith("its pairs differ by ")
    seen = noise(baseline, candidate)
    assert (seen.too_noisy, seen.spread > 0.1) == (None, True)


def test_rounds_too_few_to_be_called_noisy():
    assert noise(np.array([6.0, 3.0]), np.array([2.0, 2.0])).too_noisy is None
    assert noise(np.array([6.0]), np.array([2.0])) == Noise(spread=0.0, within=np.inf, drift=0.0, outliers=0, pairs=1)
