"""Llama-family targets (Llama, SmolLM2, Qwen2, Qwen3), and the decoder that GPT-OSS shares with them."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from dflash.config import TargetConfig
from dflash.kv_cache import KVCache, attention_mask
from dflash.models.layers import Linear, RMSNorm, SwiGLU, attend, most_likely, rope_tables, rotate


class Attention(nnx.Module):
    """Causal grouped-query attention; q, k and v are one weight, so that it is read in one pass."""

    def __init__(self, config: TargetConfig, layer: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.layer = layer
        self.window = config.windows[layer]
        self.heads, self.kv_heads, self.head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        size = (self.heads + 2 * self.kv_heads) * self.head_dim
        self.qkv = Linear(config.hidden_size, size, bias=config.qkv_bias, dtype=dtype, rngs=rngs)
        self.out = Linear(self.heads * self.head_dim, config.hidden_size, bias=config.o_bias, dtype=dtype, rngs=rngs)
        self.q_norm = RMSNorm(self.head_dim, config.rms_norm_eps, dtype=dtype) if config.qk_norm else None
        self.k_norm = RMSNorm(self.head_dim, config.rms_norm_eps, dtype=dtype) if config.qk_norm else None
        self.sinks = nnx.Param(jnp.zeros(self.heads, dtype)) if config.sinks else None

    def __call__(
        self, x: Array, rope: tuple[Array, Array], masks: dict[int | None, Array], cache: KVCache | None
    ) -> tuple[Array, KVCache | None]:
        """x [H, B*T] -> [H, B*T] and the cache with this layer's keys appended. `masks` [B, T, S] by window."""
        _, B, T = rope[0].shape
        G, R, D = self.kv_heads, self.heads // self.kv_heads, self.head_dim
        q, k, v = jnp.split(self.qkv(x).reshape(-1, D, B, T), [G * R, G * R + G])
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q, axis=1), self.k_norm(k, axis=1)
        q, k = rotate(q, rope).reshape(G, R, D, B, T), rotate(k, rope)
        if cache is None:
            keys, values = k.transpose(2, 0, 1, 3), v.transpose(2, 0, 3, 1)
        else:
            cache = cache.append(self.layer, k, v)
            keys, values = cache.keys[self.layer], cache.values[self.layer]
        sinks = None if self.sinks is None else self.sinks[...].reshape(G, R)
        mixed = attend(q, keys, values, masks[self.window], sinks)
        return self.out(mixed.reshape(-1, B * T)), cache


class DecoderLayer(nnx.Module):
    """x += attention(norm x); x += mlp(norm x)."""

    def __init__(self, config: TargetConfig, layer: int, mlp: nnx.Module, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.attention_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype=dtype)
        self.attention = Attention(config, layer, dtype=dtype, rngs=rngs)
        self.mlp_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype=dtype)
        self.mlp = mlp

    def __call__(
        self, x: Array, rope: tuple[Array, Array], masks: dict[int | None, Array], cache: KVCache | None
    ) -> tuple[Array, KVCache | None]:
        mixed, cache = self.attention(self.attention_norm(x), rope, masks, cache)
        x = x + mixed
        return x + self.mlp(self.mlp_norm(x)), cache


class Llama(nnx.Module):
    """A decoder-only target. Callers want `forward`; the decode loop uses the parts."""

    def __init__(self, config: TargetConfig, *, dtype: jnp.dtype = jnp.float32, rngs: nnx.Rngs):
        self.config = config
        self.dtype = jnp.dtype(dtype)
        self.embedding = Linear(config.hidden_size, config.vocab_size, dtype=dtype, rngs=rngs)
        self.layers = nnx.List(
            DecoderLayer(config, i, self.make_mlp(dtype, rngs), dtype=dtype, rngs=rngs)
            for i in range(config.num_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype=dtype)
        tied = config.tie_embeddings
        self.head = None if tied else Linear(config.hidden_size, config.vocab_size, dtype=dtype, rngs=rngs)

    def make_mlp(self, dtype: jnp.dtype, rngs: nnx.Rngs) -> nnx.Module:
        c = self.config
        return SwiGLU(c.hidden_size, c.intermediate_size, bias=c.mlp_bias, dtype=dtype, rngs=rngs)

    def make_cache(self, *, batch: int, capacity: int, block: int) -> KVCache:
        """An empty cache for this target; see `KVCache.create`."""
        c = self.config
        return KVCache.create(
            batch=batch,
            windows=c.windows,
            num_kv_heads=c.num_kv_heads,
            head_dim=c.head_dim,
            capacity=capacity,
            block=block,
            dtype=self.dtype,
        )

    def embed(self, tokens: Array) -> Array:
        """tokens int32 of any shape -> columns [H, tokens.size]."""
        return self.embedding.weight[...][tokens.reshape(-1)].T

    def head_rows(self, tokens: np.ndarray) -> Array:
        """The LM head's rows of these token ids [M] -> [M, H]."""
        return (self.embedding if self.head is None else self.head).weight[...][tokens]

    def logits(self, x: Array, dtype: jnp.dtype | None = None) -> Array:
        """Columns after the final norm [H, N] -> [V, N] in the dtype of computation, or summed and kept in `dtype`."""
        head = self.embedding if self.head is None else self.head
        if dtype is None or dtype == x.dtype:
            return head(x)
        # The barrier keeps a transposition out of the product, which XLA for CPUs then has no kernel for.
        return jax.lax.optimization_barrier(jnp.matmul(head.weight[...], x, preferred_element_type=dtype))

    def most_likely(self, x: Array) -> Array:
        """Columns after the final norm [H, N] -> the most likely token of each, int32 [N]; the lowest id of a tie."""
        return most_likely(self.logits(x))

    def hidden(
        self,
        tokens: Array,
        *,
        layer_ids: Sequence[int] = (),
        cache: KVCache | None = None,
        positions: Array | None = None,
    ) -> tuple[Array, list[Array], KVCache | None]:
        """All layers over tokens int32 [B, T].

        Returns the columns after the final norm [H, B*T], the outputs of `layer_ids` in that order [H, B*T] each, and
        the cache with the tokens appended (not committed). Without a cache every token is computed anew and sees the
        ones before it. `positions` int32 [B, T], contiguous in a row, defaults to the next ones of the cache or 0..T-1.
        """
        B, T = tokens.shape
        if cache is None:
            steps = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T))
            masks = {
                w: attention_mask(steps[:, :, None], steps[:, None, :], window=w, causal=True)
                for w in set(self.config.windows)
            }
        else:
            steps = cache.positions(T)
            masks = {w: cache.visible(self.config.windows.index(w), T) for w in set(self.config.windows)}
        rope = rope_tables(self.config.rope, self.config.head_dim, steps if positions is None else positions)
        x = self.embed(tokens)
        outputs: dict[int, Array] = {}
        for i, layer in enumerate(self.layers):
            x, cache = layer(x, rope, masks, cache)
            if i in layer_ids:
                outputs[i] = x
        return self.norm(x), [outputs[i] for i in layer_ids], cache

    def forward(self, tokens: Array, positions: Array | None = None) -> tuple[Array, list[Array]]:
        """Cacheless forward of tokens int32 [B, T].

        Returns logits float32 [B, T, V] and L arrays [B, T, H], entry i the residual stream after layer i (before the
        final norm). Rows of unequal length are padded on the right with any token id; what they give there is
        meaningless. `positions` int32 [B, T], contiguous in a row, default to 0..T-1.
        """
        tokens = jnp.asarray(tokens, jnp.int32)
        return _forward(self, tokens, None if positions is None else jnp.asarray(positions, jnp.int32))


@nnx.jit
def _forward(model: Llama, tokens: Array, positions: Array | None) -> tuple[Array, list[Array]]:
    B, T = tokens.shape
    x, outputs, _ = model.hidden(tokens, layer_ids=range(model.config.num_layers), positions=positions)
    logits = model.logits(x).astype(jnp.float32)
    return logits.reshape(-1, B, T).transpose(1, 2, 0), [h.reshape(-1, B, T).transpose(1, 2, 0) for h in outputs]
