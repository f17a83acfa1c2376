"""Exact-greedy parity on the device that --run-on names: every mode, whatever is proposed, gives the target's tokens.

In float32 this is asserted token by token. The same tests run on a TPU, a GPU and a CPU.
"""

import functools

import jax
import numpy as np
import pytest
from flax import nnx

from dflash import ScriptedDraft, decode, init_draft, load_draft, load_target, load_tokenizer, write_draft
from dflash.decoding.decode import build_decoder, check_request, prefill
from dflash.decoding.loop import draft_head, propose
from dflash.text.prompts import load_prompts
from dflash.weights.tiny import write_tiny_target

pytestmark = pytest.mark.usefixtures("device")

FAMILIES = ("llama", "qwen3", "gpt_oss")
MODES = ("cached_sequential_verify", "cached_block_verify", "recompute")
BLOCK = 8
# One row begins beyond GPT-OSS's tiny window of 16, one grows past it, one is a lone token, one ends at its first.
PROMPT_LENGTHS = (40, 3, 1, 17)
BUDGETS = (24, 9, 24, 1)


def random_prompts(vocab_size):
    rng = np.random.default_rng(7)
    return [rng.integers(0, vocab_size, length).tolist() for length in PROMPT_LENGTHS]


def wide_draft(target, block_size=BLOCK):
    """An untrained draft that does not just repeat itself: weights thirty times as wide as a fresh one's."""
    draft = init_draft(target, num_layers=2, block_size=block_size, target_layer_ids=(1, 3))
    nnx.update(draft, jax.tree.map(lambda w: 30 * w if w.ndim == 2 else w, nnx.state(draft)))
    return draft


def first_difference(expected, got):
    """Names a row and place, which a diff of long lists hides."""
    for row, (a, b) in enumerate(zip(expected, got, strict=True)):
        for place in range(max(len(a), len(b))):
            if a[place : place + 1] != b[place : place + 1]:
                return f"row {row}, token {place}: {a[place : place + 8]} against {b[place : place + 8]}"
    return None


@pytest.fixture(scope="module")
def load_tiny(device, tmp_path_factory):
    @functools.cache
    def load(family, dtype="float32"):
        return load_target(write_tiny_target(tmp_path_factory.mktemp(family) / "target", family), dtype)

    return load


@pytest.fixture(scope="module")
def case_of(load_tiny):
    """Target, draft, prompts, and one long greedy output per row."""

    @functools.cache
    def case(family):
        target = load_tiny(family)
        prompts = random_prompts(target.config.vocab_size)
        outputs = decode(target, None, prompts, mode="greedy", max_new_tokens=max(BUDGETS) + BLOCK).tokens
        return target, wide_draft(target), prompts, outputs

    return case


@pytest.mark.parametrize("accepted", [None, 0, 3, BLOCK - 1], ids=["own", "a0", "a3", "a7"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_mode_gives_the_greedy_tokens(case_of, family, accepted):
    target, network, prompts, outputs = case_of(family)
    assert len(set(outputs[0])) > 4, "a target that repeats itself proves nothing"
    # The third row stops in the middle of its budget, the others at another row's token if at all.
    stop = next(t for i, t in enumerate(outputs[2]) if i >= 10 and t not in outputs[2][:i])
    stops = [[], [], [stop], []]
    expected = [rows[:budget] for rows, budget in zip(outputs, BUDGETS, strict=True)]
    expected[2] = expected[2][: expected[2].index(stop) + 1] if stop in expected[2] else expected[2]
    run = functools.partial(decode, target, prompts=prompts, max_new_tokens=BUDGETS, stop_token_ids=stops)
    assert run(None, mode="greedy").tokens == expected

    draft = network
    if accepted is not None:
        draft = ScriptedDraft(draft=network, outputs=outputs, accept_len=accepted)
    results = {mode: run(draft, mode=mode) for mode in MODES}
    for mode, result in results.items():
        assert first_difference(expected, result.tokens) is None, mode
        assert result.accept_lens == results["recompute"].accept_lens, mode
        assert result.produced == results["recompute"].produced, mode
    if accepted is not None:
        assert {a for row in results["recompute"].accept_lens for a in row} == {accepted}


@pytest.mark.parametrize("rule", [{}, {"top_k": 50, "top_p": 0.9, "min_p": 0.02}], ids=["noise", "filtered"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_mode_draws_the_same_tokens(case_of, family, rule):
    target, draft, prompts, outputs = case_of(family)
    run = functools.partial(decode, target, prompts=prompts, max_new_tokens=BUDGETS, temperature=0.8, seed=11, **rule)
    expected = run(None, mode="greedy").tokens
    assert expected != [rows[:budget] for rows, budget in zip(outputs, BUDGETS, strict=True)]
    results = {mode: run(draft, mode=mode) for mode in MODES}
    for mode, result in results.items():
        assert first_difference(expected, result.tokens) is None, mode
        assert result.accept_lens == results["recompute"].accept_lens, mode


@pytest.mark.parametrize("family", FAMILIES)
def test_recompute_without_a_draft_is_greedy(case_of, family):
    target, _, prompts, outputs = case_of(family)
    result = decode(target, None, prompts[:2], mode="recompute", max_new_tokens=max(BUDGETS))
    assert first_difference([o[: max(BUDGETS)] for o in outputs[:2]], result.tokens) is None


def test_a_smaller_block_than_the_drafts_own(case_of):
    target, draft, prompts, outputs = case_of("gpt_oss")
    result = decode(target, draft, prompts, block_size=3, max_new_tokens=BUDGETS)
    assert first_difference([o[:b] for o, b in zip(outputs, BUDGETS, strict=True)], result.tokens) is None


def test_a_checkpoint_proposes_what_its_draft_proposed(case_of, tmp_path):
    target, draft, prompts, _ = case_of("gpt_oss")
    write_draft(draft, tmp_path / "draft")
    read = load_draft(tmp_path / "draft", target)

    def first_block(draft):
        options = {"mode": "cached_block_verify", "block_size": None, "max_new_tokens": 8, "stop_token_ids": ()}
        request = check_request(target, draft, prompts, **options)
        state = prefill(build_decoder(target, request), request)
        return np.asarray(jax.jit(lambda s: propose(target, draft, draft_head(target, draft), s, BLOCK)[0])(state))

    blocks = first_block(draft)
    assert len(np.unique(blocks[:, 1:])) > len(blocks), "a draft that repeats itself proves nothing"
    np.testing.assert_array_equal(first_block(read), blocks)
    for before, after in zip(jax.tree.leaves(nnx.state(draft)), jax.tree.leaves(nnx.state(read)), strict=True):
        np.testing.assert_array_equal(np.asarray(before), np.asarray(after))


@pytest.mark.parametrize("family", ["llama", "gpt_oss"])
def test_bfloat16_runs(load_tiny, family):
    """Not compared: blocks and single tokens round differently there."""
    target = load_tiny(family, "bfloat16")
    assert str(target.dtype) == "bfloat16"
    prompts = random_prompts(target.config.vocab_size)
    draft = wide_draft(target)
    for mode in ("greedy", "cached_sequential_verify", "cached_block_verify"):
        result = decode(target, None if mode == "greedy" else draft, prompts[:2], mode=mode, max_new_tokens=10)
        assert [len(row) for row in result.tokens] == [10, 10], mode
        assert all(0 <= t < target.config.vocab_size for row in result.tokens for t in row), mode


@pytest.mark.model
def test_smollm2_decodes_alike_in_all_modes(device):
    """20 prompts x 128 tokens, float32. Scripts are refused near the end of every block, so that each is cut back.

    Recompute gets longer blocks: it reads everything again for each.
    """
    budget, longest = 128, 4 * BLOCK
    target, tokenizer = load_target("smollm2-135m"), load_tokenizer("smollm2-135m")
    prompts = load_prompts("builtin").take(20).encode(tokenizer)
    network = init_draft(target, num_layers=1, block_size=longest)
    outputs = decode(target, None, prompts, mode="greedy", max_new_tokens=budget + longest).tokens
    greedy = [o[:budget] for o in outputs]
    plans = {"cached_sequential_verify": (BLOCK, 5), "cached_block_verify": (BLOCK, 5), "recompute": (longest, 30)}
    assert set(plans) == set(MODES)
    for mode, (block, accepted) in plans.items():
        draft = ScriptedDraft(draft=network, outputs=outputs, accept_len=accepted)
        result = decode(target, draft, prompts, mode=mode, block_size=block, max_new_tokens=budget)
        assert first_difference(greedy, result.tokens) is None, mode
        assert {a for row in result.accept_lens for a in row} == {accepted}, mode
