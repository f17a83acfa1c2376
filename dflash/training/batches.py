"""What one training step reads: rows of context features, anchors in them, and the tokens after each anchor.

Both forms of the teacher cache give the same kind of batch. The rows and anchors of a step depend only on the seed and
the step's number, so a resumed run reads what an uninterrupted one would have read.
"""

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np

from dflash.training.cache.arrays import CacheError
from dflash.training.cache.sequences import SequenceCache
from dflash.training.cache.windows import WindowCache


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Batch:
    """B rows with C context tokens and A anchors each, for blocks of S slots. Host arrays.

    features uint16 [B, C, K*H] bits of bfloat16; starts int32 [B], the position of context token 0; anchors int32
    [B, A], how many context tokens come before the anchor; anchor_ids int32 [B, A] and anchor_embedding [B, A, H] in
    the target's dtype; labels int32 [B, A, S-1], the tokens after the anchor; mask float32 [B, A, S-1], 1 where a label
    counts.
    """

    features: np.ndarray
    starts: np.ndarray
    anchors: np.ndarray
    anchor_ids: np.ndarray
    anchor_embedding: np.ndarray
    labels: np.ndarray
    mask: np.ndarray


def sequence_batch(
    cache: SequenceCache, rows: np.ndarray, anchors: Sequence[np.ndarray], block_size: int, embedding: np.ndarray
) -> Batch:
    """These rows with the given anchors (token indices within each row; fewer than A are padded and masked).

    A label counts if it lies in the row and is part of an answer.
    """
    A = max(map(len, anchors))
    B, C, S = len(rows), cache.longest, block_size
    features = np.zeros((B, C, cache.features.shape[1]), np.uint16)
    places = np.zeros((B, A), np.int32)
    tokens = np.zeros((B, A, S), np.int32)
    mask = np.zeros((B, A, S - 1), np.float32)
    for b, (row, chosen) in enumerate(zip(rows, anchors, strict=True)):
        first, end = cache.bounds[row], cache.bounds[row + 1]
        features[b, : end - first] = cache.features[first:end]
        slots = chosen[:, None] + np.arange(S)
        inside = slots < end - first
        sources = first + np.where(inside, slots, 0)
        places[b, : len(chosen)] = chosen
        tokens[b, : len(chosen)] = np.where(inside, cache.token_ids[sources], 0)
        mask[b, : len(chosen)] = (inside & (cache.loss_mask[sources] > 0))[:, 1:]
    return Batch(
        features=features,
        starts=np.asarray(cache.pos_start[rows], np.int32),
        anchors=places,
        anchor_ids=tokens[:, :, 0],
        anchor_embedding=embedding[tokens[:, :, 0]],
        labels=tokens[:, :, 1:],
        mask=mask,
    )


def window_batch(cache: WindowCache, rows: np.ndarray, block_size: int) -> Batch:
    """One anchor after each window, and the first S-1 of its labels."""
    samples = cache.samples(rows)
    n = len(rows)
    bits = np.ascontiguousarray(samples.context_features).view(np.uint16).reshape(n, cache.context, -1)
    labels = samples.target_ids[:, None, : block_size - 1].astype(np.int32)
    ids = samples.anchor_ids  # some old caches lack them; `check_fit` refuses those when they are needed
    return Batch(
        features=bits,
        starts=samples.ctx_pos_start.astype(np.int32),
        anchors=np.full((n, 1), cache.context, np.int32),
        anchor_ids=np.zeros((n, 1), np.int32) if ids is None else ids[:, None].astype(np.int32),
        anchor_embedding=samples.anchor_embedding[:, None],
        labels=labels,
        mask=np.ones(labels.shape, np.float32),
    )


def anchor_candidates(cache: SequenceCache, row: int) -> np.ndarray:
    """Where an anchor may be: answer tokens followed by an answer token, as indices within the row."""
    counts = np.asarray(cache.loss_mask[cache.bounds[row] : cache.bounds[row + 1]]) > 0
    return np.flatnonzero(counts[:-1] & counts[1:])


class TrainingBatches:
    """Batches of these rows of a cache, in an order redrawn for each epoch.

    `num_anchors` are drawn per sequence and step; a window has its one. embedding [V, H] is the target's.
    """

    def __init__(
        self,
        cache: SequenceCache | WindowCache,
        rows: np.ndarray,
        *,
        batch_size: int,
        num_anchors: int,
        block_size: int,
        embedding: np.ndarray,
        seed: int,
    ):
        if not len(rows):
            raise CacheError("a batch needs rows, and the cache has none on this side of its split: build a larger one")
        self.cache, self._rows, self._embedding = cache, rows, embedding
        self.batch_size, self.num_anchors, self.block_size, self.seed = batch_size, num_anchors, block_size, seed

    def rows(self, step: int) -> np.ndarray:
        """The rows of the cache that a step reads, int64 [batch_size]."""
        places = np.arange(step * self.batch_size, (step + 1) * self.batch_size)
        rounds = places // len(self._rows)
        orders = {r: np.random.default_rng([self.seed, 0, r]).permutation(self._rows) for r in np.unique(rounds)}
        return np.array([orders[r][p] for r, p in zip(rounds, places % len(self._rows), strict=True)])

    def __call__(self, step: int) -> Batch:
        rows = self.rows(step)
        if isinstance(self.cache, WindowCache):
            return window_batch(self.cache, rows, self.block_size)
        rng = np.random.default_rng([self.seed, 1, step])
        anchors = []
        for row in rows:
            candidates = anchor_candidates(self.cache, row)
            anchors.append(np.sort(rng.choice(candidates, min(self.num_anchors, len(candidates)), replace=False)))
        return widened(sequence_batch(self.cache, rows, anchors, self.block_size, self._embedding), self.num_anchors)


def widened(batch: Batch, num_anchors: int) -> Batch:
    """The same batch with room for exactly `num_anchors`, so that every step has one shape."""
    missing = num_anchors - batch.anchors.shape[1]

    def widen(x: np.ndarray) -> np.ndarray:
        return np.pad(x, [(0, 0), (0, missing)] + [(0, 0)] * (x.ndim - 2))

    names = ("anchors", "anchor_ids", "anchor_embedding", "labels", "mask")
    return dataclasses.replace(batch, **{n: widen(getattr(batch, n)) for n in names}) if missing else batch
