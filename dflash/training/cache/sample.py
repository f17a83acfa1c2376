"""What the target writes after a prompt, greedily or sampled: the text that a draft learns.

Not part of decoding: nothing here is measured or drafted.
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

from dflash.decoding.sampling import GREEDILY, Draws, Sampling
from dflash.metrics import round_up
from dflash.models import mesh
from dflash.models.kv_cache import KVCache, empty_cache
from dflash.models.layers import most_likely
from dflash.models.llama import Llama
from dflash.models.mesh import COLUMNS, ROWS, WHOLE

# Columns are batch x chunk: a short chunk is enough to keep them busy, and pads little.
CHUNK = 32


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class _State:
    """newest int32 [B], not yet in the cache; tokens int32 [B, N] valid up to count int32 [B]."""

    cache: KVCache
    newest: Array
    tokens: Array
    count: Array
    done: Array
    draws: Draws | None
    offset: Array
    stops: Array


def _next(target: Llama, x: Array, state: _State) -> Array:
    """Columns after the final norm [H, B] -> the next token of each row, int32 [B]; without draws the likeliest one.

    A row's n-th token is drawn with the noise of position n, so it depends on no other row.
    """
    # In float32 for a bfloat16 target too: rounded logits tie at the top for a few percent of all tokens.
    scores, size = target.scores(x, jnp.float32), target.config.vocab_size
    if state.draws is not None:
        scores = state.draws.perturb(scores, state.count[:, None], size)
    return most_likely(scores, size)


def _emit(state: _State, token: Array) -> _State:
    """Appends one token to every row that has not ended."""
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


def _specs(state: _State) -> _State:
    """How a state is split over a mesh, as `shard_map` takes it."""
    by_rows: dict[str, Any] = {field.name: ROWS for field in dataclasses.fields(_State)}
    draws = jax.tree.map(lambda _: ROWS, state.draws)
    return _State(**by_rows | {"cache": state.cache.specs(), "stops": WHOLE, "draws": draws})


# One program per target and shape for all Samplers: the graph is part of jax's own key.
@partial(jax.jit, static_argnums=0, donate_argnums=2)
def _read(graph: Any, weights: Any, state: _State, tokens: Array, keep: Array) -> tuple[_State, Array]:
    """The next chunk of every prompt, int32 [B, C], the first `keep` [B] real; also x after the last real one."""

    def run(weights: Any, state: _State, tokens: Array, keep: Array) -> tuple[_State, Array]:
        target = nnx.merge(graph, weights)
        batch, chunk = tokens.shape
        positions = state.cache.positions(chunk) + state.offset[:, None]
        x, _, cache = target.hidden(tokens, cache=state.cache, positions=positions)
        assert cache is not None
        last = jnp.maximum(keep - 1, 0)
        x = jnp.take_along_axis(x.reshape(-1, batch, chunk), last[None, :, None], axis=2)[:, :, 0]
        return dataclasses.replace(state, cache=cache.commit(keep)), x

    specs = _specs(state)
    in_specs = (mesh.weight_specs(weights), specs, ROWS, ROWS)
    return mesh.spread(run, mesh.of(graph, weights), in_specs, (specs, COLUMNS))(weights, state, tokens, keep)


@partial(jax.jit, static_argnums=0, donate_argnums=2)
def _first(graph: Any, weights: Any, state: _State, x: Array) -> _State:
    def run(weights: Any, state: _State, x: Array) -> _State:
        return _emit(state, _next(nnx.merge(graph, weights), x, state))

    specs = _specs(state)
    in_specs = (mesh.weight_specs(weights), specs, COLUMNS)
    return mesh.spread(run, mesh.of(graph, weights), in_specs, specs)(weights, state, x)


@partial(jax.jit, static_argnums=0, donate_argnums=2)
def _write(graph: Any, weights: Any, state: _State) -> _State:
    """One token at a time until every row has ended."""

    def run(weights: Any, state: _State) -> _State:
        target = nnx.merge(graph, weights)

        def step(state: _State) -> _State:
            positions = state.cache.positions(1) + state.offset[:, None]
            x, _, cache = target.hidden(state.newest[:, None], cache=state.cache, positions=positions)
            assert cache is not None
            token = _next(target, x, state)
            return _emit(dataclasses.replace(state, cache=cache.commit(~state.done)), token)

        return jax.lax.while_loop(lambda s: ~mesh.everywhere(s.done.all()), step, state)

    specs = _specs(state)
    return mesh.spread(run, mesh.of(graph, weights), (mesh.weight_specs(weights), specs), specs)(weights, state)


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
        sampling: Sampling = GREEDILY,
    ):
        mesh.check_rows(target.mesh, batch)
        self.target, self.batch, self.max_new_tokens = target, batch, max_new_tokens
        self.chunk = min(CHUNK, round_up(max_prompt_len, 16))
        self.prompt_len = round_up(max_prompt_len, self.chunk)
        self.stops = (*stop_token_ids, -1)
        self._sampling = sampling
        self._weights = nnx.state(target)
        self._graph = nnx.graphdef(target)

    def _start(self, indices: Sequence[int], offsets: Sequence[int], rows: int) -> _State:
        B, N = self.batch, self.max_new_tokens
        capacity = self.prompt_len + N
        real = np.arange(B) < rows
        return _State(
            cache=empty_cache(self.target, batch=B, capacity=capacity, block=self.chunk),
            newest=jnp.zeros(B, jnp.int32),
            tokens=jnp.zeros((B, N), jnp.int32),
            count=jnp.zeros(B, jnp.int32),
            done=jnp.asarray(~real),
            draws=self._draws(indices),
            offset=_padded(offsets, B),
            stops=jnp.asarray(self.stops, jnp.int32),
        )

    def _draws(self, indices: Sequence[int]) -> Draws | None:
        draws = self._sampling.draws(self.batch)
        if draws is None:
            return None
        return dataclasses.replace(draws, rows=draws.rows.at[:, 1].set(_padded(indices, self.batch)))

    def run(
        self, prompts: Sequence[Sequence[int]], *, indices: Sequence[int], offsets: Sequence[int] | None = None
    ) -> list[list[int]]:
        """What follows each prompt: up to max_new_tokens token ids, including the stop token.

        `indices` number the rows across calls: a row's draws depend only on the seed and its number. `offsets` are
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
        state = _first(self._graph, self._weights, state, ends)
        state = _write(self._graph, self._weights, state)
        tokens, count = np.asarray(state.tokens), np.asarray(state.count)
        return [tokens[i, : count[i]].tolist() for i in range(rows)]


def _padded(values: Sequence[int], size: int) -> Array:
    return jnp.asarray([*values, *([0] * (size - len(values)))], jnp.int32)
