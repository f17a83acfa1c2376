"""The reading without a cache: the model's own forward, and a noise that covers rounding and is small."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dflash import load_target
from dflash.decoding.reference import Judged, Reference, relative_move, ulp
from dflash.models.kv_cache import empty_cache
from dflash.weights.tiny import write_tiny_target

TOKENS = np.random.default_rng(0).integers(0, 199, 150).tolist()
FAMILIES = {"llama": {}, "gpt_oss": {"layer_types": ["sliding_attention", "full_attention"]}}


@pytest.fixture(scope="module", params=FAMILIES)
def directory(request, tmp_path_factory):
    changes = {"num_hidden_layers": 2, **FAMILIES[request.param]}
    return write_tiny_target(
        tmp_path_factory.mktemp("reference") / "target", request.param, dtype="bfloat16", **changes
    )


def test_the_logits_are_the_forwards_own(directory):
    target = load_target(directory)
    logits = np.asarray(target.forward([TOKENS])[0])[0]
    reference = Reference(target, TOKENS)
    best = reference.judge(0, logits.argmax(axis=1).tolist())
    np.testing.assert_array_equal(best.best, logits.argmax(axis=1))
    np.testing.assert_array_equal(best.margin, 0)
    assert best.honest.all()
    choices = np.random.default_rng(1).integers(0, 199, len(TOKENS))
    other = reference.judge(0, choices.tolist())
    places = np.arange(len(TOKENS))
    np.testing.assert_allclose(other.margin, logits.max(axis=1) - logits[places, choices], atol=1e-4)
    later = reference.judge(70, choices[70:].tolist())
    np.testing.assert_array_equal(later.margin, other.margin[70:])
    assert other.honest.mean() < 0.1


def test_keys_and_values_are_a_caches(directory):
    target = load_target(directory)
    cache = empty_cache(target, batch=1, capacity=256, block=160)
    _, _, cache = nnx.jit(type(target).hidden)(target, jnp.asarray([TOKENS]), cache=cache)
    for i, (keys, values) in enumerate(Reference(target, TOKENS).keys_values):
        held = np.asarray(cache.keys[i][0, :, :, : len(TOKENS)]).transpose(2, 0, 1).reshape(len(TOKENS), -1)
        np.testing.assert_allclose(keys, held, atol=1e-4)
        held = np.asarray(cache.values[i][0, :, : len(TOKENS)]).transpose(1, 0, 2).reshape(len(TOKENS), -1)
        np.testing.assert_allclose(values, held, atol=1e-4)


def test_the_noise_covers_the_rounding_of_bfloat16(directory):
    """The same bfloat16 weights computed in float32 are as far away as rounding goes: within the noise, not far in."""
    exact, rounded = load_target(directory), load_target(directory, "bfloat16")
    logits = np.asarray(exact.forward([TOKENS])[0])[0]
    judged = Reference(rounded, TOKENS).judge(0, logits.argmax(axis=1).tolist())
    assert judged.honest.mean() > 0.99
    off = np.abs(np.asarray(rounded.forward([TOKENS])[0])[0] - logits).max(axis=1)
    assert 0.1 < np.median(off / judged.noise) < 1
    exact_noise = Reference(exact, TOKENS).judge(0, TOKENS).noise
    assert np.median(exact_noise) < 1e-2 * np.median(judged.noise)


def test_the_noise_is_the_seeds(directory):
    target = load_target(directory, "bfloat16")
    first, again, other = (Reference(target, TOKENS[:40], seed=s).judge(0, TOKENS[:40]).noise for s in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


def test_honest():
    margin = np.array([0.0, 0.1, 0.1, 0.3, np.nan])
    judged = Judged(best=np.zeros(5), margin=margin, noise=np.full(5, 0.2), rank=np.array([0, 1, 2, 1, 0]))
    assert judged.honest.tolist() == [True, True, False, False, False]


def test_ulp():
    assert ulp(np.array([1.0, 1.9, 2.0, -5.0]), jnp.bfloat16).tolist() == [2**-7, 2**-7, 2**-6, 2**-5]
    assert ulp(np.array([1.0]), jnp.float32) == np.spacing(np.float32(1))
    assert np.isfinite(ulp(np.zeros(1), jnp.bfloat16)).all()


def test_relative_move():
    reference = np.array([[3.0, 4.0], [1.0, 0.0], [0.0, 0.0]], np.float32)
    moved = relative_move(np.array([[3.0, 4.0], [0.0, 0.0], [0.0, 0.0]], np.float32), reference)
    assert moved.tolist() == [0, 1, 0]
