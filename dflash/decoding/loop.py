"""One decode loop, all on the device: propose, verify, commit, until every row has stopped.

Greedy decoding, sequential verify and block verify are three ways to run the same loop: they differ in how the next
predictions of the target are found, and in nothing else. A `Decoder` compiles its two programs (prefill and loop) once
for one shape; `State` is all that lives on the device between them.
"""

import dataclasses
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from dflash.decoding.accept import accept_length, produced_length
from dflash.kv_cache import KVCache
from dflash.models.draft import Draft, proposed_tokens
from dflash.models.layers import multiply
from dflash.models.llama import Llama

PREFILL_CHUNK = 128


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class State:
    """All that a decode holds on the device. B rows, blocks of S tokens, N the largest budget.

    anchor int32 [B]: the newest token, emitted and not yet in a cache. tokens int32 [B, N + S]: what was emitted, valid
    up to count int32 [B]. accepted, produced int32 [B, N]: per step, -1 where a row had ended. script int32 [B, M]:
    tokens to propose instead of the draft's own, by place in the output; -1 leaves the draft's.
    """

    cache: KVCache
    draft_cache: KVCache | None
    anchor: Array
    tokens: Array
    count: Array
    done: Array
    accepted: Array
    produced: Array
    step: Array
    budget: Array
    stops: Array
    script: Array


def _write_rows(buffer: Array, rows: Array, starts: Array) -> Array:
    """rows [B, S] into buffer [B, N] at column starts [B]."""
    return jax.vmap(lambda b, r, s: jax.lax.dynamic_update_slice(b, r, (s,)))(buffer, rows, starts)


def _greedy_tokens(target: Llama, x: Array, batch: int) -> Array:
    """Columns [H, B*T] -> the most likely token of each, int32 [B, T]; the lowest id of a tie."""
    return target.most_likely(x).reshape(batch, -1)


def draft_head(target: Llama, draft: Draft) -> Array | None:
    """The head's rows for the tokens that the draft proposes [M, H], gathered once; None for the whole head."""
    ids = proposed_tokens(draft.config)
    return None if ids is None else target.head_rows(ids)


def drafted_tokens(target: Llama, draft: Draft, head: Array | None, x: Array, anchors: Array) -> Array:
    """The draft's columns of whole blocks [H, B*S] behind anchors int32 [B] -> the tokens that it drafts [B, S-1].

    `head` is `draft_head`'s.
    """
    slots = x.reshape(x.shape[0], anchors.shape[0], -1)[:, :, 1:].reshape(x.shape[0], -1)
    read = slots.astype(target.dtype)
    return draft.choose(slots, target.logits(read) if head is None else multiply(head, read), anchors)


def propose(target: Llama, draft: Draft, head: Array | None, state: State, block_size: int) -> Array:
    """[anchor, drafted tokens] int32 [B, S] of every row. `head` is `draft_head`'s."""
    assert state.draft_cache is not None
    batch = state.anchor.shape[0]
    masks = jnp.full((batch, block_size - 1), draft.config.mask_token_id, jnp.int32)
    block = jnp.concatenate([state.anchor[:, None], masks], axis=1)
    with jax.named_scope("propose"):
        x = draft.masked(target.embed(block).astype(draft.dtype), block_size)
        drafted = drafted_tokens(target, draft, head, draft.block(x, state.draft_cache), state.anchor)
    places = state.count[:, None] + jnp.arange(block_size - 1)
    scripted = jnp.take_along_axis(state.script, jnp.minimum(places, state.script.shape[1] - 1), axis=1)
    drafted = jnp.where(scripted >= 0, scripted, drafted)
    return jnp.concatenate([state.anchor[:, None], drafted], axis=1)


# What the target says of a block: predictions [B, S], accept lengths [B], context features, the cache (uncommitted).
Verdict = tuple[Array, Array, list[Array], KVCache]


def _verify_block(target: Llama, layer_ids: Sequence[int], state: State, candidates: Array) -> Verdict:
    """One target forward for the whole block."""
    with jax.named_scope("verify"):
        x, features, cache = target.hidden(candidates, layer_ids=layer_ids, cache=state.cache)
        predictions = _greedy_tokens(target, x, candidates.shape[0])
    assert cache is not None
    return predictions, accept_length(candidates, predictions), features, cache


def _verify_sequentially(target: Llama, layer_ids: Sequence[int], state: State, candidates: Array) -> Verdict:
    """One target forward per token, each committed before the next; ends when no row agrees any more."""
    batch, block = candidates.shape
    hidden = target.config.hidden_size

    def verify_one(carry: tuple[Any, ...]) -> tuple[Any, ...]:
        k, agreed, predictions, accepted, features, cache = carry
        token = jax.lax.dynamic_slice_in_dim(candidates, k, 1, axis=1)
        x, outputs, cache = target.hidden(token, layer_ids=layer_ids, cache=cache)
        assert cache is not None
        prediction = _greedy_tokens(target, x, batch)
        predictions = jax.lax.dynamic_update_slice_in_dim(predictions, prediction, k, axis=1)
        features = [
            jax.lax.dynamic_update_slice_in_dim(f, o[:, :, None], k, axis=2)
            for f, o in zip(features, outputs, strict=True)
        ]
        following = jnp.take_along_axis(candidates, jnp.full((batch, 1), jnp.minimum(k + 1, block - 1)), axis=1)
        agreed_next = agreed & (k + 1 < block) & (following == prediction)[:, 0]
        return k + 1, agreed_next, predictions, accepted + agreed_next, features, cache.commit(agreed)

    def unfinished(carry: tuple[Any, ...]) -> Array:
        return carry[1].any()

    features = [jnp.zeros((hidden, batch, block), target.dtype) for _ in layer_ids]
    zeros = jnp.zeros(batch, jnp.int32)
    start = (jnp.int32(0), ~state.done, jnp.zeros_like(candidates), zeros, features, state.cache)
    with jax.named_scope("verify"):
        _, _, predictions, accepted, features, cache = jax.lax.while_loop(unfinished, verify_one, start)
    return predictions, accepted, [f.reshape(hidden, -1) for f in features], cache.rollback(state.cache.lengths)


def _advance(state: State, predictions: Array, accepted: Array, cache: KVCache, draft_cache: KVCache | None) -> State:
    """Commits what the target agrees with, and writes it out."""
    ended = state.done
    produced, ends = produced_length(predictions, accepted, state.budget - state.count, state.stops)
    produced = jnp.where(ended, 0, produced)
    last = jnp.take_along_axis(predictions, jnp.maximum(produced - 1, 0)[:, None], axis=1)[:, 0]

    def log(buffer: Array, values: Array) -> Array:
        return jax.lax.dynamic_update_slice_in_dim(buffer, jnp.where(ended, -1, values)[:, None], state.step, axis=1)

    return dataclasses.replace(
        state,
        cache=cache.commit(produced),
        draft_cache=None if draft_cache is None else draft_cache.commit(produced),
        anchor=jnp.where(ended, state.anchor, last),
        tokens=_write_rows(state.tokens, predictions, state.count),
        count=state.count + produced,
        done=ended | ends,
        accepted=log(state.accepted, accepted),
        produced=log(state.produced, produced),
        step=state.step + 1,
    )


def _step(mode: str, block_size: int, target: Llama, draft: Draft | None, head: Array | None, state: State) -> State:
    if mode == "greedy":
        nothing = jnp.zeros_like(state.anchor)
        x, _, cache = target.hidden(state.anchor[:, None], cache=state.cache)
        assert cache is not None
        return _advance(state, _greedy_tokens(target, x, state.anchor.shape[0]), nothing, cache, None)
    assert draft is not None
    assert state.draft_cache is not None
    verify = _verify_block if mode == "cached_block_verify" else _verify_sequentially
    candidates = propose(target, draft, head, state, block_size)
    predictions, accepted, features, cache = verify(target, draft.config.target_layer_ids, state, candidates)
    with jax.named_scope("commit"):
        draft_cache = draft.append_context(features, state.draft_cache)
        return _advance(state, predictions, accepted, cache, draft_cache)


# The target's, the draft's, and `draft_head`'s.
Weights = tuple[Any, Any, Array | None]


def _merge(graphs: tuple[Any, Any], weights: Weights) -> tuple[Llama, Draft | None]:
    return nnx.merge(graphs[0], weights[0]), None if graphs[1] is None else nnx.merge(graphs[1], weights[1])


def _run_loop(
    graphs: tuple[Any, Any], mode: str, block_size: int, weights: Weights, state: State, limit: Array
) -> State:
    """Steps until every row has ended or `state.step` reaches `limit`."""
    target, draft = _merge(graphs, weights)

    def unfinished(state: State) -> Array:
        return (state.step < limit) & ~state.done.all()

    return jax.lax.while_loop(unfinished, lambda s: _step(mode, block_size, target, draft, weights[2], s), state)


def _prefill_chunk(graphs: tuple[Any, Any], weights: Weights, state: State, tokens: Array, keep: Array) -> State:
    """The next chunk of every prompt, tokens int32 [B, C], the first `keep` [B] of them real; its end is answered."""
    target, draft = _merge(graphs, weights)
    batch, chunk = tokens.shape
    layer_ids = () if draft is None else draft.config.target_layer_ids
    x, features, cache = target.hidden(tokens, layer_ids=layer_ids, cache=state.cache)
    assert cache is not None
    draft_cache = state.draft_cache
    if draft is not None and draft_cache is not None:
        draft_cache = draft.append_context(features, draft_cache).commit(keep)
    last = jnp.maximum(keep - 1, 0)
    x = jnp.take_along_axis(x.reshape(-1, batch, chunk), last[None, :, None], axis=2)[:, :, 0]
    first = _greedy_tokens(target, x, batch)[:, 0]
    return dataclasses.replace(
        state,
        cache=cache.commit(keep),
        draft_cache=draft_cache,
        anchor=jnp.where(keep > 0, first, state.anchor),
    )


@jax.jit
def _emit_first(state: State) -> State:
    """The prompt's own next token is the first of the output."""
    produced, done = produced_length(state.anchor[:, None], jnp.zeros_like(state.anchor), state.budget, state.stops)
    return dataclasses.replace(state, tokens=state.tokens.at[:, 0].set(state.anchor), count=produced, done=done)


class Decoder:
    """The two compiled programs of one decode shape. Build once, `run` often; nothing compiles while it runs.

    `batch` rows, prompts of at most `max_prompt_len` tokens, budgets of at most `max_new_tokens`. `draft` None is
    greedy decoding. `compile_s` is what compiling took, in seconds.
    """

    def __init__(
        self,
        target: Llama,
        draft: Draft | None,
        *,
        mode: str,
        block_size: int,
        batch: int,
        max_prompt_len: int,
        max_new_tokens: int,
    ):
        assert (draft is None) == (mode == "greedy"), (draft, mode)
        self.target, self.draft, self.mode = target, draft, mode
        self.block_size = block_size if draft is not None else 1
        self.batch, self.max_new_tokens = batch, max_new_tokens
        self.chunk = min(PREFILL_CHUNK, _round_up(max_prompt_len, 16))
        self.prompt_len = _round_up(max_prompt_len, self.chunk)
        # The last prefill chunk and the last block are written whole, whatever is committed of them.
        needed = max(self.prompt_len, max_prompt_len + max_new_tokens + self.block_size)
        self.capacity = _round_up(needed, 64)
        self.script_len = max_new_tokens + self.block_size
        graphs = (nnx.graphdef(target), None if draft is None else nnx.graphdef(draft))
        self.take_weights()
        weights = self._weights
        start = time.perf_counter()
        state = jax.eval_shape(self._empty)
        chunk = jax.ShapeDtypeStruct((batch, self.chunk), jnp.int32)
        row = jax.ShapeDtypeStruct((batch,), jnp.int32)
        scalar = jax.ShapeDtypeStruct((), jnp.int32)
        # A program of its own: the fields of a state that is donated must not share a buffer.
        self._fresh = jax.jit(self._empty).lower().compile()
        self._prefill = _compile(partial(_prefill_chunk, graphs), weights, state, chunk, row)
        self._loop = _compile(partial(_run_loop, graphs, mode, self.block_size), weights, state, scalar)
        # One chunk and no step: the small programs around these two are compiled here too, not in the first prefill.
        self.steps(self.prefill([[0]] * batch, budgets=[1] * batch, stops=[[]] * batch))
        self.compile_s = time.perf_counter() - start

    def take_weights(self) -> None:
        """Takes the models' present weights: training may have changed them since."""
        target, draft = self.target, self.draft
        self._weights: Weights = (
            nnx.state(target),
            None if draft is None else nnx.state(draft),
            None if draft is None else draft_head(target, draft),
        )

    def _empty(self) -> State:
        B, N, S = self.batch, self.max_new_tokens, self.block_size
        grow = max(self.chunk, S)
        cache = self.target.make_cache(batch=B, capacity=self.capacity, block=grow)
        draft = self.draft
        zeros = jnp.zeros(B, jnp.int32)
        return State(
            cache=cache,
            draft_cache=None if draft is None else draft.make_cache(batch=B, capacity=self.capacity, block=grow),
            anchor=zeros,
            tokens=jnp.zeros((B, N + S), jnp.int32),
            count=zeros,
            done=jnp.zeros(B, bool),
            accepted=jnp.full((B, N), -1, jnp.int32),
            produced=jnp.full((B, N), -1, jnp.int32),
            step=jnp.int32(0),
            budget=zeros,
            stops=jnp.full((B, MAX_STOPS), -1, jnp.int32),
            script=jnp.full((B, self.script_len), -1, jnp.int32),
        )

    def prefill(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        budgets: Sequence[int],
        stops: Sequence[Sequence[int]],
        script: np.ndarray | None = None,
    ) -> State:
        """Reads the prompts and answers each with its first token. Returns when the device is done.

        script int32 [B, <= max_new_tokens + block_size] as in `State`.
        """
        lengths = np.array([len(p) for p in prompts])
        padded = np.zeros((self.batch, self.prompt_len), np.int32)
        for row, prompt in zip(padded, prompts, strict=True):
            row[: len(prompt)] = prompt
        stop_table = np.full((self.batch, MAX_STOPS), -1, np.int32)
        for row, ids in zip(stop_table, stops, strict=True):
            row[: len(ids)] = ids
        script_table = np.full((self.batch, self.script_len), -1, np.int32)
        if script is not None:
            script_table[:, : script.shape[1]] = script[:, : self.script_len]
        state = dataclasses.replace(
            self._fresh(),
            budget=jnp.asarray(budgets, jnp.int32),
            stops=jnp.asarray(stop_table),
            script=jnp.asarray(script_table),
        )
        for start in range(0, int(lengths.max()), self.chunk):
            keep = np.clip(lengths - start, 0, self.chunk).astype(np.int32)
            state = self._prefill(self._weights, state, jnp.asarray(padded[:, start : start + self.chunk]), keep)
        return jax.block_until_ready(_emit_first(state))

    def steps(self, state: State, limit: int | None = None) -> State:
        """Runs the loop until every row has ended, or to step `limit`. Consumes `state`; returns when it is done."""
        limit = self.max_new_tokens if limit is None else limit
        return jax.block_until_ready(self._loop(self._weights, state, jnp.int32(limit)))


MAX_STOPS = 8


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _compile(function: Callable[..., State], *shapes: Any) -> Callable[..., State]:
    """Ahead of time, with the state (the second argument) given to the program: caches are updated in place."""
    return jax.jit(function, donate_argnums=1).lower(*shapes).compile()
