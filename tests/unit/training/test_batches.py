"""Training batches against plain loops: what a step reads, and that it follows from the seed and the step alone."""

import collections

import ml_dtypes
import numpy as np
import pytest

from dflash.training.batches import (
    TrainingBatches,
    anchor_candidates,
    sequence_batch,
    widened,
    window_batch,
)
from dflash.training.cache import CacheError
from dflash.training.cache.arrays import ArrayWriter
from dflash.training.cache.window_meta import LABELS
from dflash.training.cache.windows import open_windows, to_bits, window_specs

V, H, S = 199, 64, 8
FIELDS = ("features", "starts", "anchors", "anchor_ids", "anchor_embedding", "labels", "mask")


@pytest.fixture(scope="module")
def embedding():
    return np.random.default_rng(1).standard_normal((V, H)).astype(ml_dtypes.bfloat16)


@pytest.fixture(scope="module")
def cache(write_sequences, tmp_path_factory):
    """Answers with holes in them: some answer tokens have an answer token behind them and some don't."""
    cache = write_sequences(tmp_path_factory.mktemp("batches") / "cache")
    mask = np.load(cache.directory / "loss_mask_u8.npy", mmap_mode="r+")
    mask[:] &= np.random.default_rng(2).random(len(mask)) < 0.8
    mask.flush()
    return cache


def same(a, b):
    for name in FIELDS:
        x, y = getattr(a, name), getattr(b, name)
        assert (x.shape, x.dtype) == (y.shape, y.dtype), name
        np.testing.assert_array_equal(x, y, err_msg=name)


def plain_block(cache, row, anchor, block_size):
    """Token ids of a block and what of its labels counts, token by token."""
    first, end = int(cache.bounds[row]), int(cache.bounds[row + 1])
    ids, counts = [], []
    for slot in range(block_size):
        token = first + anchor + slot
        ids.append(int(cache.token_ids[token]) if token < end else None)
        counts.append(float(token < end and cache.loss_mask[token] == 1))
    return ids, counts[1:]


@pytest.mark.parametrize("block_size", [2, 8, 48])
def test_a_batch_of_sequences(cache, embedding, block_size):
    rng = np.random.default_rng(3)
    rows = np.array([5, 0, 11])
    lengths = np.diff(cache.bounds)
    anchors = [np.sort(rng.choice(lengths[row], n, replace=False)) for row, n in zip(rows, (6, 1, 3), strict=True)]
    anchors[0][-1] = lengths[5] - 1  # nothing behind it
    batch = sequence_batch(cache, rows, anchors, block_size, embedding)
    assert batch.features.shape == (3, cache.longest, 2 * H)
    assert batch.features.dtype == np.uint16
    assert cache.longest % 64 == 0
    assert batch.starts.tolist() == [cache.pos_start[row] for row in rows]
    for b, row in enumerate(rows):
        tokens = cache.features[cache.bounds[row] : cache.bounds[row + 1]]
        np.testing.assert_array_equal(batch.features[b, : len(tokens)], tokens)
        assert not batch.features[b, len(tokens) :].any()
        for a in range(6):
            if a >= len(anchors[b]):
                assert batch.anchors[b, a] == 0
                assert not batch.mask[b, a].any()
                continue
            ids, counts = plain_block(cache, row, anchors[b][a], block_size)
            assert batch.anchors[b, a] == anchors[b][a]
            np.testing.assert_array_equal(batch.anchor_embedding[b, a], embedding[ids[0]])
            assert batch.mask[b, a].tolist() == counts
            for label, expected in zip(batch.labels[b, a], ids[1:], strict=True):
                assert expected is None or label == expected


def test_labels_of_the_next_sequence_do_not_count(cache, embedding):
    last = int(np.diff(cache.bounds)[3]) - 1
    batch = sequence_batch(cache, np.array([3]), [np.array([last - 2, last])], S, embedding)
    assert not batch.mask[0, 0, 2:].any()
    assert not batch.mask[0, 1].any()


def test_labels_are_always_tokens(cache, embedding):
    """Also where nothing counts: cross-entropy looks them up."""
    batches = training(cache, embedding, num_anchors=64)
    for step in range(4):
        labels = batches(step).labels
        assert labels.min() >= 0
        assert labels.max() < V


def test_an_anchor_is_an_answer_token_that_an_answer_token_follows(cache):
    for row in range(len(cache)):
        answer = list(cache.loss_mask[cache.bounds[row] : cache.bounds[row + 1]])
        expected = [i for i in range(len(answer) - 1) if answer[i] and answer[i + 1]]
        assert anchor_candidates(cache, row).tolist() == expected


def training(cache, embedding, **changes):
    settings = {"batch_size": 6, "num_anchors": 5, "block_size": S, "embedding": embedding, "seed": 7} | changes
    return TrainingBatches(cache, cache.rows(False), **settings)


@pytest.mark.parametrize("num_anchors", [1, 5, 64])
def test_anchors_are_drawn_without_repetition_and_sorted(cache, embedding, num_anchors):
    batches = training(cache, embedding, num_anchors=num_anchors)
    for step in range(8):
        batch = batches(step)
        assert batch.anchors.shape == (6, num_anchors)
        for row, anchors, mask in zip(batches.rows(step), batch.anchors, batch.mask, strict=True):
            candidates = anchor_candidates(cache, row)
            real = mask[:, 0] > 0  # the token after an anchor is an answer's
            drawn = anchors[real].tolist()
            assert len(drawn) == min(num_anchors, len(candidates))
            assert drawn == sorted(set(drawn))
            assert set(drawn) <= set(candidates.tolist())
            assert not mask[~real].any()


def test_every_anchor_is_drawn_sooner_or_later(cache, embedding):
    batches = training(cache, embedding)
    seen = collections.defaultdict(set)
    for step in range(200):
        batch = batches(step)
        for row, anchors, mask in zip(batches.rows(step), batch.anchors, batch.mask, strict=True):
            seen[row] |= set(anchors[mask[:, 0] > 0].tolist())
    for row in cache.rows(False):
        assert seen[row] == set(anchor_candidates(cache, row).tolist())


def test_a_row_without_room_for_an_anchor_counts_nothing(write_sequences, embedding, tmp_path):
    cache = write_sequences(tmp_path / "cache", sequences=3, held_out=0)
    mask = np.load(cache.directory / "loss_mask_u8.npy", mmap_mode="r+")
    mask[:] = np.arange(len(mask)) % 2  # answers of one token
    mask.flush()
    batch = training(cache, embedding)(0)
    assert batch.anchors.shape == (6, 5)
    assert not batch.mask.any()


def test_a_step_follows_from_seed_and_number(cache, embedding):
    once, again, other = (training(cache, embedding, seed=seed) for seed in (7, 7, 8))
    for step in (3, 0, 11, 3):
        same(once(step), again(step))
        assert once.rows(step).tolist() == again.rows(step).tolist()
    assert once.rows(3).tolist() != other.rows(3).tolist()
    assert once(0).anchors.tolist() != other(0).anchors.tolist()


@pytest.mark.parametrize("batch_size", [6, 20, 33])
def test_every_row_comes_once_a_round_in_a_new_order(cache, embedding, batch_size):
    batches = training(cache, embedding, batch_size=batch_size)
    rows = cache.rows(False).tolist()
    order = np.concatenate([batches.rows(step) for step in range(3 * len(rows))]).tolist()
    rounds = [order[i : i + len(rows)] for i in range(0, 3 * len(rows), len(rows))]
    assert all(sorted(r) == rows for r in rounds)
    assert len(set(map(tuple, rounds))) == 3


def test_held_out_rows_are_not_read(cache, embedding):
    batches = training(cache, embedding)
    read = {row for step in range(10) for row in batches.rows(step).tolist()}
    assert read == set(range(20))


def test_no_rows_are_refused(write_sequences, embedding, tmp_path):
    cache = write_sequences(tmp_path / "cache", sequences=3, held_out=3)
    with pytest.raises(CacheError, match="none on this side"):
        training(cache, embedding)


# ---- windows


@pytest.fixture(scope="module")
def windows(tmp_path_factory):
    rng = np.random.default_rng(4)
    N, C = 9, 12
    writer = ArrayWriter(tmp_path_factory.mktemp("windows") / "cache", {})
    writer.allocate(window_specs(N, C, S, 2, H))
    a = writer.arrays
    a["context_features_u16"][:] = to_bits(rng.standard_normal((N, C, 2 * H), np.float32))
    a["anchor_embedding_u16"][:] = to_bits(rng.standard_normal((N, H), np.float32))
    a["target_ids"][:] = rng.integers(0, V, (N, S - 1))
    a["ctx_pos_start_i32"][:] = rng.integers(0, 900, N)
    a["anchor_pos_i32"][:] = a["ctx_pos_start_i32"] + C
    a["held_out_u8"][:] = np.arange(N) >= 7
    writer.commit(N)
    meta = {"ctx_len": C, "ctx_len_full": C + 1, "block_size": S, "hidden_size": H, "target_layer_ids": [0, 1]}
    return open_windows(writer.finish(meta | {"add_one_for_pre_layer_capture": True, "target_ids_mode": LABELS}))


@pytest.mark.parametrize("block_size", [2, 5, 8])
def test_a_batch_of_windows(windows, block_size):
    rows = np.array([8, 0, 3])
    batch = window_batch(windows, rows, block_size)
    samples = windows.samples(rows)
    assert (batch.features.dtype, batch.mask.dtype) == (np.uint16, np.float32)
    np.testing.assert_array_equal(batch.features, samples.context_features.view(np.uint16))
    np.testing.assert_array_equal(batch.starts, samples.ctx_pos_start)
    assert batch.anchors.tolist() == [[12], [12], [12]]
    np.testing.assert_array_equal(batch.anchor_embedding[:, 0], samples.anchor_embedding)
    np.testing.assert_array_equal(batch.labels[:, 0], samples.target_ids[:, : block_size - 1])
    assert batch.mask.shape == batch.labels.shape == (3, 1, block_size - 1)
    assert batch.mask.all()


def test_training_reads_windows_too(windows, embedding):
    batches = training(windows, embedding, batch_size=3)
    read = np.concatenate([batches.rows(step) for step in range(7)])
    assert sorted(read.tolist()) == sorted(list(range(7)) * 3)
    same(batches(2), window_batch(windows, batches.rows(2), S))


# ---- one shape


def test_widened_batches_have_room_for_anchors_that_count_nothing(cache, embedding):
    batch = sequence_batch(cache, np.array([1, 2]), [np.array([22]), np.array([21, 23])], S, embedding)
    wide = widened(batch, 5)
    assert wide.anchors.shape == (2, 5)
    assert not wide.mask[:, 2:].any()
    for name in FIELDS:
        kept = getattr(wide, name)
        same_rows = kept if name in ("features", "starts") else kept[:, :2]
        np.testing.assert_array_equal(same_rows, getattr(batch, name))
        assert kept.dtype == getattr(batch, name).dtype
    assert widened(batch, 2) is batch
