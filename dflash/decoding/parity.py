"""One-token steps against block verify at the same positions, teacher-forced: the same sums in another shape.

Both read the same tokens from the same prompt, each into a cache of its own. Any difference is what this device rounds
differently for 1 and for S tokens. In float32 on the CPU there should be none.
"""

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Annotated, Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from pydantic import Field

from dflash.decoding.reference import Reference, ulp
from dflash.metrics import round_up
from dflash.models import mesh
from dflash.models.kv_cache import KVCache, empty_cache
from dflash.models.llama import Llama
from dflash.models.mesh import WHOLE

_PAD = 64

# Of the figures of a result, as its JSON schema states them. No figure comes near 1e30, and what is computed of two
# figures stays finite.
Count: TypeAlias = Annotated[int, Field(ge=0)]
AtLeastOne: TypeAlias = Annotated[int, Field(ge=1)]
NotNegative: TypeAlias = Annotated[float, Field(ge=0, le=1e30)]
Fraction: TypeAlias = Annotated[float, Field(ge=0, le=1)]


@partial(jax.jit, static_argnames="graph", donate_argnums=2)
def _append(graph: Any, weights: Any, cache: KVCache, tokens: Array, keep: Array) -> tuple[Array, Array, KVCache]:
    """tokens int32 [1, T] -> logits [T, V], every layer's output [L, T, H], and the cache with `keep` [1] committed."""

    def run(weights: Any, cache: KVCache, tokens: Array, keep: Array) -> tuple[Array, Array, KVCache]:
        target = nnx.merge(graph, weights)
        x, outputs, appended = target.hidden(tokens, layer_ids=range(target.config.num_layers), cache=cache)
        assert appended is not None
        return target.logits(x).T, jnp.stack(outputs).transpose(0, 2, 1), appended.commit(keep)

    caches = cache.specs(rows=None)
    in_specs = (mesh.weight_specs(weights), caches, WHOLE, WHOLE)
    return mesh.spread(run, mesh.of(graph, weights), in_specs, (WHOLE, WHOLE, caches))(weights, cache, tokens, keep)


def _walk(target: Llama, prompt: Sequence[int], answer: Sequence[int], size: int) -> tuple[np.ndarray, np.ndarray]:
    """Logits [N, V] and layer outputs [L, N, H] at the N tokens of an answer, read `size` at a time."""
    graph, weights = nnx.split(target)
    longest = round_up(len(prompt), _PAD)
    capacity = longest + round_up(len(answer), _PAD) + _PAD
    cache = empty_cache(target, batch=1, capacity=capacity, block=max(longest, size))
    padded = jnp.asarray([*prompt, *([0] * (longest - len(prompt)))], jnp.int32)[None]
    _, _, cache = _append(graph, weights, cache, padded, jnp.asarray([len(prompt)]))
    logits, outputs = [], []
    for first in range(0, len(answer), size):
        block = jnp.asarray(answer[first : first + size], jnp.int32)[None]
        step_logits, step_outputs, cache = _append(graph, weights, cache, block, jnp.asarray([size]))
        logits.append(np.asarray(step_logits))
        outputs.append(np.asarray(step_outputs))
    return np.concatenate(logits), np.concatenate(outputs, axis=1)


def ulps(a: np.ndarray, b: np.ndarray, dtype: Any) -> np.ndarray:
    """|a - b| in units in the last place of `dtype`, float64, the shape of both.

    The unit is that of the larger of the two entries, but of no less than the root mean square of the last axis: near
    zero, any rounding is millions of an entry's own units.
    """
    a, b = a.astype(np.float64), b.astype(np.float64)
    usual = np.sqrt(np.mean(a * a, axis=-1, keepdims=True))
    return np.abs(a - b) / ulp(np.maximum(np.maximum(np.abs(a), np.abs(b)), usual), dtype)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spread:
    """How far two roundings are apart, in units in the last place."""

    ulps_p99: NotNegative
    ulps_max: NotNegative

    @classmethod
    def over(cls, distances: list[np.ndarray]) -> "Spread":
        """Of all entries of some arrays."""
        every = np.concatenate([d.ravel() for d in distances])
        return cls(ulps_p99=float(np.percentile(every, 99)), ulps_max=float(every.max()))


@dataclasses.dataclass(frozen=True, kw_only=True)
class ParityResult:
    """What blocks of `block_size` round differently from single tokens."""

    block_size: AtLeastOne
    positions: Count  # teacher-forced
    bitwise_equal: bool
    first_layer: Count | None  # the first with a difference
    flips: Count  # positions where the most likely token differs
    flip_rate: Fraction
    defects: Count  # flips that are not near ties
    logits: Spread
    layers: list[Spread]


def compare_steps(
    target: Llama, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]], block_size: int
) -> ParityResult:
    """Reads every answer after its prompt token by token and block by block (whole blocks only), and compares.

    Raises ValueError when no answer holds a whole block: there is nothing to compare then.
    """
    dtype, flips, defects, count, equal = target.dtype, 0, 0, 0, True
    of_logits: list[np.ndarray] = []
    of_layers: list[list[np.ndarray]] = [[] for _ in target.layers]
    for prompt, answer in zip(prompts, answers, strict=True):
        whole = list(answer[: len(answer) // block_size * block_size])
        if not whole:
            continue
        (single, single_layers), (block, block_layers) = (
            _walk(target, prompt, whole, size) for size in (1, block_size)
        )
        count += len(whole)
        equal &= single.tobytes() == block.tobytes()
        of_logits.append(ulps(single, block, dtype))
        for distances, a, b in zip(of_layers, single_layers, block_layers, strict=True):
            distances.append(ulps(a, b, dtype))
        best = [x.astype(np.float32).argmax(axis=1) for x in (single, block)]
        flipped = best[0] != best[1]
        if flipped.any():
            reference = Reference(target, [*prompt, *whole])
            honest = [reference.judge(len(prompt), b.tolist()).honest for b in best]
            flips += int(flipped.sum())
            defects += int((flipped & ~(honest[0] & honest[1])).sum())
    if not count:
        longest = max(map(len, answers))
        raise ValueError(f"an answer must have at least {block_size} tokens to hold a block, got {longest}")
    layers = [Spread.over(d) for d in of_layers]
    return ParityResult(
        block_size=block_size,
        positions=count,
        bitwise_equal=equal and not any(layer.ulps_max for layer in layers),
        first_layer=next((i for i, layer in enumerate(layers) if layer.ulps_max), None),
        flips=flips,
        flip_rate=flips / count,
        defects=defects,
        logits=Spread.over(of_logits),
        layers=layers,
    )
