"""GPT-OSS targets: the Llama decoder with attention sinks, alternating windows, biases and routed experts."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from dflash.config import TargetConfig
from dflash.models.layers import Linear, precision
from dflash.models.llama import Llama


class Experts(nnx.Module):
    """Top-k routed experts with clamped SwiGLU: (clip(up) + 1) * g * sigmoid(alpha g), g = min(gate, limit).

    gate_up [E, H, 2I] (gate and up interleaved), down [E, I, H], each with a bias: the checkpoint's own layout, and
    what a grouped matrix product reads. Routing weights are one softmax over the top-k logits.
    """

    def __init__(self, config: TargetConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        assert config.experts is not None
        self.settings = config.experts
        E, H, I = config.experts.count, config.hidden_size, config.intermediate_size  # noqa: E741
        self.router = Linear(H, E, bias=True, dtype=dtype, rngs=rngs)
        self.gate_up = nnx.Param(0.02 * rngs.normal((E, H, 2 * I), dtype))
        self.gate_up_bias = nnx.Param(jnp.zeros((E, 2 * I), dtype))
        self.down = nnx.Param(0.02 * rngs.normal((E, I, H), dtype))
        self.down_bias = nnx.Param(jnp.zeros((E, H), dtype))

    def route(self, x: Array) -> tuple[Array, Array]:
        """x [H, N] -> the top-k router logits of each token and the experts they are of, [N, k] both."""
        logits, chosen = jax.lax.top_k(self.router(x).T, self.settings.per_token)
        return logits, chosen

    def __call__(self, x: Array) -> Array:
        """x [H, N] -> [H, N]. Tokens are sorted by expert, so that each awake expert is read once."""
        s = self.settings
        N = x.shape[1]
        top, chosen = self.route(x)
        weights = jax.nn.softmax(top, axis=-1)
        order = jnp.argsort(chosen.reshape(-1), stable=True)
        expert = chosen.reshape(-1)[order]
        token = order // s.per_token
        sizes = jnp.bincount(expert, length=s.count).astype(jnp.int32)
        exact = precision(x.dtype)
        inner = jax.lax.ragged_dot(x.T[token], self.gate_up[...], sizes, precision=exact)
        inner += self.gate_up_bias[...][expert]
        gate = jnp.minimum(inner[:, ::2], s.limit)
        up = jnp.clip(inner[:, 1::2], -s.limit, s.limit)
        out = jax.lax.ragged_dot(
            (up + 1) * gate * jax.nn.sigmoid(s.alpha * gate), self.down[...], sizes, precision=exact
        )
        out = (out + self.down_bias[...][expert]) * weights.reshape(-1)[order][:, None]
        return jnp.zeros((N, x.shape[0]), x.dtype).at[token].add(out).T


class GptOss(Llama):
    """A GPT-OSS target."""

    def make_mlp(self, dtype: jnp.dtype, rngs: nnx.Rngs) -> nnx.Module:
        return Experts(self.config, dtype=dtype, rngs=rngs)

    def chosen_experts(self, tokens: Array) -> Array:
        """The experts that each token of int32 [B, T] wakes in each layer, int32 [L, B, T, k]. Without a cache."""
        graph, weights = nnx.split(self)
        return _chosen_experts(graph, weights, tokens)


@partial(jax.jit, static_argnames="graph")
def _chosen_experts(graph: Any, weights: Any, tokens: Array) -> Array:
    copy, seen = nnx.merge(graph, weights), []

    def watched(experts: Experts) -> Callable[[Array], Array]:
        def run(x: Array) -> Array:
            seen.append(experts.route(x)[1])
            return experts(x)

        return run

    for layer in copy.layers:
        layer.mlp = nnx.static(watched(layer.mlp))
    copy.hidden(tokens)
    return jnp.stack(seen).reshape(len(seen), *tokens.shape, -1)
