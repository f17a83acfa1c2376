"""GPT-OSS targets: the Llama decoder with attention sinks, alternating windows, biases and routed experts."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from dflash.config import TargetConfig
from dflash.models import mesh, native
from dflash.models.layers import Linear, multiply, multiply_chosen, precision
from dflash.models.llama import Llama
from dflash.models.mesh import Part

# Column n of [in, N] times matrix which[n], int32 [N], of a stack [E, out, in] -> [out, N].
_Products = Callable[[nnx.Param, Array, Array], Array]


def _by_kernel(stack: nnx.Param, which: Array, x: Array) -> Array:
    return native.products_of(stack[...], which, x)


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
        """x [H, N] -> [H, N]."""
        top, chosen = self.route(x)
        weights = jax.nn.softmax(top, axis=-1)
        rows = jnp.arange(x.shape[1])[:, None]
        share = jnp.zeros((self.settings.count, x.shape[1]), weights.dtype).at[chosen, rows].set(weights)
        out = self._mixed(x, chosen, weights, share)
        out = out if self.down.shape[2] == self.inner_size else mesh.total(out)
        return out + jnp.matmul(self.down_bias[...].T, share, precision=precision(x.dtype))

    def _mixed(self, x: Array, chosen: Array, weights: Array, share: Array) -> Array:
        """The sum of the chosen experts, without `down_bias`, read in the way that costs least.

        Few tokens read the experts that they chose, one after the other, as often as they are chosen. More tokens wake
        most experts, and all of them are read once, each multiplied with all tokens: that costs no more time than
        reading them does. A TPU reads a chosen expert where it lies, and the first pays as long as fewer are chosen
        than there are. XLA copies it on a CPU; our kernel there reads each chosen expert once, and multiplies it with
        the tokens that chose it, however many.
        """
        of_all = partial(self._of_all, x, share)
        one_by_one, by_kernel = (partial(self._of_chosen, x, chosen, weights, p) for p in (multiply_chosen, _by_kernel))
        few = one_by_one if 4 * chosen.size <= self.settings.count else of_all
        cpu = by_kernel if native.takes(1, self.gate_up[...], x) else few
        tpu = one_by_one if chosen.size < self.settings.count else of_all
        return jax.lax.platform_dependent(cpu=cpu, tpu=tpu, default=few)

    def _act(self, inner: Array) -> Array:
        """[..., 2I, N] -> [..., I, N]."""
        s = self.settings
        gate, up = jnp.split(inner, 2, axis=-2)
        gate, up = jnp.minimum(gate, s.limit), jnp.clip(up, -s.limit, s.limit)
        return (up + 1) * gate * jax.nn.sigmoid(s.alpha * gate)

    def _of_chosen(self, x: Array, chosen: Array, weights: Array, products: _Products) -> Array:
        """Each token's own experts: chosen, weights [N, k]."""
        experts = chosen.reshape(-1)

        def product(weight: nnx.Param, scale: nnx.Param | None, columns: Array) -> Array:
            y = products(weight, experts, columns)
            return y if scale is None else y * scale[...][experts].T

        inner = product(self.gate_up, self.gate_up_scale, jnp.repeat(x, chosen.shape[1], axis=1))
        inner = self._act(inner + self.gate_up_bias[...][experts].T) * weights.reshape(-1)
        return product(self.down, self.down_scale, inner).reshape(-1, *chosen.shape).sum(axis=2)

    def _of_all(self, x: Array, share: Array) -> Array:
        """All experts, each weighed by `share` [E, N]: zero for the tokens that did not choose it."""
        E, rows, H = self.gate_up.shape
        inner = multiply(self.gate_up[...].reshape(-1, H).astype(x.dtype), x).reshape(E, rows, -1)
        inner = inner if self.gate_up_scale is None else inner * self.gate_up_scale[...][:, :, None]
        inner = self._act(inner + self.gate_up_bias[...][:, :, None]) * share[:, None, :]
        each = jnp.matmul(self.down[...].astype(x.dtype), inner, precision=precision(x.dtype))
        return (each if self.down_scale is None else each * self.down_scale[...][:, :, None]).sum(axis=0)


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
