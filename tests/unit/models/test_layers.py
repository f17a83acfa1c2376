"""The shared layers against plain loops in float64, and rotary frequencies against transformers.

Up to 64 columns of float32 run in the CPU kernels where they can be built; more of them, and bfloat16, run in XLA.
"""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import networks
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from dflash.config import RopeConfig
from dflash.models.layers import (
    Linear,
    RMSNorm,
    SwiGLU,
    attend,
    rope_attention_factor,
    rope_inverse_frequencies,
    rope_tables,
    rotate,
)
from dflash.models.llama import Llama
from dflash.weights.config_json import read_target_config
from dflash.weights.tiny import tiny_config

prove = functools.partial(settings, derandomize=True, database=None, deadline=None)
sizes = st.integers(1, 24)
# Half a unit in the last place: what rounding a float32 result to bfloat16 once may cost.
ONE_ROUNDING = 1.01 * 2.0**-8


def drawn(*shape, seed=0, dtype=jnp.float32):
    """Standard normal, as jax has it and as numpy in float64."""
    x = jnp.asarray(np.random.default_rng([seed, *shape]).standard_normal(shape), dtype)
    return x, np.asarray(x, np.float64)


def fill(make, seed=0):
    """A module whose weights are all drawn; they start at zeros and ones, which hide a wrong axis."""
    seeds = itertools.count(seed)
    return networks.drawn(make, lambda path, shape: drawn(*shape, seed=next(seeds))[0])


# Linear, SwiGLU, embedding and head


def plain_linear(layer, x):
    weight = np.asarray(layer.weight[...], np.float64)
    y = np.zeros((len(weight), x.shape[1]))
    for o in range(len(weight)):
        for n in range(x.shape[1]):
            y[o, n] = sum(weight[o, i] * x[i, n] for i in range(len(x)))
            y[o, n] += 0 if layer.bias is None else float(layer.bias[...][o])
    return y


@prove(max_examples=6)
@given(sizes, sizes, st.integers(1, 5) | st.just(70), st.booleans())
def test_linear_is_the_plain_loop(inputs, outputs, columns, bias):
    layer = fill(lambda: Linear(inputs, outputs, bias=bias, dtype=jnp.float32, rngs=nnx.Rngs(0)))
    x, x64 = drawn(inputs, columns)
    np.testing.assert_allclose(layer(x), plain_linear(layer, x64), atol=1e-5)


def test_a_bfloat16_linear_rounds_its_result_and_not_its_sum():
    """4000 products of which bfloat16 could add up no more than 256."""
    layer = Linear(4000, 3, bias=False, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    layer.weight[...] = jnp.ones((3, 4000), jnp.bfloat16)
    y = layer(jnp.ones((4000, 2), jnp.bfloat16))
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(y.astype(jnp.float32), 4000, rtol=ONE_ROUNDING)


@prove(max_examples=4)
@given(sizes, sizes, st.integers(1, 5), st.booleans())
def test_swiglu_is_the_plain_loop(hidden, inner, columns, bias):
    layer = fill(lambda: SwiGLU(hidden, inner, bias=bias, dtype=jnp.float32, rngs=nnx.Rngs(0)))
    x, x64 = drawn(hidden, columns)
    both = plain_linear(layer.gate_up, x64)
    mixed = np.zeros((inner, columns))
    for i in range(inner):
        for n in range(columns):
            gate, up = both[i, n], both[inner + i, n]
            mixed[i, n] = gate / (1 + math.exp(-gate)) * up
    expected = plain_linear(layer.down, mixed)
    np.testing.assert_allclose(layer(x), expected, atol=1e-5 * max(1, np.abs(expected).max()))


@pytest.mark.parametrize("tied", [False, True])
def test_embedding_and_head_are_rows_by_token(tied):
    config = read_target_config(tiny_config(num_hidden_layers=1, vocab_size=31, tie_word_embeddings=tied))
    model = fill(lambda: Llama(config, rngs=nnx.Rngs(0)))
    embedding = np.asarray(model.embedding.weight[...])
    tokens = np.array([[3, 30, 0], [3, 7, 7]])
    columns = model.embed(jnp.asarray(tokens))
    for n, token in enumerate([3, 30, 0, 3, 7, 7]):
        np.testing.assert_array_equal(columns[:, n], embedding[token])
    assert (model.head is None) == tied
    x, x64 = drawn(64, 6)
    logits = model.logits(x)
    np.testing.assert_allclose(logits, plain_linear(model.embedding if tied else model.head, x64), atol=1e-4)
    np.testing.assert_array_equal(model.most_likely(x), np.argmax(logits, axis=0))


# RMSNorm


def plain_rms_norm(x, weight, eps, axis):
    lines = np.moveaxis(x, axis, -1)
    out = np.empty_like(lines)
    for index in np.ndindex(*lines.shape[:-1]):
        mean_square = sum(v * v for v in lines[index]) / len(weight)
        out[index] = lines[index] / math.sqrt(mean_square + eps) * weight
    return np.moveaxis(out, -1, axis)


@prove(max_examples=15)
@given(hnp.array_shapes(min_dims=1, max_dims=4, max_side=9), st.data(), st.sampled_from([1e-6, 1e-5, 0.5]))
def test_rms_norm_is_the_plain_loop_along_any_axis(shape, data, eps):
    axis = data.draw(st.integers(-len(shape), len(shape) - 1))
    norm = fill(lambda: RMSNorm(shape[axis], eps, dtype=jnp.float32), seed=1)
    x, x64 = drawn(*shape)
    expected = plain_rms_norm(x64, np.asarray(norm.weight[...], np.float64), eps, axis)
    np.testing.assert_allclose(jax.jit(lambda x: norm(x, axis=axis))(x), expected, atol=1e-5)


def test_rms_norm_takes_the_norm_of_a_column():
    norm = fill(lambda: RMSNorm(8, 1e-5, dtype=jnp.float32))
    x, _ = drawn(8, 3)
    np.testing.assert_array_equal(norm(x), norm(x, axis=0))


def test_rms_norm_in_bfloat16_rounds_once():
    """Statistics are float32's: in bfloat16 a sum of 2048 squares near 1 would stop growing at 256."""
    norm = fill(lambda: RMSNorm(2048, 1e-5, dtype=jnp.bfloat16), seed=1)
    x, x64 = drawn(2048, 3, dtype=jnp.bfloat16)
    out = norm(x)
    assert out.dtype == jnp.bfloat16
    expected = plain_rms_norm(x64, np.asarray(norm.weight[...], np.float64), 1e-5, 0)
    np.testing.assert_allclose(out.astype(jnp.float32), expected, rtol=ONE_ROUNDING, atol=1e-30)


def test_rms_norm_of_zeros_is_zeros():
    assert (RMSNorm(4, 1e-6, dtype=jnp.float32)(jnp.zeros((4, 2))) == 0).all()


# Rotary embedding

LLAMA3 = RopeConfig(theta=500000.0, kind="llama3", factor=8.0, original_max_position=8192)
YARN = RopeConfig(theta=150000.0, kind="yarn", factor=32.0, original_max_position=4096, truncate=False)
ROPES = {
    "default": RopeConfig(theta=10000.0),
    "linear": RopeConfig(theta=10000.0, kind="linear", factor=4.0),
    "llama3": LLAMA3,
    "yarn": YARN,
    "yarn-truncated": RopeConfig(theta=150000.0, kind="yarn", factor=32.0, original_max_position=4096),
    "yarn-betas": RopeConfig(
        theta=1e6, kind="yarn", factor=4.0, original_max_position=32768, beta_fast=16.0, beta_slow=2.0
    ),
}
each_rope = pytest.mark.parametrize("rope", ROPES.values(), ids=list(ROPES))


def plain_frequency(rope, pair, head_dim):
    """Radians per position of one pair, after the papers and Meta's llama3 code."""
    plain = rope.theta ** (-2 * pair / head_dim)
    turns = rope.original_max_position * plain / (2 * math.pi)
    if rope.kind == "linear":
        return plain / rope.factor
    if rope.kind == "llama3":
        share = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
        share = min(max(share, 0.0), 1.0)
        return share * plain + (1 - share) * plain / rope.factor
    if rope.kind == "yarn":

        def pair_of(turns):
            return head_dim * math.log(rope.original_max_position / (2 * math.pi * turns)) / (2 * math.log(rope.theta))

        first, last = pair_of(rope.beta_fast), pair_of(rope.beta_slow)
        if rope.truncate:
            first, last = math.floor(first), math.ceil(last)
        share = min(max((pair - first) / (last - first), 0.0), 1.0)
        return (1 - share) * plain + share * plain / rope.factor
    return plain


@each_rope
@pytest.mark.parametrize("head_dim", [16, 64, 128])
def test_rotary_frequencies_are_their_definition(rope, head_dim):
    got = rope_inverse_frequencies(rope, head_dim)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, [plain_frequency(rope, i, head_dim) for i in range(head_dim // 2)], rtol=2e-6)


def test_every_kind_of_rope_leaves_some_pairs_scales_some_and_blends_the_rest():
    """The cases above would prove little if all pairs fell on one side."""
    for rope in (LLAMA3, YARN):
        shrunk = rope_inverse_frequencies(RopeConfig(theta=rope.theta), 64) / rope_inverse_frequencies(rope, 64)
        kept, full = np.isclose(shrunk, 1), np.isclose(shrunk, rope.factor)
        assert kept.any()
        assert full.any()
        assert (~kept & ~full).any()


def test_truncate_moves_the_bounds_of_yarn():
    frequencies = [rope_inverse_frequencies(ROPES[name], 64) for name in ("yarn", "yarn-truncated")]
    assert not np.allclose(*frequencies, rtol=1e-3)


@pytest.mark.parametrize(
    ("rope", "expected"),
    [
        (RopeConfig(theta=1e4), 1.0),
        (LLAMA3, 1.0),
        (YARN, 0.1 * math.log(32) + 1),
        (RopeConfig(theta=1e4, kind="yarn", factor=0.5, original_max_position=64), 1.0),
        (RopeConfig(theta=1e4, kind="yarn", factor=4.0, original_max_position=64, attention_factor=0.75), 0.75),
        (
            RopeConfig(theta=1e4, kind="yarn", factor=40.0, original_max_position=64, mscale=2.0, mscale_all_dim=0.5),
            (0.2 * math.log(40) + 1) / (0.05 * math.log(40) + 1),
        ),
    ],
    ids=["default", "llama3", "yarn", "yarn-shrinking", "given", "mscale"],
)
def test_attention_factor(rope, expected):
    assert rope_attention_factor(rope) == pytest.approx(expected, rel=1e-12)


@each_rope
@pytest.mark.parametrize("end", [100, 131072, 2**24])
def test_rope_tables_are_cos_and_sin_of_any_position(rope, end):
    positions = np.array([[0, 1, 2], [end - 3, end - 2, end - 1]], np.int32)
    cos, sin = rope_tables(rope, 16, jnp.asarray(positions))
    assert cos.shape == sin.shape == (8, 2, 3)
    assert cos.dtype == sin.dtype == np.float32
    # The angle itself is float32's, as in every implementation that the checkpoints were trained with.
    angles = (rope_inverse_frequencies(rope, 16)[:, None, None] * positions.astype(np.float32)).astype(np.float64)
    factor = rope_attention_factor(rope)
    np.testing.assert_allclose(cos, factor * np.cos(angles), atol=1e-6)
    np.testing.assert_allclose(sin, factor * np.sin(angles), atol=1e-6)


def plain_rotate(x, frequencies, positions):
    """Each pair (i, i + D/2) is a complex number, turned by its angle. x [heads, D, B, T]."""
    out = np.empty_like(x)
    half = x.shape[1] // 2
    for head, i, b, t in np.ndindex(len(x), half, *positions.shape):
        pair = complex(x[head, i, b, t], x[head, i + half, b, t])
        pair *= np.exp(1j * frequencies[i] * positions[b, t])
        out[head, i, b, t], out[head, i + half, b, t] = pair.real, pair.imag
    return out


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_rotate_turns_every_pair(dtype):
    rope = RopeConfig(theta=100.0)
    positions = np.array([[0, 1, 2, 3], [40, 41, 42, 43]])
    x, x64 = drawn(3, 6, 2, 4, dtype=dtype)
    turned = rotate(x, rope_tables(rope, 6, jnp.asarray(positions)))
    assert turned.dtype == dtype
    expected = plain_rotate(x64, [plain_frequency(rope, i, 6) for i in range(3)], positions)
    rounding = ONE_ROUNDING if dtype == jnp.bfloat16 else 0
    np.testing.assert_allclose(turned.astype(jnp.float32), expected, rtol=rounding, atol=2e-5)


def test_rotate_takes_any_leading_axes():
    tables = rope_tables(RopeConfig(theta=100.0), 6, jnp.array([[5, 6, 7]]))
    x, _ = drawn(2, 3, 6, 1, 3)
    np.testing.assert_array_equal(rotate(x, tables).reshape(6, 6, 1, 3), rotate(x.reshape(6, 6, 1, 3), tables))


@prove(max_examples=20)
@given(st.integers(0, 2000), st.integers(0, 2000), st.integers(0, 2000))
def test_scores_after_rotation_depend_on_the_distance_only(query, key, shift):
    (q, _), (k, _) = drawn(1, 16, 1, 1), drawn(1, 16, 1, 1, seed=1)

    def score(query, key):
        at = [rope_tables(YARN, 16, jnp.array([[p]])) for p in (query, key)]
        return float((rotate(q, at[0]) * rotate(k, at[1])).sum())

    assert score(query, key) == pytest.approx(score(query + shift, key + shift), abs=5e-3)


@pytest.mark.oracle
@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning", "ignore:.*:FutureWarning", "ignore:.*:UserWarning")
@pytest.mark.parametrize("head_dim", [64, 128])
@each_rope
def test_rotary_frequencies_are_those_of_transformers(rope, head_dim):
    """To two units in the last place: torch's float32 power is off by one on some CPUs, ours is rounded correctly."""
    transformers = pytest.importorskip("transformers")
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    parameters = {"rope_type": rope.kind, "rope_theta": rope.theta}
    if rope.kind != "default":
        parameters["factor"] = rope.factor
    if rope.kind in ("llama3", "yarn"):
        parameters["original_max_position_embeddings"] = rope.original_max_position
    if rope.kind == "llama3":
        parameters |= {"low_freq_factor": rope.low_freq_factor, "high_freq_factor": rope.high_freq_factor}
    if rope.kind == "yarn":
        parameters |= {"beta_fast": rope.beta_fast, "beta_slow": rope.beta_slow, "truncate": rope.truncate}
    config = transformers.LlamaConfig(head_dim=head_dim, max_position_embeddings=131072, rope_parameters=parameters)
    theirs = llama.LlamaRotaryEmbedding(config)
    np.testing.assert_array_max_ulp(rope_inverse_frequencies(rope, head_dim), theirs.inv_freq.numpy(), maxulp=2)
    assert rope_attention_factor(rope) == theirs.attention_scaling


# Attention


def plain_attention(q, keys, values, visible, sinks):
    """One query head and one token at a time. Without a sink, a query that sees nothing has no answer: NaN."""
    q, keys, values = (np.asarray(a, np.float64) for a in (q, keys, values))
    out = np.full(q.shape, np.nan)
    for g, r, b, t in np.ndindex(*q.shape[:2], *q.shape[3:]):
        seen = np.flatnonzero(visible[b, t])
        scores = [q[g, r, :, b, t] @ keys[b, g, :, s] / math.sqrt(q.shape[2]) for s in seen]
        logits = scores if sinks is None else [*scores, float(sinks[g, r])]
        if logits:
            weights = np.exp(np.array(logits) - max(logits))
            weights /= weights.sum()
            out[g, r, :, b, t] = sum((w * values[b, g, s] for w, s in zip(weights, seen, strict=False)), np.zeros(1))
    return out


def heads(G, R, D, B, T, S, dtype=jnp.float32):
    """q, keys, values and sinks; queries wide enough that attention is sharp."""
    shapes = (G, R, D, B, T), (B, G, D, S), (B, G, S, D), (G, R)
    q, keys, values, sinks = (drawn(*shape, seed=i, dtype=dtype)[0] for i, shape in enumerate(shapes))
    return 2 * q, keys, values, sinks


def mask_of(lengths, T, S, window=None):
    """Row b has `lengths[b]` slots filled; its T queries are the newest of them, each sees `window` slots back."""
    visible = np.zeros((len(lengths), T, S), bool)
    for b, length in enumerate(lengths):
        for t in range(T):
            position = length - T + t
            first = 0 if window is None else max(0, position - window + 1)
            visible[b, t, first : position + 1] = True
    return visible


SIZES = [(2, 3, 8), (3, 1, 6), (1, 4, 2)]
# Three rows of 40 queries are more than the CPU kernels take.
each_kernel = pytest.mark.parametrize("T", [4, 40], ids=["native-kernels", "xla"])


def attended(*heads):
    """`attend` as one program. Compiled anew each time, since the kernels are chosen when it is traced."""
    return jax.jit(lambda *heads: attend(*heads))(*heads)


@pytest.mark.parametrize("with_sinks", [False, True], ids=["plain", "sinks"])
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize(("G", "R", "D"), SIZES)
@each_kernel
def test_attention_is_the_plain_loop(G, R, D, T, window, with_sinks):
    """Three rows of unequal length: a full one, one that has only its queries, one between."""
    lengths, S = [T + 12, T, T + 5], T + 12
    q, keys, values, sinks = heads(G, R, D, 3, T, S)
    sinks = sinks if with_sinks else None
    visible = mask_of(lengths, T, S, window)
    expected = plain_attention(q, keys, values, visible, sinks)
    np.testing.assert_allclose(attended(q, keys, values, jnp.asarray(visible), sinks), expected, atol=1e-5)


@prove(max_examples=40)
@given(hnp.arrays(bool, (2, 3, 7)), st.booleans())
def test_attention_obeys_any_mask(visible, with_sinks):
    """Where nothing is seen, a sink takes all the weight and the answer is zero; no other query notices."""
    q, keys, values, sinks = heads(2, 2, 4, 2, 3, 7)
    sinks = sinks if with_sinks else None
    expected = plain_attention(q, keys, values, visible, sinks)
    np.testing.assert_allclose(attended(q, keys, values, jnp.asarray(visible), sinks), expected, atol=1e-5)


@each_kernel
def test_a_row_that_sees_nothing_gives_zeros_with_a_sink_and_spoils_no_other_row(T):
    q, keys, values, sinks = heads(2, 2, 4, 3, T, 9)
    visible = np.ones((3, T, 9), bool)
    expected = attended(q, keys, values, jnp.asarray(visible), sinks)
    visible[1] = False
    got = attended(q, keys, values, jnp.asarray(visible), sinks)
    assert (got[:, :, :, 1] == 0).all()
    np.testing.assert_array_equal(got[:, :, :, ::2], expected[:, :, :, ::2])


@each_kernel
def test_large_scores_and_sinks_do_not_overflow(T):
    q, keys, values, _ = heads(2, 2, 4, 3, T, 9)
    q, sinks = 500 * q, jnp.array([[1e4, -1e4], [300.0, 0.0]])
    visible = np.ones((3, T, 9), bool)
    expected = plain_attention(q, keys, values, visible, sinks)
    np.testing.assert_allclose(attended(q, keys, values, jnp.asarray(visible), sinks), expected, atol=2e-3)


def test_bfloat16_attention_is_near_the_plain_loop():
    q, keys, values, sinks = heads(2, 2, 16, 2, 5, 20, dtype=jnp.bfloat16)
    visible = mask_of([20, 11], 5, 20)
    got = attended(q, keys, values, jnp.asarray(visible), sinks)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(
        got.astype(jnp.float32), plain_attention(q, keys, values, visible, sinks), atol=0.05, rtol=0.02
    )


# What a CPU can't show


def test_float32_products_ask_for_float32_on_every_device(monkeypatch):
    """A TPU multiplies float32 in bfloat16 and a GPU in TF32 unless asked; only the program can tell here."""
    monkeypatch.setenv("DFLASH_NATIVE", "0")
    mlp = fill(lambda: SwiGLU(4, 6, dtype=jnp.float32, rngs=nnx.Rngs(0)))
    q, keys, values, sinks = heads(2, 2, 4, 1, 3, 5)
    programs = [
        jax.make_jaxpr(mlp)(jnp.ones((4, 2))),
        jax.make_jaxpr(attend)(q, keys, values, jnp.ones((1, 3, 5), bool), sinks),
    ]
    for program in programs:
        products = str(program).count("dot_general[")
        assert products == 2
        assert str(program).count("precision=(Precision.HIGHEST, Precision.HIGHEST)") == products
