"""GPT-OSS targets: the Llama decoder with attention sinks, alternating windows, biases and routed experts."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from dflash.config import TargetConfig
from dflash.models import mesh
from dflash.models.layers import Linear, multiply, precision
from dflash.models.llama import Llama
from dflash.models.mesh import Part


class Experts(nnx.Module):
    """Top-k routed experts with clamped SwiGLU: (clip(up) + 1) * g * sigmoid(alpha g), g = min(gate, limit).

    gate_up [E, 2I, H] (rows of all gates, then of all ups), down [E, H, I], each with a bias. Held in `held`, which may
    be narrower than the dtype of computation: then each output row has a factor in `gate_up_scale` [E, 2I] and
    `down_scale` [E, H], a power of two. Routing weights are one softmax over the top-k logits. On a mesh every device
    has a part of every expert's inner width.
    """

    def __init__(self, config: TargetConfig, *, dtype: jnp.dtype, held: jnp.dtype | None = None, rngs: nnx.Rngs):
        assert config.experts is not None
        self.settings = config.experts
        E, H, I = config.experts.count, config.hidden_size, config.intermediate_size  # noqa: E741
        self.inner_size = I
        width = Part("inner", I)
        halves = (width, width)
        narrow = held is not None and jnp.dtype(held) != jnp.dtype(dtype)
        self.router = Linear(H, E, bias=True, dtype=dtype, rngs=rngs)
        gate_up, down = (0.02 * rngs.normal(shape, dtype) for shape in ((E, 2 * I, H), (E, H, I)))
        self.gate_up = nnx.Param(gate_up.astype(held or dtype), axes=(None, halves, None))
        self.gate_up_scale = nnx.Param(jnp.ones((E, 2 * I), dtype), axes=(None, halves)) if narrow else None
        self.gate_up_bias = nnx.Param(jnp.zeros((E, 2 * I), dtype), axes=(None, halves))
        self.down = nnx.Param(down.astype(held or dtype), axes=(None, None, (width,)), batched=True)
        self.down_scale = nnx.Param(jnp.ones((E, H), dtype)) if narrow else None
        self.down_bias = nnx.Param(jnp.zeros((E, H), dtype))

    def route(self, x: Array) -> tuple[Array, Array]:
        """x [H, N] -> the top-k router logits of each token and their experts, both [N, k]."""
        logits, chosen = jax.lax.top_k(self.router(x).T, self.settings.per_token)
        return logits, chosen

    def __call__(self, x: Array) -> Array:
        """x [H, N] -> [H, N].

        A few tokens read the experts that they chose, one after the other; more tokens wake most experts, and all of
        them are read once, each multiplied with all tokens: that costs no more time than reading them does.
        """
        top, chosen = self.route(x)
        weights = jax.nn.softmax(top, axis=-1)
        rows = jnp.arange(x.shape[1])[:, None]
        share = jnp.zeros((self.settings.count, x.shape[1]), weights.dtype).at[chosen, rows].set(weights)
        few = 4 * chosen.size <= self.settings.count
        out = self._of_chosen(x, chosen, weights) if few else self._of_all(x, share)
        out = out if self.down.shape[2] == self.inner_size else mesh.total(out)
        return out + jnp.matmul(self.down_bias[...].T, share, precision=precision(x.dtype))

    def _act(self, inner: Array) -> Array:
        """[..., 2I, N] -> [..., I, N]."""
        s = self.settings
        gate, up = jnp.split(inner, 2, axis=-2)
        gate, up = jnp.minimum(gate, s.limit), jnp.clip(up, -s.limit, s.limit)
        return (up + 1) * gate * jax.nn.sigmoid(s.alpha * gate)

    def _of_chosen(self, x: Array, chosen: Array, weights: Array) -> Array:
        """Each token's own experts: chosen, weights [N, k]."""

        def of(weight: nnx.Param, expert: Array) -> Array:
            one = jax.lax.dynamic_index_in_dim(weight[...], expert)
            return (mesh.as_it_lies(one) if weight is self.down else one)[0]

        def product(weight: nnx.Param, scale: nnx.Param | None, expert: Array, column: Array) -> Array:
            return _product(of(weight, expert), None if scale is None else of(scale, expert), column)

        def of_token(column: Array, experts: Array, share: Array) -> Array:
            inner = jnp.stack([product(self.gate_up, self.gate_up_scale, e, column) for e in experts])
            inner = self._act(inner + self.gate_up_bias[...][experts][:, :, None]) * share[:, None, None]
            parts = zip(experts, inner, strict=True)
            first, *others = (product(self.down, self.down_scale, e, part) for e, part in parts)
            return sum(others, first)

        columns = [of_token(x[:, n : n + 1], chosen[n], weights[n]) for n in range(x.shape[1])]
        return jnp.concatenate(columns, axis=1)

    def _of_all(self, x: Array, share: Array) -> Array:
        """All experts, each weighed by `share` [E, N]: zero for the tokens that did not choose it."""
        E, rows, H = self.gate_up.shape
        scale = None if self.gate_up_scale is None else self.gate_up_scale[...].reshape(-1)
        inner = _product(self.gate_up[...].reshape(-1, H), scale, x).reshape(E, rows, -1)
        inner = self._act(inner + self.gate_up_bias[...][:, :, None]) * share[:, None, :]
        each = jnp.matmul(self.down[...].astype(x.dtype), inner, precision=precision(x.dtype))
        return (each if self.down_scale is None else each * self.down_scale[...][:, :, None]).sum(axis=0)


def _product(weight: Array, scale: Array | None, x: Array) -> Array:
    """weight [out, in], in its own dtype, times columns x [in, N], each row by its scale [out] -> [out, N]."""
    y = multiply(weight.astype(x.dtype), x)
    return y if scale is None else y * scale[:, None]


class GptOss(Llama):
    """A GPT-OSS target."""

    def __init__(
        self,
        config: TargetConfig,
        *,
        dtype: jnp.dtype = jnp.float32,
        held: jnp.dtype | None = None,
        rngs: nnx.Rngs,
    ):
        """`held` is the dtype in which the experts are held where it is not `dtype`; see `Experts`."""
        self._held = held
        super().__init__(config, dtype=dtype, rngs=rngs)

    def make_mlp(self, dtype: jnp.dtype, rngs: nnx.Rngs) -> nnx.Module:
        return Experts(self.config, dtype=dtype, held=self._held, rngs=rngs)

    def chosen_experts(self, tokens: Array) -> Array:
        """The experts that each token of int32 [B, T] wakes in each layer, int32 [L, B, T, k]. Runs without a cache."""
        graph, weights = nnx.split(self)
        return _chosen_experts(graph, weights, tokens)


@partial(jax.jit, static_argnames="graph")
def _chosen_experts(graph: Any, weights: Any, tokens: Array) -> Array:
    def run(weights: Any, tokens: Array) -> Array:
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

    return mesh.on_every_device(run, mesh.of(graph, weights))(weights, tokens)
