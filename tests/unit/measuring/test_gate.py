"""Verdicts on canned cases: every sentence, and which term each blames."""

import re
from dataclasses import fields, replace

import pytest
import sample_runs

from dflash.measuring.gate import Floors, closing_line, doubt, failures, own_line, remark, status
from dflash.measuring.result import BrokenConvention, OwnAcceptance, Served, TokenPlace, VerifyRatio
from dflash.metrics import acceptance

OK = sample_runs.case(
    case="block-b8-n64-draft",
    verify_ratio=1.4,
    acceptance_length=6.0,
    speedup_x=3.0,
    speedup_x_ci95=(2.9, 3.1),
    block_ratio=2.0,
    predicted_block_ratio=1.9,
    predicted_speedup_x=3.2,
)
PLACE = TokenPlace(prompt=2, token=17)
NOISY = replace(OK, status="too-noisy", too_noisy="its rounds differ by 30% (at most 10%)")
QUICK = replace(OK, status="quick", speedup_x_ci95=None)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "ok"),
        ({"lossless": False}, "invalid"),
        ({"speedup_x": None, "speedup_x_ci95": None}, "invalid"),
        ({"lossless": None, "speedup_x": None, "speedup_x_ci95": None}, "no-baseline"),
        ({"too_noisy": "its rounds differ"}, "too-noisy"),
        ({"speedup_x_ci95": None}, "quick"),
        ({"predicted_speedup_x": 3.5}, "unexplained"),
        ({"predicted_speedup_x": 2.6}, "unexplained"),
        ({"predicted_speedup_x": 3.4}, "ok"),  # the interval reaches what the steps predict
        ({"speedup_x_timing_ci95": [2.99, 3.01], "predicted_speedup_x": 3.4}, "unexplained"),
        ({"verify_ratio": 0.9}, "slow-baseline"),
        ({"verify_ratio": 0.9, "verify_ratio_ci95": [0.88, 0.92], "predicted_speedup_x": 9.0}, "slow-baseline"),
        ({"verify_ratio": 0.99, "verify_ratio_ci95": [0.9, 1.05]}, "ok"),
        ({"cheapest_verify": VerifyRatio(tokens=2, ratio=0.8, ratio_ci95=(0.78, 0.82))}, "slow-baseline"),
        ({"cheapest_verify": VerifyRatio(tokens=2, ratio=0.98, ratio_ci95=(0.9, 1.01))}, "ok"),
        ({"predicted_speedup_x": None}, "ok"),
        ({"predicted_speedup_x": 9.0, "too_noisy": "its rounds differ"}, "too-noisy"),
        ({"lossless": False, "too_noisy": "its rounds differ"}, "invalid"),
    ],
)
def test_status(changes, expected):
    assert status(replace(OK, **changes)) == expected


def test_noise_fails_what_is_asked_of_the_speed_up_and_only_that():
    assert failures(NOISY, Floors(predicted_share=0.9)) == []
    (broken,) = failures(NOISY, Floors(speedup_x=0.1))
    assert re.match(r"speedup_x is too noisy: .*30% \(at most 10%\)", broken)
    (broken,) = failures(NOISY, Floors(acceptance_length=7.0))
    assert broken.startswith("acceptance_length 6.00 < 7.00")


def test_a_quick_run_passes_no_floor():
    assert failures(QUICK, Floors(predicted_share=0.9)) == []
    (broken,) = failures(QUICK, Floors(speedup_x=0.1))
    assert re.match("speedup_x .*without an interval.* 3 rounds", broken)


def served(**changes):
    broken = {name: BrokenConvention(accept_len_mean=0.2, accept_rate_per_pos=[0.2], chance=0.5) for name in "ab"}
    own = OwnAcceptance(**acceptance([[0, 1]], 8), chance=0.001, gap=True, broken=broken)
    common = {f.name: getattr(OK, f.name) for f in fields(OK)} | {"block_size": 8, "accept_len_mean": 0.17}
    return Served(**common | {"own": replace(own, **changes)})


def test_a_gap_between_a_server_and_us_is_one_sentence():
    both = "0.17 of 7 accepted by the server, 0.50 here"
    assert own_line(served(gap=False)) == f"{both}: no gap"
    assert own_line(served()) == f"{both}: a gap, and none of 2 broken conventions explains it"
    assert own_line(served(explained_by=["a"])) == f"{both}: a gap, as with a"
    assert own_line(served(explained_by=["b", "a"])) == f"{both}: a gap, as with b (less closely: a)"


def test_remarks():
    assert remark(OK) is None
    assert doubt(OK) is None
    far = replace(OK, status="unexplained", residual=-0.2)
    assert doubt(far) is None
    assert re.match(r"unexplained: -20% .*3\.20 .*10%", remark(far))
    assert remark(NOISY) == doubt(NOISY)


def test_no_speed_up_counts_over_a_baseline_that_is_slower_than_a_verify_step():
    slow = replace(OK, verify_ratio=0.9, status="slow-baseline")
    assert re.match(r"slow-baseline: .*8 tokens .*0\.90 ", doubt(slow))
    (broken,) = failures(slow, Floors(speedup_x=0.1))
    assert "slow-baseline" in broken
    smaller = replace(OK, cheapest_verify=VerifyRatio(tokens=2, ratio=0.6), status="slow-baseline")
    assert re.match(r"slow-baseline: .* 2 tokens .*0\.60 ", doubt(smaller))


def test_slower_than_greedy_decoding_is_said_where_a_gain_was_asked_for():
    slow = replace(OK, speedup_x=0.8, speedup_x_ci95=(0.7, 0.9), batch_size=4)
    assert re.match(r"slower than greedy .*batch 4: .*2\.00", remark(slow))
    assert remark(replace(slow, mode="cached_sequential_verify")) is None
    assert remark(replace(slow, scripted=3)) is None


def test_a_run_in_one_line():
    other = replace(OK, case="other", speedup_x=2.0)
    line = "3.00 times as fast as greedy decoding (95% interval 2.90 to 3.10), lossless, ok: block-b8-n64-draft"
    assert closing_line([other, OK, replace(OK, scripted=7, speedup_x=9.0)]) == line
    assert closing_line([replace(OK, mode="cached_sequential_verify"), replace(OK, speedup_x=None)]) is None
    # What counts goes before what does not.
    assert closing_line([other, NOISY]).endswith(": other")
    assert closing_line([NOISY]).endswith("lossless, too noisy: block-b8-n64-draft")
    assert "NOT LOSSLESS, invalid" in closing_line(
        [replace(OK, status="invalid", lossless=False, first_divergence=PLACE)]
    )


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
    assert failures(replace(OK, acceptance_length=1.0, speedup_x=0.1, speedup_x_ci95=[0.1, 0.1]), Floors()) == []


def test_invalid_says_where():
    info = replace(OK, status="invalid", lossless=False, first_divergence=TokenPlace(prompt=2, token=17))
    (broken,) = failures(info, Floors())
    assert re.match("speedup_x is invalid: .*prompt 2, token 17$", broken)


def test_invalid_without_a_block():
    info = replace(OK, status="invalid", speedup_x=None, speedup_x_ci95=None, acceptance_length=None)
    (broken,) = failures(info, Floors(speedup_x=1.0))
    assert re.match("speedup_x is invalid: no block .*max_new_tokens", broken)


def test_no_baseline():
    info = replace(OK, status="no-baseline", lossless=None, speedup_x=None, speedup_x_ci95=None)
    (broken,) = failures(info, Floors(speedup_x=1.0))
    assert re.match("speedup_x is no-baseline: greedy decoding must run", broken)


def test_acceptance_moved():
    low = replace(OK, acceptance_length=4.0, speedup_x=2.0, speedup_x_ci95=[1.9, 2.1])
    length, speedup = failures(low, Floors(acceptance_length=5.2, speedup_x=2.8))
    assert re.match(r"acceptance_length 4\.00 < 5\.20: .*accepted less .*2\.00 .*1\.90", length)
    assert re.match(r"speedup_x 2\.00 \(1\.90 to 2\.10\) < 2\.80: acceptance moved; .*2\.00 .*4\.00 .*5\.60$", speedup)


def test_acceptance_alone_can_fail():
    assert len(failures(OK, Floors(acceptance_length=6.5))) == 1


def test_block_cost_moved():
    slow = replace(OK, speedup_x=2.0, speedup_x_ci95=[1.9, 2.1], block_ratio=3.0)
    (broken,) = failures(slow, Floors(acceptance_length=5.2, speedup_x=2.8))
    assert re.match(
        r"speedup_x 2\.00 \(1\.90 to 2\.10\) < 2\.80: the cost .*moved; .*3\.00 .*1\.90 .*6\.00 .*8\.40$", broken
    )


def test_without_an_acceptance_floor_neither_term_is_cleared():
    slow = replace(OK, speedup_x=2.0, speedup_x_ci95=[1.9, 2.1])
    (broken,) = failures(slow, Floors(speedup_x=2.8))
    assert "< 2.80: acceptance or the cost of a block" in broken


def test_loop_moved():
    slow = replace(OK, speedup_x=2.5, speedup_x_ci95=[2.4, 2.6])
    (broken,) = failures(slow, Floors(predicted_share=0.9))
    assert re.match(r"speedup_x 2\.50 \(2\.40 to 2\.60\) < 0\.90 .*3\.20 .*: the loop moved; .*2\.00 .*1\.90", broken)


def test_the_upper_end_is_judged():
    noisy = replace(OK, speedup_x=2.0, speedup_x_ci95=[1.0, 2.9])
    assert failures(noisy, Floors(speedup_x=2.8, predicted_share=0.9)) == []
    assert len(failures(noisy, Floors(speedup_x=2.95, predicted_share=0.95))) == 2


def test_other_prompts_are_not_asked():
    slow = replace(OK, speedup_x=2.0, speedup_x_ci95=[1.0, 4.0], speedup_x_timing_ci95=[1.9, 2.1])
    (said,) = failures(slow, Floors(speedup_x=2.8))
    assert said.startswith("speedup_x 2.00 (1.90 to 2.10) < 2.80")


def test_without_a_prediction_the_loop_is_not_judged():
    plain = replace(OK, predicted_block_ratio=None, predicted_speedup_x=None)
    assert failures(plain, Floors(predicted_share=0.9)) == []
    (said,) = failures(plain, Floors(acceptance_length=7.0))
    assert said.endswith("(a block costs 2.00 one-token steps)")
