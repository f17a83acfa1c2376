"""What training minimises and evaluation counts: the draft's proposals for many blocks against the target's tokens."""

import dataclasses
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jax import Array

from dflash.config import Checked, Count, DraftConfig, Positive, Share
from dflash.models.draft import Draft, proposed_tokens
from dflash.models.layers import precision
from dflash.training.batches import Batch
from dflash.training.loss import Weighting, cross_entropy, head_rows, position_weights, top_tokens

# The keys of `block_sums`.
SUMS = ("weighted", "weight", "nll", "taught", "right", "labels", "accepted", "blocks")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Objective(Checked):
    """How slots are weighted (`position_weights`), and how many rows of the vocabulary are multiplied at a time."""

    weights: Annotated[Weighting, tyro.conf.arg(name="position-weights")] = "dpace"
    """How the slots of a block are weighted in the loss."""
    gamma: Annotated[Positive, tyro.conf.arg(name="decay-gamma")] = 4.0
    """decay: slots until the weight has fallen to 1/e."""
    alpha: Annotated[Share, tyro.conf.arg(name="dpace-alpha")] = 0.5
    """dpace: 1 is uniform in the draft's confidence, 0 trusts it entirely."""
    chunk: Annotated[Count, tyro.conf.arg(name="vocab-chunk-size")] = 2048
    """Rows of the head multiplied at a time."""


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


# nll of a label that the draft does not propose: finite, so that a weight of 0 removes it from every sum.
NEVER = 1e4


def trained_head(config: DraftConfig, head: Array | np.ndarray) -> Array | np.ndarray:
    """The rows of the target's head [V, H] for the tokens that the draft proposes."""
    ids = proposed_tokens(config)
    return head if ids is None else head[ids]


def _places(ids: np.ndarray, vocab_size: int) -> Array:
    """The index of each token of the vocabulary in `ids`, int32 [V]; -1 for tokens not in it."""
    places = np.full(vocab_size, -1, np.int32)
    places[ids] = np.arange(len(ids))
    return jnp.asarray(places)


class Predictions(NamedTuple):
    """A draft's predictions for the drafted slots of blocks, each [B, A, S-1].

    nll float32: of the label, over the tokens that the draft proposes; NEVER if the label is not among them. choice_nll
    float32: the selector's, among its candidates; 0 where the label is none of them, and for a draft without a
    selector. best int32: the draft's choice; a selector gets the preceding label, which it will have chosen wherever
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
    """The draft's predictions for every drafted slot of a batch.

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
    """Drafted tokens that are right before the first wrong one, int32 [...], of best and labels [..., S-1]."""
    return jnp.cumprod((best == labels).astype(jnp.int32), axis=-1).sum(axis=-1)


def block_sums(predictions: Predictions, batch: Batch, objective: Objective) -> dict[str, Array]:
    """Sums over the blocks of a batch, float32 scalars, from which losses and means are computed.

    weighted / weight is the loss: nats per label whatever the kind of weights, as SpecForge has it (speculators divides
    by the counted slots; for D-PACE that makes the step grow with the draft's skill). A selector's loss counts as much
    as the network's. `accepted` counts over `blocks`, those whose labels all count. A label that the draft does not
    propose teaches nothing and counts as wrong.
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
