"""The ways to decode, a record each, and how the target verifies a block in them.

What depends on the mode is asked of its record: nothing else compares names of modes.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from dflash.decoding.accept import accept_length
from dflash.decoding.sampling import Draws, next_tokens
from dflash.models import mesh
from dflash.models.kv_cache import KVCache
from dflash.models.llama import Llama

# What the target says of a block: predictions [B, S], accept lengths [B], context features, the cache (uncommitted).
Verified = tuple[Array, Array, list[Array], KVCache]
# (target, whose draws, layers whose outputs the draft reads, cache, done bool [B], candidates int32 [B, S]) -> Verified
Verify = Callable[[Llama, Draws | None, Sequence[int], KVCache, Array, Array], Verified]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Mode:
    """One way to decode.

    name     what users and results call it
    short    what the ids of benchmark cases call it; empty where none is measured
    drafts   whether it needs a draft; None where it decodes with or without
    cached   whether the loop on the device runs it
    verify   how the loop asks the target about a block; None where nothing is verified
    whole    whether that is one forward pass over the whole block: only this can be faster than greedy decoding
    """

    name: str
    short: str = ""
    drafts: bool | None
    cached: bool = True
    verify: Verify | None = None
    whole: bool = False


def _verify_block(
    target: Llama, draws: Draws | None, layer_ids: Sequence[int], cache: KVCache, done: Array, candidates: Array
) -> Verified:
    """One target forward for the whole block."""
    del done  # an ended row rides along
    with jax.named_scope("verify"):
        x, features, appended = target.hidden(candidates, layer_ids=layer_ids, cache=cache)
        predictions = next_tokens(target, draws, x, cache.positions(candidates.shape[1]))
    assert appended is not None
    return predictions, accept_length(candidates, predictions), features, appended


def _verify_sequentially(
    target: Llama, draws: Draws | None, layer_ids: Sequence[int], cache: KVCache, done: Array, candidates: Array
) -> Verified:
    """One target forward per token, each committed before the next; ends when no row agrees any more."""
    batch, block = candidates.shape
    hidden, lengths = target.config.hidden_size, cache.lengths

    def verify_one(carry: tuple[Any, ...]) -> tuple[Any, ...]:
        k, agreed, predictions, accepted, features, cache = carry
        token = jax.lax.dynamic_slice_in_dim(candidates, k, 1, axis=1)
        x, outputs, appended = target.hidden(token, layer_ids=layer_ids, cache=cache)
        assert appended is not None
        prediction = next_tokens(target, draws, x, cache.positions(1))
        predictions = jax.lax.dynamic_update_slice_in_dim(predictions, prediction, k, axis=1)
        features = [
            jax.lax.dynamic_update_slice_in_dim(f, o[:, :, None], k, axis=2)
            for f, o in zip(features, outputs, strict=True)
        ]
        following = jnp.take_along_axis(candidates, jnp.full((batch, 1), jnp.minimum(k + 1, block - 1)), axis=1)
        agreed_next = agreed & (k + 1 < block) & (following == prediction)[:, 0]
        return k + 1, agreed_next, predictions, accepted + agreed_next, features, appended.commit(agreed)

    def unfinished(carry: tuple[Any, ...]) -> Array:
        return ~mesh.everywhere(~carry[1].any())

    features = [jnp.zeros((hidden, batch, block), target.dtype) for _ in layer_ids]
    zeros = jnp.zeros(batch, jnp.int32)
    start = (jnp.int32(0), ~done, jnp.zeros_like(candidates), zeros, features, cache)
    with jax.named_scope("verify"):
        _, _, predictions, accepted, features, cache = jax.lax.while_loop(unfinished, verify_one, start)
    return predictions, accepted, [f.reshape(hidden, -1) for f in features], cache.rollback(lengths)


GREEDY = Mode(name="greedy", drafts=False)
SEQUENTIAL = Mode(name="cached_sequential_verify", short="seq", drafts=True, verify=_verify_sequentially)
BLOCK = Mode(name="cached_block_verify", short="block", drafts=True, verify=_verify_block, whole=True)
RECOMPUTE = Mode(name="recompute", drafts=None, cached=False)

MODES = {mode.name: mode for mode in (GREEDY, BLOCK, SEQUENTIAL, RECOMPUTE)}
# Those that a benchmark or an audit compares with greedy decoding.
VERIFYING = tuple(mode for mode in MODES.values() if mode.verify)
