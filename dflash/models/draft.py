"""The DFlash draft: a few non-causal layers that turn [anchor, mask, mask, ...] into a block of proposals at once.

Its context is the target's hidden states of the committed tokens, projected to keys and values (never queries). The
anchor, the newest token, has no hidden state yet: it enters as a block token. Embedding and LM head are the target's.
Canonical form: PyPI `dflash==0.1.0` (q/k norm with weights before RoPE, no bias in fc and MLP, mask = the embedding of
`mask_token_id`); a draft of another trainer keeps what it has beyond that (`DraftConfig`). DFlash 2 adds convolutions
over a block's slots and a choice among each slot's candidates.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from numbers import Integral
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.sharding import Mesh

from dflash.config import ConfigError, DraftConfig, DraftVocab
from dflash.models.conv import DynamicConv
from dflash.models.kv_cache import KVCache, attention_mask
from dflash.models.layers import Linear, RMSNorm, SwiGLU, attend, most_likely, rope_tables, rotate
from dflash.models.mesh import Part
from dflash.models.selector import CandidateSelector

Rope = tuple[Array, Array]


def pack_tokens(token_ids: np.ndarray, vocab_size: int) -> bytes:
    """Token ids as one bit per token of the vocabulary, the first in the lowest bit: `DraftConfig.vocabulary`."""
    chosen = np.zeros(vocab_size, bool)
    chosen[token_ids] = True
    return np.packbits(chosen, bitorder="little").tobytes()


def proposed_tokens(config: DraftConfig) -> np.ndarray | None:
    """The ids of the tokens that a draft proposes, int32 [M], ascending; None for the whole vocabulary."""
    if config.vocabulary is None:
        return None
    return np.flatnonzero(np.unpackbits(np.frombuffer(config.vocabulary, np.uint8), bitorder="little")).astype(np.int32)


def _view(draft: "Draft", **changes: Any) -> "Draft":
    """Another module over the same arrays, with changes to the config."""
    view: Draft = nnx.merge(*nnx.split(draft))
    view.config = dataclasses.replace(draft.config, **changes)
    return view


def proposing(draft: "Draft", count: DraftVocab | None) -> "Draft":
    """A draft with the same weights that proposes `count` tokens of the vocabulary, or all; None leaves it as it is.

    Those that it was trained with come first, then the rest, both by id: in a vocabulary made by merging pairs of
    bytes, low ids were merged first and are usually the frequent ones. Raises ConfigError.
    """
    if count is None:
        return draft
    config, trained = draft.config, proposed_tokens(draft.config)
    size = config.vocab_size
    least = 1 if config.selector is None else config.selector.top_k
    if count != "all" and not (isinstance(count, Integral) and not isinstance(count, bool) and least <= count <= size):
        raise ConfigError(f"a draft proposes {least} to {size} tokens, or all; got draft_vocab {count!r}")
    vocabulary = None
    if count not in ("all", size):
        first = np.arange(0) if trained is None else trained
        order = np.concatenate([first, np.setdiff1d(np.arange(size), first)])
        vocabulary = pack_tokens(order[:count], size)
    return _view(draft, vocabulary=vocabulary)


def plain(draft: "Draft") -> "Draft":
    """A draft with the same layers, without a DFlash 2 draft's convolutions and selector."""
    view = _view(draft, conv=None, selector=None)
    view.selector = None
    for layer in view.layers:
        layer.attention_conv = layer.mlp_conv = None
    return view


class DraftAttention(nnx.Module):
    """Queries from the block; keys and values from context and block, through the same weights."""

    def __init__(self, config: DraftConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.heads, self.kv_heads, self.head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        bias = config.attention_bias
        H, D = config.hidden_size, self.head_dim
        heads, kv_heads = Part("heads", self.heads, D), Part("kv_heads", self.kv_heads, D)
        linear = partial(Linear, bias=bias, dtype=dtype, rngs=rngs)
        self.q = linear(H, self.heads * D, rows=(heads,))
        self.kv = linear(H, 2 * self.kv_heads * D, rows=(kv_heads, kv_heads))
        self.out = linear(self.heads * D, H, columns=(heads,))
        norm = partial(RMSNorm, self.head_dim, config.rms_norm_eps, dtype=dtype)
        self.q_norm = norm() if config.qk_norm else None
        self.k_norm = norm() if config.qk_norm else None

    def keys_values(self, x: Array, rope: Rope) -> tuple[Array, Array]:
        """x [H, B*T] -> keys and values [G, D, B, T], keys normed and rotated."""
        _, B, T = rope[0].shape
        k, v = jnp.split(self.kv(x).reshape(-1, self.head_dim, B, T), 2)
        return rotate(k if self.k_norm is None else self.k_norm(k, axis=1), rope), v

    def mix(self, x: Array, rope: Rope, keys: Array, values: Array, visible: Array) -> Array:
        """Queries of x [H, B*T] over keys [B, G, D, S] and values [B, G, S, D] -> [H, B*T]."""
        _, B, T = rope[0].shape
        q = self.q(x).reshape(-1, self.head_dim, B, T)
        q = rotate(q if self.q_norm is None else self.q_norm(q, axis=1), rope)
        mixed = attend(q.reshape(keys.shape[1], -1, self.head_dim, B, T), keys, values, visible)
        return self.out(mixed.reshape(-1, B * T))


class DraftLayer(nnx.Module):
    """x += attention(norm x, context); x += mlp(norm x). The context is not normed again.

    In a DFlash 2 draft each of the two sublayers is between the halves of a convolution over the block.
    """

    def __init__(self, config: DraftConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.attention_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype=dtype)
        self.attention = DraftAttention(config, dtype=dtype, rngs=rngs)
        self.mlp_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype=dtype)
        self.mlp = SwiGLU(config.hidden_size, config.intermediate_size, bias=config.mlp_bias, dtype=dtype, rngs=rngs)
        self.attention_conv, self.mlp_conv = (
            None if config.conv is None else DynamicConv(config.hidden_size, config.conv, dtype=dtype, rngs=rngs)
            for _ in range(2)
        )

    def __call__(self, x: Array, slots: int, attend_to: Callable[[Array], Array]) -> Array:
        """Block columns x [H, N], `slots` of them a block -> [H, N]. `attend_to` maps normed columns to mixed ones."""
        x = x + _around(self.attention_conv, attend_to, self.attention_norm(x), slots)
        return x + _around(self.mlp_conv, self.mlp, self.mlp_norm(x), slots)

    def uncached(self, x: Array, context: Array, ropes: tuple[Rope, Rope], visible: Array, slots: int) -> Array:
        """Block columns x [H, B*T], `slots` of them a block, over context columns [H, B*C] and themselves -> [H, B*T].

        `ropes` are the context's and the block's; visible bool [B, T, C + T].
        """

        def attend_to(normed: Array) -> Array:
            of_context = self.attention.keys_values(context, ropes[0])
            of_block = self.attention.keys_values(normed, ropes[1])
            k, v = (jnp.concatenate(pair, axis=3) for pair in zip(of_context, of_block, strict=True))
            keys, values = k.transpose(2, 0, 1, 3), v.transpose(2, 0, 3, 1)
            return self.attention.mix(normed, ropes[1], keys, values, visible)

        return self(x, slots, attend_to)


def _around(conv: DynamicConv | None, sublayer: Callable[[Array], Array], x: Array, slots: int) -> Array:
    """A sublayer over normed columns [H, N], between the two halves of its convolution if there is one."""
    if conv is None:
        return sublayer(x)
    x, kernels = conv.prepare(x, slots)
    return conv.finish(sublayer(x), kernels, slots)


class Draft(nnx.Module):
    """A draft network. The decode loop uses `append_context` and `block`; `uncached` is the same without a cache."""

    def __init__(self, config: DraftConfig, *, dtype: jnp.dtype = jnp.float32, rngs: nnx.Rngs):
        self.config = config
        self.dtype = jnp.dtype(dtype)
        self.mesh: Mesh | None = None
        size = config.hidden_size
        read = config.num_features * size
        features = (Part("features", read),)
        self.fc = Linear(read, size, bias=config.fc_bias, columns=features, dtype=dtype, rngs=rngs)
        self.hidden_norm = RMSNorm(size, config.rms_norm_eps, dtype=dtype)
        self.layers = nnx.List(DraftLayer(config, dtype=dtype, rngs=rngs) for _ in range(config.num_layers))
        self.norm = RMSNorm(size, config.rms_norm_eps, dtype=dtype)
        self.mask_embedding = nnx.Param(jnp.zeros(size, dtype)) if config.learned_mask else None
        self.selector = (
            None
            if config.selector is None
            else CandidateSelector(config.vocab_size, size, config.selector, dtype=dtype, rngs=rngs)
        )

    def masked(self, x: Array, block_size: int) -> Array:
        """Embedded blocks [H, N*S] with the learned mask in every slot but the anchor's; unchanged if there is none."""
        if self.mask_embedding is None:
            return x
        anchors = jnp.arange(x.shape[1]) % block_size == 0
        return jnp.where(anchors, x, self.mask_embedding[...][:, None].astype(x.dtype))

    def _rope(self, positions: Array) -> Rope:
        return rope_tables(self.config.rope, self.config.head_dim, positions)

    def _context(self, features: list[Array]) -> Array:
        """K context features [H, N] -> the columns from which every layer makes keys and values [H, N]."""
        return self.hidden_norm(self.fc(jnp.concatenate(features).astype(self.dtype)))

    def append_context(self, features: list[Array], cache: KVCache) -> KVCache:
        """Appends the next T tokens' context features (K arrays [H, B*T]) uncommitted, as the target's cache does."""
        batch = cache.lengths.shape[0]
        context = self._context(features)
        rope = self._rope(cache.positions(context.shape[1] // batch))
        for i, layer in enumerate(self.layers):
            cache = cache.append(i, *layer.attention.keys_values(context, rope))
        return cache

    def block(self, x: Array, cache: KVCache) -> tuple[Array, KVCache]:
        """Embedded block [H, B*T] (anchor and masks) over the committed context -> hidden after the norm [H, B*T].

        The block's own keys are written beyond the committed ones and never committed. Returns the cache that
        holds them; continuing with it avoids a copy.
        """
        T = x.shape[1] // cache.lengths.shape[0]
        rope = self._rope(cache.positions(T))

        def attend(i: int, normed: Array) -> Array:
            nonlocal cache
            mixed, cache = self._attend_to(i, rope, cache, normed)
            return mixed

        for i, layer in enumerate(self.layers):
            x = layer(x, T, partial(attend, i))
        return self.norm(x), cache

    def _attend_to(self, i: int, rope: Rope, cache: KVCache, normed: Array) -> tuple[Array, KVCache]:
        """Layer i's attention of a block's columns [H, B*T] over the committed context and the block -> [H, B*T]."""
        attention = self.layers[i].attention
        cache = cache.append(i, *attention.keys_values(normed, rope))
        visible = cache.visible(i, rope[0].shape[2], self.config.causal[i])
        return attention.mix(normed, rope, cache.keys[i], cache.values[i], visible), cache

    def choose(self, x: Array, logits: Array, anchors: Array, scale: float = 1.0) -> Array:
        """Drafted columns [H, B*T] and their logits [M, B*T], after anchors int32 [B] -> tokens int32 [B, T].

        The M rows of logits are those of `proposed_tokens`, and the whole vocabulary's for a draft that proposes any;
        on a mesh, those of them that this device has. `scale` is what the logits were multiplied by.
        """
        ids, count = proposed_tokens(self.config), self.config.num_tokens
        if self.selector is not None:
            return self.selector.select(x.astype(self.dtype), logits, anchors, count, ids, scale)
        best = most_likely(logits, count).reshape(anchors.shape[0], -1)
        return best if ids is None else jnp.asarray(ids)[best]

    def uncached(
        self, features: list[Array], anchors: Array, x: Array, start: Array | None = None, *, remat: bool = False
    ) -> Array:
        """`block` without a cache, for many blocks of a row at once: what training and evaluation call.

        K context features [H, B*C]; block a of a row sees the first `anchors` int32 [B, A] of the row's context tokens
        (what comes later, padding too, is hidden) and itself, no other block. Context positions are start .. start+C-1
        (start int32 [B], 0 by default); a block's begin at start + anchors. Embedded blocks [H, B*A*T] -> hidden after
        the norm [H, B*A*T]. With `remat` a gradient recomputes every layer instead of keeping its activations.
        """
        B, A = anchors.shape
        context = self._context(features)
        C, T = context.shape[1] // B, x.shape[1] // (B * A)
        first = jnp.zeros(B, jnp.int32) if start is None else start
        context_positions = first[:, None] + jnp.arange(C, dtype=jnp.int32)
        block_positions = (first[:, None] + anchors)[:, :, None] + jnp.arange(T, dtype=jnp.int32)
        block_positions = block_positions.reshape(B, A * T)
        context_rope, block_rope = self._rope(context_positions), self._rope(block_positions)
        positions = jnp.concatenate([context_positions, block_positions], axis=1)
        before = jnp.repeat(jnp.arange(C) < anchors[:, :, None], T, axis=1)
        blocks = jnp.repeat(jnp.arange(A), T)
        own = jnp.broadcast_to(blocks[:, None] == blocks, (B, A * T, A * T))
        real = jnp.concatenate([before, own], axis=2)
        run = nnx.remat(DraftLayer.uncached, static_argnums=5) if remat else DraftLayer.uncached
        for i, layer in enumerate(self.layers):
            visible = real & attention_mask(
                block_positions[:, :, None],
                positions[:, None, :],
                window=self.config.windows[i],
                causal=self.config.causal[i],
            )
            x = run(layer, x, context, (context_rope, block_rope), visible, T)
        return self.norm(x)
