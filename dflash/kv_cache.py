"""Static-shape key/value cache: append a block, commit a prefix of it, forget the rest.

A layer with full attention has one slot per position. A layer with a sliding window W has a ring: position p lives in
slot p mod R with R >= W + block - 1, so what a rejected block overwrote is always out of every later window. There is
one `lengths` for all layers; what lies beyond it is never visible and is overwritten by the next block. So commit,
crop and rollback are all the same small thing: a new `lengths`.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class KVCache:
    """keys[i] [B, G, D, S_i] and values[i] [B, G, S_i, D] of layer i; lengths int32 [B], the committed tokens."""

    keys: tuple[Array, ...]
    values: tuple[Array, ...]
    lengths: Array
    windows: tuple[int | None, ...] = dataclasses.field(metadata={"static": True})
    block: int = dataclasses.field(metadata={"static": True})

    @classmethod
    def create(
        cls,
        *,
        batch: int,
        windows: Sequence[int | None],
        num_kv_heads: int,
        head_dim: int,
        capacity: int,
        block: int,
        dtype: jnp.dtype,
    ) -> "KVCache":
        """An empty cache for rows of up to `capacity` positions that grows by at most `block` of them at a time.

        `capacity` must hold the committed tokens and one block beyond them: a block that would pass the end has
        nowhere to go (the decode loop sizes it so).
        """

        def slots(window: int | None) -> int:
            return capacity if window is None else min(capacity, window + block - 1)

        sizes = [slots(w) for w in windows]
        return cls(
            keys=tuple(jnp.zeros((batch, num_kv_heads, head_dim, s), dtype) for s in sizes),
            values=tuple(jnp.zeros((batch, num_kv_heads, s, head_dim), dtype) for s in sizes),
            lengths=jnp.zeros(batch, jnp.int32),
            windows=tuple(windows),
            block=block,
        )

    def positions(self, count: int) -> Array:
        """Positions of the next `count` tokens of each row, int32 [B, count]."""
        return self.lengths[:, None] + jnp.arange(count, dtype=jnp.int32)

    def append(self, layer: int, keys: Array, values: Array) -> "KVCache":
        """Writes keys and values [G, D, B, T] of the next T tokens of each row, uncommitted. T <= block."""
        B, T = keys.shape[2:]
        if self.block < T:
            raise ValueError(f"a cache made for blocks of {self.block} tokens can't append {T}")
        old_keys, old_values = self.keys[layer], self.values[layer]
        if B == 1 and self.windows[layer] is None:
            # One row without a ring is one slice; XLA's scatter costs several times as much on a CPU.
            start = self.lengths[0]
            new_keys = jax.lax.dynamic_update_slice(old_keys, keys.transpose(2, 0, 1, 3), (0, 0, 0, start))
            new_values = jax.lax.dynamic_update_slice(old_values, values.transpose(2, 0, 3, 1), (0, 0, start, 0))
        else:
            rows = jnp.arange(B)[:, None]
            slots = self.positions(T) % old_values.shape[2]
            new_keys = old_keys.at[rows, :, :, slots].set(keys.transpose(2, 3, 0, 1))
            new_values = old_values.at[rows, :, slots, :].set(values.transpose(2, 3, 0, 1))
        return dataclasses.replace(
            self,
            keys=(*self.keys[:layer], new_keys, *self.keys[layer + 1 :]),
            values=(*self.values[:layer], new_values, *self.values[layer + 1 :]),
        )

    def visible(self, layer: int, count: int, causal: bool = True) -> Array:
        """Which slots each of the `count` appended tokens may look at, bool [B, count, S].

        The newest position written is lengths + count - 1, so slot s holds the last position up to it that is s
        modulo the ring's size; a slot that would hold a negative position was never written.
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
        """Back to `lengths` int32 [B], at most `block` before the newest appended token (what rings hold)."""
        return dataclasses.replace(self, lengths=lengths.astype(jnp.int32))


def attention_mask(queries: Array, keys: Array, *, window: int | None, causal: bool) -> Array:
    """Whether a query position sees a key position, by broadcasting. A window of W holds W keys, its own too."""
    distance = queries - keys
    mask = distance >= 0 if causal else jnp.ones_like(distance, bool)
    if window is not None:
        mask &= (distance < window) & (distance > -window)
    return mask
