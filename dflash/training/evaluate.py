"""Offline acceptance: a draft's proposals at the anchors of a teacher cache, against the target's tokens there.

On held-out prompts by default: a draft's score on its training rows says nothing. For a cache in sequence form the
blocks that live decoding would visit are also walked, and their mean equals live decoding's.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax import Array
from jax.sharding import Mesh, NamedSharding
from tqdm import tqdm

from dflash import metrics
from dflash.config import ConfigError
from dflash.models import mesh
from dflash.models.draft import Draft
from dflash.training.batches import Batch, anchor_candidates, sequence_batch, widened, window_batch
from dflash.training.cache.sequences import SequenceCache
from dflash.training.cache.windows import WindowCache
from dflash.training.loss import pad_head
from dflash.training.objective import predict_blocks, trained_head

_ANCHORS = 32


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Blocks:
    """One entry per evaluated block.

    `row` is its row in the cache, `accept_len` is 0..S-1. `right` counts the labels that it got right, of the `labels`
    that it had (fewer than S-1 at the end of a sequence). `ctx_pos_start` is the position of its row's first token.
    """

    row: np.ndarray
    anchor: np.ndarray
    accept_len: np.ndarray
    right: np.ndarray
    labels: np.ndarray
    ctx_pos_start: np.ndarray

    def take(self, chosen: np.ndarray) -> "Blocks":
        """Only these blocks: indices or a mask."""
        return Blocks(**{f.name: getattr(self, f.name)[chosen] for f in dataclasses.fields(self)})


def check_fit(draft: Draft, cache: SequenceCache | WindowCache) -> None:
    """Raises ConfigError with every reason why this draft can't read these features."""
    c = draft.config
    faults = []
    if cache.feature_layer_ids != c.target_layer_ids:
        faults.append(
            f"it reads the outputs of layers {list(c.target_layer_ids)}, the cache holds those of "
            f"{list(cache.feature_layer_ids)}"
        )
    if cache.hidden_size != c.hidden_size:
        faults.append(f"its hidden size is {c.hidden_size}, the cache's {cache.hidden_size}")
    if c.block_size > cache.max_block_size:
        faults.append(f"its blocks have {c.block_size} slots, the cache's labels serve {cache.max_block_size}")
    if c.selector is not None and isinstance(cache, WindowCache) and not cache.has_anchor_ids:
        faults.append("its selector follows the anchor, and this old cache does not say which token that is")
    if faults:
        raise ConfigError("the draft does not fit the teacher cache: " + "; ".join(faults))


@partial(jax.jit, static_argnames=("graph", "vocab_size", "chunk", "devices"))
def _best(
    weights: Any,
    batch: Batch,
    mask_embedding: Array,
    head: Array,
    *,
    graph: Any,
    vocab_size: int,
    chunk: int,
    devices: Mesh | None,
) -> Array:
    sharding: dict[str, Any] = {"vocab_size": vocab_size, "chunk": chunk, "axis": None if devices is None else mesh.TP}

    def best(weights: Any, batch: Batch, mask_embedding: Array, head: Array) -> Array:
        return predict_blocks(nnx.merge(graph, weights), batch, mask_embedding, head, **sharding).best

    rows, whole = mesh.ROWS, mesh.WHOLE
    specs = (whole, rows, whole, mesh.split_by("vocab"))
    return mesh.spread(best, devices, specs, rows)(weights, batch, mask_embedding, head)


class Evaluator:
    """Scores drafts with one target's embedding [V, H] and head [V, H].

    On a mesh, as in training: the draft whole on every device, rows over dp, the head's vocabulary over tp.
    """

    def __init__(
        self,
        embedding: np.ndarray,
        head: np.ndarray,
        *,
        chunk: int = 2048,
        batch_size: int = 4,
        devices: Mesh | None = None,
    ):
        self.embedding, self.devices = embedding, devices
        self._head: Array | None = None
        self._head_of: tuple[Any, bytes | None] | None = None
        self._raw_head, self.chunk = head, chunk
        self.batch_size = batch_size * mesh.ways(devices, mesh.DP)

    def _score(self, draft: Draft, batches: Iterator[tuple[np.ndarray, Batch]]) -> Blocks:
        of = draft.dtype, draft.config.vocabulary
        if self._head is None or self._head_of != of:
            head = jax.numpy.asarray(trained_head(draft.config, self._raw_head), draft.dtype)
            self._head, self._head_of = pad_head(head, mesh.ways(self.devices, mesh.TP)), of
            if self.devices is not None:
                self._head = jax.device_put(self._head, NamedSharding(self.devices, mesh.split_by("vocab")))
        graph, weights = nnx.split(draft)
        mask_embedding = jax.numpy.asarray(self.embedding[draft.config.mask_token_id], draft.dtype)
        best_of = partial(
            _best, graph=graph, vocab_size=draft.config.num_tokens, chunk=self.chunk, devices=self.devices
        )
        columns: dict[str, list[np.ndarray]] = {f.name: [] for f in dataclasses.fields(Blocks)}
        for rows, batch in batches:
            # Every device has as many rows, and the last of a cache may be fewer.
            missing = -len(rows) % mesh.ways(self.devices, mesh.DP)
            padded = jax.tree.map(lambda a, n=missing: np.pad(a, ((0, n), *[(0, 0)] * (a.ndim - 1))), batch)
            best = np.asarray(best_of(weights, padded, mask_embedding, self._head))[: len(rows)]
            real = batch.mask[:, :, 0] > 0
            # A missing label is never right: it ends the block.
            agreed = np.where(batch.mask > 0, best == batch.labels, False)
            values = {
                "row": np.broadcast_to(rows[:, None], real.shape),
                "anchor": batch.anchors,
                "accept_len": np.cumprod(agreed, axis=2).sum(axis=2),
                "right": agreed.sum(axis=2),
                "labels": (batch.mask > 0).sum(axis=2),
                "ctx_pos_start": np.broadcast_to(batch.starts[:, None], real.shape),
            }
            for name, value in values.items():
                columns[name].append(value[real])
        return Blocks(**{name: np.concatenate(parts) for name, parts in columns.items()})

    def score(self, draft: Draft, cache: SequenceCache | WindowCache, rows: np.ndarray) -> Blocks:
        """The draft at the anchor of each of these windows, or at every anchor of each of these sequences.

        Raises ConfigError if the cache holds other features than the draft reads.
        """
        check_fit(draft, cache)
        batches = self._windows if isinstance(cache, WindowCache) else self._sequences
        return self._score(draft, batches(cache, rows, draft.config.block_size))  # type: ignore[arg-type]

    def _windows(self, cache: WindowCache, rows: np.ndarray, block_size: int) -> Iterator[tuple[np.ndarray, Batch]]:
        size = self.batch_size * _ANCHORS // 4
        for first in _progress(range(0, len(rows), size)):
            chosen = rows[first : first + size]
            yield chosen, window_batch(cache, chosen, block_size)

    def _sequences(self, cache: SequenceCache, rows: np.ndarray, block_size: int) -> Iterator[tuple[np.ndarray, Batch]]:
        pieces = [
            (row, anchors[first : first + _ANCHORS])
            for row in rows.tolist()
            for anchors in [anchor_candidates(cache, row)]
            for first in range(0, len(anchors), _ANCHORS)
        ]
        for first in _progress(range(0, len(pieces), self.batch_size)):
            part = pieces[first : first + self.batch_size]
            # One shape for all batches: the last one is padded with a piece that has no anchors.
            part += [(part[0][0], part[0][1][:0])] * (self.batch_size - len(part))
            chosen = np.array([row for row, _ in part])
            batch = sequence_batch(cache, chosen, [anchors for _, anchors in part], block_size, self.embedding)
            yield chosen, widened(batch, _ANCHORS)


def _progress(steps: range) -> Iterator[int]:
    return iter(tqdm(steps, desc="evaluate", unit="batch", leave=False, disable=None))


def walk(blocks: Blocks) -> np.ndarray:
    """The blocks that live decoding visits, as indices: from a row's first anchor, each step forward by accepted + 1.

    Proposals depend only on the anchor, so the walk needs no decoding. Every anchor of a row must be in `blocks`.
    """
    order = np.lexsort((blocks.anchor, blocks.row))
    taken: list[int] = []
    row, following = -1, -1
    for i in order:
        if blocks.row[i] != row:
            row, following = blocks.row[i], blocks.anchor[i]
        if blocks.anchor[i] == following:
            taken.append(int(i))
            following += int(blocks.accept_len[i]) + 1
    return np.array(taken, int)


def _spread(values: np.ndarray, name: str, percentiles: Sequence[int]) -> dict[str, float]:
    return {f"{name}_mean": float(values.mean())} | {
        f"{name}_p{p}": float(np.percentile(values, p)) for p in percentiles
    }


def summarise(blocks: Blocks, block_size: int) -> dict[str, Any]:
    """The figures of evaluated blocks; only blocks with all S-1 labels count.

    Their keys are those of earlier scripts (accept_rate_tokens, token_acc_*, by_ctx_pos_start) and of
    `metrics.acceptance`.
    """
    whole = blocks.labels == block_size - 1
    accepted, token_acc = blocks.accept_len[whole], blocks.right[whole] / (block_size - 1)
    if not len(accepted):
        raise ConfigError(f"no block of {block_size} slots fits these rows: they need longer answers")
    starts = blocks.ctx_pos_start[whole]
    by_start = {
        str(start): {
            "n": int((starts == start).sum()),
            **_spread(accepted[starts == start], "accept_len", (50, 90)),
            "tok_acc_mean": float(token_acc[starts == start].mean()),
        }
        for start in np.unique(starts).tolist()
    }
    return {
        "num_samples": len(accepted),
        **_spread(accepted, "accept_len", (50, 90, 99)),
        "accept_rate_tokens": float(accepted.sum() / (len(accepted) * (block_size - 1))),
        **_spread(token_acc, "token_acc", (50, 90)),
        "by_ctx_pos_start": by_start,
        **metrics.acceptance([accepted.tolist()], block_size),
    }
