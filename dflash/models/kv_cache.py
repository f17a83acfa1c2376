"""Static-shape key/value cache: append a block, commit a prefix of it, forget the rest.

A layer with full attention has one slot per position. A layer with a sliding window W has a ring: position p lives in
slot p mod R with R >= W + block - 1, so what a rejected block overwrote is always out of every later window. There is
one `lengths` for all layers; what lies beyond it is never visible and is overwritten by the next block. So commit, crop
and rollback all just set `lengths`.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental.layout import Format, Layout
from jax.sharding import PartitionSpec as P

from dflash.metrics import round_up
from dflash.models import mesh


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class KVCache:
    """keys[i] [B, G, D, S_i] and values[i] [B, G, S_i, D] of layer i; lengths int32 [B], the committed tokens."""

    keys: tuple[Array, ...]
    values: tuple[Array, ...]
    lengths: Array
    windows: tuple[int | None, ...] = dataclasses.field(metadata={"static": True})
    block: int = dataclasses.field(metadata={"static": True})

    def specs(self, rows: str | None = "rows") -> "KVCache":
        """How a cache is split over a mesh, as `shard_map` takes it: by key heads, and by rows unless that is None."""
        layers, heads = len(self.values), mesh.split_by(rows, "kv_heads")
        # In the place of arrays, as in every pytree of specs.
        split: dict[str, Any] = {"keys": (heads,) * layers, "values": (heads,) * layers, "lengths": mesh.split_by(rows)}
        return dataclasses.replace(self, **split)

    def positions(self, count: int) -> Array:
        """Positions of the next `count` tokens of each row, int32 [B, count]."""
        return self.lengths[:, None] + jnp.arange(count, dtype=jnp.int32)

    def is_slice(self, layer: int, rows: int) -> bool:
        """Whether a layer's next tokens are one slice of its cache: those of a single row without a ring."""
        return rows == 1 and self.windows[layer] is None

    def append(self, layer: int, keys: Array, values: Array) -> "KVCache":
        """Writes keys and values [G, D, B, T] of the next T tokens of each row, uncommitted. T <= block."""
        B, T = keys.shape[2:]
        if self.block < T:
            raise ValueError(f"a cache made for blocks of {self.block} tokens can't append {T}")
        old_keys, old_values = self.keys[layer], self.values[layer]
        if self.is_slice(layer, B):
            # XLA's scatter costs several times as much on a CPU.
            start = self.lengths[0]
            new_keys = jax.lax.dynamic_update_slice(old_keys, keys.transpose(2, 0, 1, 3), (0, 0, 0, start))
            new_values = jax.lax.dynamic_update_slice(old_values, values.transpose(2, 0, 3, 1), (0, 0, start, 0))
        else:
            # One write for each head and token: a TPU's compiler then leaves the cache in the layout in which
            # attention reads it. Over rows and slots alone it would turn the whole cache before the loop and after it.
            heads = jnp.arange(keys.shape[0])[None, :, None]
            slots = self.positions(T) % old_values.shape[2]
            new_keys, new_values = old_keys, old_values
            for some, tokens in _writes(keys.shape):
                row, slot = jnp.arange(B)[some, None, None], slots[some, None, tokens]
                new_keys = new_keys.at[row, heads, :, slot].set(keys[:, :, some, tokens].transpose(2, 0, 3, 1))
                new_values = new_values.at[row, heads, slot].set(values[:, :, some, tokens].transpose(2, 0, 3, 1))
        return dataclasses.replace(
            self,
            keys=(*self.keys[:layer], new_keys, *self.keys[layer + 1 :]),
            values=(*self.values[:layer], new_values, *self.values[layer + 1 :]),
        )

    def visible(self, layer: int, count: int, causal: bool = True) -> Array:
        """Which slots each of the `count` appended tokens may see, bool [B, count, S].

        The newest position written is lengths + count - 1, so slot s holds the last position up to it that equals s
        modulo the ring's size; a slot with a negative position was never written.
        """
        size = self.values[layer].shape[2]
        window = self.windows[layer]
        slots = jnp.arange(size, dtype=jnp.int32)[None, None, :]
        newest = (self.lengths + (count - 1))[:, None, None]
        held = slots if window is None else newest - (newest - slots) % size
        queries = self.positions(count)[:, :, None]
        return attention_mask(queries, held, window=window, causal=causal) & (held >= 0) & (held <= newest)

    def commit(self, keep: Array) -> "KVCache":
        """Keeps the first `keep` int32 [B] appended tokens of each row."""
        return dataclasses.replace(self, lengths=self.lengths + keep.astype(jnp.int32))

    def rollback(self, lengths: Array) -> "KVCache":
        """Back to `lengths` int32 [B], at most `block` before the newest appended token (what rings still hold)."""
        return dataclasses.replace(self, lengths=lengths.astype(jnp.int32))


def _writes(shape: tuple[int, ...]) -> list[tuple[slice, slice]]:
    """The rows and tokens of keys [G, D, B, T] to be written at a time.

    In a loop on a TPU 1024 heads and tokens at once that are narrower than a row of its memory turn the whole cache. A
    prompt's chunk, more tokens than a block has, is written once and not in a loop.
    """
    heads, width, rows, tokens = shape
    if width >= mesh.LANES or tokens > _LONGEST_BLOCK:
        return [(slice(rows), slice(tokens))]
    some = min(rows, max(1, _MOST_WRITES // heads))
    few = max(1, _MOST_WRITES // (some * heads))
    return [(slice(r, r + some), slice(t, t + few)) for r in range(0, rows, some) for t in range(0, tokens, few)]


_MOST_WRITES = 1023
_LONGEST_BLOCK = 64


def empty_cache(network: mesh.Network, *, batch: int, capacity: int, block: int) -> KVCache:
    """An empty cache for a target or a draft: up to `capacity` positions a row, at most `block` of them at a time.

    `capacity` must hold the committed tokens and one block beyond them, since a block past the end has nowhere to go.
    The cache is whole: on a mesh its key heads are those of all devices together, more than the config's where they are
    repeated.
    """
    c, dtype = network.config, network.dtype
    heads = max(c.num_kv_heads, mesh.ways(network.mesh, mesh.TP))
    slots = [capacity if window is None else min(capacity, round_up(window + block - 1, _ROWS)) for window in c.windows]
    return KVCache(
        keys=tuple(jnp.zeros((batch, heads, c.head_dim, s), dtype) for s in slots),
        values=tuple(jnp.zeros((batch, heads, s, c.head_dim), dtype) for s in slots),
        lengths=jnp.zeros(batch, jnp.int32),
        windows=tuple(c.windows),
        block=block,
    )


# A TPU holds bfloat16 in tiles of so many tokens. A cache that ends within one is copied to another layout before each
# loop.
_ROWS = 16
# How keys [B, G, D, S] and values [B, G, S, D] lie in memory: each token in one piece, or each channel.
_TOKENS = ((0, 1, 3, 2), (0, 1, 2, 3))
_CHANNELS = ((0, 1, 2, 3), (0, 1, 3, 2))


def places(network: mesh.Network, tree: Any, specs: Any) -> Any:
    """Where a pytree with caches of this split (`KVCache.specs`) lies beside a network; None: where jax puts it.

    On a TPU or GPU a token lies in one piece, as it is written by head and token. Of a cache that is written as one
    slice the keys lie by channel, and so do a TPU's values where heads are narrow. Then no program transposes a cache.
    A CPU reads them as they are declared.
    """
    anywhere = mesh.sharding_of(network, P())
    if anywhere is None or (network.mesh is None and _platform(anywhere) == "cpu"):
        return None
    platform = _platform(anywhere)

    def place(spec: Any, order: tuple[int, ...] | None = None) -> Any:
        sharding = mesh.sharding_of(network, spec)
        return Format(Layout(order), sharding) if platform != "cpu" and order else sharding

    def of(split: Any, part: Any) -> Any:
        if not isinstance(part, KVCache):
            return place(split)
        rows, layers = part.lengths.shape[0] // mesh.ways(network.mesh, mesh.DP), len(part.keys)
        slices = [part.is_slice(i, rows) for i in range(layers)]
        narrow = platform == "tpu" and part.values[0].shape[3] < mesh.LANES
        of_keys = [(_CHANNELS if is_slice else _TOKENS)[0] for is_slice in slices]
        of_values = [(_CHANNELS if is_slice and narrow else _TOKENS)[1] for is_slice in slices]
        return dataclasses.replace(
            split,
            keys=tuple(map(place, split.keys, of_keys)),
            values=tuple(map(place, split.values, of_values)),
            lengths=place(split.lengths),
        )

    return jax.tree.map(of, specs, tree, is_leaf=lambda part: isinstance(part, KVCache))


def _platform(sharding: Any) -> str:
    return next(iter(sharding.device_set)).platform


def attention_mask(queries: Array, keys: Array, *, window: int | None, causal: bool) -> Array:
    """Whether a query position sees a key position, by broadcasting. A window of W covers W keys, its own included."""
    distance = queries - keys
    mask = distance >= 0 if causal else jnp.ones_like(distance, bool)
    if window is not None:
        mask &= (distance < window) & (distance > -window)
    return mask
