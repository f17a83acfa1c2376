"""Tiny snapshots: the project reads what it writes, a seed is a model, and the models say something."""

import functools
import hashlib
import itertools
import json

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from dflash.config import ConfigError, RopeConfig
from dflash.models.families import FAMILIES
from dflash.models.gpt_oss import GptOss
from dflash.models.llama import Llama
from dflash.weights.config_json import read_target_config
from dflash.weights.load import load_target
from dflash.weights.names import target_tensors
from dflash.weights.tiny import tiny_config, write_tiny_target

each_family = pytest.mark.parametrize("family", FAMILIES)


def files_of(directory):
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in directory.iterdir()}


def tensors_of(directory):
    return functools.reduce(lambda a, b: a | b, (load_file(p) for p in sorted(directory.glob("*.safetensors"))))


def greedy(target, prompts, count):
    """Tokens int [B, count] that a forward without a cache predicts one after the other."""
    tokens = np.zeros((len(prompts), len(prompts[0]) + count), np.int32)
    start = len(prompts[0])
    tokens[:, :start] = prompts
    # Padding on the right changes nothing before it, so that one shape, and one compilation, does.
    for at in range(start, start + count):
        tokens[:, at] = np.asarray(target.forward(tokens)[0][:, at - 1]).argmax(-1)
    return tokens[:, start:]


@each_family
def test_the_reader_takes_it(family, tmp_path):
    written = write_tiny_target(tmp_path / "deep" / "target", family)
    assert written == tmp_path / "deep" / "target"
    assert sorted(files_of(written)) == ["config.json", "model.safetensors"]
    target = load_target(written)
    assert type(target) is (GptOss if family == "gpt_oss" else Llama)
    assert target.config == read_target_config(tiny_config(family))
    assert target.config.family == family
    assert {n: t.shape for n, t in tensors_of(written).items()} == target_tensors(target.config)


def test_each_family_has_what_sets_it_apart():
    configs = {family: read_target_config(tiny_config(family)) for family in FAMILIES}
    assert [f for f in FAMILIES if configs[f].qkv_bias] == ["qwen2", "gpt_oss"]
    assert [f for f in FAMILIES if configs[f].qk_norm] == ["qwen3"]
    assert [f for f in FAMILIES if configs[f].sinks] == ["gpt_oss"]
    assert [f for f in FAMILIES if configs[f].experts] == ["gpt_oss"]
    gpt_oss = configs["gpt_oss"]
    assert gpt_oss.windows == (16, None, 16, None)
    assert (gpt_oss.rope.kind, gpt_oss.rope.truncate) == ("yarn", False)
    # With one key head, or one query head for each, a wrong grouping would go unseen.
    assert all(c.num_heads > c.num_kv_heads > 1 for c in configs.values())


def differing(a, b):
    return [name for name in a if not np.array_equal(a[name], b[name])]


@each_family
@pytest.mark.parametrize("shards", [1, 3])
def test_a_seed_is_a_model_to_the_byte(family, shards, tmp_path):
    first, again, other = (
        write_tiny_target(tmp_path / name, family, seed=seed, shards=shards)
        for name, seed in (("first", 7), ("again", 7), ("other", 8))
    )
    assert files_of(first) == files_of(again)
    assert files_of(first)["config.json"] == files_of(other)["config.json"]
    tensors = tensors_of(first)
    assert differing(tensors, tensors_of(other)) == list(tensors)


def test_the_default_seed_is_0(tmp_path):
    assert files_of(write_tiny_target(tmp_path / "a")) == files_of(write_tiny_target(tmp_path / "b", seed=0))


@each_family
def test_no_two_tensors_are_alike(family, tmp_path):
    """A reader that mixed up two layers, or k and v, would go unseen."""
    tensors = tensors_of(write_tiny_target(tmp_path, family))
    for (a, left), (b, right) in itertools.combinations(tensors.items(), 2):
        assert left.shape != right.shape or not np.array_equal(left, right), (a, b)


SIZES = {
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-3,
}


@each_family
def test_sizes_are_changed_by_their_names_in_config_json(family, tmp_path):
    types = {"layer_types": ["full_attention", "sliding_attention"]} if family == "gpt_oss" else {}
    target = load_target(write_tiny_target(tmp_path, family, **SIZES, **types))
    config = target.config
    assert (config.vocab_size, config.hidden_size, config.intermediate_size, config.num_layers) == (61, 24, 40, 2)
    assert (config.num_heads, config.num_kv_heads, config.head_dim) == (6, 3, 8)
    assert (config.max_position, config.rms_norm_eps) == (512, 1e-3)
    assert config.windows == ((None, 16) if types else (None, None))
    assert target.forward(np.array([[60, 0, 1]]))[0].shape == (1, 3, 61)


def test_other_settings_are_changed_too(tmp_path):
    changes = {"tie_word_embeddings": True, "attention_bias": True, "rope_theta": 500.0, "bos_token_id": 5}
    written = write_tiny_target(tmp_path, **changes)
    config = load_target(written).config
    assert config.tie_embeddings
    assert config.qkv_bias
    assert config.o_bias
    assert config.rope == RopeConfig(theta=500.0)
    assert "lm_head.weight" not in tensors_of(written)
    assert json.loads((written / "config.json").read_text())["bos_token_id"] == 5


def test_a_changed_config_changes_no_other():
    before = json.dumps(tiny_config("gpt_oss"))
    changed = tiny_config("gpt_oss")
    changed["rope_scaling"]["factor"] = 2.0
    changed["layer_types"].clear()
    assert json.dumps(tiny_config("gpt_oss")) == before


def test_a_config_that_can_not_be_is_refused_before_anything_is_written(tmp_path):
    for family, changes in (("mamba", {}), ("llama", {"head_dim": 7}), ("gpt_oss", {"num_hidden_layers": 3})):
        with pytest.raises(ConfigError):
            write_tiny_target(tmp_path / "target", family, **changes)
    assert not (tmp_path / "target").exists()


@pytest.mark.parametrize("shards", [2, 5])
def test_shards_hold_the_same_model(shards, tmp_path):
    whole, parts = write_tiny_target(tmp_path / "whole"), write_tiny_target(tmp_path / "parts", shards=shards)
    names = [f"model-{i + 1:05d}-of-{shards:05d}.safetensors" for i in range(shards)]
    assert sorted(files_of(parts)) == ["config.json", *names, "model.safetensors.index.json"]
    index = json.loads((parts / "model.safetensors.index.json").read_text())["weight_map"]
    for name in names:
        assert {n for n, file in index.items() if file == name} == set(load_file(parts / name)) != set()
    tensors = tensors_of(whole)
    assert set(tensors) == set(tensors_of(parts))
    assert differing(tensors, tensors_of(parts)) == []
    tokens = np.array([[1, 2, 3]])
    np.testing.assert_array_equal(load_target(whole).forward(tokens)[0], load_target(parts).forward(tokens)[0])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_dtype_rounds_the_same_weights(dtype, tmp_path):
    exact = tensors_of(write_tiny_target(tmp_path / "exact"))
    written = write_tiny_target(tmp_path / "rounded", dtype=dtype)
    kind = np.dtype({"bfloat16": ml_dtypes.bfloat16}.get(dtype, dtype))
    for name, tensor in tensors_of(written).items():
        assert tensor.dtype == kind
        np.testing.assert_array_equal(tensor, exact[name].astype(kind))
    assert json.loads((written / "config.json").read_text())["dtype"] == dtype
    load_target(written)


def test_mxfp4_packs_the_experts_only(tmp_path):
    written = write_tiny_target(tmp_path, "gpt_oss", mxfp4=True)
    packed = {name: t for name, t in tensors_of(written).items() if t.dtype == np.uint8}
    assert {name.rpartition("_")[2] for name in packed} == {"blocks", "scales"}
    assert all(".experts." in name for name in packed)
    assert len(packed) == 4 * load_target(written).config.num_layers


MODELS = {
    **{family: (family, {}) for family in FAMILIES},
    "llama-1-layer": ("llama", {"num_hidden_layers": 1}),
    "gpt_oss-mxfp4": ("gpt_oss", {"mxfp4": True}),
}


@pytest.mark.parametrize(("family", "changes"), MODELS.values(), ids=list(MODELS))
@pytest.mark.parametrize("seed", [0, 3])
def test_it_says_many_things_and_to_every_prompt_another(family, changes, seed, tmp_path):
    """A model that repeats one token agrees with any other that does: parity tests would prove nothing."""
    target = load_target(write_tiny_target(tmp_path, family, seed=seed, **changes))
    prompts = np.random.default_rng(1).integers(0, 199, (4, 8))
    said = greedy(target, prompts, 24).tolist()
    # One row may run into a loop of a token or two, as greedy decoding does; not all of them.
    assert sorted(len(set(row)) for row in said)[1] >= 5
    assert len(set(itertools.chain(*said))) >= 20
    assert len({tuple(row) for row in said}) == 4


@each_family
def test_the_last_token_alone_does_not_settle_the_next(family, tmp_path):
    """Else a cache that lost its context would go unseen."""
    target = load_target(write_tiny_target(tmp_path, family))
    tokens = np.random.default_rng(2).integers(0, 199, (40, 12))
    tokens[:, -1] = 9
    assert len(set(np.asarray(target.forward(tokens)[0][:, -1]).argmax(-1).tolist())) >= 10
