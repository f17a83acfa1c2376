"""Offline acceptance: what a draft proposes at the anchors of a teacher cache, against what the target said there.

On held-out prompts unless told otherwise: what a draft scores on the rows it was trained on says nothing. For a cache
in sequence form the blocks that live decoding would go through are walked too, and their mean is live decoding's.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax import Array
from tqdm import tqdm

from dflash import metrics
from dflash.config import ConfigError
from dflash.models.draft import Draft
from dflash.teacher_cache.sequences import SequenceCache
from dflash.teacher_cache.windows import WindowCache
from dflash.training.batches import Batch, anchor_candidates, sequence_batch, widened, window_batch
from dflash.training.objective import predict_blocks, trained_head

SPLITS = ("held_out", "train", "all")
_ANCHORS = 32


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Blocks:
    """One entry per evaluated block: its row in the cache, its anchor, accept_len 0..S-1, labels that it got right,

    labels that it had (fewer than S-1 at the end of a sequence), and the position of its row's first token.
    """

    row: np.ndarray
    anchor: np.ndarray
    accept_len: np.ndarray
    right: np.ndarray
    labels: np.ndarray
    ctx_pos_start: np.ndarray

    def take(self, chosen: np.ndarray) -> "Blocks":
        """These blocks only: indices, or a mask."""
        return Blocks(**{f.name: getattr(self, f.name)[chosen] for f in dataclasses.fields(self)})


def check_fit(draft: Draft, cache: SequenceCache | WindowCache) -> None:
    """Raises ConfigError with every reason why these features are not what this draft reads."""
    c = draft.config
    faults = []
    if cache.feature_layer_ids != c.target_layer_ids:
        faults.append(
            f"it reads the outputs of layers {list(c.target_layer_ids)}, the cache holds those of "
            f"{list(cache.feature_layer_ids)}"
        )
    if cache.hidden_size != c.hidden_size:
        faults.append(f"its hidden size is {c.hidden_size}, the cache's {cache.hidden_size}")
    if cache.max_block_size is not None and c.block_size > cache.max_block_size:
        faults.append(f"its blocks have {c.block_size} slots, the cache's labels serve {cache.max_block_size}")
    if c.selector is not None and isinstance(cache, WindowCache) and not cache.has_anchor_ids:
        faults.append("its selector follows the anchor, and this old cache does not say which token that is")
    if faults:
        raise ConfigError("the draft does not fit the teacher cache: " + "; ".join(faults))


@partial(jax.jit, static_argnames=("graph", "chunk"))
def _best(graph: Any, weights: Any, batch: Batch, mask_embedding: Array, head: Array, chunk: int) -> Array:
    draft = nnx.merge(graph, weights)
    return predict_blocks(draft, batch, mask_embedding, head, vocab_size=head.shape[0], chunk=chunk).best


class Evaluator:
    """Scores drafts with one target's embedding [V, H] and head [V, H]."""

    def __init__(self, embedding: np.ndarray, head: np.ndarray, *, chunk: int = 2048, batch_size: int = 4):
        self.embedding = embedding
        self._head: Array | None = None
        self._head_of: tuple[Any, bytes | None] | None = None
        self._raw_head, self.chunk, self.batch_size = head, chunk, batch_size

    def _score(self, draft: Draft, batches: Iterator[tuple[np.ndarray, Batch]]) -> Blocks:
        of = draft.dtype, draft.config.vocabulary
        if self._head is None or self._head_of != of:
            self._head, self._head_of = jax.numpy.asarray(trained_head(draft.config, self._raw_head), draft.dtype), of
        graph, weights = nnx.split(draft)
        mask_embedding = jax.numpy.asarray(self.embedding[draft.config.mask_token_id], draft.dtype)
        found: dict[str, list[np.ndarray]] = {f.name: [] for f in dataclasses.fields(Blocks)}
        for rows, batch in batches:
            best = np.asarray(_best(graph, weights, batch, mask_embedding, self._head, self.chunk))
            real = batch.mask[:, :, 0] > 0
            # A label that is not there is never right: it ends the block.
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
                found[name].append(value[real])
        return Blocks(**{name: np.concatenate(parts) for name, parts in found.items()})

    def score(self, draft: Draft, cache: SequenceCache | WindowCache, rows: np.ndarray) -> Blocks:
        """The draft at the anchor of each of these windows, or at every anchor of each of these sequences.

        Raises ConfigError when the cache holds other features than the draft reads.
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
            # One shape for all: the last batch is filled up with a piece whose anchors are none.
            part += [(part[0][0], part[0][1][:0])] * (self.batch_size - len(part))
            chosen = np.array([row for row, _ in part])
            batch = sequence_batch(cache, chosen, [anchors for _, anchors in part], block_size, self.embedding)
            yield chosen, widened(batch, _ANCHORS)


def _progress(steps: range) -> Iterator[int]:
    return iter(tqdm(steps, desc="evaluate", unit="batch", leave=False, disable=None))


def walk(blocks: Blocks) -> np.ndarray:
    """The blocks that live decoding goes through, as indices: from a row's first anchor, on by what was accepted + 1.

    Proposals follow from the anchor alone, so the walk needs no decoding. Every anchor of a row must be in `blocks`.
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
    """The figures of evaluated blocks: the keys of earlier scripts (accept_rate_tokens, token_acc_*,

    by_ctx_pos_start), and those of `metrics.acceptance`. Only blocks with all S-1 labels count.
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
