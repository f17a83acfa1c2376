"""A draft that starts as layers of its target: the same functions; refused where a layer can't be one of a draft."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dflash.config import ConfigError
from dflash.models.kv_cache import attention_mask
from dflash.models.layers import rope_tables
from dflash.training.cache.windows import WindowCache
from dflash.training.start import check_init_layers, frequent_tokens, start_from_layers
from dflash.weights.load import load_target, new_draft, read_layers
from dflash.weights.tiny import write_tiny_target

LAYERS = (2, 0)


def test_learned_tokens_come_before_frequent_ones_and_those_before_the_rest():
    labels = np.array([[7, 7, 7, 3, 3, 9, 1]])
    cache = SimpleNamespace(
        rows=lambda held_out: [0],
        bounds=[0, labels.size],
        token_ids=labels.ravel(),
        loss_mask=np.array([1, 1, 1, 1, 1, 1, 0]),
    )

    # Nothing else of a window cache is read.
    windows = WindowCache(None, None, {"target_ids": np.delete(labels, 6, axis=1)})

    def frequent(count, learned=None):
        assert (frequent_tokens(windows, count, 12, learned) == frequent_tokens(cache, count, 12, learned)).all()
        return frequent_tokens(cache, count, 12, learned).tolist()

    assert [frequent(n) for n in (1, 2, 3, 4)] == [[7], [3, 7], [3, 7, 9], [0, 3, 7, 9]]  # of equals the lowest id
    learned = np.array([2, 3, 5])
    assert [frequent(n, learned) for n in (1, 2, 3, 4, 6)] == [[3], [2, 3], [2, 3, 5], [2, 3, 5, 7], [0, 2, 3, 5, 7, 9]]


@pytest.fixture(params=["llama", "qwen3"])
def pair(request, tmp_path):
    """A target, and a draft of two layers that are copies of its last but one and its first."""
    folder = write_tiny_target(tmp_path / "target", request.param, shards=2)
    target = load_target(folder)
    draft = new_draft(target.config, num_layers=2, block_size=4, target_layer_ids=(0, 1, 3))
    check_init_layers(LAYERS, target.config, 2)
    start_from_layers(draft, read_layers(folder, LAYERS))
    return target, draft


def test_a_copied_layer_is_the_targets_layer(pair):
    """A lone token sees itself only, the context being hidden: there a target's layer and a draft's do the same."""
    target, draft = pair
    H = target.config.hidden_size
    x = jax.random.normal(jax.random.key(0), (H, 1))
    rope = rope_tables(target.config.rope, target.config.head_dim, jnp.full((1, 1), 5))
    mask = attention_mask(jnp.zeros((1, 1, 1)), jnp.zeros((1, 1, 1)), window=None, causal=True)
    for layer, source in zip(draft.layers, LAYERS, strict=True):
        expected, _ = target.layers[source](x, rope, {None: mask}, None)
        got = layer.uncached(x, jnp.ones((H, 1)), (rope, rope), jnp.array([[[False, True]]]), 1)
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


def test_queries_and_keys_are_as_long_as_the_targets(pair):
    """The norms are the target's; where it has none, they give back the length that they take."""
    target, draft = pair
    x = jax.random.normal(jax.random.key(2), (target.config.hidden_size, 4000))
    for layer, source in zip(draft.layers, LAYERS, strict=True):
        mine, its = layer.attention, target.layers[source].attention
        if its.q_norm is not None:
            np.testing.assert_array_equal(mine.q_norm.weight[...], its.q_norm.weight[...])
            np.testing.assert_array_equal(mine.k_norm.weight[...], its.k_norm.weight[...])
            continue
        q, k, _ = jnp.split(its.qkv(target.layers[source].attention_norm(x)), [64, 96])
        for norm, heads in ((mine.q_norm, q), (mine.k_norm, k)):
            normed = norm(heads.reshape(-1, 16, x.shape[1]), axis=1)
            assert float(jnp.mean(normed**2)) == pytest.approx(float(jnp.mean(heads**2)), rel=0.04)


def test_the_context_starts_as_the_mean_of_the_features(pair):
    _, draft = pair
    H = draft.config.hidden_size
    features = jax.random.normal(jax.random.key(1), (3, H, 5))
    np.testing.assert_allclose(draft.fc(features.reshape(3 * H, 5)), features.mean(axis=0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("family", "changes", "layers", "said"),
    [
        ("llama", {}, (1,), r"for each of the draft's 2; got \[1\]"),
        ("llama", {}, (1, 4), r"one layer of the target, 0\.\.3"),
        ("llama", {}, (-1, 2), r"one layer of the target, 0\.\.3"),
        ("gpt_oss", {}, (0, 1), "experts, sinks or biases"),
        ("qwen2", {}, (0, 1), "experts, sinks or biases"),
    ],
)
def test_layers_that_no_draft_can_start_from(family, changes, layers, said, tmp_path):
    target = load_target(write_tiny_target(tmp_path / "target", family, **changes))
    with pytest.raises(ConfigError, match=said):
        check_init_layers(layers, target.config, 2)
