"""The training objective: cross-entropy of the draft's block slots over the whole vocabulary, weighted by position.

The head is the target's and frozen, so a column's gradient, E_softmax[W] - W[label], is known once its softmax is: it
is accumulated beside the softmax, chunk by chunk, as flash attention accumulates its output. Value and gradient then
cost two products with the head instead of three, and no array holds [V, N].
"""

import functools
import math
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jax import Array, lax

from dflash.models.bfloat16 import transposed
from dflash.models.layers import precision

Weighting = Literal["uniform", "decay", "dpace"]
# The maximum before any row of the vocabulary is seen; not -inf, because -inf minus itself is NaN.
_LOWEST = float(jnp.finfo(jnp.float32).min)


class _Running(NamedTuple):
    """The state of N columns after some rows of the head; float32 except `best`."""

    top: Array  # [N] largest logit
    best: Array  # int32 [N] its token, the lowest of equals
    total: Array  # [N] sum of exp(logit - top)
    gold: Array  # [N] the label's logit, 0 while unseen
    rows: Array  # [H, N] sum of exp(logit - top) * row of the head; [0, N] without a gradient


def pad_head(head: Array, shards: int) -> Array:
    """Head [V, H] padded with rows of zeros so that `shards` divides it; `vocab_size=V` then excludes them."""
    missing = -head.shape[0] % shards
    return jnp.pad(head, ((0, missing), (0, 0))) if missing else head


def cross_entropy(
    x: Array, labels: Array, head: Array, *, chunk: int, axis: str | None = None, vocab_size: int | None = None
) -> tuple[Array, Array]:
    """-log softmax(head @ x)[label] of each column, float32 [N], and each column's likeliest token, int32 [N].

    x [H, N] after the draft's final norm, labels int32 [N] in 0 .. V-1 (not checked), head [V, H]. The logits of
    `chunk` rows exist at a time; they and all sums are float32. No gradient flows to the head, and there is no
    forward-mode derivative. (XLA for CPUs makes one float32 copy of a bfloat16 head before it takes chunks of it.)

    Inside shard_map, `axis` names the mesh axis that the head's rows are split over (`pad_head` makes them divide):
    head is this device's shard, x and labels are the same on every device of the axis, and so are the results and x's
    gradient, which is complete and needs no sum over `axis`. Rows from `vocab_size` on are padding.
    """
    rows = head.shape[0] * (1 if axis is None else lax.axis_size(axis))
    V = rows if vocab_size is None else vocab_size
    if x.ndim != 2 or head.shape[1:] != x.shape[:1] or labels.shape != x.shape[1:]:
        raise ValueError(f"x [H, N], labels [N], head [V, H] don't fit: {x.shape}, {labels.shape}, {head.shape}")
    if chunk < 1 or not 1 <= V <= rows:
        raise ValueError(f"chunk is at least 1 and vocab_size in 1..{rows} (the head's rows), got {chunk} and {V}")
    return _cross_entropy(x, labels, head, min(chunk, head.shape[0]), axis, V)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _cross_entropy(x: Array, labels: Array, head: Array, chunk: int, axis: str | None, V: int) -> tuple[Array, Array]:
    return _whole(_run(x, labels, head, chunk, axis, V, gradient=False), axis)[:2]


def _forward(
    x: Array, labels: Array, head: Array, chunk: int, axis: str | None, V: int
) -> tuple[tuple[Array, Array], Array]:
    """The results, and nll's gradient [H, N] in x's dtype for `_backward` to scale."""
    run = _run(x, labels, head, chunk, axis, V, gradient=True)
    nll, best, scale = _whole(run, axis)
    local = labels - _first_row(head, axis)
    mine = (local >= 0) & (local < head.shape[0])
    gold = jnp.where(mine[:, None], head[jnp.clip(local, 0, head.shape[0] - 1)], 0).T.astype(jnp.float32)
    return (nll, best), _sum(run.rows * scale - gold, axis).astype(x.dtype)


def _backward(
    chunk: int,  # noqa: ARG001  custom_vjp passes every static argument
    axis: str | None,  # noqa: ARG001
    V: int,  # noqa: ARG001
    gradient: Array,
    cotangents: tuple[Array, Array],
) -> tuple[Array, None, None]:
    return (gradient.astype(jnp.float32) * cotangents[0]).astype(gradient.dtype), None, None


_cross_entropy.defvjp(_forward, _backward)


def _run(x: Array, labels: Array, head: Array, chunk: int, axis: str | None, V: int, *, gradient: bool) -> _Running:
    """Goes through the rows of this device's head [rows, H], `chunk` at a time."""
    rows, H = head.shape
    N = labels.shape[0]
    offset = _first_row(head, axis)
    dtype = jnp.promote_types(x.dtype, head.dtype)
    dot = functools.partial(jnp.einsum, precision=precision(dtype), preferred_element_type=jnp.float32)
    turned = transposed if dtype == jnp.bfloat16 else jnp.transpose
    nothing = _Running(
        top=jnp.full(N, _LOWEST, jnp.float32),
        best=jnp.zeros(N, jnp.int32),
        total=jnp.zeros(N, jnp.float32),
        gold=jnp.zeros(N, jnp.float32),
        rows=jnp.zeros((H if gradient else 0, N), jnp.float32),
    )
    x = x.astype(dtype)

    def step(i: Array, seen: _Running) -> _Running:
        # The rows left over by `chunk` are covered by one more chunk that ends with the head and overlaps the one
        # before, so nothing is copied or padded.
        start = jnp.minimum(i * chunk, rows - chunk)
        part = lax.dynamic_slice_in_dim(head, start, chunk).astype(dtype)
        tokens = offset + start + jnp.arange(chunk, dtype=jnp.int32)
        fresh = (tokens >= offset + i * chunk) & (tokens < V)
        logits = jnp.where(fresh[:, None], dot("vh,hn->vn", part, x), -jnp.inf)
        highest = logits.max(axis=0)
        # Not argmax, which on a CPU visits all entries one at a time.
        first = jnp.where(logits == highest, tokens[:, None], V).min(axis=0)
        top = jnp.maximum(seen.top, highest)
        shrink = jnp.exp(seen.top - top)
        weights = jnp.exp(logits - top)
        slot = labels - offset - start
        here = (slot >= i * chunk - start) & (slot < chunk)
        gold = jnp.take_along_axis(logits, jnp.clip(slot, 0, chunk - 1)[None], axis=0)[0]
        return _Running(
            top=top,
            best=jnp.where(highest > seen.top, first, seen.best),
            total=seen.total * shrink + weights.sum(axis=0),
            gold=jnp.where(here, gold, seen.gold),
            rows=seen.rows * shrink + dot("hv,vn->hn", turned(part), weights.astype(dtype)) if gradient else seen.rows,
        )

    # The first chunk is outside the loop, so that the carry varies over the same mesh axes before and after a step.
    return lax.fori_loop(1, math.ceil(rows / chunk), step, step(jnp.int32(0), nothing))


def _whole(run: _Running, axis: str | None) -> tuple[Array, Array, Array]:
    """Over all shards: nll [N], best [N], and the factor for this shard's `rows` [N]."""
    top, best = run.top, run.best
    if axis is not None:
        top = lax.pmax(run.top, axis)
        best = lax.pmin(jnp.where(run.top < top, jnp.iinfo(jnp.int32).max, best), axis)
    shrink = jnp.exp(run.top - top)
    total = _sum(run.total * shrink, axis)
    # In this order it is 0, never below, if the label has all the probability.
    return (top - _sum(run.gold, axis)) + jnp.log(total), best, shrink / total


def top_tokens(
    x: Array, head: Array, *, k: int, chunk: int, axis: str | None = None, vocab_size: int | None = None
) -> Array:
    """The `k` likeliest tokens of each column of x [H, N], int32 [N, k], the likeliest first. Not differentiable.

    `chunk`, `axis` and `vocab_size` as in `cross_entropy`; among equals the lowest ids.
    """
    rows, N = head.shape[0], x.shape[1]
    V = rows * (1 if axis is None else lax.axis_size(axis)) if vocab_size is None else vocab_size
    dtype = jnp.promote_types(x.dtype, head.dtype)
    chunk, offset = min(chunk, rows), _first_row(head, axis)
    x = lax.stop_gradient(x).astype(dtype)

    def largest(logits: Array, tokens: Array) -> tuple[Array, Array]:
        kept, places = lax.top_k(logits, min(k, logits.shape[1]))
        return kept, jnp.take_along_axis(tokens, places, axis=1)

    def step(i: Array, seen: tuple[Array, Array]) -> tuple[Array, Array]:
        start = jnp.minimum(i * chunk, rows - chunk)
        part = lax.dynamic_slice_in_dim(head, start, chunk).astype(dtype)
        tokens = offset + start + jnp.arange(chunk, dtype=jnp.int32)
        fresh = (tokens >= offset + i * chunk) & (tokens < V)
        logits = jnp.einsum("vh,hn->nv", part, x, precision=precision(dtype), preferred_element_type=jnp.float32)
        candidates = largest(jnp.where(fresh, logits, -jnp.inf), jnp.broadcast_to(tokens, (N, chunk)))
        return largest(*(jnp.concatenate(pair, axis=1) for pair in zip(seen, candidates, strict=True)))

    nothing = jnp.full((N, k), -jnp.inf, jnp.float32), jnp.full((N, k), V - 1, jnp.int32)
    best = lax.fori_loop(0, math.ceil(rows / chunk), step, nothing)
    if axis is not None:
        best = largest(*(lax.all_gather(part, axis, axis=1, tiled=True) for part in best))
    return best[1]


def head_rows(head: Array, tokens: Array, axis: str | None = None) -> Array:
    """Rows of the head [V, H] (with `axis`, of all shards of it) of tokens int32 [...] -> [..., H]. A constant."""
    local = tokens - _first_row(head, axis)
    mine = (local >= 0) & (local < head.shape[0])
    rows = head[jnp.clip(local, 0, head.shape[0] - 1)]
    return lax.stop_gradient(_sum(jnp.where(mine[..., None], rows, 0), axis))


def _first_row(head: Array, axis: str | None) -> Array:
    """The token of this device's first row, int32 []."""
    return jnp.int32(0) if axis is None else lax.axis_index(axis).astype(jnp.int32) * head.shape[0]


def _sum(x: Array, axis: str | None) -> Array:
    return x if axis is None else lax.psum(x, axis)


def position_weights(kind: str, nll: Array, mask: Array, *, gamma: float, alpha: float) -> Array:
    """How much each slot of a block counts, float32 [..., S-1]; a constant for differentiation.

    nll and mask [..., S-1], slot 1 first; mask is 1 where the slot has a label that counts, else 0.
    uniform: the mask. decay: exp(-(k-1) / gamma) for slot k (SpecForge and speculators). dpace: with q the probability
    that the draft gives the label, s = (1 - alpha) q + alpha and P_k = s_1 .. s_k, slot k counts the sum of P over
    itself and the counted slots after it, since a rejected slot forfeits those (D-PACE, as speculators has it).
    """
    if kind not in get_args(Weighting):
        raise ValueError(f"position weights are one of {', '.join(get_args(Weighting))}, got {kind!r}")
    counts = mask.astype(jnp.float32)
    if kind == "decay":
        counts *= jnp.exp(-jnp.arange(nll.shape[-1], dtype=jnp.float32) / gamma)
    elif kind == "dpace":
        reached = jnp.cumprod((1 - alpha) * jnp.exp(-nll.astype(jnp.float32)) + alpha, axis=-1)
        counts *= lax.cumsum(reached * counts, axis=nll.ndim - 1, reverse=True)
    return lax.stop_gradient(counts)
