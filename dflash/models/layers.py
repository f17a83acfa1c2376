"""Layers that targets and drafts share. Activations are columns: a feature axis first, one column per token.

Why columns: `y = W @ x` with W stored [out, in], as checkpoints store it, is the form of a thin matrix product that
XLA runs fastest on a CPU once a few tokens are multiplied at a time, and accelerators don't mind it. `Linear` is the
one place that knows how a weight is stored and multiplied.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from dflash import native
from dflash.config import RopeConfig


def precision(dtype: jnp.dtype) -> jax.lax.Precision | None:
    """float32 means float32 on every device: TPUs and GPUs would otherwise multiply in bfloat16 or TF32."""
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None


def multiply(weight: Array, x: Array) -> Array:
    """weight [out, in] times columns x [in, N] -> [out, N]."""
    if native.takes(x.shape[1], weight, x):
        return native.product(weight, x)
    return jnp.matmul(weight, x, precision=precision(x.dtype))


class Linear(nnx.Module):
    """y = W x + b. `weight` [out, in], `bias` [out] or None."""

    def __init__(self, in_size: int, out_size: int, *, bias: bool = False, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.weight = nnx.Param(0.02 * rngs.normal((out_size, in_size), dtype))
        self.bias = nnx.Param(jnp.zeros(out_size, dtype)) if bias else None

    def __call__(self, x: Array) -> Array:
        """x [in, N] -> [out, N]."""
        y = multiply(self.weight[...], x)
        return y if self.bias is None else y + self.bias[...][:, None]


class RMSNorm(nnx.Module):
    """Root-mean-square norm over one axis, in float32 whatever comes in. `weight` [size]."""

    def __init__(self, size: int, eps: float, *, dtype: jnp.dtype):
        self.weight = nnx.Param(jnp.ones(size, dtype))
        self.eps = eps

    def __call__(self, x: Array, axis: int = 0) -> Array:
        """x of any shape whose `axis` has `size` entries -> the same shape and dtype."""
        x32 = x.astype(jnp.float32)
        scale = jax.lax.rsqrt(jnp.mean(x32 * x32, axis=axis, keepdims=True) + self.eps)
        weight = self.weight[...].astype(jnp.float32)
        shape = [1] * x.ndim
        shape[axis] = -1
        return (x32 * scale * weight.reshape(shape)).astype(x.dtype)


class SwiGLU(nnx.Module):
    """down(silu(gate x) * up x); gate and up are one weight, so that it is read in one pass."""

    def __init__(self, hidden: int, inner: int, *, bias: bool = False, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.gate_up = Linear(hidden, 2 * inner, bias=bias, dtype=dtype, rngs=rngs)
        self.down = Linear(inner, hidden, bias=bias, dtype=dtype, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        """x [H, N] -> [H, N]."""
        gate, up = jnp.split(self.gate_up(x), 2)
        return self.down(jax.nn.silu(gate) * up)


def _yarn_correction(rope: RopeConfig, head_dim: int) -> tuple[float, float]:
    """The frequency indices between which YaRN blends (arXiv 2309.00071, section 3.2; `truncate` as transformers)."""

    def index(rotations: float) -> float:
        wavelengths = rope.original_max_position / (rotations * 2 * math.pi)
        return head_dim * math.log(wavelengths) / (2 * math.log(rope.theta))

    low, high = index(rope.beta_fast), index(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    return low, high + 0.001 if low == high else high


def rope_attention_factor(rope: RopeConfig) -> float:
    """What cos and sin are multiplied by: YaRN's mscale (0.1 ln s + 1), 1 for the other kinds."""
    if rope.kind != "yarn":
        return 1.0
    if rope.attention_factor is not None:
        return rope.attention_factor

    def mscale(weight: float) -> float:
        return 0.1 * weight * math.log(rope.factor) + 1.0 if rope.factor > 1 else 1.0

    if rope.mscale and rope.mscale_all_dim:
        return mscale(rope.mscale) / mscale(rope.mscale_all_dim)
    return mscale(1.0)


def rope_inverse_frequencies(rope: RopeConfig, head_dim: int) -> np.ndarray:
    """Radians per position for each pair of a head's dimensions, float32 [head_dim / 2].

    Rounded as transformers rounds (float32 at every step): at position 131071 one unit in the last place of a
    frequency is 0.008 rad.
    """
    f32 = np.float32
    exponents = np.arange(0, head_dim, 2, dtype=f32) / f32(head_dim)
    powers = np.power(np.float64(f32(rope.theta)), exponents.astype(np.float64)).astype(f32)
    inverse = f32(1) / powers
    if rope.kind == "linear":
        return inverse / f32(rope.factor)
    if rope.kind == "llama3":
        wavelengths = f32(2 * math.pi) / inverse
        low = rope.original_max_position / rope.low_freq_factor
        high = rope.original_max_position / rope.high_freq_factor
        scaled = np.where(wavelengths > f32(low), inverse / f32(rope.factor), inverse)
        smooth = (f32(rope.original_max_position) / wavelengths - f32(rope.low_freq_factor)) / f32(
            rope.high_freq_factor - rope.low_freq_factor
        )
        blended = (f32(1) - smooth) * scaled / f32(rope.factor) + smooth * scaled
        between = ~(wavelengths < f32(high)) & ~(wavelengths > f32(low))
        return np.where(between, blended, scaled).astype(f32)
    if rope.kind == "yarn":
        low, high = _yarn_correction(rope, head_dim)
        ramp = np.clip((np.arange(head_dim // 2, dtype=f32) - f32(low)) / f32(high - low), 0, 1)
        keep = f32(1) - ramp
        interpolated = f32(1) / (f32(rope.factor) * powers)
        return (interpolated * (f32(1) - keep) + inverse * keep).astype(f32)
    return inverse


def rope_tables(rope: RopeConfig, head_dim: int, positions: Array) -> tuple[Array, Array]:
    """cos and sin for positions int32 [B, T]: two float32 arrays [head_dim / 2, B, T]. No table, so no last row."""
    inverse = jnp.asarray(rope_inverse_frequencies(rope, head_dim))
    angles = inverse[:, None, None] * positions.astype(jnp.float32)
    factor = rope_attention_factor(rope)
    cos, sin = jnp.cos(angles) * factor, jnp.sin(angles) * factor
    # Without a word, a CPU computes them anew for every head of every layer: 4% of a step of 16 tokens.
    return (native.kept(cos), native.kept(sin)) if native.takes(positions.size, cos) else (cos, sin)


def rotate(x: Array, tables: tuple[Array, Array]) -> Array:
    """Rotary embedding of heads x [..., D, B, T] (pairs are i and i + D/2), in float32."""
    cos, sin = tables
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-3)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-3)
    return turned.astype(x.dtype)


def _attend_xla(q: Array, keys: Array, values: Array, visible: Array, sinks: Array | None) -> Array:
    G, R, D, B, T = q.shape
    exact = precision(q.dtype)
    # Rows here, unlike everywhere else: the softmax then runs along the last axis, which is 3 times faster on a CPU.
    rows = (q * D**-0.5).transpose(3, 0, 1, 4, 2).reshape(B, G, R * T, D)
    scores = jnp.matmul(rows, keys, precision=exact).astype(jnp.float32).reshape(B, G, R, T, -1)
    scores = jnp.where(visible[:, None, None], scores, -jnp.inf)
    top = scores.max(axis=-1, keepdims=True)
    if sinks is not None:
        sink = sinks.astype(jnp.float32)[None, :, :, None, None]
        top = jnp.maximum(top, sink)
    # The result does not depend on it: so neither does the derivative, which would go through all scores once more.
    top = jax.lax.stop_gradient(top)
    weights = jnp.exp(scores - top)
    total = weights.sum(axis=-1, keepdims=True)
    if sinks is not None:
        total += jnp.exp(sink - top)
    mixed = jnp.matmul(weights.astype(q.dtype).reshape(B, G, R * T, -1), values, precision=exact)
    mixed = mixed.reshape(B, G, R, T, D) / total
    return mixed.astype(q.dtype).transpose(1, 2, 4, 0, 3)


_attend_native = native.differentiable_as(_attend_xla)(native.attention)


def attend(q: Array, keys: Array, values: Array, visible: Array, sinks: Array | None = None) -> Array:
    """Grouped-query attention with an explicit mask; softmax in float32.

    q [G, R, D, B, T] (G key heads, R query heads per key head), keys [B, G, D, S], values [B, G, S, D],
    visible bool [B, T, S], sinks [G, R] (a logit per head that takes weight and gives nothing) -> [G, R, D, B, T].
    """
    ours = native.takes(q.shape[3] * q.shape[4], q, keys, values, *(() if sinks is None else (sinks,)))
    return (_attend_native if ours else _attend_xla)(q, keys, values, visible, sinks)


def most_likely(logits: Array) -> Array:
    """The index of the largest entry of each column of [V, N], int32 [N]; the lowest of equals.

    First which run of entries has it, then where in the run: XLA's argmax goes through all V one at a time, which for
    16 columns is 5% of a step on a CPU, and its max does not.
    """
    V, N = logits.shape
    run = max(size for size in range(1, math.isqrt(V) + 1) if V % size == 0)
    runs = logits.reshape(V // run, run, N)
    best = jnp.argmax(runs.max(axis=1), axis=0)
    entries = jnp.take_along_axis(runs, best[None, None], axis=0)[0]
    return (best * run + jnp.argmax(entries, axis=0)).astype(jnp.int32)
