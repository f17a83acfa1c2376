"""Layers that targets and drafts share. Activations are columns: a feature axis first, one column per token.

Why columns: `y = W @ x` with W stored [out, in], as checkpoints store it, is the form of a thin matrix product that XLA
runs fastest on a CPU for a few tokens at a time, and it costs accelerators nothing.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from dflash.config import RopeConfig
from dflash.models import bfloat16, mesh, native
from dflash.models.mesh import Part


def precision(dtype: jnp.dtype) -> jax.lax.Precision | None:
    """float32 means float32 on every device: TPUs and GPUs would otherwise multiply in bfloat16 or TF32."""
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None


def _multiply_xla(weight: Array, x: Array) -> Array:
    # Fewer columns are a step of decoding: it waits for memory, and sums as it does for any other number of them.
    if weight.dtype == x.dtype == jnp.bfloat16 and x.shape[1] > native.MAX_COLUMNS:
        return bfloat16.product(weight, x)
    return jnp.matmul(weight, x, precision=precision(x.dtype))


def multiply(weight: Array, x: Array) -> Array:
    """weight [out, in] times columns x [in, N] -> [out, N]."""
    if native.takes(x.shape[1], weight, x):
        return native.on_cpu(native.product, _multiply_xla)(weight, x)
    return _multiply_xla(weight, x)


def multiply_chosen(stack: nnx.Param, which: Array, x: Array) -> Array:
    """Column n of x [in, N] times matrix `which[n]`, int32 [N], of stack [E, out, in], in its own dtype -> [out, N].

    One after the other. A TPU reads a matrix where it lies, as often as it is named; XLA copies each of them on a CPU.
    """
    batched = stack.get_metadata().get("batched", False)

    def product(index: Array, column: Array) -> Array:
        one = jax.lax.dynamic_index_in_dim(stack[...], index)
        return _multiply_xla((mesh.as_it_lies(one) if batched else one)[0].astype(x.dtype), column)

    return jnp.concatenate([product(index, x[:, n : n + 1]) for n, index in enumerate(which)], axis=1)


class Linear(nnx.Module):
    """y = W x + b. `weight` [out, in], `bias` [out] or None.

    `rows` and `columns` say what lies along `out` and `in` (`dflash.models.mesh`). On a mesh a device holds some rows
    and gives these rows of y; or some columns, takes these rows of x (of a whole x its own), and gives all of y.
    """

    def __init__(
        self,
        in_size: int,
        out_size: int,
        *,
        bias: bool = False,
        rows: tuple[Part, ...] | None = None,
        columns: tuple[Part, ...] | None = None,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        self.in_size = in_size
        self.weight = nnx.Param(0.02 * rngs.normal((out_size, in_size), dtype), axes=(rows, columns))
        self.bias = nnx.Param(jnp.zeros(out_size, dtype), axes=(rows,)) if bias else None

    def __call__(self, x: Array) -> Array:
        """x [in, N] -> [out, N]."""
        weight = self.weight[...]
        here = weight.shape[1]
        y = multiply(weight, x if x.shape[0] == here else mesh.own_part(x, here))
        y = y if here == self.in_size else mesh.total(y)
        return y if self.bias is None else y + self.bias[...][:, None]


class RMSNorm(nnx.Module):
    """Root-mean-square norm over one axis, computed in float32 for any input dtype. `weight` [size]."""

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
    """down(silu(gate x) * up x); gate and up are one weight, read in one pass."""

    def __init__(self, hidden: int, inner: int, *, bias: bool = False, dtype: jnp.dtype, rngs: nnx.Rngs):
        width = Part("inner", inner)
        self.gate_up = Linear(hidden, 2 * inner, bias=bias, rows=(width, width), dtype=dtype, rngs=rngs)
        self.down = Linear(inner, hidden, bias=bias, columns=(width,), dtype=dtype, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        """x [H, N] -> [H, N]."""
        gate, up = jnp.split(self.gate_up(x), 2)
        return self.down(jax.nn.silu(gate) * up)


def _yarn_correction(rope: RopeConfig, head_dim: int) -> tuple[float, float]:
    """Frequency indices between which YaRN blends (arXiv 2309.00071, section 3.2; `truncate` as in transformers)."""

    def index(rotations: float) -> float:
        wavelengths = rope.original_max_position / (rotations * 2 * math.pi)
        return head_dim * math.log(wavelengths) / (2 * math.log(rope.theta))

    low, high = index(rope.beta_fast), index(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    return low, high + 0.001 if low == high else high


def rope_attention_factor(rope: RopeConfig) -> float:
    """The factor on cos and sin: YaRN's mscale (0.1 ln s + 1), 1 for the other kinds."""
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
    """cos and sin of any positions int32 [B, T], not from a table: two float32 arrays [head_dim / 2, B, T]."""
    inverse = jnp.asarray(rope_inverse_frequencies(rope, head_dim))
    angles = inverse[:, None, None] * positions.astype(jnp.float32)
    factor = rope_attention_factor(rope)
    cos, sin = jnp.cos(angles) * factor, jnp.sin(angles) * factor
    if not native.takes(positions.size, cos):
        return cos, sin
    # Otherwise XLA on a CPU recomputes them for every head of every layer: 4% of a step of 16 tokens.
    kept = native.on_cpu(native.kept, lambda x: x)
    return kept(cos), kept(sin)


def rotate(x: Array, tables: tuple[Array, Array]) -> Array:
    """Rotary embedding of heads x [..., D, B, T] (pairs are i and i + D/2), in float32."""
    cos, sin = tables
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-3)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-3)
    return turned.astype(x.dtype)


def _attend_xla(q: Array, keys: Array, values: Array, visible: Array, sinks: Array | None) -> Array:
    G, R, D, B, T = q.shape
    exact = precision(q.dtype)
    # Rows here, unlike elsewhere: the softmax then runs along the last axis, which is 3 times faster on a CPU.
    rows = (q * D**-0.5).transpose(3, 0, 1, 4, 2).reshape(B, G, R * T, D)
    scores = jnp.matmul(rows, keys, precision=exact).astype(jnp.float32).reshape(B, G, R, T, -1)
    scores = jnp.where(visible[:, None, None], scores, -jnp.inf)
    top = scores.max(axis=-1, keepdims=True)
    if sinks is not None:
        sink = sinks.astype(jnp.float32)[None, :, :, None, None]
        top = jnp.maximum(top, sink)
    # The result does not depend on it, so no derivative is needed, which would go through all scores once more.
    top = jax.lax.stop_gradient(top)
    weights = jnp.exp(scores - top)
    total = weights.sum(axis=-1, keepdims=True)
    if sinks is not None:
        total += jnp.exp(sink - top)
    mixed = jnp.matmul(weights.astype(q.dtype).reshape(B, G, R * T, -1), values, precision=exact)
    mixed = mixed.reshape(B, G, R, T, D) / total
    return mixed.astype(q.dtype).transpose(1, 2, 4, 0, 3)


def _attend_wide(q: Array, keys: Array, values: Array, visible: Array, sinks: Array | None) -> Array:
    """In float32: XLA's products of bfloat16 with a batch axis are slow on a CPU."""
    q32, k32, v32 = (x.astype(jnp.float32) for x in (q, keys, values))
    return _attend_xla(q32, k32, v32, visible, sinks).astype(q.dtype)


_attend_native = native.on_cpu(native.differentiable_as(_attend_xla)(native.attention), _attend_xla)


def attend(q: Array, keys: Array, values: Array, visible: Array, sinks: Array | None = None) -> Array:
    """Grouped-query attention with an explicit mask; softmax in float32.

    q [G, R, D, B, T] (G key heads, R query heads per key head), keys [B, G, D, S], values [B, G, S, D],
    visible bool [B, T, S], sinks [G, R] (a logit per head that takes weight and gives nothing) -> [G, R, D, B, T].
    """
    columns = q.shape[3] * q.shape[4]
    if native.takes(columns, q, keys, values, *(() if sinks is None else (sinks,))):
        return _attend_native(q, keys, values, visible, sinks)
    if q.dtype == jnp.bfloat16 and columns > native.MAX_COLUMNS:
        return native.on_cpu(_attend_wide, _attend_xla)(q, keys, values, visible, sinks)
    return _attend_xla(q, keys, values, visible, sinks)


def rows_of(table: Array, ids: Array, size: int) -> Array:
    """Rows `ids` int32 [N] of a table with `size` of them, of which a device may hold some -> [N, H]."""
    return table[ids] if table.shape[0] == size else mesh.total(mesh.own_rows(table, ids))


def _best_of_runs(logits: Array) -> tuple[Array, Array]:
    """First which run of entries has the largest, then where in the run: XLA's argmax goes through all V one at a time.

    For 16 columns that is 5% of a step on a CPU, and its max is not.
    """
    V, N = logits.shape
    run = max(size for size in range(1, math.isqrt(V) + 1) if V % size == 0)
    runs = logits.reshape(V // run, run, N)
    best = jnp.argmax(runs.max(axis=1), axis=0)
    entries = jnp.take_along_axis(runs, best[None, None], axis=0)[0]
    return entries.max(axis=0), (best * run + jnp.argmax(entries, axis=0)).astype(jnp.int32)


def _best_at_once(logits: Array) -> tuple[Array, Array]:
    return logits.max(axis=0), jnp.argmax(logits, axis=0).astype(jnp.int32)


def _of_this_device(logits: Array, size: int) -> tuple[Array, Array]:
    """This device's logits, -inf in rows past the whole array's `size`, and the number of its first row."""
    first = mesh.first_row(logits.shape[0])
    numbers = first + jnp.arange(logits.shape[0])
    return jnp.where((numbers < size)[:, None], logits, -jnp.inf), first


def most_likely(logits: Array, size: int | None = None) -> Array:
    """The index of the largest entry of each column of [V, N], int32 [N]; the lowest of equals.

    Fewer rows than `size` are one device's share: then the devices compare the best that each has.
    """
    first = None
    if size is not None and logits.shape[0] != size:
        logits, first = _of_this_device(logits, size)
    top, best = jax.lax.platform_dependent(logits, cpu=_best_of_runs, default=_best_at_once)
    if first is None:
        return best
    tops, bests = _side_by_side(top, first + best)
    return jnp.take_along_axis(bests, jnp.argmax(tops, axis=0)[None], axis=0)[0]


def _side_by_side(values: Array, numbers: Array) -> tuple[Array, Array]:
    """Every device's values, float32, and int32 numbers, along a new first axis: in one exchange, not two."""
    both = jnp.stack([jax.lax.bitcast_convert_type(values.astype(jnp.float32), jnp.int32), numbers])
    pairs = mesh.side_by_side(both)
    return jax.lax.bitcast_convert_type(pairs[:, 0], jnp.float32), pairs[:, 1]


def likeliest(logits: Array, count: int, size: int | None = None) -> tuple[Array, Array]:
    """The `count` largest entries of each column of [V, N], descending, and their indices, [N, count] both.

    Of equals the lowest index comes first. `size` as in `most_likely`.
    """
    if size is None or logits.shape[0] == size:
        return jax.lax.top_k(logits.T, count)
    logits, first = _of_this_device(logits, size)
    top, best = jax.lax.top_k(logits.T, min(count, logits.shape[0]))
    # By device and then by rank, so that equals stay in the order of their indices.
    tops, bests = (jnp.moveaxis(x, 0, 1).reshape(len(top), -1) for x in _side_by_side(top, first + best))
    top, places = jax.lax.top_k(tops, count)
    return top, jnp.take_along_axis(bests, places, axis=1)
