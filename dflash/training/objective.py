"""What training minimises and evaluation counts: the draft's proposals for many blocks against what the target said."""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from dflash.config import ConfigError, DraftConfig
from dflash.models.draft import Draft, proposed_tokens
from dflash.models.layers import precision
from dflash.training.batches import Batch
from dflash.training.loss import KINDS, cross_entropy, head_rows, position_weights, top_tokens

# What `block_sums` gives.
SUMS = ("weighted", "weight", "nll", "taught", "right", "labels", "accepted", "blocks")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Objective:
    """How slots weigh in the loss (`position_weights`) and how much of the vocabulary is multiplied at a time."""

    weights: str = "dpace"
    gamma: float = 4.0
    alpha: float = 0.5
    chunk: int = 2048

    def __post_init__(self) -> None:
        faults = [] if self.weights in KINDS else [f"weights must be one of {list(KINDS)}, got {self.weights!r}"]
        if not 0 < self.gamma < math.inf:
            faults.append(f"gamma must be a number above 0, got {self.gamma}")
        if not 0 <= self.alpha <= 1:
            faults.append(f"alpha must be 0 to 1, got {self.alpha}")
        if self.chunk < 1:
            faults.append(f"chunk must be at least 1, got {self.chunk}")
        if faults:
            raise ConfigError("; ".join(faults))


def block_hidden(draft: Draft, batch: Batch, mask_embedding: Array, *, remat: bool = False) -> Array:
    """The draft's columns for the drafted slots of every block, [H, B*A*(S-1)].

    mask_embedding [H] is the target's; a draft with a learned mask uses its own.
    """
    B, A, drafted = batch.labels.shape
    H = mask_embedding.shape[0]
    features = jax.lax.bitcast_convert_type(jnp.asarray(batch.features), jnp.bfloat16)
    columns = features.astype(draft.dtype).transpose(2, 0, 1).reshape(-1, H, B * features.shape[1])
    masks = jnp.broadcast_to(mask_embedding.astype(draft.dtype), (B, A, drafted, H))
    anchor = jnp.asarray(batch.anchor_embedding).astype(draft.dtype)[:, :, None]
    x = draft.masked(jnp.concatenate([anchor, masks], axis=2).reshape(-1, H).T, drafted + 1)
    anchors, starts = jnp.asarray(batch.anchors), jnp.asarray(batch.starts)
    hidden = draft.uncached(list(columns), anchors, x, starts, remat=remat)
    return hidden.reshape(H, B * A, drafted + 1)[:, :, 1:].reshape(H, -1)


# nll of a label that the draft does not propose: finite, so that a weight of 0 takes it out of every sum.
NEVER = 1e4


def trained_head(config: DraftConfig, head: Array | np.ndarray) -> Array | np.ndarray:
    """The rows of the target's head [V, H] for the tokens that the draft proposes."""
    ids = proposed_tokens(config)
    return head if ids is None else head[ids]


def _places(ids: np.ndarray, vocab_size: int) -> Array:
    """Where each token of the vocabulary is among `ids`, int32 [V]; -1 for those that are not."""
    places = np.full(vocab_size, -1, np.int32)
    places[ids] = np.arange(len(ids))
    return jnp.asarray(places)


class Predictions(NamedTuple):
    """What a draft says of the drafted slots of blocks, each [B, A, S-1].

    nll float32: of the label, over the tokens that the draft proposes; NEVER where the label is none of them.
    choice_nll float32: the selector's, among its candidates; 0 where the label is none of them, and for a draft without
    a selector. best int32: what the draft says; a selector is told the label before, as it will have chosen it wherever
    the slot counts for an accept length.
    """

    nll: Array
    choice_nll: Array
    best: Array


def predict_blocks(
    draft: Draft,
    batch: Batch,
    mask_embedding: Array,
    head: Array,
    *,
    vocab_size: int,
    chunk: int,
    axis: str | None = None,
    remat: bool = False,
) -> Predictions:
    """The draft's word on every drafted slot of a batch.

    head [V, H] (`trained_head`), or this device's rows of it when `axis` names the mesh axis that splits them.
    """
    x = block_hidden(draft, batch, mask_embedding, remat=remat)
    shape, tokens = batch.labels.shape, jnp.asarray(batch.labels)
    ids = proposed_tokens(draft.config)
    labels = tokens.reshape(-1) if ids is None else _places(ids, draft.config.vocab_size)[tokens.reshape(-1)]
    proposed = labels >= 0
    sharding: dict[str, Any] = {"chunk": chunk, "vocab_size": vocab_size, "axis": axis}
    nll, best = cross_entropy(x, jnp.maximum(labels, 0), head, **sharding)
    nll = jnp.where(proposed, nll, NEVER)
    choice = jnp.zeros_like(nll)
    if draft.selector is not None:
        previous = jnp.concatenate([jnp.asarray(batch.anchor_ids)[:, :, None], tokens[:, :, :-1]], axis=2).reshape(-1)
        rows = top_tokens(x, head, k=draft.selector.top_k, **sharding)
        candidates = rows if ids is None else jnp.asarray(ids)[rows]
        logits = jnp.einsum("nkh,hn->nk", head_rows(head, rows, axis), x, precision=precision(x.dtype))
        scores = logits + draft.selector.follow(draft.selector.hidden(x), previous, candidates)
        is_label = rows == labels[:, None]
        likelihood = jnp.where(is_label, jax.nn.log_softmax(scores.astype(jnp.float32), axis=1), 0)
        choice = -likelihood.sum(axis=1)
        best = jnp.take_along_axis(rows, scores.argmax(axis=1)[:, None], axis=1)[:, 0]
    best = best if ids is None else jnp.asarray(ids)[best]
    return Predictions(nll.reshape(shape), choice.reshape(shape), best.reshape(shape))


def accept_lens(best: Array, labels: Array) -> Array:
    """Drafted tokens in a row that are right, int32 [...], 0..S-1, of best and labels [..., S-1]."""
    return jnp.cumprod((best == labels).astype(jnp.int32), axis=-1).sum(axis=-1)


def block_sums(predictions: Predictions, batch: Batch, objective: Objective) -> dict[str, Array]:
    """Sums over the blocks of a batch, float32 scalars: what losses and means are made of.

    weighted / weight is the loss: nats per label whatever the kind of weights, as SpecForge has it (speculators
    divides by the counted slots; for D-PACE that makes the step grow with the draft's skill). A selector's likelihood
    counts as much as the network's. `accepted` counts over `blocks`, those whose labels all count. A label that the
    draft does not propose teaches nothing, and is wrong.
    """
    nll, choice_nll, best = predictions
    S = nll.shape[-1]
    mask = jnp.asarray(batch.mask)
    taught = jnp.where(nll < NEVER, mask, 0)
    weights = position_weights(
        objective.weights,
        nll.reshape(-1, S),
        taught.reshape(-1, S),
        gamma=objective.gamma,
        alpha=objective.alpha,
    ).reshape(mask.shape)
    whole = mask.min(axis=-1)
    return {
        "weighted": (weights * (nll + choice_nll)).sum(),
        "weight": weights.sum(),
        "nll": (taught * nll).sum(),
        "taught": taught.sum(),
        "right": (mask * (best == batch.labels)).sum(),
        "labels": mask.sum(),
        "accepted": (whole * accept_lens(best, jnp.asarray(batch.labels))).sum(),
        "blocks": whole.sum(),
    }


def means(sums: dict[str, Any]) -> dict[str, float]:
    """Figures from sums: loss, cross_entropy (nats per taught label, unweighted), token_acc and accept_len_mean."""

    def ratio(above: str, below: str) -> float:
        return float(sums[above]) / (float(sums[below]) or 1.0)

    return {
        "loss": ratio("weighted", "weight"),
        "cross_entropy": ratio("nll", "taught"),
        "token_acc": ratio("right", "labels"),
        "accept_len_mean": ratio("accepted", "blocks"),
    }
