"""Paired rounds: what a case says of itself, with tokens compared in every round."""

import dataclasses
import json

import numpy as np
import pytest

from dflash import RequestError, init_draft, load_target
from dflash.decoding.decode import decode, prefill
from dflash.decoding.modes import MODES
from dflash.measuring.cost_model import StepTimes
from dflash.measuring.gate import Floors, failures
from dflash.measuring.greedy import Greedy
from dflash.measuring.paired import PairedRun, first_divergence
from dflash.measuring.result import Decode, Results, TokenPlace, from_json, to_json
from dflash.metrics import expected_awake
from dflash.report.sections import Section, render, speedup_section
from dflash.weights.tiny import write_tiny_target

BLOCK, BUDGET = 4, 18
ORIGIN = {"case": "it", "proposer": "draft", "scripted": None}
GROUPS = [[[5, 17, 3], [120, 88, 9, 41, 7]], [[2, 2, 90, 14], [61]]]
STEPS = StepTimes(step_s=0.010, verify_s={BLOCK: 0.012}, draft_s={BLOCK: 0.003}, context=64, batch=2)


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    return load_target(write_tiny_target(tmp_path_factory.mktemp("paired") / "target", num_hidden_layers=1))


@pytest.fixture(scope="module")
def draft(target):
    return init_draft(target, num_layers=1, block_size=BLOCK, target_layer_ids=(0,))


def paired(target, draft, groups=GROUPS, rounds=2, **settings):
    workload = {"max_new_tokens": BUDGET, "stop_token_ids": ()}
    workload |= {name: settings.pop(name) for name in workload if name in settings}
    run = PairedRun(
        Greedy(target, groups, **workload),
        draft,
        **{"mode": MODES["cached_block_verify"], "block_size": BLOCK} | settings,
    )
    take(run, rounds)
    return run


def table(case):
    """Lines of the terminal."""
    return render(Section(key="", title="", tables=speedup_section(Results(measured=[case])).tables[:1]))


def take(run, rounds=1):
    for _ in range(rounds):
        if run.with_baseline:
            for group in range(len(run.greedy.groups)):
                run.greedy.decode(group)
        for group in range(len(run.greedy.groups)):
            run.decode(group)
        run.pair()


@pytest.mark.parametrize(
    ("expected", "got", "place"),
    [
        ([[[1, 2], [3]]], [[[1, 2], [3]]], None),
        ([[[1, 2], [3, 4, 5]]], [[[1, 2], [3, 9, 5]]], TokenPlace(prompt=1, token=1)),
        ([[[1, 2]], [[3, 4]], [[5]]], [[[1, 2]], [[3, 4]], [[6]]], TokenPlace(prompt=2, token=0)),
        ([[[1, 2, 3]]], [[[1, 2]]], TokenPlace(prompt=0, token=2)),
        ([[[1, 2]]], [[[1, 2, 3]]], TokenPlace(prompt=0, token=2)),
        ([[[1], [2]]], [[[9], [8]]], TokenPlace(prompt=0, token=0)),
        ([], [], None),
    ],
)
def test_first_divergence(expected, got, place):
    assert first_divergence(expected, got) == place


def test_a_case(target, draft):
    run = paired(target, draft, rounds=4)
    # A hundredth of a second each: what they took is no part of this test.
    run.baseline_s[1:], run.dflash_s[1:] = [[2.0, 1.9], [2.1, 2.0], [2.0, 2.0]], [[1.0, 1.0], [1.0, 1.1], [1.1, 1.0]]
    info = run.result(3, ORIGIN)
    assert (info.status, info.lossless, info.first_divergence) == ("ok", True, None)
    assert info.rounds == 3
    assert (info.mode, info.block_size, info.dtype) == ("cached_block_verify", BLOCK, "float32")
    assert (info.batch_size, info.num_prompts, info.max_new_tokens) == (2, 4, BUDGET)
    assert (info.prompt_len, info.prompt_len_mean) == (5, 13 / 4)
    assert info.num_output_tokens == 4 * BUDGET
    assert info.speedup_x == pytest.approx(info.tok_s_total / info.baseline_tok_s_total)
    assert info.speedup_x == pytest.approx(info.baseline_tpot_ms / info.tpot_ms)
    for name in ("speedup_x_ci95", "speedup_x_timing_ci95"):
        low, high = getattr(info, name)
        assert 0 < low < info.speedup_x < high
    assert 0 < info.spread < 0.1
    assert (info.drift, info.outliers, info.too_noisy) == (0, 0, None)
    assert info.ttft_ms > 0
    assert sum(info.accept_histogram) == info.num_drafts
    assert from_json(json.loads(json.dumps(to_json(info), allow_nan=False)), Decode) == info
    assert failures(info, Floors()) == []
    assert len(table(info)) == 3


def test_the_clock_waits_for_the_device(target, draft):
    """A decode of a thousand tokens is over when its seconds are taken."""
    run = paired(target, draft, [[[5, 17, 3]]], rounds=0, max_new_tokens=1000)
    assert run.dflash.steps(prefill(run.dflash, run._requests[0])).tokens.is_ready()


def test_warm_up_rounds_are_left_out(target, draft):
    run = paired(target, draft, rounds=1)
    run.baseline_s = [[1e6, 1e6]] + 3 * [[4.0, 4.0]]
    run.dflash_s = [[1e-6, 1e-6]] + 3 * [[1.0, 1.0]]
    run.prefill_s = [1e6, 1e6] + 6 * [0.1]
    info = run.result(3, ORIGIN)
    assert info.speedup_x == pytest.approx(4)
    assert info.speedup_x_ci95 == pytest.approx([4, 4])
    assert info.ttft_ms == pytest.approx(100)
    assert info.tok_s_total == pytest.approx(4 * (BUDGET - 1) / 2)
    # Two groups of rows that all emit BUDGET - 1 tokens after the first, in 2 and 8 seconds.
    assert info.tpot_ms == pytest.approx(1000 / (BUDGET - 1))
    assert info.baseline_tpot_ms == pytest.approx(4000 / (BUDGET - 1))


@pytest.mark.parametrize("accept_len", range(BLOCK))
def test_scripted_acceptance_is_exact(target, draft, accept_len):
    info = paired(target, draft, scripted=accept_len, rounds=1).result(1, ORIGIN, STEPS)
    blocks = -(-(BUDGET - 1) // (accept_len + 1))
    assert info.accept_histogram == [4 * blocks if a == accept_len else 0 for a in range(BLOCK)]
    assert info.status == "quick"
    assert info.predicted_block_ratio == pytest.approx(1.5)
    assert info.predicted_speedup_x == pytest.approx((BUDGET - 1) / blocks / 1.5)
    assert info.block_ratio == pytest.approx((BUDGET - 1) / blocks / info.speedup_x)


@pytest.mark.parametrize("accept_len", [1, 3])
def test_scripted_sequential_verify(target, draft, accept_len):
    mode = MODES["cached_sequential_verify"]
    info = paired(target, draft, scripted=accept_len, rounds=1, mode=mode).result(1, ORIGIN, STEPS)
    assert (info.status, info.accept_len_mean) == ("quick", accept_len)
    assert info.predicted_block_ratio == pytest.approx(accept_len + 1 + 0.3)


def test_a_scripted_draft_is_exact_in_the_block_that_stops(target, draft):
    tokens = decode(target, None, GROUPS[0], mode="greedy", max_new_tokens=BUDGET).tokens
    stop = tokens[0][6]
    run = paired(target, draft, GROUPS[:1], rounds=1, scripted=BLOCK - 1, stop_token_ids=[stop])
    info = run.result(1, ORIGIN)
    assert (info.status, info.accept_len_mean) == ("quick", BLOCK - 1)
    assert info.num_output_tokens < 2 * BUDGET


def test_prediction_of_a_ragged_batch(target, draft):
    """A batch takes as many blocks as its slowest row, and greedy decoding as many steps as its longest."""
    run = paired(target, draft, rounds=1)
    run._outcome = [
        ([[0] * 9, [0] * 9], [[3, 3], [0, 0, 0, 0, 0, 0, 0, 0]], [[4, 4], [1] * 8]),
        ([[0] * 5, [0] * 3], [[3], [1]], [[4], [2]]),
    ]
    info = run.result(1, ORIGIN, STEPS)
    assert info.predicted_speedup_x == pytest.approx((8 + 4) / (8 + 1) / 1.5)
    run.mode = MODES["cached_sequential_verify"]
    # Rows walk a block together: 4, 4 and then 1 token at a time, and 4 in the second group.
    assert run.result(1, ORIGIN, STEPS).predicted_block_ratio == pytest.approx((4 + 4 + 6 + 4) / 9 + 0.3)


def with_seconds(run, baseline, candidate):
    """The same run, as if its rounds of one group had taken this long."""
    run.baseline_s, run.dflash_s = ([[s / 2, s / 2] for s in seconds] for seconds in (baseline, candidate))
    return run


def test_noise_makes_a_case_too_noisy(target, draft):
    run = with_seconds(paired(target, draft, rounds=1), [2.0, 2.0, 3.0, 4.0, 5.0], [1.0, 2.0, 1.0, 1.5, 1.0])
    info = run.result(5, ORIGIN, STEPS)
    assert (info.status, info.lossless) == ("too-noisy", True)
    assert info.too_noisy.startswith("its pairs differ by")
    assert failures(info, Floors(predicted_share=0.9)) == []
    assert "take more rounds" in failures(info, Floors(speedup_x=0.1))[0]


def test_two_rounds_have_no_interval(target, draft):
    run = with_seconds(paired(target, draft, rounds=1), [4.0, 4.0], [1.0, 1.0])
    info = run.result(2, ORIGIN, STEPS)
    assert (info.status, info.speedup_x) == ("quick", pytest.approx(4))
    assert (info.speedup_x_ci95, info.speedup_x_timing_ci95) == (None, None)
    assert failures(info, Floors(predicted_share=0.9)) == []
    assert "at least 3 rounds" in failures(info, Floors(speedup_x=0.1))[0]


def test_a_brief_case_decodes_the_first_groups_and_asks_for_no_more_rounds(target, draft):
    groups = [[[5, 17, 3 + i]] for i in range(8)]
    greedy = Greedy(target, groups, max_new_tokens=BUDGET)
    run = PairedRun(greedy, draft, mode=MODES["cached_block_verify"], block_size=BLOCK, scripted=2, brief=True)
    assert run.groups == 2
    for group in range(8):
        greedy.decode(group)
    for group in range(2):
        run.decode(group)
    run.pair()
    info = run.result(1, ORIGIN, STEPS)
    assert (info.num_prompts, info.lossless, info.accept_len_mean) == (2, True, 2)
    assert run.rounds_to_add(1, 0.0) == 0


def test_a_speed_up_is_held_against_its_terms(target, draft):
    run = paired(target, draft, rounds=1, scripted=3)
    blocks = -(-(BUDGET - 1) // 4)
    predicted = (BUDGET - 1) / blocks / 1.5
    for factor, status in ((1.0, "ok"), (0.8, "unexplained")):
        info = with_seconds(run, 3 * [predicted * factor], 3 * [1.0]).result(3, ORIGIN, STEPS)
        assert info.status == status
        assert info.residual == pytest.approx(factor - 1)
        assert info.break_even_acceptance_length == pytest.approx(1.5)
        assert (info.verify_ratio, info.draft_ratio) == pytest.approx((1.2, 0.3))
        shares = {"verify": 80 * factor, "draft": 20 * factor, "loop": 100 - 100 * factor}
        assert info.time_shares == pytest.approx(shares, abs=1e-6)
    # Only the block of 4 was timed: nothing is said of smaller ones.
    assert info.advice is None
    every = StepTimes(
        step_s=0.01,
        verify_s={2: 0.011, 4: 0.012},
        draft_s={2: 0.002, 4: 0.003},
        context=64,
        batch=2,
        verify_ratio_ci95={4: (1.19, 1.21)},
    )
    info = run.result(3, ORIGIN, every)
    assert info.advice.best_block_size == BLOCK
    assert [row.block_size for row in info.advice.by_block_size] == [2, 3, 4]
    assert info.verify_ratio_ci95 == (1.19, 1.21)
    assert info.cheapest_verify.tokens == 4  # nothing is sure of the other
    assert info.status != "slow-baseline"
    below = dataclasses.replace(
        every, verify_s={2: 0.006, 4: 0.012}, verify_ratio_ci95={2: (0.59, 0.61), 4: (1.19, 1.21)}
    )
    info = run.result(3, ORIGIN, below)
    assert (info.cheapest_verify.tokens, info.cheapest_verify.ratio_ci95) == (2, (0.59, 0.61))
    assert info.status == "slow-baseline"


def test_a_routed_target_says_how_many_experts_were_awake(tmp_path):
    routed = load_target(
        write_tiny_target(tmp_path / "routed", "gpt_oss", num_hidden_layers=1, layer_types=["full_attention"])
    )
    draft = init_draft(routed, num_layers=1, block_size=BLOCK, target_layer_ids=(0,))
    info = paired(routed, draft, GROUPS[:1], rounds=1).result(1, ORIGIN)
    experts = routed.config.experts
    assert info.experts == experts.count
    assert experts.per_token <= info.experts_awake_step <= 2 * experts.per_token
    assert info.experts_awake_step < info.experts_awake_verify <= experts.count
    assert info.experts_awake_verify_expected == expected_awake(experts.count, experts.per_token, 2 * BLOCK)


def test_rounds_are_asked_for_while_the_interval_is_wide(target, draft):
    quiet = with_seconds(paired(target, draft, rounds=1), [9.0, 2.0, 2.0, 2.0, 2.0], 5 * [1.0])
    assert quiet.rounds_to_add(4, precision=0.05) == 0  # the first was warm-up
    loud = with_seconds(quiet, [2.0, 2.0, 3.0, 2.5, 2.0], 5 * [1.0])
    assert loud.rounds_to_add(4, precision=0.05) == 2
    assert loud.rounds_to_add(4, precision=0.99) == 0


@pytest.mark.parametrize("settings", [{"baseline": False}, {"max_new_tokens": 1}, {"rounds": 0}])
def test_no_rounds_are_asked_for_where_there_is_no_speed_up(target, draft, settings):
    assert paired(target, draft, **settings).rounds_to_add(2, precision=0) == 0


def test_without_a_baseline_nothing_is_claimed(target, draft):
    run = paired(target, draft, baseline=False)
    info = run.result(2, ORIGIN, STEPS)
    assert info.status == "no-baseline"
    for name in ("baseline_tok_s_total", "baseline_tpot_ms", "speedup_x", "speedup_x_ci95", "lossless", "block_ratio"):
        assert getattr(info, name) is None, name
    assert run.baseline_s == []
    assert info.tok_s_total > 0
    assert info.predicted_speedup_x > 0
    assert "no-baseline" in failures(info, Floors())[0]


def sabotage(run, row, place):
    """Alters one token that the draft's decoder gives, as a broken verify would."""
    whole = run.dflash.steps

    class Broken:
        compile_s = 0.0
        prefill = run.dflash.prefill

        def steps(self, state):
            done = whole(state)
            altered = np.array(done.tokens)
            altered[row, place] = (altered[row, place] + 1) % 199
            return type(done)(**{**vars(done), "tokens": altered})

    run.dflash = Broken()


def test_altered_tokens_are_invalid_for_good(target, draft):
    run = paired(target, draft, rounds=1)
    healthy = run.dflash
    sabotage(run, row=1, place=6)
    take(run)
    run.dflash = healthy
    # A round that is right again does not take it back.
    take(run)
    info = run.result(2, ORIGIN)
    assert (info.lossless, info.status) == (False, "invalid")
    assert info.first_divergence == TokenPlace(prompt=1, token=6)
    assert failures(info, Floors())[0].endswith("differ first at prompt 1, token 6")


def close_call(target, prompt, tokens):
    """The place where the target was least sure, and its second choice there."""
    logits = np.asarray(target.forward([[*prompt, *tokens]])[0])[0, len(prompt) - 1 : -1]
    ranked = np.sort(logits, axis=1)
    place = int(np.argmin(ranked[:, -1] - ranked[:, -2]))
    return place, int(np.argsort(logits[place])[-2])


@pytest.mark.slow
def test_bfloat16_tokens_that_differ_are_audited(tmp_path):
    """A token that the target nearly chose leaves the case lossless, one that it did not makes it invalid."""
    target = load_target(write_tiny_target(tmp_path / "target", num_hidden_layers=1), "bfloat16")
    run = paired(target, init_draft(target, num_layers=1, block_size=BLOCK, target_layer_ids=(0,)), rounds=1)
    info = run.result(1, ORIGIN)
    assert (info.lossless, info.divergences, info.near_ties) == (True, [], 0)
    prompt, greedy = GROUPS[1][0], run.greedy.tokens[1][0]
    place, second = close_call(target, prompt, greedy)
    rest = decode(target, None, [[*prompt, *greedy[:place], second]], mode="greedy", max_new_tokens=BUDGET).tokens[0]

    def differ(token):
        altered = [rows[:] for rows in run.greedy.tokens]
        altered[1][0] = [*greedy[:place], token, *rest][:BUDGET]
        run._differing, run.divergence = [(run.greedy.tokens, altered)], first_divergence(run.greedy.tokens, altered)
        return run.result(1, ORIGIN)

    info = differ(second)
    assert (info.status, info.lossless, info.near_ties) == ("quick", True, 1)
    assert info.first_divergence == TokenPlace(prompt=2, token=place)
    assert (info.divergences[0].greedy_token, info.divergences[0].dflash_token) == (greedy[place], second)
    assert failures(info, Floors()) == []
    assert "quick, lossless up to 1 near tie" in table(info)[2]
    info = differ((second + 1) % 199)
    assert (info.status, info.lossless, info.near_ties) == ("invalid", False, 0)
    assert failures(info, Floors())[0].endswith(f"differ first at prompt 2, token {place}")


def test_texts_of_different_length_are_compared_by_the_token(target, draft):
    """After a near tie greedy may stop elsewhere: twice the tokens in twice the time is no speed-up."""
    run = paired(target, draft, rounds=3)
    run.baseline_s = [[1.0] * len(GROUPS) for _ in range(3)]
    run.dflash_s = [[0.5] * len(GROUPS) for _ in range(3)]
    assert run.result(3, ORIGIN).speedup_x == pytest.approx(2)
    # As if greedy's texts were twice as long.
    run.greedy.produced = [[row + row for row in rows] for rows in run.greedy.produced]
    assert run.result(3, ORIGIN).speedup_x == pytest.approx(1)


def test_no_block_was_needed(target, draft):
    info = paired(target, draft, max_new_tokens=1, rounds=1).result(1, ORIGIN, STEPS)
    assert (info.status, info.lossless) == ("invalid", True)
    for name in ("speedup_x", "speedup_x_ci95", "tok_s_total", "tpot_ms", "accept_len_mean", "predicted_speedup_x"):
        assert getattr(info, name) is None, name
    assert "no block was needed" in failures(info, Floors())[0]


def test_a_run_may_go_up_to_the_position_limit(tmp_path):
    small = load_target(write_tiny_target(tmp_path / "small", num_hidden_layers=1, max_position_embeddings=32))
    draft = init_draft(small, num_layers=1, block_size=BLOCK)
    run = paired(small, draft, [[[1] * 20]], rounds=1, max_new_tokens=32 - 20 - BLOCK, scripted=2)
    assert run.result(1, ORIGIN).accept_len_mean == 2


def test_changed_weights_are_taken(target, draft, tmp_path):
    fresh = load_target(write_tiny_target(tmp_path / "target", num_hidden_layers=1))
    before = paired(fresh, draft, rounds=1).greedy.tokens
    other = load_target(write_tiny_target(tmp_path / "other", num_hidden_layers=1, seed=9))
    fresh.embedding.weight.set_value(other.embedding.weight.get_value())
    run = paired(fresh, draft, rounds=1)
    assert run.greedy.tokens != before
    assert run.greedy.tokens[0] == decode(fresh, None, GROUPS[0], mode="recompute", max_new_tokens=BUDGET).tokens
    assert run.result(1, ORIGIN).lossless


@pytest.mark.parametrize("mode", ["greedy", "recompute"])
def test_modes_that_are_no_case(target, draft, mode):
    with pytest.raises(
        RequestError,
        match=f"cached_block_verify, cached_sequential_verify .*got {mode}",
    ):
        paired(target, draft, mode=MODES[mode])


def test_a_bad_request_is_refused_before_anything_is_compiled(target, draft, monkeypatch):
    for module in ("greedy", "paired"):
        monkeypatch.setattr(f"dflash.measuring.{module}.compiled_decoder", lambda *_: pytest.fail("compiled"))
    with pytest.raises(RequestError, match="block_size 5 is above the 4"):
        paired(target, draft, block_size=5)
