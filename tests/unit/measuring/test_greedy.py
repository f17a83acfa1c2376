"""Rounds of greedy decoding: the baseline that cases share."""

import pytest

from dflash import RequestError, load_target
from dflash.decoding.decode import decode, prefill
from dflash.measuring.greedy import Greedy
from dflash.weights.tiny import write_tiny_target

BUDGET = 18
GROUPS = [[[5, 17, 3], [120, 88, 9, 41, 7]], [[2, 2, 90, 14], [61]]]


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    return load_target(write_tiny_target(tmp_path_factory.mktemp("greedy") / "target", num_hidden_layers=1))


@pytest.fixture(scope="module")
def expected(target):
    return [decode(target, None, g, mode="greedy", max_new_tokens=BUDGET).tokens for g in GROUPS]


def a_round(greedy):
    for group in range(len(GROUPS)):
        greedy.decode(group)


def test_a_round_decodes_every_group(target, expected):
    greedy = Greedy(target, GROUPS, max_new_tokens=BUDGET)
    a_round(greedy)
    assert greedy.tokens == expected
    assert [[sum(row) for row in rows] for rows in greedy.produced] == [[BUDGET - 1] * 2] * 2
    assert len(greedy.seconds) == 2
    first = greedy.seconds
    a_round(greedy)
    assert greedy.seconds is not first  # who kept those of the first round has them still


def test_the_baseline_is_the_one_token_step(target):
    """And not a verify of a block with one useful row, which would make any draft look fast."""
    decoder = Greedy(target, GROUPS, max_new_tokens=BUDGET).decoder
    shape = decoder.shape
    assert (shape.mode, shape.block_size, decoder.draft, shape.max_new_tokens) == ("greedy", 1, None, BUDGET)


def test_the_clock_waits_for_the_device(target):
    greedy = Greedy(target, [[[5, 17, 3]]], max_new_tokens=1000)
    assert greedy.decoder.steps(prefill(greedy.decoder, greedy.greedy_requests[0])).tokens.is_ready()


def test_stop_tokens_end_a_round_and_not_the_outputs(target, expected):
    stop = expected[0][0][6]
    greedy = Greedy(target, GROUPS, max_new_tokens=BUDGET, stop_token_ids=[stop])
    a_round(greedy)
    assert greedy.tokens[0][0] == expected[0][0][: expected[0][0].index(stop) + 1]
    assert [greedy.outputs(group, BUDGET) for group in range(len(GROUPS))] == expected


def test_outputs_are_decoded_once(target, expected, monkeypatch):
    greedy = Greedy(target, GROUPS, max_new_tokens=BUDGET)
    longest = greedy.outputs(1, BUDGET + 3)
    assert [row[:BUDGET] for row in longest] == expected[1]
    monkeypatch.setattr("dflash.measuring.greedy.compiled_decoder", lambda *_: pytest.fail("compiled"))
    assert greedy.outputs(1, BUDGET) == expected[1]
    assert greedy.outputs(1, BUDGET + 3) == longest


def test_a_bad_request_is_refused_before_anything_is_compiled(target, monkeypatch):
    monkeypatch.setattr("dflash.measuring.greedy.compiled_decoder", lambda *_: pytest.fail("compiled"))
    with pytest.raises(RequestError, match="max_new_tokens must be at least 1, got 0"):
        Greedy(target, GROUPS, max_new_tokens=0)
