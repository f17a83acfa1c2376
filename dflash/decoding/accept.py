"""The accept rule as pure functions: which drafted tokens the target agrees with, and how many tokens a row emits."""

import jax.numpy as jnp
from jax import Array


def accept_length(candidates: Array, predictions: Array) -> Array:
    """How many drafted tokens of each block the target agrees with, int32 [B], 0..S-1.

    candidates [B, S]: the anchor, then the drafted tokens. predictions [B, S]: the target's greedy token after each
    of them. Drafted token k is right if it is what the target predicts after token k-1; the first wrong one ends it.
    The target's own next token (the bonus) is predictions[b, accept_length[b]] and is not counted here.
    """
    agree = candidates[:, 1:] == predictions[:, :-1]
    return jnp.cumprod(agree.astype(jnp.int32), axis=1).sum(axis=1)


def produced_length(predictions: Array, accepted: Array, budget: Array, stops: Array) -> tuple[Array, Array]:
    """How many tokens of each block are emitted, and whether the row ends there: int32 [B], bool [B].

    Emitted is predictions[:accepted + 1] (accepted tokens and bonus), cut after the first stop token and at `budget`
    int32 [B] tokens left. stops int32 [B, N], padded with -1.
    """
    width = predictions.shape[1]
    limit = jnp.minimum(accepted + 1, budget)
    is_stop = (predictions[:, :, None] == stops[:, None, :]).any(axis=2)
    first_stop = jnp.where(is_stop.any(axis=1), jnp.argmax(is_stop, axis=1), width)
    produced = jnp.minimum(limit, first_stop + 1)
    return produced, (produced >= budget) | (first_stop < limit)
