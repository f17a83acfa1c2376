"""The clock: steps timed in turn, and the floor that the memory sets.

Everything that is compared is timed in one process, in turn, with the device synchronised and nothing compiling: on a
machine that drifts, only ratios of neighbours mean anything.
"""

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from dflash.cost_model import StepTimes
from dflash.decoding.loop import draft_head, drafted_tokens
from dflash.device import weight_bytes
from dflash.interval import pair_ratio_interval
from dflash.kv_cache import KVCache
from dflash.metrics import expected_awake
from dflash.models.draft import Draft
from dflash.models.gpt_oss import GptOss
from dflash.models.layers import precision
from dflash.models.llama import Llama

Timed = Callable[[], Any]


def in_turn(timed: Mapping[str, Timed], *, rounds: int, warmup: int = 2) -> dict[str, np.ndarray]:
    """Seconds of every function, float64 [rounds] each: one call of each a round, the order reversed every other.

    A function must return only when its device is done.
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
    """Bytes per second at which the default device reads memory: the best of summing one large float32 array."""
    data = jnp.ones(megabytes * 2**20 // 4, jnp.float32)
    total = jax.jit(jnp.sum).lower(data).compile()
    seconds = in_turn({"sum": lambda: jax.block_until_ready(total(data))}, rounds=rounds)["sum"]
    return data.nbytes / float(seconds.min())


def matmul_rate(dtype: str = "float32", size: int = 2048, rounds: int = 5) -> float:
    """Floating point operations per second of one large square matrix product on the default device: the best of some.

    float32 is multiplied as the networks here multiply it, without TF32 and the like.
    """
    data = jnp.ones((size, size), dtype)
    product = jax.jit(partial(jnp.matmul, precision=precision(data.dtype))).lower(data, data).compile()
    seconds = in_turn({"product": lambda: jax.block_until_ready(product(data, data))}, rounds=rounds)["product"]
    return 2 * size**3 / float(seconds.min())


def step_bytes(target: Llama, tokens: int) -> float:
    """Bytes of weights that a step of `tokens` tokens reads: all, but only a token's rows of an untied embedding.

    Of routed experts, those that are expected to be awake.
    """
    experts = target.config.experts
    total = 0.0
    for path, value in nnx.to_flat_state(nnx.state(target)):
        size = float(weight_bytes(value.get_value()))
        if path[0] == "embedding" and target.head is not None:
            size *= min(1.0, tokens / target.config.vocab_size)
        elif experts is not None and path[-1] in ("gate_up", "down", "gate_up_bias", "down_bias"):
            size *= expected_awake(experts.count, experts.per_token, tokens) / experts.count
        total += size
    return total


def experts_awake(target: GptOss, rows: Sequence[Sequence[int]], block_size: int) -> float:
    """Experts that a step over `block_size` tokens of each row wakes, mean over layers and places; counted, not timed.

    `rows` are token ids of text that the target reads or writes, cut to the shortest. Tokens that a draft proposes and
    the target refuses are not among them: they wake others.
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
    """One compiled step that is called again and again at the same place; its cache is updated in place."""

    program: Callable[..., Any]
    weights: Any
    caches: Any
    inputs: tuple[Array, ...]

    def __call__(self) -> None:
        out, self.caches = self.program(self.weights, self.caches, *self.inputs)
        jax.block_until_ready((out, self.caches))


def _at(cache: KVCache, length: int) -> KVCache:
    return cache.rollback(jnp.full_like(cache.lengths, length))


def verify_step(target: Llama, *, tokens: int, batch: int, context: int, layer_ids: Sequence[int] = ()) -> _Step:
    """T_verify(tokens), and T_1 for one token: target forward of a block behind `context` committed tokens."""
    graph, weights = nnx.split(target)

    def run(weights: Any, cache: KVCache, block: Array) -> tuple[Any, KVCache]:
        model = nnx.merge(graph, weights)
        x, features, appended = model.hidden(block, layer_ids=layer_ids, cache=cache)
        assert appended is not None
        return (model.most_likely(x), features), appended

    capacity = -(-(context + tokens) // 64) * 64
    cache = _at(target.make_cache(batch=batch, capacity=capacity, block=tokens), context)
    # Rows differ, as prompts do: equal ones would wake the same experts.
    block = (jnp.arange(batch * tokens, dtype=jnp.int32) % target.config.vocab_size).reshape(batch, tokens)
    program = jax.jit(run, donate_argnums=1).lower(weights, cache, block).compile()
    return _Step(program=program, weights=weights, caches=cache, inputs=(block,))


def draft_step(target: Llama, draft: Draft, *, block_size: int, batch: int, context: int) -> _Step:
    """T_draft(block_size): proposing a block, LM head included, and taking in the last block's features."""
    (target_graph, target_weights), (draft_graph, draft_weights) = nnx.split(target), nnx.split(draft)
    weights = (target_weights, draft_weights, draft_head(target, draft))
    hidden, ids = target.config.hidden_size, draft.config.target_layer_ids

    def run(weights: Any, cache: KVCache, block: Array, features: Array) -> tuple[Array, KVCache]:
        target, draft = nnx.merge(target_graph, weights[0]), nnx.merge(draft_graph, weights[1])
        x = draft.block(draft.masked(target.embed(block).astype(draft.dtype), block_size), cache)
        drafted = drafted_tokens(target, draft, weights[2], x, block[:, 0])
        return drafted, draft.append_context([features] * len(ids), cache)

    capacity = -(-(context + block_size) // 64) * 64
    cache = _at(draft.make_cache(batch=batch, capacity=capacity, block=block_size), context)
    block = jnp.full((batch, block_size), draft.config.mask_token_id, jnp.int32)
    features = jnp.ones((hidden, batch * block_size), target.dtype)
    program = jax.jit(run, donate_argnums=1).lower(weights, cache, block, features).compile()
    return _Step(program=program, weights=weights, caches=cache, inputs=(block, features))


def time_steps(
    target: Llama,
    draft: Draft,
    block_sizes: Sequence[int],
    *,
    verify_sizes: Sequence[int] = (),
    batch: int = 1,
    context: int = 256,
    rounds: int = 45,
    within: float = 0.015,
    time_limit_s: float = 20.0,
) -> StepTimes:
    """T_1, T_verify(S) for block and verify sizes, T_draft(S) for block sizes, at `context` committed tokens.

    What counts is how many one-token steps of the same round each took: the median of that, with an interval for
    T_verify(S) / T_1. That of the largest block size is a gate's, and is timed on, with the one-token step alone, until
    its interval is no wider than `within` on either side, for `time_limit_s` at most.
    """
    ids = draft.config.target_layer_ids
    verify = partial(verify_step, target, batch=batch, context=context)
    timed: dict[str, Timed] = {"step": verify(tokens=1)}
    for size in sorted({*block_sizes, *verify_sizes}):
        timed[f"verify {size}"] = verify(tokens=size, layer_ids=ids)
    for size in block_sizes:
        timed[f"draft {size}"] = draft_step(target, draft, block_size=size, batch=batch, context=context)
    seconds = in_turn(timed, rounds=rounds)
    pairs = {name: (s, seconds["step"]) for name, s in seconds.items() if name != "step"}
    gated = f"verify {max(block_sizes)}"
    pairs[gated] = _until_sure({n: timed[n] for n in (gated, "step")}, pairs[gated], within, time_limit_s)
    ratios = {name: pair_ratio_interval(*pair) for name, pair in pairs.items()}
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
    """Seconds of two functions with as many rounds more as make their ratio certain; [rounds] each."""
    first, second = taken
    deadline = time.monotonic() + time_limit_s
    while len(first) and time.monotonic() < deadline:
        ratio, _, high = pair_ratio_interval(first, second)
        if high <= (1 + within) * ratio:
            break
        left = int((deadline - time.monotonic()) / float(first.mean() + second.mean()))
        more = in_turn(timed, rounds=max(1, min(len(first) // 2, left)), warmup=0)
        first, second = (np.concatenate([s, m]) for s, m in zip((first, second), more.values(), strict=True))
    return first, second
