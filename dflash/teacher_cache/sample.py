"""What the target itself writes after a prompt, greedily or drawn with a temperature: the text that a draft learns.

No part of decoding: nothing here is measured, and nothing here is proposed.
"""

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from dflash.kv_cache import KVCache
from dflash.models.layers import most_likely
from dflash.models.llama import Llama

# Columns are batch x chunk: a short chunk keeps them busy and pads little.
CHUNK = 32


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class _State:
    """newest int32 [B], not yet in the cache; tokens int32 [B, N] valid up to count int32 [B]; keys one per row."""

    cache: KVCache
    newest: Array
    tokens: Array
    count: Array
    done: Array
    keys: Array
    offset: Array
    stops: Array


def _draw(target: Llama, x: Array, state: _State, temperature: float, min_p: float) -> Array:
    """Columns after the final norm [H, B] -> the next token of each row, int32 [B]; temperature 0: the likeliest one.

    min_p leaves out what is less likely than min_p times the most likely token (arXiv 2407.01082). Row b's n-th token
    is drawn with key b folded with n: what a row gets depends on no other row.
    """
    # In float32 also of a bfloat16 target: rounded logits tie at the top in some percent of all tokens.
    logits = target.logits(x, jnp.float32)
    if temperature == 0:
        return most_likely(logits)
    scores = logits.T / temperature
    if min_p > 0:
        scores = jnp.where(scores >= scores.max(axis=1, keepdims=True) + jnp.log(min_p), scores, -jnp.inf)
    keys = jax.vmap(jax.random.fold_in)(state.keys, state.count)
    return jax.vmap(jax.random.categorical)(keys, scores).astype(jnp.int32)


def _emit(state: _State, token: Array) -> _State:
    """Writes one token to every row that has not ended."""
    room = state.tokens.shape[1]
    place = jnp.arange(room) == state.count[:, None]
    tokens = jnp.where(place & ~state.done[:, None], token[:, None], state.tokens)
    count = state.count + ~state.done
    stopped = (token[:, None] == state.stops).any(axis=1)
    return dataclasses.replace(
        state,
        newest=jnp.where(state.done, state.newest, token),
        tokens=tokens,
        count=count,
        done=state.done | stopped | (count == room),
    )


# One program per target and shape, whatever Sampler runs it: the graph is part of jax's own key.
@partial(jax.jit, static_argnums=0, donate_argnums=2)
def _read(graph: Any, weights: Any, state: _State, tokens: Array, keep: Array) -> tuple[_State, Array]:
    """The next chunk of every prompt, int32 [B, C], the first `keep` [B] real; also x after the last real one."""
    target = nnx.merge(graph, weights)
    batch, chunk = tokens.shape
    positions = state.cache.positions(chunk) + state.offset[:, None]
    x, _, cache = target.hidden(tokens, cache=state.cache, positions=positions)
    assert cache is not None
    last = jnp.maximum(keep - 1, 0)
    x = jnp.take_along_axis(x.reshape(-1, batch, chunk), last[None, :, None], axis=2)[:, :, 0]
    return dataclasses.replace(state, cache=cache.commit(keep)), x


@partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=4)
def _first(graph: Any, temperature: float, min_p: float, weights: Any, state: _State, x: Array) -> _State:
    return _emit(state, _draw(nnx.merge(graph, weights), x, state, temperature, min_p))


@partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=4)
def _write(graph: Any, temperature: float, min_p: float, weights: Any, state: _State) -> _State:
    """One token at a time until every row has ended."""
    target = nnx.merge(graph, weights)

    def step(state: _State) -> _State:
        positions = state.cache.positions(1) + state.offset[:, None]
        x, _, cache = target.hidden(state.newest[:, None], cache=state.cache, positions=positions)
        assert cache is not None
        token = _draw(target, x, state, temperature, min_p)
        return _emit(dataclasses.replace(state, cache=cache.commit(~state.done)), token)

    return jax.lax.while_loop(lambda s: ~s.done.all(), step, state)


class Sampler:
    """Continues batches of up to `batch` prompts of at most `max_prompt_len` tokens; compiled once for that shape."""

    def __init__(
        self,
        target: Llama,
        *,
        batch: int,
        max_prompt_len: int,
        max_new_tokens: int,
        stop_token_ids: Sequence[int] = (),
        temperature: float = 0.0,
        min_p: float = 0.0,
        seed: int = 0,
    ):
        self.target, self.batch, self.max_new_tokens = target, batch, max_new_tokens
        self.chunk = min(CHUNK, -(-max_prompt_len // 16) * 16)
        self.prompt_len = -(-max_prompt_len // self.chunk) * self.chunk
        self.stops = (*stop_token_ids, -1)
        self._key = jax.random.key(seed)
        self._weights = nnx.state(target)
        self._graph = nnx.graphdef(target)
        self._draw = (temperature, min_p)

    def _start(self, indices: Sequence[int], offsets: Sequence[int], rows: int) -> _State:
        B, N = self.batch, self.max_new_tokens
        capacity = self.prompt_len + N
        real = np.arange(B) < rows
        return _State(
            cache=self.target.make_cache(batch=B, capacity=capacity, block=self.chunk),
            newest=jnp.zeros(B, jnp.int32),
            tokens=jnp.zeros((B, N), jnp.int32),
            count=jnp.zeros(B, jnp.int32),
            done=jnp.asarray(~real),
            keys=jax.vmap(lambda i: jax.random.fold_in(self._key, i))(_padded(indices, B)),
            offset=_padded(offsets, B),
            stops=jnp.asarray(self.stops, jnp.int32),
        )

    def run(
        self, prompts: Sequence[Sequence[int]], *, indices: Sequence[int], offsets: Sequence[int] | None = None
    ) -> list[list[int]]:
        """What follows each prompt: up to max_new_tokens token ids, a stop token included.

        `indices` number the rows over all calls: a row's draws depend on the seed and its number alone. `offsets` are
        added to the positions of each row (0 by default).
        """
        rows = len(prompts)
        lengths = np.zeros(self.batch, np.int32)
        lengths[:rows] = [len(p) for p in prompts]
        if not 0 < rows <= self.batch or lengths[:rows].min() < 1 or lengths.max() > self.prompt_len:
            raise ValueError(f"1 to {self.batch} prompts of 1 to {self.prompt_len} tokens, got {lengths[:rows]}")
        padded = np.zeros((self.batch, self.prompt_len), np.int32)
        for row, prompt in zip(padded, prompts, strict=False):
            row[: len(prompt)] = prompt
        state = self._start(indices, [0] * rows if offsets is None else offsets, rows)
        ends = None
        for start in range(0, int(lengths.max()), self.chunk):
            keep = np.clip(lengths - start, 0, self.chunk).astype(np.int32)
            state, x = _read(self._graph, self._weights, state, padded[:, start : start + self.chunk], keep)
            ends = x if ends is None else jnp.where(keep > 0, x, ends)
        state = _first(self._graph, *self._draw, self._weights, state, ends)
        state = _write(self._graph, *self._draw, self._weights, state)
        tokens, count = np.asarray(state.tokens), np.asarray(state.count)
        return [tokens[i, : count[i]].tolist() for i in range(rows)]


def _padded(values: Sequence[int], size: int) -> Array:
    return jnp.asarray([*values, *([0] * (size - len(values)))], jnp.int32)
