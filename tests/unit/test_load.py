"""Targets and drafts by name or directory, and new drafts for a target."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dflash import ConfigError, WeightsError, init_draft, load_draft, load_target, write_draft
from dflash.tiny import write_tiny_target
from dflash.weights import load, smollm2
from dflash.weights.easydel import write_run
from dflash.weights.huggingface import read_borrowed
from dflash.weights.load import (
    default_draft,
    draft_directory,
    draft_hash,
    is_own_run,
    model_facts,
    read_any_draft,
    target_directory,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny_target(tmp_path_factory.mktemp("load") / "target", num_hidden_layers=6)


@pytest.fixture(scope="module")
def target(folder):
    return load_target(folder)


def same_weights(a, b):
    left, right = (dict(nnx.to_flat_state(nnx.state(m))) for m in (a, b))
    assert left.keys() == right.keys()
    return all(np.array_equal(left[k].get_value(), right[k].get_value()) for k in left)


def test_target_directory(monkeypatch, tmp_path):
    assert target_directory(tmp_path) == tmp_path
    assert target_directory(str(tmp_path)) == tmp_path
    monkeypatch.setattr(smollm2, "snapshot_dir", lambda: Path("made on first use"))
    assert target_directory("smollm2-135m") == Path("made on first use")


def test_draft_directory(monkeypatch, tmp_path):
    assert draft_directory(tmp_path) == draft_directory(str(tmp_path)) == tmp_path
    assert draft_directory("./smollm2-135m") == Path("smollm2-135m")
    (tmp_path / "model.safetensors").write_bytes(b"")
    monkeypatch.setattr(load, "SHIPPED_DRAFT", tmp_path)
    assert draft_directory("smollm2-135m") == tmp_path


def test_an_installation_without_the_draft_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(load, "SHIPPED_DRAFT", tmp_path / "gone")
    for read in (draft_directory, read_any_draft, draft_hash, is_own_run):
        with pytest.raises(WeightsError, match=r"no weights at .*gone: install it anew .*, or untrained$"):
            read("smollm2-135m")


def test_only_the_built_in_target_comes_with_a_draft(tmp_path):
    assert default_draft("smollm2-135m") == "smollm2-135m"
    assert default_draft(str(tmp_path)) is None


def test_load_target(folder, target):
    assert target.config.num_layers == 6
    assert target.dtype == jnp.float32
    assert same_weights(load_target(str(folder)), target)
    assert load_target(folder, dtype="bfloat16").dtype == jnp.bfloat16
    with pytest.raises(ValueError, match=r"dtype must be one of \['bfloat16', 'float32'\], got 'float16'"):
        load_target(folder, dtype="float16")


def test_a_target_that_is_not_there(tmp_path):
    with pytest.raises(WeightsError, match=r"a snapshot is a directory; .*nowhere is none"):
        load_target(tmp_path / "nowhere")


def test_init_draft_defaults(target):
    c, d = target.config, init_draft(target).config
    assert (d.num_layers, d.block_size, d.target_layer_ids) == (2, 8, (1, 3))
    assert d.mask_token_id == c.vocab_size - 1
    assert d.num_target_layers == c.num_layers
    assert d.windows == (None, None)
    assert d.causal == (False, False)
    for name in ("vocab_size", "hidden_size", "intermediate_size", "num_heads", "num_kv_heads", "head_dim", "rope"):
        assert getattr(d, name) == getattr(c, name), name
    assert d.max_position == c.max_position


def test_init_draft_as_asked(target):
    draft = init_draft(target, num_layers=1, block_size=4, target_layer_ids=[5, 0, 2], mask_token_id=7, seed=3)
    d = draft.config
    assert (d.num_layers, d.block_size, d.target_layer_ids, d.mask_token_id) == (1, 4, (5, 0, 2), 7)
    assert d.num_features == 3
    settings = {"num_layers": 1, "block_size": 4, "target_layer_ids": (5, 0, 2), "mask_token_id": 7}
    assert same_weights(draft, init_draft(target, **settings, seed=3))
    assert not same_weights(draft, init_draft(target, **settings, seed=4))


def test_init_draft_takes_the_targets_dtype(folder):
    assert init_draft(load_target(folder, dtype="bfloat16"), num_layers=1).dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"block_size": 1}, "a draft has at least 1 layer and blocks of 2; got 2 and 1"),
        ({"num_layers": 0}, "a draft has at least 1 layer and blocks of 2; got 0 and 8"),
        ({"num_layers": 5}, "context features must come from different layers"),
        ({"target_layer_ids": (1, 6)}, r"it reads layers \[6\] of a target with layers 0..5"),
        ({"target_layer_ids": (-1,)}, r"it reads layers \[-1\]"),
        ({"target_layer_ids": ()}, "a draft reads at least one layer of its target"),
        ({"mask_token_id": 199}, "its mask token 199 is outside the vocabulary of 199"),
    ],
)
def test_init_draft_refuses(target, settings, said):
    with pytest.raises(ConfigError, match=said):
        init_draft(target, **settings)


def test_load_draft(target, folder, tmp_path):
    draft = init_draft(target, num_layers=1, block_size=4, target_layer_ids=(0, 3), seed=5)
    write_draft(draft, tmp_path / "draft")
    read = load_draft(str(tmp_path / "draft"), target)
    assert read.config == draft.config
    assert same_weights(read, draft)
    assert load_draft(tmp_path / "draft", load_target(folder, dtype="bfloat16")).dtype == jnp.bfloat16


def test_a_draft_by_its_name_is_the_one_of_its_directory(target, folder, monkeypatch, tmp_path):
    directory = tmp_path / "draft"
    write_draft(init_draft(target, num_layers=1, seed=5), directory)
    monkeypatch.setattr(load, "SHIPPED_DRAFT", directory)
    assert same_weights(load_draft("smollm2-135m", target), load_draft(directory, target))
    assert same_weights(read_any_draft("smollm2-135m"), read_any_draft(directory))
    assert not is_own_run("smollm2-135m")
    facts = model_facts(str(folder), "smollm2-135m")
    assert (facts["draft"], facts["draft_sha256"]) == ("smollm2-135m", draft_hash(directory))


def test_a_draft_of_another_target_is_refused_at_load(target, tmp_path):
    write_draft(init_draft(target, num_layers=1, target_layer_ids=(5,)), tmp_path / "draft")
    other = load_target(
        write_tiny_target(tmp_path / "other", num_hidden_layers=2, hidden_size=32, vocab_size=150, head_dim=8)
    )
    with pytest.raises(ConfigError) as error:
        load_draft(tmp_path / "draft", other)
    assert str(error.value) == (
        "the draft does not fit the target: its hidden size is 64, the target's 32; its vocabulary has 199 tokens, the "
        "target's 150; it reads layers [5] of a target with layers 0..1; its mask token 198 is outside the vocabulary "
        "of 150. Give the draft of this target"
    )


def test_a_drafts_hash_follows_its_weights_in_either_layout(target, tmp_path):
    one, other = (init_draft(target, seed=s, target_layer_ids=(1, 3)) for s in (0, 1))
    written = {"same layout": [], "run": []}
    for i, draft in enumerate((one, one, other)):
        write_draft(draft, tmp_path / f"draft-{i}")
        write_run(draft, tmp_path / f"root-{i}", 5, optimizer_state=None, provenance={}, keep=None)
        written["same layout"].append(draft_hash(tmp_path / f"draft-{i}"))
        written["run"].append(draft_hash(tmp_path / f"root-{i}"))
    for first, second, third in written.values():
        assert first == second != third
    assert draft_hash(tmp_path / "root-0" / "run-5") == written["run"][0]


@pytest.mark.parametrize("tied", [False, True])
def test_what_a_draft_borrows_is_the_targets(tied, tmp_path):
    folder = write_tiny_target(tmp_path / "target", tie_word_embeddings=tied, shards=3)
    borrowed, target = read_borrowed(folder), load_target(folder)
    assert borrowed.config == target.config
    np.testing.assert_array_equal(borrowed.embedding, target.embedding.weight[...])
    np.testing.assert_array_equal(borrowed.norm, target.norm.weight[...])
    assert (borrowed.head is borrowed.embedding) == tied
    if not tied:
        np.testing.assert_array_equal(borrowed.head, target.head.weight[...])


def test_a_target_without_its_embedding_lends_nothing(tmp_path):
    from safetensors.numpy import load_file, save_file

    folder = write_tiny_target(tmp_path / "target")
    tensors = load_file(folder / "model.safetensors")
    tensors.pop("model.embed_tokens.weight")
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(WeightsError, match=r"missing model\.embed_tokens\.weight"):
        read_borrowed(folder)
