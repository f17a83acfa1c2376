"""Verdicts on canned cases: every sentence, and which term each blames."""

import pytest

from dflash.gate import Floors, doubt, failures, remark, status

OK = {
    "status": "ok",
    "lossless": True,
    "first_divergence": None,
    "acceptance_length": 6.0,
    "speedup_x": 3.0,
    "speedup_x_ci95": [2.9, 3.1],
    "block_ratio": 2.0,
    "predicted_block_ratio": 1.9,
    "predicted_speedup_x": 3.2,
}


NOISY = OK | {"status": "invalid", "too_noisy": "its rounds differ by 30% (at most 10%)"}
QUICK = OK | {"status": "quick", "speedup_x_ci95": None}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "ok"),
        ({"lossless": False}, "invalid"),
        ({"speedup_x": None, "speedup_x_ci95": None}, "invalid"),
        ({"lossless": None, "speedup_x": None, "speedup_x_ci95": None}, "no-baseline"),
        ({"too_noisy": "its rounds differ"}, "invalid"),
        ({"speedup_x_ci95": None}, "quick"),
        ({"predicted_speedup_x": 3.4}, "unexplained"),
        ({"predicted_speedup_x": 2.7}, "unexplained"),
        ({"predicted_speedup_x": None}, "ok"),
        ({"predicted_speedup_x": 9.0, "too_noisy": "its rounds differ"}, "invalid"),
        ({"lossless": False, "too_noisy": "its rounds differ"}, "invalid"),
    ],
)
def test_status(changes, expected):
    assert status(OK | changes) == expected


def test_noise_fails_what_is_asked_of_the_speed_up_and_only_that():
    assert failures(NOISY, Floors(predicted_share=0.9)) == []
    assert failures(NOISY, Floors(speedup_x=0.1)) == [
        "speedup_x is invalid: its rounds differ by 30% (at most 10%); take more rounds on a quieter machine"
    ]
    (said,) = failures(NOISY, Floors(acceptance_length=7.0))
    assert said.startswith("acceptance_length 6.00 < 7.00")


def test_a_quick_run_passes_no_floor():
    assert failures(QUICK, Floors(predicted_share=0.9)) == []
    assert failures(QUICK, Floors(speedup_x=0.1)) == ["speedup_x is without an interval: it needs at least 3 rounds"]


def test_remarks():
    assert remark(OK) is None
    assert doubt(OK) is None
    far = OK | {"status": "unexplained", "residual": -0.2}
    assert doubt(far) is None
    assert remark(far) == "unexplained: -20% off the 3.20 that its steps predict (within 10% is explained)"
    assert remark(NOISY) == doubt(NOISY)


@pytest.mark.parametrize(
    "floors",
    [
        Floors(),
        Floors(speedup_x=2.5, acceptance_length=5.5, predicted_share=0.9),
        Floors(speedup_x=3.1, acceptance_length=6.0),
    ],
)
def test_pass(floors):
    assert failures(OK, floors) == []


def test_no_floor_asks_for_nothing():
    assert failures(OK | {"acceptance_length": 1.0, "speedup_x": 0.1, "speedup_x_ci95": [0.1, 0.1]}, Floors()) == []


def test_invalid_says_where():
    info = OK | {"status": "invalid", "lossless": False, "first_divergence": {"prompt": 2, "token": 17}}
    assert failures(info, Floors()) == [
        "speedup_x is invalid: the tokens must be the target's own, and differ first at prompt 2, token 17"
    ]


def test_invalid_without_a_block():
    info = OK | {"status": "invalid", "speedup_x": None, "speedup_x_ci95": None, "acceptance_length": None}
    assert failures(info, Floors(speedup_x=1.0)) == [
        "speedup_x is invalid: no block was needed, so nothing was measured; raise max_new_tokens"
    ]


def test_no_baseline():
    info = OK | {"status": "no-baseline", "lossless": None, "speedup_x": None, "speedup_x_ci95": None}
    assert failures(info, Floors(speedup_x=1.0)) == [
        "speedup_x is no-baseline: greedy decoding must run beside it, to compare with and to prove the tokens"
    ]


def test_acceptance_moved():
    low = OK | {"acceptance_length": 4.0, "speedup_x": 2.0, "speedup_x_ci95": [1.9, 2.1]}
    assert failures(low, Floors(acceptance_length=5.2, speedup_x=2.8)) == [
        "acceptance_length 4.00 < 5.20: the draft is accepted less (a block costs 2.00 one-token steps (1.90 by its "
        "steps timed alone))",
        "speedup_x 2.00 (1.90 to 2.10) < 2.80: acceptance moved; a block costs 2.00 one-token steps (1.90 by its steps "
        "timed alone), acceptance_length is 4.00 and would have to be 5.60",
    ]


def test_acceptance_alone_can_fail():
    assert len(failures(OK, Floors(acceptance_length=6.5))) == 1


def test_block_cost_moved():
    slow = OK | {"speedup_x": 2.0, "speedup_x_ci95": [1.9, 2.1], "block_ratio": 3.0}
    assert failures(slow, Floors(acceptance_length=5.2, speedup_x=2.8)) == [
        "speedup_x 2.00 (1.90 to 2.10) < 2.80: the cost of a block moved; a block costs 3.00 one-token steps (1.90 by "
        "its steps timed alone), acceptance_length is 6.00 and would have to be 8.40"
    ]


def test_without_an_acceptance_floor_neither_term_is_cleared():
    slow = OK | {"speedup_x": 2.0, "speedup_x_ci95": [1.9, 2.1]}
    (said,) = failures(slow, Floors(speedup_x=2.8))
    assert "< 2.80: acceptance or the cost of a block moved;" in said


def test_loop_moved():
    slow = OK | {"speedup_x": 2.5, "speedup_x_ci95": [2.4, 2.6]}
    assert failures(slow, Floors(predicted_share=0.9)) == [
        "speedup_x 2.50 (2.40 to 2.60) < 0.90 x the 3.20 that its steps predict: the loop moved; a block costs 2.00 "
        "one-token steps (1.90 by its steps timed alone)"
    ]


def test_the_upper_end_is_judged():
    noisy = OK | {"speedup_x": 2.0, "speedup_x_ci95": [1.0, 2.9]}
    assert failures(noisy, Floors(speedup_x=2.8, predicted_share=0.9)) == []
    assert len(failures(noisy, Floors(speedup_x=2.95, predicted_share=0.95))) == 2


def test_other_prompts_are_not_asked():
    slow = OK | {"speedup_x": 2.0, "speedup_x_ci95": [1.0, 4.0], "speedup_x_timing_ci95": [1.9, 2.1]}
    (said,) = failures(slow, Floors(speedup_x=2.8))
    assert said.startswith("speedup_x 2.00 (1.90 to 2.10) < 2.80")


def test_without_a_prediction_the_loop_is_not_judged():
    plain = {k: v for k, v in OK.items() if not k.startswith("predicted")}
    assert failures(plain, Floors(predicted_share=0.9)) == []
    (said,) = failures(plain, Floors(acceptance_length=7.0))
    assert said.endswith("(a block costs 2.00 one-token steps)")
