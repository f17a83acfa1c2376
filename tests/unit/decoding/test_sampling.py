"""Sampling: the noise, the filters against transformers', and the same tokens however they are decoded."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from dflash import RequestError, ScriptedDraft, decode, init_draft, load_target
from dflash.decoding.audit import audit
from dflash.decoding.sampling import Sampling, gumbel, threefry
from dflash.weights.tiny import write_tiny_target

LAYERS = {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8}
PROMPTS = [[5, 17, 3, 120, 88, 41, 9, 66, 7, 30, 2], [61], [90, 14, 14, 8]]
BUDGETS = [20, 9, 15]
DRAFTED = ("cached_sequential_verify", "cached_block_verify", "recompute")


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    return load_target(write_tiny_target(tmp_path_factory.mktemp("sampling") / "llama", "llama", **LAYERS))


@pytest.fixture(scope="module")
def draft(target):
    return init_draft(target, num_layers=1, block_size=4, target_layer_ids=(0, 1))


def perturbed(logits, **rule):
    """float32 [N, V] logits of one row, at positions 0..N-1 -> the same of scores."""
    sampling = Sampling(**{"temperature": 1.0} | rule)
    positions = jnp.arange(len(logits))[None]
    return np.asarray(sampling.draws(1).perturb(jnp.asarray(logits.T), positions, logits.shape[1])).T


# ---- noise


def test_bits_are_those_of_jax():
    key = jax.random.key(12345)
    high, low = np.asarray(jax.random.key_data(key))
    zero, counter = jnp.uint32(0), jnp.arange(1000, dtype=jnp.uint32)
    ours = threefry((jnp.uint32(high), jnp.uint32(low)), (zero, counter))
    np.testing.assert_array_equal(ours[0] ^ ours[1], jax.random.bits(key, 1000))


def test_noise_is_gumbels_in_its_tails_too():
    bits = np.array([0, 1, 2**8, 2**20, 2**24 - 1, 2**24, 2**31, 2**32 - 2**10, 2**32 - 1], np.uint32)
    exact = -np.log(-np.log1p(-(bits + 0.5) / 2.0**32))
    np.testing.assert_allclose(gumbel(jnp.asarray(bits))[:-1], exact[:-1], rtol=2e-5, atol=2e-5)
    assert np.isfinite(gumbel(jnp.asarray(bits))).all()
    noise = perturbed(np.zeros((20, 5000), np.float32))
    assert stats.kstest(noise.ravel(), "gumbel_r").pvalue > 1e-3


def test_noise_of_a_token_depends_on_seed_row_and_position_alone():
    positions = jnp.asarray([[7, 8, 9], [100, 101, 102]])

    def noise(sampling, positions, tokens=None):
        size = 199 if tokens is None else len(tokens)
        logits = jnp.zeros((size, positions.size))
        scores = sampling.draws(len(positions)).perturb(logits, positions, size, tokens)
        return np.asarray(scores).reshape(size, *positions.shape)

    whole = noise(Sampling(temperature=1.0, seed=3), positions)
    alone = noise(Sampling(temperature=0.5, seed=3, first_row=1), positions[1:, 2:])
    np.testing.assert_array_equal(alone[:, 0, 0], whole[:, 1, 2])
    some = np.array([3, 50, 198], np.int32)
    np.testing.assert_array_equal(noise(Sampling(temperature=1.0, seed=3), positions, some), whole[some])
    for other in (Sampling(temperature=1.0, seed=4), Sampling(temperature=1.0, seed=3, first_row=1)):
        assert (noise(other, positions) != whole).mean() > 0.99
    assert len(np.unique(whole)) > 0.99 * whole.size


# ---- filters


@pytest.mark.oracle
@pytest.mark.parametrize(
    "rule",
    [
        {"top_k": 20},
        {"top_k": 400},
        {"top_p": 0.9},
        {"top_p": 0.999},
        {"min_p": 0.05},
        {"top_k": 50, "top_p": 0.8, "min_p": 0.1},
        {"top_k": 400, "top_p": 0.95, "temperature": 1.7},
    ],
    ids=str,
)
def test_filters_are_those_of_transformers(rule):
    """A peaked and a flat distribution side by side: the flat one's filter ends beyond the tokens that are listed."""
    torch = pytest.importorskip("torch")
    theirs = pytest.importorskip("transformers.generation.logits_process")

    rng = np.random.default_rng(0)
    logits = (rng.standard_normal((6, 1000)) * np.array([[0.5], [1], [2], [3], [5], [8]])).astype(np.float32)
    scores = theirs.TemperatureLogitsWarper(float(rule.get("temperature", 1.0)))(None, torch.tensor(logits))
    warpers = {
        "top_k": theirs.TopKLogitsWarper,
        "top_p": theirs.TopPLogitsWarper,
        "min_p": theirs.MinPLogitsWarper,
    }
    for name, warper in warpers.items():
        if name in rule:
            scores = warper(rule[name])(None, scores)
    expected = np.isfinite(scores.numpy())
    got = np.isfinite(perturbed(logits, **rule))
    assert 6 <= expected.sum() < expected.size
    np.testing.assert_array_equal(got, expected)


def test_equal_scores_stay_or_go_together():
    logits = np.array([[3.0, 2.0, 2.0, 2.0, 1.0] + [0.0] * 5], np.float32)
    for rule in ({"top_k": 2}, {"top_p": 0.6}):
        np.testing.assert_array_equal(np.isfinite(perturbed(logits, **rule))[0, :5], [True] * 4 + [False])


# ---- tokens


@pytest.mark.parametrize(
    "rule", [{"temperature": 1.0}, {"temperature": 0.7, "top_k": 40, "top_p": 0.9, "min_p": 0.02, "seed": 3}], ids=str
)
def test_the_modes_draw_the_same_tokens(target, draft, rule):
    settings = {"max_new_tokens": BUDGETS, **rule}
    plain = decode(target, None, PROMPTS, mode="greedy", **settings)
    assert [len(row) for row in plain.tokens] == BUDGETS
    assert plain.tokens != decode(target, None, PROMPTS, mode="greedy", max_new_tokens=BUDGETS).tokens
    longer = decode(target, None, PROMPTS, mode="greedy", **settings | {"max_new_tokens": 24})
    for proposer in (draft, ScriptedDraft(draft=draft, outputs=longer.tokens, accept_len=2)):
        results = {m: decode(target, proposer, PROMPTS, mode=m, **settings) for m in DRAFTED}
        for mode, result in results.items():
            assert result.tokens == plain.tokens, mode
            assert result.accept_lens == results["recompute"].accept_lens, mode
    assert {a for row in result.accept_lens for a in row} == {2}


def test_a_row_depends_on_no_neighbour_and_on_no_block_size(target, draft):
    settings = {"temperature": 1.0, "seed": 9, "max_new_tokens": 15}
    rows = decode(target, draft, PROMPTS, **settings).tokens
    assert decode(target, draft, PROMPTS[1:], block_size=2, first_row=1, **settings).tokens == rows[1:]
    assert decode(target, draft, PROMPTS[1:], block_size=2, **settings).tokens != rows[1:]
    # The noise is that of a position, so what was drawn can be taken into the prompt.
    known = [[*p, *row[:6]] for p, row in zip(PROMPTS, rows, strict=True)]
    more = decode(target, draft, known, **settings | {"max_new_tokens": 9}).tokens
    assert more == [row[6:] for row in rows]


def test_another_seed_compiles_nothing_and_temperature_0_is_greedy(target, draft):
    first = decode(target, draft, PROMPTS, temperature=1.0, max_new_tokens=5)
    again = decode(target, draft, PROMPTS, temperature=1.0, seed=2**32 - 1, first_row=70, max_new_tokens=5)
    assert again.compile_s == 0
    assert again.tokens != first.tokens
    greedy = decode(target, draft, PROMPTS, max_new_tokens=5)
    same = decode(target, draft, PROMPTS, temperature=0, top_k=3, seed=8, max_new_tokens=5)
    assert (same.compile_s, same.tokens) == (0, greedy.tokens)


def test_the_likeliest_alone_is_greedy(target, draft):
    greedy = decode(target, draft, PROMPTS, max_new_tokens=8).tokens
    assert decode(target, draft, PROMPTS, temperature=3.0, top_k=1, max_new_tokens=8).tokens == greedy
    for rule in ({"top_p": 1e-300}, {"top_p": 1e-40}, {"min_p": 1.0}):
        np.testing.assert_array_equal(np.isfinite(perturbed(np.eye(4, dtype=np.float32), **rule)), np.eye(4))


def test_the_lowest_temperature_is_greedy_and_lower_ones_are_refused(target, draft):
    greedy = decode(target, draft, PROMPTS, max_new_tokens=8).tokens
    assert decode(target, draft, PROMPTS, temperature=1e-6, max_new_tokens=8).tokens == greedy
    with pytest.raises(RequestError, match=r"temperature .*\b0, or at least 1e-06, got 1e-38"):
        decode(target, draft, PROMPTS, temperature=1e-38)


@pytest.mark.parametrize("rule", [{}, {"top_p": 0.9, "min_p": 0.02}], ids=str)
def test_the_audit_judges_drawn_tokens(target, draft, rule):
    sampling = Sampling(temperature=1.0, seed=5, **rule)
    found = audit(target, draft, PROMPTS[:2], max_new_tokens=8, sampling=sampling)
    assert found.defects == []


def test_the_audit_finds_noise_of_another_row(target, draft, monkeypatch):
    sampling = Sampling(temperature=1.0, seed=5)
    monkeypatch.setattr(Sampling, "row", lambda self, number: self)
    found = audit(target, draft, PROMPTS[:2], max_new_tokens=8, sampling=sampling)
    assert any("prompt 1" in defect and "below the target" in defect for defect in found.defects)
    assert not any(defect.startswith("greedy, prompt 0") for defect in found.defects)


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "block_size"), [("greedy", None), ("cached_block_verify", 4)])
def test_tokens_come_as_often_as_they_are_likely(mode, block_size, tmp_path):
    """100,000 draws of a pair of tokens: the first is drawn after the prompt, the second in the loop."""
    shape = {"vocab_size": 13, "num_hidden_layers": 1, "hidden_size": 32, "head_dim": 8, "intermediate_size": 32}
    small = load_target(write_tiny_target(tmp_path / "small", "llama", **shape))
    draft = None
    if block_size:
        draft = init_draft(small, num_layers=1, block_size=block_size, target_layer_ids=(0,), mask_token_id=1)
    prompt, temperature, rows, count = [3, 1, 4], 1.3, 5000, 100_000
    seen = np.zeros((13, 13), int)
    for first in range(0, count, rows):
        settings = {"mode": mode, "temperature": temperature, "seed": 1, "first_row": first, "max_new_tokens": 2}
        for pair in decode(small, draft, [prompt] * rows, **settings).tokens:
            seen[tuple(pair)] += 1
    logits = np.asarray(small.forward([[*prompt, token] for token in range(13)])[0], np.float64) / temperature
    chances = np.exp(logits - logits.max(axis=2, keepdims=True))
    chances /= chances.sum(axis=2, keepdims=True)
    expected = count * chances[0, 2][:, None] * chances[:, 3]
    likely = expected >= 5
    assert likely.sum() > 50
    assert seen[~likely].sum() <= 5 + 3 * expected[~likely].sum()
    got, wanted = seen[likely], expected[likely]
    assert stats.chisquare(got, wanted * got.sum() / wanted.sum()).pvalue > 1e-3
