"""Llama-family targets (Llama, SmolLM2, Qwen2, Qwen3), and the decoder that GPT-OSS shares with them."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.sharding import Mesh

from dflash.config import TargetConfig
from dflash.models import mesh
from dflash.models.kv_cache import KVCache, attention_mask
from dflash.models.layers import Linear, RMSNorm, SwiGLU, attend, most_likely, rope_tables, rotate, rows_of
from dflash.models.mesh import Part


class Attention(nnx.Module):
    """Causal grouped-query attention; q, k and v are one weight, read in one pass."""

    def __init__(self, config: TargetConfig, layer: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.layer = layer
        self.window = config.windows[layer]
        self.heads, self.kv_heads, self.head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        H, D = config.hidden_size, self.head_dim
        heads, kv_heads = Part("heads", self.heads, D), Part("kv_heads", self.kv_heads, D)
        rows = (heads, kv_heads, kv_heads)
        size = (self.heads + 2 * self.kv_heads) * D
        self.qkv = Linear(H, size, bias=config.qkv_bias, rows=rows, dtype=dtype, rngs=rngs)
        self.out = Linear(self.heads * D, H, bias=config.o_bias, columns=(heads,), dtype=dtype, rngs=rngs)
        self.q_norm = RMSNorm(self.head_dim, config.rms_norm_eps, dtype=dtype) if config.qk_norm else None
        self.k_norm = RMSNorm(self.head_dim, config.rms_norm_eps, dtype=dtype) if config.qk_norm else None
        of_heads = ((Part("heads", self.heads),),)
        self.sinks = nnx.Param(jnp.zeros(self.heads, dtype), axes=of_heads) if config.sinks else None

    def __call__(
        self, x: Array, rope: tuple[Array, Array], masks: dict[int | None, Array], cache: KVCache | None
    ) -> tuple[Array, KVCache | None]:
        """x [H, B*T] -> [H, B*T] and the cache with this layer's keys appended. `masks` [B, T, S] by window.

        On a mesh this device has some of the heads, R for each of its G key heads.
        """
        _, B, T = rope[0].shape
        D = self.head_dim
        heads = self.out.weight.shape[1] // D
        G = (self.qkv.weight.shape[0] // D - heads) // 2
        R = heads // G
        q, k, v = jnp.split(self.qkv(x).reshape(-1, D, B, T), [heads, heads + G])
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
    """A decoder-only target. `forward` is for callers; the decode loop uses the parts."""

    def __init__(self, config: TargetConfig, *, dtype: jnp.dtype = jnp.float32, rngs: nnx.Rngs):
        self.config = config
        self.dtype = jnp.dtype(dtype)
        self.mesh: Mesh | None = None
        tokens = (Part("vocab", config.vocab_size),)
        self.embedding = Linear(config.hidden_size, config.vocab_size, rows=tokens, dtype=dtype, rngs=rngs)
        self.layers = nnx.List(
            DecoderLayer(config, i, self.make_mlp(dtype, rngs), dtype=dtype, rngs=rngs)
            for i in range(config.num_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype=dtype)
        self.head = (
            None
            if config.tie_embeddings
            else Linear(config.hidden_size, config.vocab_size, rows=tokens, dtype=dtype, rngs=rngs)
        )

    def make_mlp(self, dtype: jnp.dtype, rngs: nnx.Rngs) -> nnx.Module:
        c = self.config
        return SwiGLU(c.hidden_size, c.intermediate_size, bias=c.mlp_bias, dtype=dtype, rngs=rngs)

    def embed(self, tokens: Array) -> Array:
        """tokens int32 of any shape -> columns [H, tokens.size]."""
        return rows_of(self.embedding.weight[...], tokens.reshape(-1), self.config.vocab_size).T

    def head_rows(self, tokens: np.ndarray) -> Array:
        """The LM head's rows of these token ids [M] -> [M, H]; on a mesh this device's of them."""
        weight = (self.embedding if self.head is None else self.head).weight[...]
        if weight.shape[0] == self.config.vocab_size:
            return weight[tokens]
        return mesh.shared_out(mesh.own_rows(weight, jnp.asarray(tokens)), len(tokens))

    def scores(self, x: Array, dtype: jnp.dtype | None = None) -> Array:
        """`logits`; on a mesh the rows of the tokens that this device holds, [V/tp, N]."""
        head = self.embedding if self.head is None else self.head
        if dtype is None or dtype == x.dtype:
            return head(x)
        # The barrier keeps a transposition out of the product; XLA for CPUs has no kernel for the two together.
        return jax.lax.optimization_barrier(jnp.matmul(head.weight[...], x, preferred_element_type=dtype))

    def logits(self, x: Array, dtype: jnp.dtype | None = None) -> Array:
        """Columns after the final norm [H, N] -> [V, N] in the dtype of computation, or summed and kept in `dtype`."""
        scores = self.scores(x, dtype)
        if scores.shape[0] == self.config.vocab_size:
            return scores
        return mesh.rows_end_to_end(scores)[: self.config.vocab_size]

    def most_likely(self, x: Array) -> Array:
        """Columns after the final norm [H, N] -> the most likely token of each, int32 [N]; the lowest id of a tie."""
        return most_likely(self.scores(x), self.config.vocab_size)

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
        the cache with the tokens appended (not committed). Without a cache every token is computed and sees the ones
        before it. `positions` int32 [B, T], contiguous in a row, defaults to the next ones of the cache or 0..T-1.
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
        final norm). Rows of unequal length are padded on the right with any token id; the results there are
        meaningless. `positions` int32 [B, T], contiguous in a row, default to 0..T-1.
        """
        tokens = jnp.asarray(tokens, jnp.int32)
        positions = None if positions is None else jnp.asarray(positions, jnp.int32)
        return _forward(*nnx.split(self), tokens, positions)


@partial(jax.jit, static_argnames="graph")
def _forward(graph: Any, weights: Any, tokens: Array, positions: Array | None) -> tuple[Array, list[Array]]:
    B, T = tokens.shape

    def run(weights: Any, tokens: Array, positions: Array | None) -> tuple[Array, list[Array]]:
        model = nnx.merge(graph, weights)
        x, outputs, _ = model.hidden(tokens, layer_ids=range(model.config.num_layers), positions=positions)
        logits = model.logits(x).astype(jnp.float32)
        return logits.reshape(-1, B, T).transpose(1, 2, 0), [h.reshape(-1, B, T).transpose(1, 2, 0) for h in outputs]

    return mesh.on_every_device(run, mesh.of(graph, weights))(weights, tokens, positions)
