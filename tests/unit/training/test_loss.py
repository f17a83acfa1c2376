"""The training objective against the whole table of logits in float64, plain loops, and itself on one device."""

import functools
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dflash.training.loss import cross_entropy, pad_head, position_weights

prove = functools.partial(settings, derandomize=True, database=None, deadline=None)
close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)


def drawn(V, H, N, scale=1.0, dtype=jnp.float32):
    """x [H, N], labels [N] and a head [V, H] whose logits have about the given spread."""
    rng = np.random.default_rng([V, H, N])
    x = rng.standard_normal((H, N)).astype(dtype)
    head = (scale * H**-0.5 * rng.standard_normal((V, H))).astype(dtype)
    return jnp.asarray(x), jnp.asarray(rng.integers(0, V, N).astype(np.int32)), jnp.asarray(head)


def plainly(x, labels, head, cotangent):
    """nll and best of each column, and the gradient of sum(cotangent * nll) by x, all in float64."""
    x, head = np.asarray(x, np.float64), np.asarray(head, np.float64)
    logits = head @ x
    shifted = logits - logits.max(axis=0)
    softmax = np.exp(shifted) / np.exp(shifted).sum(axis=0)
    columns = np.arange(len(labels))
    nll = np.log(np.exp(shifted).sum(axis=0)) - shifted[labels, columns]
    softmax[labels, columns] -= 1
    return nll, logits.argmax(axis=0), head.T @ (softmax * cotangent)


def chunked(x, labels, head, cotangent, **options):
    """The same from `cross_entropy`."""

    @jax.jit
    def run(x, labels, head, cotangent):
        # Undifferentiated it is another program.
        alone = cross_entropy(x, labels, head, **options)
        (nll, best), back = jax.vjp(lambda x: cross_entropy(x, labels, head, **options), x)
        return alone, (nll, best, *back((cotangent, np.zeros(best.shape, jax.dtypes.float0))))

    alone, (nll, best, gradient) = run(x, labels, head, np.asarray(cotangent, np.float32))
    assert (nll.dtype, best.dtype, gradient.dtype) == (jnp.float32, jnp.int32, x.dtype)
    np.testing.assert_array_equal(alone[1], best)
    close(alone[0], nll, rtol=1e-6, atol=1e-6)
    return nll, best, gradient


@prove(max_examples=12)
@given(V=st.integers(1, 41), H=st.integers(1, 9), N=st.integers(1, 6), chunk=st.integers(1, 50))
@example(V=41, H=8, N=5, chunk=40)
@example(V=41, H=8, N=5, chunk=41)
def test_chunks_give_the_whole_vocabulary(V, H, N, chunk):
    x, labels, head = drawn(V, H, N)
    cotangent = np.linspace(-1, 2, N, dtype=np.float32)
    for got, expected in zip(
        chunked(x, labels, head, cotangent, chunk=chunk), plainly(x, labels, head, cotangent), strict=True
    ):
        close(got, expected)


def test_logits_in_the_thousands():
    x, labels, head = drawn(37, 8, 16, scale=5000.0)
    nll, best, gradient = chunked(x, labels, head, jnp.ones(16), chunk=10)
    expected = plainly(x, labels, head, 1.0)
    close(nll, expected[0])
    np.testing.assert_array_equal(best, expected[1])
    # Entries of the head are in the thousands too.
    close(gradient, expected[2], atol=1e-5 * float(jnp.abs(head).max()))


def test_a_certain_label_costs_nothing():
    x, _, head = drawn(37, 8, 16, scale=1000.0)
    nll, _, gradient = chunked(x, jnp.argmax(head @ x, axis=0).astype(jnp.int32), head, jnp.ones(16), chunk=10)
    assert float(nll.min()) == 0.0  # some columns are certain, and none is below
    assert not np.asarray(gradient)[:, np.asarray(nll) == 0].any()


@pytest.mark.parametrize("chunk", [1, 3, 4, 12])
def test_the_lowest_of_equal_tokens_is_best(chunk):
    rows = jnp.asarray([0, 1, 2, 1, 2, 0, 2, 2, 1, 0, 2, 2])
    head = jnp.stack([rows, -rows], axis=1).astype(jnp.float32)
    x = jnp.asarray([[1, 0, 0], [0, 1, 0]], jnp.float32)
    _, best = cross_entropy(x, jnp.zeros(3, jnp.int32), head, chunk=chunk)
    assert best.tolist() == [2, 0, 0]


@pytest.mark.parametrize(("V", "chunk"), [(41, 10), (41, 44), (43, 41), (2, 1)])
def test_padded_rows_do_not_count(V, chunk):
    x, labels, head = drawn(V, 8, 5)
    head = head - 5  # so that a row of zeros would be likely
    padded = pad_head(head, 8)
    assert padded.shape[0] == -(-V // 8) * 8
    assert pad_head(padded, 4) is padded
    for got, expected in zip(
        chunked(x, labels, padded, jnp.ones(5), chunk=chunk, vocab_size=V), plainly(x, labels, head, 1.0), strict=True
    ):
        close(got, expected)


@pytest.mark.parametrize("dtypes", [("bfloat16", "bfloat16"), ("float32", "bfloat16"), ("bfloat16", "float32")])
def test_bfloat16(dtypes):
    x, labels, head = drawn(199, 64, 32)
    x, head = x.astype(dtypes[0]), head.astype(dtypes[1])
    nll, best, gradient = chunked(x, labels, head, jnp.ones(32), chunk=50)
    expected = plainly(x, labels, head, 1.0)
    # The products of bfloat16 numbers are exact and their sums float32; only softmax and gradient are rounded.
    close(nll, expected[0])
    np.testing.assert_array_equal(best, expected[1])
    close(np.asarray(gradient, np.float32), expected[2], rtol=0.01, atol=0.002)


def test_the_head_gets_no_gradient():
    x, labels, head = drawn(41, 8, 5)
    gradient = jax.grad(lambda head: cross_entropy(x, labels, head, chunk=10)[0].sum())(head)
    assert not np.asarray(gradient).any()


def test_two_products_with_gradient_and_one_without():
    x, labels, head = drawn(41, 8, 5)

    def nll(x):
        return cross_entropy(x, labels, head, chunk=10)[0].sum()

    # Each stands in the program twice: for the first chunk, and in the loop over the others.
    assert str(jax.make_jaxpr(nll)(x)).count("dot_general") == 2
    program = str(jax.make_jaxpr(jax.grad(nll))(x))
    assert program.count("dot_general") == program.count("precision=(Precision.HIGHEST, Precision.HIGHEST)") == 4


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"chunk": 0}, "chunk is at least 1"),
        ({"vocab_size": 42}, "vocab_size in 1..41"),
        ({"head": np.zeros((8, 41), np.float32)}, "don't fit"),
        ({"labels": np.zeros(4, np.int32)}, "don't fit"),
    ],
)
def test_what_does_not_fit_is_refused(change, said):
    x, labels, head = drawn(41, 8, 5)
    with pytest.raises(ValueError, match=said):
        cross_entropy(**({"x": x, "labels": labels, "head": head, "chunk": 10} | change))


def test_memory_at_the_size_of_gpt_oss_20b():
    V, H, N, chunk = 201088, 2880, 64 * 7, 8192
    arguments = (
        jax.ShapeDtypeStruct((H, N), jnp.float32),
        jax.ShapeDtypeStruct((N,), jnp.int32),
        jax.ShapeDtypeStruct((V, H), jnp.float32),
    )

    def loss(x, labels, head):
        return cross_entropy(x, labels, head, chunk=chunk)[0].mean()

    compiled = jax.jit(jax.value_and_grad(loss)).lower(*arguments).compile()
    temporary, logits, part = compiled.memory_analysis().temp_size_in_bytes, 4 * V * N, 4 * chunk * H
    assert temporary < part + logits / 8, (
        f"{temporary / 1e6:.0f} MB beside the arguments; all logits are {logits / 1e6:.0f} MB, "
        f"and a chunk of the head, which XLA copies on a CPU, is {part / 1e6:.0f} MB"
    )


# ---- weights of positions


def blocks(seed=0, count=20, slots=7):
    rng = np.random.default_rng(seed)
    mask = rng.integers(0, 2, (count, slots))
    mask[0], mask[1] = 0, 1
    return rng.exponential(1.0, (count, slots)).astype(np.float32), mask


def plain_weights(kind, nll, mask, gamma, alpha):
    weights = np.zeros(nll.shape)
    for n, row in enumerate(nll):
        s = [(1 - alpha) * np.exp(-float(v)) + alpha for v in row]
        for k in range(len(row)):
            after = sum(np.prod(s[: j + 1]) * mask[n, j] for j in range(k, len(row)))
            weights[n, k] = mask[n, k] * {"uniform": 1, "decay": np.exp(-k / gamma), "dpace": after}[kind]
    return weights


@pytest.mark.parametrize("kind", ["uniform", "decay", "dpace"])
@pytest.mark.parametrize(("gamma", "alpha"), [(7.0, 0.5), (4.0, 0.0), (0.5, 1.0)])
def test_position_weights(kind, gamma, alpha):
    nll, mask = blocks()
    got = position_weights(kind, jnp.asarray(nll), jnp.asarray(mask), gamma=gamma, alpha=alpha)
    assert got.dtype == jnp.float32
    close(got, plain_weights(kind, nll, mask, gamma, alpha))
    slope = jax.grad(lambda nll: position_weights(kind, nll, jnp.asarray(mask), gamma=gamma, alpha=alpha).sum())
    assert not np.asarray(slope(jnp.asarray(nll))).any()


def test_unknown_position_weights_are_refused():
    with pytest.raises(ValueError, match="uniform, decay, dpace, got 'linear'"):
        position_weights("linear", jnp.ones((1, 7)), jnp.ones((1, 7)), gamma=4.0, alpha=0.5)


# ---- several devices

SHARDED = """
import functools, itertools
import jax, jax.numpy as jnp, numpy as np, optax
from flax import nnx
from jax.sharding import Mesh, PartitionSpec as P
from dflash.training.loss import cross_entropy, pad_head, position_weights

assert len(jax.devices()) == 8
SLOTS, H, N = 3, 6, 8 * 2 * 3
rng = np.random.default_rng(0)
graph, params = nnx.split(nnx.Linear(5, H, rngs=nnx.Rngs(0)))
inputs = jnp.asarray(rng.standard_normal((N, 5)), jnp.float32)
mask = rng.integers(0, 2, N)
mask[:6], mask[6:12] = 0, 1  # nothing counts on one device of 8 in dp, everything on the next
mask = jnp.asarray(mask)

def loss(params, inputs, labels, mask, entropy):
    nll, best = entropy(nnx.merge(graph, params)(inputs).T, labels)
    nll, mask = nll.reshape(-1, SLOTS), mask.reshape(-1, SLOTS)
    weights = position_weights("dpace", nll, mask, gamma=4.0, alpha=0.5)
    return (weights * nll).sum(), (best, weights.sum())

def unchunked(head, x, labels):
    logits = (head @ x).T
    return optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels), logits.argmax(axis=-1)

def step(params, inputs, labels, mask, head, V):
    # Each device's own copy, so that its gradient is its rows' part; without this, check_vma sums in the backward pass.
    own = jax.lax.pcast(params, "dp", to="varying")
    entropy = functools.partial(cross_entropy, head=head, chunk=2, axis="tp", vocab_size=V)
    (value, (best, weight)), gradient = jax.value_and_grad(loss, has_aux=True)(own, inputs, labels, mask, entropy)
    value, weight, gradient = jax.lax.psum((value, weight, gradient), "dp")
    return value / weight, best, jax.tree.map(lambda g: g / weight, gradient)

for V in (17, 43):  # 17 over 8 devices: two hold padding only
    labels = jnp.asarray(rng.integers(0, V, N), jnp.int32)
    head = jnp.asarray(rng.standard_normal((V, H)), jnp.float32) - 3
    plain = functools.partial(unchunked, head)
    (value, (best, weight)), gradient = jax.value_and_grad(loss, has_aux=True)(params, inputs, labels, mask, plain)
    value, gradient = value / weight, jax.tree.map(lambda g: g / weight, gradient)
    for (dp, tp), check in itertools.product([(1, 1), (8, 1), (1, 8), (2, 4), (4, 2)], [True, False]):
        mesh = Mesh(np.array(jax.devices()[: dp * tp]).reshape(dp, tp), ("dp", "tp"))
        split = jax.jit(jax.shard_map(
            functools.partial(step, V=V), mesh=mesh, check_vma=check,
            in_specs=(P(), P("dp"), P("dp"), P("dp"), P("tp")), out_specs=(P(), P("dp"), P()),
        ))
        got = split(params, inputs, labels, mask, pad_head(head, tp))
        for copy in got[2]["kernel"].get_value().addressable_shards:  # without check_vma, nobody compares the copies
            np.testing.assert_array_equal(copy.data, got[2]["kernel"].get_value())
        np.testing.assert_array_equal(got[1], best)
        for mine, theirs in zip(jax.tree.leaves((got[0], got[2])), jax.tree.leaves((value, gradient)), strict=True):
            np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-5, err_msg=f"{V=} {dp=} {tp=} {check=}")

# Small integers, so that a sum is the same in any order and equal rows tie: tokens 4 and 17 on different devices.
mesh = Mesh(np.array(jax.devices()), ("tp",))
entropy = functools.partial(cross_entropy, chunk=2, axis="tp", vocab_size=19)
head = jnp.zeros((19, H)).at[jnp.asarray([4, 17])].set(1)
split = jax.shard_map(entropy, mesh=mesh, in_specs=(P(), P(), P("tp")), out_specs=P())
best = jax.jit(split)(jnp.ones((H, 1)), jnp.zeros(1, jnp.int32), pad_head(head, 8))[1]
assert best.tolist() == [4], best
print("same")
"""


@pytest.mark.slow
def test_shards_give_loss_and_gradient_of_one_device():
    env = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "JAX_PLATFORMS": "cpu",
        "TF_CPP_MIN_LOG_LEVEL": "2",
    }
    done = subprocess.run([sys.executable, "-c", SHARDED], env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip() == "same"
