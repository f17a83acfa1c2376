"""The clock: steps timed in turn, and the machine's own rates that they are held beside.

Everything that is compared is timed in one process, in turn, with the device synchronised and nothing compiling: on a
machine that drifts, only ratios of neighbouring calls mean anything.
"""

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from dflash.decoding.loop import HEAD, draft_head, drafted_tokens
from dflash.decoding.sampling import GREEDILY, Draws, Sampling, next_tokens
from dflash.measuring.cost_model import StepTimes
from dflash.measuring.interval import ratio_interval
from dflash.metrics import expected_awake, round_up
from dflash.models import mesh
from dflash.models.draft import Draft
from dflash.models.gpt_oss import GptOss
from dflash.models.kv_cache import KVCache, empty_cache, places
from dflash.models.layers import multiply
from dflash.models.llama import Llama
from dflash.models.mesh import COLUMNS, ROWS

Timed = Callable[[], Any]
# An awake expert's weights, by their names in `dflash.models.gpt_oss.Experts`.
_OF_EXPERTS = [f"{name}{part}" for name in ("gate_up", "down") for part in ("", "_bias", "_scale")]


def in_turn(timed: Mapping[str, Timed], *, rounds: int, warmup: int = 2) -> dict[str, np.ndarray]:
    """Seconds of every function, float64 [rounds] each; every other round calls them in reversed order.

    A function must return only when the device is done.
    """
    names = list(timed)
    seconds: dict[str, list[float]] = {n: [] for n in names}
    for r in range(warmup + rounds):
        for name in names if r % 2 == 0 else reversed(names):
            start = time.perf_counter()
            timed[name]()
            seconds[name].append(time.perf_counter() - start)
    return {n: np.array(s[warmup:]) for n, s in seconds.items()}


def read_bandwidth(megabytes: int = 512, rounds: int = 7) -> float:
    """Bytes per second at which the default device reads memory: the best of several sums over one array."""
    data = jnp.ones(megabytes * 2**20 // 4, jnp.float32)
    total = jax.jit(jnp.sum).lower(data).compile()
    seconds = in_turn({"sum": partial(_finished, total, data)}, rounds=rounds)["sum"]
    return data.nbytes / float(seconds.min())


def matmul_rate(dtype: str = "float32", size: int = 2048, rounds: int = 5) -> float:
    """Floating point operations per second of a square matrix product on the default device: the best of some rounds.

    It is multiplied as the networks here multiply: float32 without TF32 and the like.
    """
    data = jnp.ones((size, size), dtype)
    product = jax.jit(multiply).lower(data, data).compile()
    seconds = in_turn({"product": partial(_finished, product, data, data)}, rounds=rounds, warmup=1)["product"]
    return 2 * size**3 / float(seconds.min())


def weights_of_step(target: Llama, tokens: int) -> Iterator[tuple[Any, float, float]]:
    """Every weight, the fraction of it that a step of `tokens` tokens reads, and the one that a token multiplies.

    All of a weight; but only the tokens' rows of an untied embedding, which multiplies nothing, and of routed experts
    those expected to be awake. The target may be abstract.
    """
    experts = target.config.experts
    for path, weight in nnx.to_flat_state(nnx.state(target)):
        read = multiplied = 1.0
        if path[0] == "embedding" and target.head is not None:
            read, multiplied = min(1.0, tokens / target.config.vocab_size), 0.0
        elif experts is not None and path[-1] in _OF_EXPERTS:
            read = expected_awake(experts.count, experts.per_token, tokens) / experts.count
            multiplied = experts.per_token / experts.count
        yield weight.get_value(), read, multiplied


def step_bytes(target: Llama, tokens: int) -> float:
    """Bytes of weights that a step of `tokens` tokens reads, on all devices together."""
    return sum(read * array.size * array.dtype.itemsize for array, read, _ in weights_of_step(target, tokens))


def experts_awake(target: GptOss, rows: Sequence[Sequence[int]], block_size: int) -> float:
    """Experts that a step over `block_size` tokens of each row wakes, mean over layers and places; counted, not timed.

    `rows` are token ids of text that the target reads or writes, cut to the shortest. Proposals that the target rejects
    are not among them, and would wake other experts.
    """
    length = min(map(len, rows))
    if length < block_size:
        raise ValueError(f"each row must have {block_size} tokens at least, got {length}")
    chosen = np.asarray(target.chosen_experts(jnp.array([r[:length] for r in rows], jnp.int32)))  # [L, B, T, k]
    steps = chosen[:, :, : length - length % block_size].reshape(
        len(chosen), len(rows), -1, block_size, chosen.shape[3]
    )
    assert target.config.experts is not None
    awake = np.zeros((len(chosen), steps.shape[2], target.config.experts.count), bool)
    layer, step = np.ogrid[: awake.shape[0], : awake.shape[1]]
    for expert in steps.transpose(1, 3, 4, 0, 2).reshape(-1, *awake.shape[:2]):
        awake[layer, step, expert] = True
    return float(awake.sum(axis=2).mean())


@dataclasses.dataclass(kw_only=True)
class _Step:
    """One compiled step, called repeatedly at the same position; its cache is updated in place."""

    program: jax.stages.Compiled
    weights: Any
    caches: Any
    inputs: tuple[Array | Draws | None, ...]

    def __call__(self) -> None:
        out, self.caches = self.program(self.weights, self.caches, *self.inputs)
        jax.block_until_ready((out, self.caches))


def _at(cache: KVCache, length: int) -> KVCache:
    return cache.rollback(jnp.full_like(cache.lengths, length))


def _compiled(
    run: Callable[..., Any],
    network: Llama | Draft,
    weights: tuple[Any, Any],
    cache: KVCache,
    inputs: Sequence[tuple[Array | Draws | None, Any]],
    out_specs: Any,
) -> _Step:
    """A step over a network's cache. `weights` and `inputs` come with how they are split over the network's mesh."""
    split, where = cache.specs(), places(network, cache, cache.specs())
    in_specs = (weights[1], split, *(spec for _, spec in inputs))
    spread = mesh.spread(run, network.mesh, in_specs, (out_specs, split))
    arrays = tuple(array for array, _ in inputs)
    if where is not None:
        cache = jax.device_put(cache, where)
        arrays = tuple(jax.device_put(array, mesh.sharding_of(network, spec)) for array, spec in inputs)
    options = mesh.compiler_options(network)
    jitted = jax.jit(spread, donate_argnums=1, out_shardings=(None, where), compiler_options=options)
    program = jitted.lower(weights[0], cache, *arrays).compile()
    return _Step(program=program, weights=weights[0], caches=cache, inputs=arrays)


def verify_step(
    target: Llama,
    *,
    tokens: int,
    batch: int,
    context: int,
    layer_ids: Sequence[int] = (),
    sampling: Sampling = GREEDILY,
) -> _Step:
    """T_verify(tokens), and T_1 for one token: target forward of a block behind `context` committed tokens."""
    graph, weights = nnx.split(target)

    def run(weights: Any, cache: KVCache, block: Array, draws: Draws | None) -> tuple[Any, KVCache]:
        model = nnx.merge(graph, weights)
        x, features, appended = model.hidden(block, layer_ids=layer_ids, cache=cache)
        assert appended is not None
        return (next_tokens(model, draws, x, cache.positions(tokens)), features), appended

    capacity = round_up(context + tokens, 64)
    cache = _at(empty_cache(target, batch=batch, capacity=capacity, block=tokens), context)
    # Rows differ, as prompts do: equal rows would wake the same experts.
    block = (jnp.arange(batch * tokens, dtype=jnp.int32) % target.config.vocab_size).reshape(batch, tokens)
    of_weights = weights, mesh.weight_specs(weights)
    inputs = [(block, ROWS), (sampling.draws(batch), ROWS)]
    return _compiled(run, target, of_weights, cache, inputs, (ROWS, COLUMNS))


def one_column_products(target: Llama) -> dict[str, Timed]:
    """The output head [V, H] times one column, as a step computes it (`plain`), and `padded` to 8 columns.

    A TPU's compiler and its own code disagree about the first by 3.4 times, so a chip must be asked.
    """
    head = (target.head or target.embedding).weight[...]
    column = jnp.ones((head.shape[1], 1), head.dtype)

    def padded(head: Array, column: Array) -> Array:
        return multiply(head, jnp.pad(column, ((0, 0), (0, 7))))

    programs = {"plain": jax.jit(multiply), "padded": jax.jit(padded)}
    return {name: partial(_finished, program, head, column) for name, program in programs.items()}


def _finished(program: Callable[..., Array], *arrays: Array) -> None:
    jax.block_until_ready(program(*arrays))


def draft_step(
    target: Llama, draft: Draft, *, block_size: int, batch: int, context: int, sampling: Sampling = GREEDILY
) -> _Step:
    """T_draft(block_size): proposing a block, LM head included, and taking in the last block's features."""
    draft = mesh.place(draft, target.mesh)
    (target_graph, target_weights), (draft_graph, draft_weights) = nnx.split(target), nnx.split(draft)
    weights = (target_weights, draft_weights, draft_head(target, draft))
    hidden, ids = target.config.hidden_size, draft.config.target_layer_ids

    def run(weights: Any, cache: KVCache, block: Array, features: Array, draws: Draws | None) -> tuple[Array, KVCache]:
        target, draft = nnx.merge(target_graph, weights[0]), nnx.merge(draft_graph, weights[1])
        x, cache = draft.block(draft.masked(target.embed(block).astype(draft.dtype), block_size), cache)
        drafted = drafted_tokens(target, draft, weights[2], x, block[:, 0], draws, cache.positions(block_size))
        return drafted, draft.append_context([features] * len(ids), cache)

    capacity = round_up(context + block_size, 64)
    cache = _at(empty_cache(draft, batch=batch, capacity=capacity, block=block_size), context)
    block = jnp.full((batch, block_size), draft.config.mask_token_id, jnp.int32)
    features = jnp.ones((hidden, batch * block_size), target.dtype)
    of_weights = weights, (mesh.weight_specs(target_weights), mesh.weight_specs(draft_weights), HEAD)
    inputs = [(block, ROWS), (features, COLUMNS), (sampling.draws(batch), ROWS)]
    return _compiled(run, draft, of_weights, cache, inputs, ROWS)


def time_steps(
    target: Llama,
    draft: Draft,
    block_sizes: Sequence[int],
    *,
    verify_sizes: Sequence[int] = (),
    batch: int = 1,
    context: int = 256,
    sampling: Sampling = GREEDILY,
    rounds: int = 45,
    within: float = 0.015,
    time_limit_s: float = 10.0,
) -> StepTimes:
    """T_1, T_verify(S) for block and verify sizes, T_draft(S) for block sizes, at `context` committed tokens.

    Each is measured as a multiple of the one-token step of its own round: the median, and for T_verify(S) / T_1 an
    interval. Gates use the largest block size, so that one is timed further, beside the one-token step alone, until its
    interval is within `within` on either side, for at most `time_limit_s`.
    """
    ids = draft.config.target_layer_ids
    verify = partial(verify_step, target, batch=batch, context=context, sampling=sampling)
    timed: dict[str, Timed] = {"step": verify(tokens=1)}
    for size in sorted({*block_sizes, *verify_sizes}):
        timed[f"verify {size}"] = verify(tokens=size, layer_ids=ids)
    for size in block_sizes:
        timed[f"draft {size}"] = draft_step(
            target, draft, block_size=size, batch=batch, context=context, sampling=sampling
        )
    seconds = in_turn(timed, rounds=rounds)
    pairs = {name: (s, seconds["step"]) for name, s in seconds.items() if name != "step"}
    gated = f"verify {max(block_sizes)}"
    pairs[gated] = _until_sure({n: timed[n] for n in (gated, "step")}, pairs[gated], within, time_limit_s)
    ratios = {name: ratio_interval(*pair, draws=500) for name, pair in pairs.items()}
    step_s = float(np.median(seconds["step"]))

    def of(kind: str) -> dict[int, tuple[float, float, float]]:
        return {int(n.split()[1]): r for n, r in ratios.items() if n.startswith(kind)}

    return StepTimes(
        step_s=step_s,
        verify_s={size: ratio * step_s for size, (ratio, _, _) in of("verify").items()},
        draft_s={size: ratio * step_s for size, (ratio, _, _) in of("draft").items()},
        context=context,
        batch=batch,
        verify_ratio_ci95={size: (low, high) for size, (_, low, high) in of("verify").items()},
    )


def _until_sure(
    timed: Mapping[str, Timed], taken: tuple[np.ndarray, np.ndarray], within: float, time_limit_s: float
) -> tuple[np.ndarray, np.ndarray]:
    """Seconds of two functions, [rounds] each, with rounds added until their ratio is certain."""
    first, second = taken
    deadline = time.monotonic() + time_limit_s
    while len(first) and time.monotonic() < deadline:
        ratio, _, high = ratio_interval(first, second, draws=500)
        if high <= (1 + within) * ratio:
            break
        left = int((deadline - time.monotonic()) / float(first.mean() + second.mean()))
        more = in_turn(timed, rounds=max(1, min(len(first) // 2, left)), warmup=0)
        first, second = (np.concatenate([s, m]) for s, m in zip((first, second), more.values(), strict=True))
    return first, second
