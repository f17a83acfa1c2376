"""The cache against memory without tricks: a list of what was committed, and a forward that has no cache."""

import functools
import tempfile
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from dflash.models.kv_cache import attention_mask, empty_cache
from dflash.models.layers import attend
from dflash.weights.load import load_target
from dflash.weights.tiny import write_tiny_target

prove = functools.partial(settings, derandomize=True, database=None, deadline=None)
BATCH = 3

# Without a model: every appended token has an identity, and attention over values that are one-hot identities tells
# which tokens a query sees, wherever the cache keeps them.
IDENTITIES, CAPACITY, BLOCK = 160, 168, 4
BLOCKS = (1, 2, 4)


def empty(window, *, batch=BATCH, capacity=CAPACITY, block=BLOCK):
    config = SimpleNamespace(windows=(window,), num_kv_heads=1, head_dim=IDENTITIES)
    network = SimpleNamespace(config=config, dtype=jnp.float32, mesh=None)
    return empty_cache(network, batch=batch, capacity=capacity, block=block)


@functools.partial(jax.jit, static_argnames="causal")
def append_and_look(cache, identities, causal):
    """Appends identities int32 [B, T]; the cache, and which identities each of the T tokens sees, bool [B, T, D]."""
    values = jax.nn.one_hot(identities, IDENTITIES).transpose(2, 0, 1)[None]
    cache = cache.append(0, jnp.zeros_like(values), values)
    queries = jnp.zeros((1, 1, *values.shape[1:]))
    visible = cache.visible(0, identities.shape[1], causal)
    return cache, attend(queries, cache.keys[0], cache.values[0], visible)[0, 0].transpose(1, 2, 0) > 0


def sees(query, key, window, causal):
    """The definition, in words of positions."""
    if causal and key > query:
        return False
    return window is None or abs(query - key) < window


class PlainCache:
    """What the cache should be: per row the identities of the committed tokens, in order."""

    def __init__(self, window, batch=BATCH):
        self.window, self.rows, self.high = window, [[] for _ in range(batch)], [0] * batch

    def look(self, blocks, causal):
        """Which identities each token of each row's block sees."""
        expected = np.zeros((*blocks.shape, IDENTITIES), bool)
        for b, (row, block) in enumerate(zip(self.rows, blocks.tolist(), strict=True)):
            held = [*row, *block]
            self.high[b] = max(self.high[b], len(held))
            for k in range(len(block)):
                for position, identity in enumerate(held):
                    expected[b, k, identity] = sees(len(row) + k, position, self.window, causal)
        return expected

    def commit(self, blocks, keep):
        for row, block, n in zip(self.rows, blocks.tolist(), keep, strict=True):
            row += block[:n]

    def rollback(self, removed):
        """Removes up to `removed` tokens a row, no further than a ring is promised to remember; the new lengths."""
        for b, (row, n) in enumerate(zip(self.rows, removed, strict=True)):
            del row[max(len(row) - n, self.high[b] - BLOCK, 0) :]
        return [len(row) for row in self.rows]


def steps(blocks, most):
    """Steps of (block length, tokens to keep per row, tokens to roll back per row)."""
    keep = st.lists(st.integers(0, max(blocks)), min_size=BATCH, max_size=BATCH)
    removed = st.lists(st.sampled_from([0, 0, 0, 0, 1, 2, max(blocks)]), min_size=BATCH, max_size=BATCH)
    return st.lists(st.tuples(st.sampled_from(blocks), keep, removed), min_size=most // 2, max_size=most)


def check_steps(window, plan, *, capacity=CAPACITY):
    cache, plain, used = empty(window, capacity=capacity), PlainCache(window), 0
    for i, (size, wanted, removed) in enumerate(plan):
        if max(map(len, plain.rows)) + size > capacity:
            break
        # No identity comes twice in a row of the batch, and no two rows have the same history.
        blocks = (used + np.arange(size) + 53 * np.arange(BATCH)[:, None]).astype(np.int32) % IDENTITIES
        used += size
        assert used <= IDENTITIES
        causal = i % 2 == 0
        cache, seen = append_and_look(cache, blocks, causal)
        np.testing.assert_array_equal(np.asarray(seen), plain.look(blocks, causal), err_msg=f"step {i}")
        keep = [min(size, n) for n in wanted]
        plain.commit(blocks, keep)
        cache = cache.commit(jnp.asarray(keep))
        if any(removed):
            cache = cache.rollback(jnp.asarray(plain.rollback(removed)))
        assert cache.lengths.tolist() == [len(row) for row in plain.rows]
    return plain


@pytest.mark.parametrize("window", [None, 1, 2, 5, 13], ids="w{}".format)
@prove(max_examples=8)
@given(plan=steps(BLOCKS, 30))
def test_a_token_sees_the_committed_ones_in_its_window_and_its_block(window, plan):
    check_steps(window, plan)


@prove(max_examples=12)
@given(plan=steps(BLOCKS, 16))
def test_a_capacity_below_the_ring_is_enough_for_rows_that_fit(plan):
    check_steps(40, plan, capacity=24)


@pytest.mark.parametrize("window", [1, 5, 13], ids="w{}".format)
def test_a_ring_forgets_nothing_in_its_window_after_many_turns(window):
    plain = check_steps(window, [(4, [4, 2, 1], [0, 1, 0])] * (IDENTITIES // 4))
    assert [len(row) for row in plain.rows] == [160, 40, 40]
    assert len(plain.rows[0]) > 9 * (window + BLOCK - 1)


@pytest.mark.parametrize("causal", [True, False])
def test_keys_beyond_the_lengths_are_never_seen(causal):
    """A block that is rejected whole leaves no trace, in a full layer and in a ring that it went once round."""
    for window in (None, 5):
        cache = empty(window)
        committed = np.arange(BATCH * 4, dtype=np.int32).reshape(BATCH, 4)
        for start in (0, 12, 24):
            cache, _ = append_and_look(cache, committed + start, causal)
            cache = cache.commit(jnp.array([4, 3, 1]))
        rejected, _ = append_and_look(cache, committed + 100, causal)
        for size in BLOCKS:
            block = committed[:, :size] + 50
            _, clean = append_and_look(cache, block, causal)
            _, seen = append_and_look(rejected.commit(jnp.zeros(BATCH, jnp.int32)), block, causal)
            np.testing.assert_array_equal(seen, clean)
            assert not np.asarray(seen)[:, :, 100:].any()


@pytest.mark.parametrize("block", [1, 4, 9])
def test_a_ring_holds_a_window_and_a_block(block):
    def slots(window, capacity):
        return empty(window, capacity=capacity, block=block).visible(0, 1).shape[-1]

    assert slots(None, 200) >= 200
    for window in (1, 5, 16):
        assert slots(window, 200) >= window + block - 1
    assert slots(500, 200) >= 200


@pytest.mark.parametrize("window", [None, 5])
def test_a_block_larger_than_agreed_is_refused(window):
    tokens = jnp.zeros((1, IDENTITIES, BATCH, BLOCK + 1))
    with pytest.raises(ValueError, match="blocks of 4 tokens can't append 5"):
        empty(window).append(0, tokens, tokens)


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize(("heads", "batch", "tokens"), [(8, 130, 3), (3, 90, 4), (1100, 2, 2)])
def test_what_is_written_in_several_pieces_lies_where_it_belongs(window, heads, batch, tokens):
    config = SimpleNamespace(windows=(window,), num_kv_heads=heads, head_dim=2)
    network = SimpleNamespace(config=config, dtype=jnp.float32, mesh=None)
    lengths = np.arange(batch) % 11
    cache = empty_cache(network, batch=batch, capacity=16, block=tokens).commit(jnp.asarray(lengths))
    new = np.arange(1, 1 + heads * 2 * batch * tokens, dtype=np.float32).reshape(heads, 2, batch, tokens)
    cache = cache.append(0, jnp.asarray(new), jnp.asarray(-new))
    expected = np.zeros(cache.values[0].shape, np.float32)
    for row, token in np.ndindex(batch, tokens):
        expected[row, :, (lengths[row] + token) % expected.shape[2]] = new[:, :, row, token]
    np.testing.assert_array_equal(cache.keys[0].transpose(0, 1, 3, 2), expected)
    np.testing.assert_array_equal(cache.values[0], -expected)


def test_positions_go_on_from_each_rows_length():
    cache = empty(5).commit(jnp.array([3, 0, 17]))
    assert cache.positions(2).tolist() == [[3, 4], [0, 1], [17, 18]]
    assert cache.rollback(jnp.array([1, 0, 16])).positions(1).tolist() == [[1], [0], [16]]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 1, 4])
def test_attention_mask_is_its_definition(window, causal):
    positions = jnp.arange(12)
    mask = attention_mask(positions[:, None], positions[None, :], window=window, causal=causal)
    assert mask.tolist() == [[sees(q, k, window, causal) for k in range(12)] for q in range(12)]


# With a model: logits after any history equal those of a forward without a cache.
WINDOW, MODEL_BLOCK, LENGTH = 8, 8, 264
FAMILIES = {
    "llama": {},
    "qwen2-sliding": {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
    "gpt_oss": {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]},
}


class Model:
    """A tiny target, a fixed text for every row, and what a cacheless forward says of it."""

    def __init__(self, name, batch):
        with tempfile.TemporaryDirectory() as directory:
            family = name.split("-")[0]
            target = load_target(
                write_tiny_target(Path(directory) / name, family, num_hidden_layers=2, **FAMILIES[name])
            )
        graph, self.weights = nnx.split(target)
        self.target, self.batch, self.vocab = target, batch, target.config.vocab_size
        self.text = np.random.default_rng(1).integers(0, self.vocab, (batch, LENGTH)).astype(np.int32)
        self.logits = np.asarray(target.forward(self.text)[0])

        @jax.jit
        def step(weights, cache, tokens):
            model = nnx.merge(graph, weights)
            x, _, cache = model.hidden(tokens, cache=cache)
            logits = model.logits(x).astype(jnp.float32)
            return cache, logits.reshape(-1, *tokens.shape).transpose(1, 2, 0)

        self._step = step

    def step(self, cache, tokens):
        cache, logits = self._step(self.weights, cache, tokens)
        return cache, np.asarray(logits)

    def empty(self):
        return empty_cache(self.target, batch=self.batch, capacity=LENGTH + MODEL_BLOCK, block=MODEL_BLOCK)


@pytest.fixture(scope="module")
def model(request):
    return Model(*request.param)


MODELS = [("llama", BATCH), ("llama", 1), ("qwen2-sliding", BATCH), ("gpt_oss", BATCH), ("gpt_oss", 1)]
each_model = pytest.mark.parametrize("model", MODELS, indirect=True, ids=[f"{n}-b{b}" for n, b in MODELS])
# How many tokens of a block are the text's own, how many more are committed and rolled back, how many before those.
row_steps = st.tuples(st.integers(0, 8), st.integers(0, 8), st.sampled_from([0, 0, 0, 0, 1, 3, 8]))
histories = st.lists(
    st.tuples(st.sampled_from([1, 3, 8]), st.lists(row_steps, min_size=BATCH, max_size=BATCH)), min_size=8, max_size=24
)


class History:
    """Feeds a model block after block: the text's next tokens, then wrong ones that must leave no trace."""

    def __init__(self, model, seed):
        self.model, self.cache = model, model.empty()
        self.lengths, self.high = np.zeros(model.batch, int), np.zeros(model.batch, int)
        self.rng = np.random.default_rng(seed)

    def step(self, size, rows):
        model, lengths = self.model, self.lengths
        good = np.array([min(size, r[0]) for r in rows])
        tokens = self.rng.integers(0, model.vocab, (model.batch, size)).astype(np.int32)
        for b, n in enumerate(good):
            tokens[b, :n] = model.text[b, lengths[b] : lengths[b] + n]
        cache, logits = model.step(self.cache, tokens)
        real = np.arange(size) < good[:, None]
        expected = model.logits[np.arange(model.batch)[:, None], lengths[:, None] + np.arange(size)]
        np.testing.assert_allclose(logits[real], expected[real], atol=1e-4, rtol=1e-4, err_msg=f"{lengths} + {good}")
        self.high = np.maximum(self.high, lengths + size)
        committed = np.minimum(good + [r[1] for r in rows], size)
        self.cache = cache.commit(jnp.asarray(committed, jnp.int32))
        back = lengths + good - [r[2] for r in rows]
        self.lengths = np.maximum(back, np.maximum(self.high - MODEL_BLOCK, 0)).clip(max=lengths + good)
        if (self.lengths != lengths + committed).any():
            self.cache = self.cache.rollback(jnp.asarray(self.lengths, jnp.int32))
        assert self.cache.lengths.tolist() == self.lengths.tolist()


@each_model
@prove(max_examples=8)
@given(plan=histories, seed=st.integers(0, 2**16))
def test_logits_after_any_history_are_a_cacheless_forwards(model, plan, seed):
    history = History(model, seed)
    for size, rows in plan:
        history.step(size, rows[: model.batch])
    # On, with rows at different lengths, until every ring has gone round a few times.
    while history.lengths.min() < 4 * (WINDOW + MODEL_BLOCK):
        full = history.lengths.max() > LENGTH - 2 * MODEL_BLOCK
        grow = (history.lengths < LENGTH - 2 * MODEL_BLOCK) if full else np.ones(model.batch, bool)
        history.step(8, [(8 * int(g), 0, 0) for g in grow])
    history.step(1, [(1, 0, 0)] * model.batch)


@each_model
def test_what_is_rolled_back_was_never_there(model):
    """Up to a block, committed in one piece or several and rolled back, all round the ring: the same to the bit."""
    cache, rng = model.empty(), np.random.default_rng(2)
    for start in range(0, 4 * (WINDOW + MODEL_BLOCK), 3):
        following = model.text[:, start : start + 3]
        grown, clean = model.step(cache, following)
        for pieces in ((8,), (3, 3, 1), (1, 1), (3,)):
            wrong = cache
            for size in pieces:
                tokens = rng.integers(0, model.vocab, (model.batch, size)).astype(np.int32)
                wrong, _ = model.step(wrong, tokens)
                wrong = wrong.commit(jnp.full(model.batch, size))
            _, logits = model.step(wrong.rollback(cache.lengths), following)
            np.testing.assert_array_equal(logits, clean, err_msg=f"{pieces} at {start}")
        cache = grown.commit(jnp.full(model.batch, 3))
