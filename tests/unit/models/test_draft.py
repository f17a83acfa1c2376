"""The draft through its cache against the draft without one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dflash.models.kv_cache import empty_cache
from dflash.weights.huggingface import write_draft
from dflash.weights.load import read_any_draft

BATCH, BLOCK, WINDOW, HIDDEN, VOCAB = 3, 6, 8, 64, 199
LONGEST = 72
# How many tokens the context grows by, appended and then committed of each row: a ragged prompt longer than a window
# in two chunks, then blocks with everything from nothing to all of it.
GROWTH = [
    (16, (16, 9, 3)),
    (16, (5, 0, 0)),
    (BLOCK, (6, 1, 3)),
    (BLOCK, (0, 6, 2)),
    (BLOCK, (1, 0, 6)),
    (BLOCK, (6, 6, 6)),
    (BLOCK, (4, 5, 0)),
    (BLOCK, (2, 6, 6)),
    (BLOCK, (6, 6, 1)),
]


def variant(name, layers, features, **changes):
    """layers: one letter each, f full, s sliding; a capital is causal."""
    config = {
        "windows": tuple(WINDOW if c in "sS" else None for c in layers),
        "causal": tuple(c.isupper() for c in layers),
        "target_layer_ids": tuple(range(features)),
        "num_target_layers": 8,
        "block_size": BLOCK,
        **changes,
    }
    return pytest.param(config, id=name)


# Each kind of layer, first and second; each makes programs of its own, so what does not interact shares a draft.
VARIANTS = [
    variant("full-then-sliding-causal-k5", "fS", 5),
    variant("sliding-then-full-causal-k1", "SF", 1),
    variant("one-layer-bias-k4", "S", 4, attention_bias=True),
    variant("one-kv-head-wide-heads", "fs", 2, num_heads=2, num_kv_heads=1, head_dim=32),
    variant("heads-wider-than-hidden", "sfs", 3, num_heads=8, num_kv_heads=8, head_dim=16),
]


class Drive:
    """A draft, features and blocks for it, and its compiled pieces."""

    def __init__(self, draft):
        self.draft, self.K = draft, draft.config.num_features
        graph, self.weights = nnx.split(draft)
        rng = np.random.default_rng(5)
        self.features = rng.normal(size=(self.K, HIDDEN, BATCH, LONGEST)).astype(np.float32)
        self.blocks = rng.normal(size=(len(GROWTH), HIDDEN, BATCH, BLOCK)).astype(np.float32)
        self.head = rng.normal(size=(VOCAB, HIDDEN)).astype(np.float32)
        merge = nnx.merge
        self._append = jax.jit(lambda w, f, cache: merge(graph, w).append_context(list(f), cache))
        self._block = jax.jit(lambda w, x, cache: merge(graph, w).block(x, cache))
        self._uncached = jax.jit(lambda w, f, n, x, start: merge(graph, w).uncached(list(f), n, x, start))

    def empty(self):
        return empty_cache(self.draft, batch=BATCH, capacity=LONGEST + BLOCK, block=16)

    def append(self, cache, count, keep, garbage):
        """The next `count` features of every row, of which those beyond `keep` are `garbage`."""
        part = np.full((self.K, HIDDEN, BATCH, count), garbage, np.float32)
        for b, (start, n) in enumerate(zip(cache.lengths.tolist(), keep, strict=True)):
            part[:, :, b, :n] = self.features[:, :, b, start : start + n]
        cache = self._append(self.weights, part.reshape(self.K, HIDDEN, -1), cache)
        return cache.commit(jnp.array(keep))

    def block(self, cache, i):
        return self.block_and_cache(cache, i)[0]

    def block_and_cache(self, cache, i):
        hidden, cache = self._block(self.weights, self.blocks[i].reshape(HIDDEN, -1), cache)
        return np.asarray(hidden), cache

    def uncached(self, lengths, i, *, garbage=0.0, start=0, weights=None):
        real = np.arange(LONGEST) < np.asarray(lengths)[:, None]
        features = np.where(real, self.features, garbage).astype(np.float32).reshape(self.K, HIDDEN, -1)
        x = self.blocks[i].reshape(HIDDEN, -1)
        first = jnp.full(BATCH, start, jnp.int32)
        weights = self.weights if weights is None else weights
        return np.asarray(self._uncached(weights, features, jnp.asarray(lengths)[:, None], x, first))

    def together(self, anchors):
        """Block i of every row after anchors [B, A] tokens of it, all A in one call: [H, B, A, T]."""
        features = self.features.reshape(self.K, HIDDEN, -1)
        x = self.blocks[: anchors.shape[1]].transpose(1, 2, 0, 3).reshape(HIDDEN, -1)
        hidden = self._uncached(self.weights, features, jnp.asarray(anchors), x, jnp.zeros(BATCH, jnp.int32))
        return np.asarray(hidden).reshape(HIDDEN, BATCH, -1, BLOCK)

    def proposals(self, hidden):
        return (self.head @ hidden).argmax(0)


@pytest.fixture(scope="module", params=VARIANTS)
def drive(request, draw_draft):
    return Drive(draw_draft(seed=1, **request.param))


def test_through_the_cache_is_without_one(drive):
    cache, proposals = drive.empty(), set()
    lengths = np.zeros(BATCH, int)
    for i, (count, keep) in enumerate(GROWTH):
        cache = drive.append(cache, count, keep, garbage=1.0)
        lengths += keep
        assert cache.lengths.tolist() == lengths.tolist()
        hidden = drive.block(cache, i)
        np.testing.assert_allclose(hidden, drive.uncached(lengths, i), atol=1e-4, rtol=1e-4, err_msg=f"block {i}")
        proposals |= set(drive.proposals(hidden).tolist())
    assert lengths.min() > 3 * WINDOW
    assert len(proposals) > 20


def test_what_is_not_committed_changes_nothing(drive):
    """To the bit: rejected features and earlier blocks in the cache, features beyond the lengths without one."""
    clean, dirty = drive.empty(), drive.empty()
    lengths = np.zeros(BATCH, int)
    for i, (count, keep) in enumerate(GROWTH):
        clean = drive.append(clean, count, keep, garbage=0.0)
        dirty = drive.append(dirty, count, keep, garbage=1e3)
        lengths += keep
        expected = drive.block(clean, i)
        np.testing.assert_array_equal(drive.block(dirty, i), expected)
        # A block commits nothing, and one that is committed by mistake can be taken back.
        _, dirty = drive.block_and_cache(dirty, i - 1)
        np.testing.assert_array_equal(drive.block(dirty, i), expected)
        again = drive.append(dirty, BLOCK, (0, 0, 0), garbage=-7.0)
        np.testing.assert_array_equal(drive.block(again, i), expected)
        plain = drive.uncached(lengths, i)
        np.testing.assert_array_equal(drive.uncached(lengths, i, garbage=1e3), plain)


def test_blocks_of_a_row_are_each_alone(drive):
    """What training sees in one call is what decoding sees block by block: no later context, no other block."""
    anchors = np.array([[3, 30, 31, 0], [40, 2, 17, 17], [5, 6, 7, 44]])
    together = drive.together(anchors)
    for i, lengths in enumerate(anchors.T):
        alone = drive.uncached(lengths, i).reshape(HIDDEN, BATCH, BLOCK)
        np.testing.assert_allclose(together[:, :, i], alone, atol=1e-4, rtol=1e-4)


def test_only_distances_matter(drive):
    """Rotary positions are relative: a context that starts at 1000 proposes what one at 0 does."""
    lengths = np.array([30, 20, 9])
    moved = drive.uncached(lengths, 0, start=1000)
    np.testing.assert_allclose(moved, drive.uncached(lengths, 0), atol=5e-3)


def test_every_feature_and_every_slot_counts(drive):
    """A draft that ignored a feature, or the anchor, would pass every comparison with itself."""
    lengths = np.array([3, 3, 3])
    plain = drive.uncached(lengths, 0)
    features, blocks = drive.features.copy(), drive.blocks.copy()
    try:
        for k in range(drive.K):
            drive.features = features.copy()
            drive.features[k, :, :, 2] += 1.0
            assert np.abs(drive.uncached(lengths, 0) - plain).max(axis=0).min() > 1e-4
        drive.features = features
        drive.blocks = blocks.copy()
        drive.blocks[0, :, :, -1] += 1.0
        changed = np.abs(drive.uncached(lengths, 0) - plain).max(axis=0).reshape(BATCH, BLOCK) > 1e-6
    finally:
        drive.features, drive.blocks = features, blocks
    # The last slot is seen by the ones before it unless every layer is causal.
    assert changed[:, -1].all()
    assert (changed[:, :-1] == (not all(drive.draft.config.causal))).all()


def test_an_empty_context_is_a_block_alone(drive):
    """No row has committed anything yet: finite, and the same with and without the cache."""
    hidden = drive.block(drive.empty(), 0)
    np.testing.assert_allclose(hidden, drive.uncached(np.zeros(BATCH, int), 0), atol=1e-4, rtol=1e-4)
    assert np.isfinite(hidden).all()


def test_written_and_read_back_it_proposes_the_same(drive, tmp_path):
    write_draft(drive.draft, tmp_path / "draft")
    draft = read_any_draft(tmp_path / "draft")
    assert draft.config == drive.draft.config
    lengths = np.array([40, 11, 3])
    expected = drive.uncached(lengths, 1)
    np.testing.assert_array_equal(drive.uncached(lengths, 1, weights=nnx.state(draft)), expected)


def test_bfloat16_is_written_and_read_as_such(draw_draft, tmp_path):
    draft = draw_draft(dtype=jnp.bfloat16)
    write_draft(draft, tmp_path / "draft")
    back = read_any_draft(tmp_path / "draft", "bfloat16")
    assert back.dtype == jnp.bfloat16
    for a, b in zip(jax.tree.leaves(nnx.state(draft)), jax.tree.leaves(nnx.state(back)), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
