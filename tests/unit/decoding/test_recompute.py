"""Decoding without a cache, checked against a plain loop over `forward`."""

import jax.numpy as jnp
import numpy as np
import pytest

from dflash import init_draft, load_target
from dflash.decoding.recompute import recompute_row
from dflash.weights.tiny import write_tiny_target

PROMPT = [5, 17, 3, 120, 88]
BUDGET = 14


LAYERS = {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8}


@pytest.fixture(scope="module", params=["llama", "gpt_oss"])
def target(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("recompute") / request.param
    return load_target(write_tiny_target(folder, request.param, **LAYERS))


@pytest.fixture(scope="module")
def draft(target):
    return init_draft(target, num_layers=1, block_size=4, target_layer_ids=(0, 1))


@pytest.fixture(scope="module")
def expected(target):
    """Greedy tokens by `forward`, one at a time; padded to one length, so that it compiles once."""
    tokens = list(PROMPT)
    for _ in range(BUDGET + 4):
        logits, _ = target.forward(jnp.asarray([tokens + [0] * (32 - len(tokens))]))
        tokens.append(int(np.argmax(np.asarray(logits)[0, len(tokens) - 1])))
    return tokens[len(PROMPT) :]


def test_greedy(target, expected):
    tokens, accepted, produced = recompute_row(target, None, PROMPT, block_size=1, budget=BUDGET, stops=[])
    assert tokens == expected[:BUDGET]
    assert accepted == [0] * (BUDGET - 1)
    assert produced == [1] * (BUDGET - 1)
    assert len(set(expected)) > 5, "a target that repeats itself proves nothing"


def test_with_a_draft(target, draft, expected):
    tokens, accepted, produced = recompute_row(target, draft, PROMPT, block_size=4, budget=BUDGET, stops=[])
    assert tokens == expected[:BUDGET]
    assert 1 + sum(produced) == BUDGET
    assert all(0 <= a <= 3 for a in accepted)
    assert [a + 1 for a in accepted[:-1]] == produced[:-1]


def test_a_script_is_proposed_where_it_has_a_token(target, draft, expected):
    script = np.array(expected[: 1 + 3 + 1 + 3], np.int32)
    tokens, accepted, produced = recompute_row(
        target, draft, PROMPT, block_size=4, budget=BUDGET, stops=[], script=script
    )
    assert tokens == expected[:BUDGET]
    assert accepted[:2] == [3, 3]
    assert produced[:2] == [4, 4]
    wrong = script.copy()
    wrong[2] = (wrong[2] + 1) % target.config.vocab_size
    _, accepted, _ = recompute_row(target, draft, PROMPT, block_size=4, budget=BUDGET, stops=[], script=wrong)
    assert accepted[0] == 1


def test_a_stop_token_ends_it_in_the_middle_of_a_block(target, draft, expected):
    end = next(i for i in range(2, BUDGET) if expected[i] not in expected[:i] and (i - 1) % 4 != 3)
    script = np.array(expected, np.int32)
    for proposer, table in ((None, None), (draft, None), (draft, script)):
        size = 1 if proposer is None else 4
        tokens, _, produced = recompute_row(
            target, proposer, PROMPT, block_size=size, budget=BUDGET, stops=[expected[end]], script=table
        )
        assert tokens == expected[: end + 1]
        assert 1 + sum(produced) == end + 1


def test_the_first_token_can_be_the_last(target, draft, expected):
    for budget, stops in ((1, []), (BUDGET, [expected[0]])):
        row = recompute_row(target, draft, PROMPT, block_size=4, budget=budget, stops=stops)
        assert row == (expected[:1], [], [])


def test_the_budget_cuts_a_block(target, draft, expected):
    script = np.array(expected, np.int32)
    tokens, accepted, produced = recompute_row(target, draft, PROMPT, block_size=4, budget=7, stops=[], script=script)
    assert tokens == expected[:7]
    assert accepted == [3, 3]
    assert produced == [4, 2]
