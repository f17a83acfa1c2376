"""One decode loop, all on the device: propose, verify, commit, until every row has stopped.

Greedy decoding, sequential verify and block verify run the same loop and differ only in how the target's next
predictions are found. `Programs` are what one shape needs, lowered; a `Decoder` compiles them once; `State` is
everything that stays on the devices between them. On a mesh each program runs under `shard_map`.
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
from jax.stages import Lowered

from dflash.decoding.accept import produced_length
from dflash.decoding.modes import MODES
from dflash.decoding.sampling import GREEDILY, Draws, Sampling, next_tokens
from dflash.metrics import round_up
from dflash.models import mesh
from dflash.models.draft import Draft, proposed_tokens
from dflash.models.kv_cache import KVCache, empty_cache, places
from dflash.models.layers import multiply
from dflash.models.llama import Llama
from dflash.models.mesh import ROWS, WHOLE

PREFILL_CHUNK = 128


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class State:
    """Everything that a decode holds on the device. B rows, blocks of S tokens, N the largest budget.

    anchor int32 [B]: the newest token, emitted and not yet in a cache. tokens int32 [B, N + S]: what was emitted, valid
    up to count int32 [B]. accepted, produced int32 [B, N]: per step, -1 where a row had ended. script int32 [B, M]:
    tokens to propose instead of the draft's own, by position in the output; -1 leaves the draft's. draws None: greedy.
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
    draws: Draws | None


def _write_rows(buffer: Array, rows: Array, starts: Array) -> Array:
    """rows [B, S] into buffer [B, N] at column starts [B]."""
    return jax.vmap(lambda b, r, s: jax.lax.dynamic_update_slice(b, r, (s,)))(buffer, rows, starts)


def draft_head(target: Llama, draft: Draft) -> Array | None:
    """The head's rows for the tokens that the draft proposes [M, H], gathered once; None for the whole head.

    On a mesh they are split as the head is, and padded to be so.
    """
    ids = proposed_tokens(draft.config)
    if ids is None:
        return None
    graph, weights = nnx.split(target)

    def run(weights: Any) -> Array:
        return nnx.merge(graph, weights).head_rows(ids)

    specs = (mesh.weight_specs(weights),)
    where = None if target.mesh is None else mesh.in_order(target.mesh, HEAD, (0, 1))
    gathered = jax.jit(mesh.spread(run, target.mesh, specs, HEAD), out_shardings=where)
    abstract = isinstance(jax.tree.leaves(weights)[0], jax.ShapeDtypeStruct)
    return mesh.abstract(gathered.eval_shape(weights), where) if abstract else gathered(weights)


def drafted_tokens(
    target: Llama,
    draft: Draft,
    head: Array | None,
    x: Array,
    anchors: Array,
    draws: Draws | None,
    positions: Array,
) -> Array:
    """The draft's columns of whole blocks [H, B*S] after anchors int32 [B] -> the tokens that it drafts [B, S-1].

    `head` is `draft_head`'s. positions int32 [B, S] are the block's: the draft draws with the target's own noise.
    """
    slots = x.reshape(x.shape[0], anchors.shape[0], -1)[:, :, 1:].reshape(x.shape[0], -1)
    read = slots.astype(target.dtype)
    logits = target.scores(read) if head is None else multiply(head, read)
    if draws is None:
        return draft.choose(slots, logits, anchors)
    scores = draws.perturb(logits, positions[:, 1:], draft.config.num_tokens, proposed_tokens(draft.config))
    return draft.choose(slots, scores, anchors, 1 / draws.rule.temperature)


def propose(target: Llama, draft: Draft, head: Array | None, state: State, block_size: int) -> tuple[Array, KVCache]:
    """[anchor, drafted tokens] int32 [B, S] of every row, and the draft's cache. `head` is `draft_head`'s."""
    assert state.draft_cache is not None
    batch = state.anchor.shape[0]
    masks = jnp.full((batch, block_size - 1), draft.config.mask_token_id, jnp.int32)
    block = jnp.concatenate([state.anchor[:, None], masks], axis=1)
    with jax.named_scope("propose"):
        x = draft.masked(target.embed(block).astype(draft.dtype), block_size)
        x, draft_cache = draft.block(x, state.draft_cache)
        positions = state.draft_cache.positions(block_size)
        drafted = drafted_tokens(target, draft, head, x, state.anchor, state.draws, positions)
    places = state.count[:, None] + jnp.arange(block_size - 1)
    scripted = jnp.take_along_axis(state.script, jnp.minimum(places, state.script.shape[1] - 1), axis=1)
    drafted = jnp.where(scripted >= 0, scripted, drafted)
    return jnp.concatenate([state.anchor[:, None], drafted], axis=1), draft_cache


def _advance(state: State, predictions: Array, accepted: Array, cache: KVCache, draft_cache: KVCache | None) -> State:
    """Commits what the target agrees with and adds it to the output."""
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
    verify = MODES[mode].verify
    if verify is None:
        nothing = jnp.zeros_like(state.anchor)
        x, _, cache = target.hidden(state.anchor[:, None], cache=state.cache)
        assert cache is not None
        token = next_tokens(target, state.draws, x, state.cache.positions(1))
        return _advance(state, token, nothing, cache, None)
    assert draft is not None
    candidates, draft_cache = propose(target, draft, head, state, block_size)
    layer_ids = draft.config.target_layer_ids
    predictions, accepted, features, cache = verify(target, state.draws, layer_ids, state.cache, state.done, candidates)
    with jax.named_scope("commit"):
        draft_cache = draft.append_context(features, draft_cache)
        return _advance(state, predictions, accepted, cache, draft_cache)


# Of the target, of the draft, and from `draft_head`.
Weights = tuple[Any, Any, Array | None]
HEAD = mesh.split_by("vocab", None)


def _merge(graphs: tuple[Any, Any], weights: Weights) -> tuple[Llama, Draft | None]:
    return nnx.merge(graphs[0], weights[0]), None if graphs[1] is None else nnx.merge(graphs[1], weights[1])


def _run_loop(
    graphs: tuple[Any, Any], mode: str, block_size: int, weights: Weights, state: State, limit: Array
) -> State:
    """Steps until every row has ended or `state.step` reaches `limit`."""
    target, draft = _merge(graphs, weights)

    def unfinished(state: State) -> Array:
        return (state.step < limit) & ~mesh.everywhere(state.done.all())

    return jax.lax.while_loop(unfinished, lambda s: _step(mode, block_size, target, draft, weights[2], s), state)


def _prefill_chunk(graphs: tuple[Any, Any], weights: Weights, state: State, tokens: Array, keep: Array) -> State:
    """Reads the first `keep` [B] tokens of the next chunk of every prompt, int32 [B, C], and predicts what follows."""
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
    first = next_tokens(target, state.draws, x, (state.cache.lengths + last)[:, None])[:, 0]
    return dataclasses.replace(
        state,
        cache=cache.commit(keep),
        draft_cache=draft_cache,
        anchor=jnp.where(keep > 0, first, state.anchor),
    )


def _emit_first(state: State) -> State:
    """The token that follows the prompt is the first of the output."""
    produced, done = produced_length(state.anchor[:, None], jnp.zeros_like(state.anchor), state.budget, state.stops)
    return dataclasses.replace(state, tokens=state.tokens.at[:, 0].set(state.anchor), count=produced, done=done)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class DecodeShape:
    """What the programs of a decode are compiled for.

    `batch` rows, prompts of at most `max_prompt_len` tokens, budgets of at most `max_new_tokens`. Greedy decoding has
    blocks of 1. Of `sampling` the rule is kept: seed and rows are the state's.
    """

    mode: str
    block_size: int
    batch: int
    max_prompt_len: int
    max_new_tokens: int
    sampling: Sampling = GREEDILY

    def __post_init__(self) -> None:
        object.__setattr__(self, "sampling", self.sampling.rule)

    @property
    def chunk(self) -> int:
        """How many tokens of every prompt are read at a time."""
        return min(PREFILL_CHUNK, round_up(self.max_prompt_len, 16))

    @property
    def prompt_len(self) -> int:
        return round_up(self.max_prompt_len, self.chunk)

    @property
    def capacity(self) -> int:
        """Slots of a cache: the last chunk and the last block are written whole, whatever is committed of them."""
        return round_up(max(self.prompt_len, self.max_prompt_len + self.max_new_tokens + self.block_size), 64)

    @property
    def script_len(self) -> int:
        return self.max_new_tokens + self.block_size

    def empty(self, target: Llama, draft: Draft | None) -> State:
        """The state before the first chunk."""
        B, N = self.batch, self.max_new_tokens
        sizes = {"batch": B, "capacity": self.capacity, "block": max(self.chunk, self.block_size)}
        zeros = jnp.zeros(B, jnp.int32)
        return State(
            cache=empty_cache(target, **sizes),
            draft_cache=None if draft is None else empty_cache(draft, **sizes),
            anchor=zeros,
            tokens=jnp.zeros((B, N + self.block_size), jnp.int32),
            count=zeros,
            done=jnp.zeros(B, bool),
            accepted=jnp.full((B, N), -1, jnp.int32),
            produced=jnp.full((B, N), -1, jnp.int32),
            step=jnp.int32(0),
            budget=zeros,
            stops=jnp.full((B, MAX_STOPS), -1, jnp.int32),
            script=jnp.full((B, self.script_len), -1, jnp.int32),
            draws=self.sampling.draws(B),
        )


def state_specs(state: State) -> State:
    """How a state is split over a mesh, as `shard_map` takes it: by rows, and its caches by key heads too."""
    by_rows: dict[str, Any] = {field.name: ROWS for field in dataclasses.fields(State)}
    draft_cache = None if state.draft_cache is None else state.draft_cache.specs()
    draws = jax.tree.map(lambda _: ROWS, state.draws)
    return State(**by_rows | {"cache": state.cache.specs(), "draft_cache": draft_cache, "step": WHOLE, "draws": draws})


def take_weights(target: Llama, draft: Draft | None) -> Weights:
    """The networks' present weights, as the programs of a decode take them."""
    if draft is None:
        return nnx.state(target), None, None
    return nnx.state(target), nnx.state(draft), draft_head(target, draft)


class Programs:
    """The programs of one decode shape, lowered for the devices that the networks lie on: all but compiled.

    The networks may be abstract (`mesh.place` of `nnx.eval_shape`), on a mesh of devices that are only described.
    `fresh()` makes a state; `prefill(weights, state, tokens, keep)`, `first(state)` and `loop(weights, state, limit)`
    take one, are given its memory, and return it with the same shardings and layouts.
    """

    def __init__(self, target: Llama, draft: Draft | None, shape: DecodeShape):
        assert (draft is not None) == MODES[shape.mode].drafts, (draft, shape)
        mesh.check_rows(target.mesh, shape.batch)
        draft = None if draft is None else mesh.place(draft, target.mesh)
        graphs = (nnx.graphdef(target), None if draft is None else nnx.graphdef(draft))
        weights = take_weights(target, draft)
        empty = partial(shape.empty, target, draft)
        state = jax.eval_shape(empty)
        specs = state_specs(state)
        of_weights = (*(None if w is None else mesh.weight_specs(w) for w in weights[:2]), HEAD)
        where, options = places(target, state, specs), mesh.compiler_options(target)

        def lower(function: Callable[..., State], arguments: tuple[Any, ...], in_specs: tuple[Any, ...]) -> Lowered:
            spread = mesh.spread(function, target.mesh, in_specs, specs)
            given = next((i for i, a in enumerate(arguments) if isinstance(a, State)), ())
            jitted = jax.jit(spread, donate_argnums=given, out_shardings=where, compiler_options=options)
            return jitted.lower(*arguments)

        B = shape.batch
        state = mesh.abstract(state, where)
        chunk, row = jax.ShapeDtypeStruct((B, shape.chunk), jnp.int32), jax.ShapeDtypeStruct((B,), jnp.int32)
        scalar = jax.ShapeDtypeStruct((), jnp.int32)
        # A program of its own: the fields of a state that is donated must not share a buffer.
        self.fresh = jax.jit(empty, out_shardings=where).lower()
        self.prefill = lower(
            partial(_prefill_chunk, graphs), (weights, state, chunk, row), (of_weights, specs, ROWS, ROWS)
        )
        self.first = lower(_emit_first, (state,), (specs,))
        run = partial(_run_loop, graphs, shape.mode, shape.block_size)
        self.loop = lower(run, (weights, state, scalar), (of_weights, specs, WHOLE))


class Decoder:
    """The compiled programs of one decode shape. Build once, `run` often; nothing compiles while it runs.

    `draft` None is greedy decoding. A network that lies on a mesh is decoded there; its draft follows it. `compile_s`
    is what compiling took, in seconds.
    """

    def __init__(self, target: Llama, draft: Draft | None, shape: DecodeShape):
        self.target, self.draft, self.shape = target, draft, shape
        start = time.perf_counter()
        programs = Programs(target, draft, shape)
        self._fresh, self._first = programs.fresh.compile(), programs.first.compile()
        self._prefill, self._loop = programs.prefill.compile(), programs.loop.compile()
        self.take_weights()
        # One chunk and no step: the small programs around these are compiled here too, not in the first prefill.
        self.steps(self.prefill([[0]] * shape.batch, budgets=[1] * shape.batch, stops=[[]] * shape.batch))
        self.compile_s = time.perf_counter() - start

    def take_weights(self) -> None:
        """Takes the models' present weights: training may have changed them since."""
        draft = None if self.draft is None else mesh.place(self.draft, self.target.mesh)
        self._weights = take_weights(self.target, draft)

    def prefill(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        budgets: Sequence[int],
        stops: Sequence[Sequence[int]],
        script: np.ndarray | None = None,
        sampling: Sampling = GREEDILY,
    ) -> State:
        """Reads the prompts and predicts the first token of each. Returns when the device is done.

        script int32 [B, <= max_new_tokens + block_size] as in `State`. `sampling` has the rule of the decoder's shape.
        """
        shape = self.shape
        lengths = np.array([len(p) for p in prompts])
        padded = np.zeros((shape.batch, shape.prompt_len), np.int32)
        for row, prompt in zip(padded, prompts, strict=True):
            row[: len(prompt)] = prompt
        stop_table = np.full((shape.batch, MAX_STOPS), -1, np.int32)
        for row, ids in zip(stop_table, stops, strict=True):
            row[: len(ids)] = ids
        script_table = np.full((shape.batch, shape.script_len), -1, np.int32)
        if script is not None:
            script_table[:, : script.shape[1]] = script[:, : shape.script_len]
        state = self._fresh()

        def like(value: Any, field: Array) -> Array:
            return jax.device_put(np.asarray(value, np.int32), field.sharding)

        state = dataclasses.replace(
            state,
            budget=like(budgets, state.budget),
            stops=like(stop_table, state.stops),
            script=like(script_table, state.script),
        )
        if state.draws is not None:
            rows = like(sampling.rows(shape.batch), state.draws.rows)
            state = dataclasses.replace(state, draws=dataclasses.replace(state.draws, rows=rows))
        for start in range(0, int(lengths.max()), shape.chunk):
            keep = np.clip(lengths - start, 0, shape.chunk).astype(np.int32)
            state = self._prefill(self._weights, state, padded[:, start : start + shape.chunk], keep)
        return jax.block_until_ready(self._first(state))

    def steps(self, state: State, limit: int | Array | None = None) -> State:
        """Runs until every row has ended or step `limit`. Consumes `state`; returns when the device is done."""
        limit = self.shape.max_new_tokens if limit is None else limit
        # One that lies on the device already costs no transfer.
        last = limit if isinstance(limit, Array) else jax.device_put(np.int32(limit), state.step.sharding)
        return jax.block_until_ready(self._loop(self._weights, state, last))


MAX_STOPS = 8
