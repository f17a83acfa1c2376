"""The cost model by hand: predictions for every block size, the best one, and where a block's time goes."""

from dataclasses import replace

import pytest
import sample_runs

from dflash.measuring.cost_model import (
    StepTimes,
    advice,
    advice_line,
    is_explained,
    residual,
    sizes_to_time,
    time_shares,
)

# T_1 10 ms; a block of 8 costs 1.4 + 0.5 one-token steps, one of 2 costs 1.1 + 0.2.
TIMES = StepTimes(
    step_s=0.010,
    verify_s={2: 0.011, 4: 0.012, 8: 0.014, 16: 0.030},
    draft_s={2: 0.002, 4: 0.003, 8: 0.005},
    context=64,
    batch=1,
)


def test_ratios():
    assert TIMES.verify_ratio(8) == pytest.approx(1.4)
    assert TIMES.draft_ratio(8) == pytest.approx(0.5)
    assert TIMES.block_ratio(8) == pytest.approx(1.9)
    # Half-way between 4 and 8.
    assert TIMES.block_ratio(6) == pytest.approx(1.3 + 0.4)


@pytest.mark.parametrize("size", [1, 9])
def test_sizes_that_were_not_timed_are_refused(size):
    with pytest.raises(ValueError, match=rf"between those that were timed, \[2, 4, 8\]; got {size}"):
        TIMES.draft_ratio(size)


@pytest.mark.parametrize(("size", "timed"), [(2, [2]), (3, [2, 3]), (8, [2, 4, 8]), (10, [2, 4, 8, 10])])
def test_sizes_to_time(size, timed):
    assert sizes_to_time(size) == timed


def test_advice_for_every_block_size():
    told = advice(TIMES, [0.9, 0.8, 0.7, 0.1, 0.1, 0.0, 0.0])
    rows = {row.block_size: row for row in told.by_block_size}
    assert list(rows) == list(range(2, 9))
    assert rows[2].predicted_speedup_x == pytest.approx(1.9 / 1.3)
    assert rows[8].predicted_speedup_x == pytest.approx(3.6 / 1.9)
    assert rows[6].acceptance_length == pytest.approx(3.6)
    assert rows[6].break_even_acceptance_length == pytest.approx(1.7)
    assert [size for size, row in rows.items() if row.timed] == [2, 4, 8]
    # The fourth slot still pays; what comes after is seldom accepted.
    assert (told.best_block_size, told.best_predicted_speedup_x) == (4, pytest.approx(3.4 / 1.5))


def test_a_draft_that_is_always_right_wants_the_whole_block():
    assert advice(TIMES, [1.0] * 7).best_block_size == 8


def test_at_the_break_even_the_speed_up_is_one():
    needed = TIMES.block_ratio(8) - 1
    told = advice(TIMES, [needed / 7] * 7)
    assert told.by_block_size[-1].predicted_speedup_x == pytest.approx(1)


def test_a_useless_draft_is_best_left_out():
    told = advice(TIMES, [0.0] * 7)
    assert (told.best_block_size, told.best_predicted_speedup_x) == (1, 1.0)
    assert len(told.by_block_size) == 7


def test_time_shares():
    assert time_shares(1.4, 0.5, 2.0) == pytest.approx({"verify": 70, "draft": 25, "loop": 5})
    shares = time_shares(1.4, 0.6, 1.8)
    assert shares == pytest.approx({"verify": 70, "draft": 30, "loop": 0})


@pytest.mark.parametrize(
    ("measured", "explained"),
    [((2.21, 2.6), False), ((2.19, 2.6), True), ((2.0, 2.0), True), ((1.5, 1.81), True), ((1.5, 1.79), False)],
)
def test_explained_where_the_interval_reaches_a_tenth_of_the_prediction(measured, explained):
    assert is_explained(measured, 2.0) is explained


def test_residual():
    assert residual(2.5, 2.0) == pytest.approx(0.25)


def test_advice_in_one_line():
    info = sample_runs.case(
        acceptance_length=3.6,
        break_even_acceptance_length=1.9,
        advice=advice(TIMES, [0.9, 0.8, 0.7, 0.1, 0.1, 0.0, 0.0]),
        time_shares=time_shares(1.4, 0.5, 2.0),
    )
    line = (
        "best block size 4 (2.27 x predicted); with 8 it breaks even at acceptance_length 1.90, "
        "and has 3.60; time: verify 70%, draft 25%, loop 5%"
    )
    assert advice_line(info) == line
    routed = {"experts": 32, "experts_awake_verify": 19.04, "experts_awake_verify_expected": 21}
    assert advice_line(replace(info, **routed)) == line + "; experts awake 19.0 of 32, 21.0 expected"
    useless = advice_line(replace(info, advice=advice(TIMES, [0.0] * 7)))
    assert "no block size" in useless
    assert advice_line(replace(info, advice=None)) is None
