"""Draft directories for other programs: what each is written as, what is refused, and a published layout read back."""

import dataclasses
import json

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from dflash import ConfigError, WeightsError, decode, load_draft, load_target
from dflash.config import ConvConfig, RopeConfig, SelectorConfig, check_draft
from dflash.weights.config_json import read_draft_config, read_target_config
from dflash.weights.export import check_directory, check_export, export_draft, parse_size
from dflash.weights.huggingface import draft_tensors, read_tensors
from dflash.weights.load import read_any_draft
from dflash.weights.tiny import tiny_config, write_tiny_target

FULL = {"windows": (None, None), "causal": (False, False), "num_target_layers": 4}
SECOND = {"conv": ConvConfig(kernel_size=3, group_size=16), "selector": SelectorConfig(rank=8, top_k=5)}
YARN = RopeConfig(theta=1e4, kind="yarn", factor=4.0, original_max_position=32)


@pytest.fixture(scope="module")
def draft(draw_draft):
    return draw_draft(**FULL)


@pytest.fixture(scope="module")
def target_dir(tmp_path_factory):
    return write_tiny_target(tmp_path_factory.mktemp("export") / "target", num_hidden_layers=4)


def config_of(directory):
    return json.loads((directory / "config.json").read_text())


def same(a, b):
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


# ---- weights


@pytest.mark.parametrize(("dtype", "kind"), [("float16", np.float16), ("bfloat16", ml_dtypes.bfloat16)])
def test_weights_are_rounded_once(draft, tmp_path, dtype, kind):
    export_draft(draft, tmp_path / "d", dtype=dtype)
    ours = {name: value.astype(kind) for name, value in draft_tensors(draft).items()}
    assert same(read_tensors(tmp_path / "d"), ours)
    assert config_of(tmp_path / "d")["dtype"] == dtype
    assert read_any_draft(tmp_path / "d").config == draft.config


def test_shards_are_full_and_complete(draft, tmp_path):
    tensors = draft_tensors(draft)
    limit = 40_000
    export_draft(draft, tmp_path / "d", dtype="float32", shard_bytes=limit)
    index = json.loads((tmp_path / "d" / "model.safetensors.index.json").read_text())
    files = sorted(p.name for p in (tmp_path / "d").glob("*.safetensors"))
    assert files == [f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)]
    assert sorted(set(index["weight_map"].values())) == files
    assert len(files) > 3
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in tensors.values())
    for file in files:
        part = load_file(tmp_path / "d" / file)
        assert sorted(part) == sorted(name for name, where in index["weight_map"].items() if where == file)
        assert sum(value.nbytes for value in part.values()) <= limit
    assert same(read_tensors(tmp_path / "d"), tensors)
    export_draft(draft, tmp_path / "one", dtype="float32", shard_bytes=10**9)
    assert sorted(p.name for p in (tmp_path / "one").iterdir()) == ["config.json", "model.safetensors"]
    export_draft(draft, tmp_path / "each", dtype="float32", shard_bytes=1)
    assert len(list((tmp_path / "each").glob("*.safetensors"))) == len(tensors)


def test_sizes():
    assert [parse_size(text) for text in ("5GB", "200mb", "3", "7KB")] == [5 * 10**9, 2 * 10**8, 3, 7000]
    for text in ("", "0", "5 GiB", "-1GB", "GB"):
        with pytest.raises(ConfigError, match=f"size .*bytes, KB, MB or GB.*{text!r}"):
            parse_size(text)


def test_numbers_that_a_dtype_can_not_hold(draw_draft, tmp_path):
    draft = draw_draft(**FULL)
    draft.norm.weight[...] = jnp.full(64, 1e5)
    with pytest.raises(WeightsError, match=r"float16, \['norm.weight'\] .*not finite"):
        export_draft(draft, tmp_path / "d", dtype="float16")
    assert list(tmp_path.iterdir()) == []
    export_draft(draft, tmp_path / "d", dtype="bfloat16")


# ---- a config in each reader's words


def test_sglang_jax_is_told_at_the_top_level_too(draft, tmp_path):
    export_draft(draft, tmp_path / "d", consumer="sglang-jax")
    config = config_of(tmp_path / "d")
    assert (config["target_hidden_size"], config["target_layer_ids"], config["mask_token_id"]) == (64, [0, 1], 5)
    assert config["dflash_config"] == {"target_layer_ids": [0, 1], "mask_token_id": 5, "block_size": 8}
    assert read_any_draft(tmp_path / "d").config == draft.config


def test_speculators_counts_layers_from_the_embedding(draw_draft, target_dir, tmp_path):
    draft = draw_draft(**FULL | {"windows": (16, 16), "rope": YARN, "target_layer_ids": (0, 2)})
    export_draft(draft, tmp_path / "d", consumer="speculators", target_dir=target_dir, verifier="a/b")
    config = config_of(tmp_path / "d")
    assert config["aux_hidden_state_layer_ids"] == [1, 3]
    assert config["sliding_window_non_causal"] is True
    assert config["speculators_config"]["verifier"] == {"name_or_path": "a/b", "architectures": ["LlamaForCausalLM"]}
    assert config["speculators_config"]["proposal_methods"][0]["speculative_tokens"] == 7
    layers = config["transformer_layer_config"]
    assert layers["layer_types"] == ["sliding_attention"] * 2
    assert layers["rope_scaling"]["rope_type"] == "yarn"
    assert not layers.keys() & {"dflash_config", "architectures", "block_size", "is_causal"}
    with pytest.raises(ConfigError, match=r"verifier.*snapshot directory"):
        export_draft(draft, tmp_path / "e", consumer="speculators")


# ---- what is refused, all at once


@pytest.mark.parametrize(
    ("consumer", "changes", "message"),
    [
        ("z-lab", {"learned_mask": True, "qk_norm": False}, "'learned_mask': True, 'use_qk_norm': False"),
        ("z-lab", {"target_layer_ids": (1, 1)}, r"target_layer_ids \[1, 1\] .*twice"),
        ("z-lab", {"target_layer_ids": (1, 4)}, r"layers \[4\] .*0\.\.3"),
        ("z-lab", {"mask_token_id": 199}, "mask token 199 .*vocabulary of 199"),
        ("z-lab", {"block_size": 1}, "block_size is 1"),
        ("sglang-jax", {"target_layer_ids": (0, 3)}, r"sglang-jax .*last layer \(3\)"),
        ("speculators", {"target_layer_ids": (0, 3)}, r"speculators .*last layer \(3\)"),
        ("sglang-jax", SECOND, "sglang-jax .*DFlash 2"),
        ("speculators", SECOND, "speculators .*DFlash 2"),
        ("sglang-jax", {"rope": YARN}, "sglang-jax .*rope_scaling; .*yarn"),
        ("sglang-jax", {"windows": (None, 16)}, "sglang-jax .*sliding windows"),
        ("speculators", {"causal": (True, True)}, "speculators' full-attention layers .*block"),
        ("speculators", {"windows": (8, 8), "causal": (True, False)}, "sliding layers .*causal"),
    ],
)
def test_what_a_reader_would_do_otherwise(draft, consumer, changes, message):
    check_export(draft.config, consumer)
    with pytest.raises(ConfigError, match=message):
        check_export(dataclasses.replace(draft.config, **changes), consumer)


def test_all_faults_at_once(draft):
    changes = {"rope": YARN, "mask_token_id": -1, "target_layer_ids": (3, 9)}
    target = read_target_config(tiny_config(hidden_size=32, num_hidden_layers=4))
    with pytest.raises(ConfigError) as error:
        check_export(dataclasses.replace(draft.config, **changes), "sglang-jax", target)
    for said in ("rope is yarn", "mask token -1", "layers [9]", "last layer (3)", "hidden size is 64, the target's 32"):
        assert said in str(error.value)


def test_a_directory_for_a_server_is_held_against_its_config_and_target(draft, target_dir, tmp_path):
    target = read_target_config(config_of(target_dir))
    export_draft(draft, tmp_path / "d", dtype="float32", target_dir=target_dir)
    assert check_directory(tmp_path / "d", target) == draft.config
    tensors = load_file(tmp_path / "d" / "model.safetensors")
    tensors.pop("hidden_norm.weight")
    tensors |= {"fc.bias": np.zeros(64, np.float32), "fc.weight": np.zeros((64, 64), np.float32)}
    save_file(tensors, tmp_path / "d" / "model.safetensors")
    config = config_of(tmp_path / "d")
    config["dflash_config"] |= {"mask_token_id": 199, "target_layer_ids": [0, 4]}
    (tmp_path / "d" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError) as error:
        check_directory(tmp_path / "d", target)
    for said in (
        "missing hidden_norm.weight [64]",
        "unexpected fc.bias [64]",
        "fc.weight is [64, 64], must be [64, 128]",
        "it reads layers [4]",
        "its mask token 199 is outside",
    ):
        assert said in str(error.value)


# ---- the way back: what z-lab published for gpt-oss


def published(block_size, ids, **changes):
    """The keys of the published config.json (20b: blocks of 8; 120b: of 10), sizes scaled down."""
    scaling = {"beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0, "original_max_position_embeddings": 4096}
    return {
        "architectures": ["DFlashDraftModel"],
        "attention_bias": True,
        "attention_dropout": 0.0,
        "auto_map": {"AutoModel": "dflash.DFlashDraftModel"},
        "block_size": block_size,
        "bos_token_id": 199998,
        "dflash_config": {"mask_token_id": 198, "target_layer_ids": ids},
        "dtype": "bfloat16",
        "eos_token_id": 200002,
        "head_dim": 16,
        "hidden_act": "silu",
        "hidden_size": 64,
        "initial_context_length": 4096,
        "initializer_range": 0.02,
        "intermediate_size": 176,
        "max_position_embeddings": 131072,
        "model_type": "gpt_oss",
        "num_attention_heads": 4,
        "num_hidden_layers": 8,
        "num_key_value_heads": 2,
        "num_target_layers": 24,
        "rms_norm_eps": 1e-5,
        "rope_scaling": scaling | {"rope_type": "yarn", "truncate": False},
        "rope_theta": 150000,
        "sliding_window": 128,
        "tie_word_embeddings": False,
        "use_cache": True,
        "vocab_size": 199,
        **changes,
    }


SLIDING = {"layer_types": ["sliding_attention", "full_attention"] * 4, "sliding_window": 16}
IDS = [1, 6, 11, 16, 21]
TYPES = ["sliding_attention", "full_attention"] * 12


def write_published(directory, raw):
    """A directory with the published names of tensors; returns them."""
    rng = np.random.default_rng(0)
    H, D, inner = 64, 16, 176
    shapes = {"fc.weight": (H, 5 * H), "hidden_norm.weight": (H,), "norm.weight": (H,)}
    for i in range(8):
        layer, attention = f"layers.{i}", f"layers.{i}.self_attn"
        shapes |= {f"{layer}.{n}_layernorm.weight": (H,) for n in ("input", "post_attention")}
        shapes |= {f"{attention}.{n}_norm.weight": (D,) for n in "qk"}
        for name, (rows, columns) in {"q": (64, H), "k": (32, H), "v": (32, H), "o": (H, 64)}.items():
            shapes |= {f"{attention}.{name}_proj.weight": (rows, columns), f"{attention}.{name}_proj.bias": (rows,)}
        shapes |= {f"{layer}.mlp.{n}_proj.weight": (inner, H) for n in ("gate", "up")}
        shapes |= {f"{layer}.mlp.down_proj.weight": (H, inner)}
    tensors = {name: rng.normal(0, 0.1, shape).astype(ml_dtypes.bfloat16) for name, shape in shapes.items()}
    directory.mkdir()
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps(raw))
    return tensors


@pytest.mark.parametrize(
    ("block_size", "changes"), [(8, {}), (10, SLIDING), (10, SLIDING | {"is_causal": False})], ids=["b8", "b10", "b10n"]
)
def test_z_labs_published_layout_loads(tmp_path, block_size, changes):
    tensors = write_published(tmp_path / "d", published(block_size, IDS, **changes))
    draft = read_any_draft(tmp_path / "d")
    c = draft.config
    check_draft(c, read_target_config(tiny_config("gpt_oss", num_hidden_layers=24, layer_types=TYPES)))
    assert (c.num_layers, c.block_size, c.target_layer_ids, c.attention_bias) == (8, block_size, tuple(IDS), True)
    sliding = "layer_types" in changes
    assert c.windows == ((16, None) * 4 if sliding else (None,) * 8)
    assert c.causal == ((True, False) * 4 if sliding and "is_causal" not in changes else (False,) * 8)
    assert (c.rope.kind, c.rope.truncate) == ("yarn", False)
    assert same(draft_tensors(draft), {name: value.astype(np.float32) for name, value in tensors.items()})
    # And out again, in the same words.
    export_draft(draft, tmp_path / "again", dtype="bfloat16")
    assert same(read_tensors(tmp_path / "again"), tensors)
    assert read_draft_config(config_of(tmp_path / "again")) == c


@pytest.mark.slow
def test_z_labs_published_layout_decodes(tmp_path):
    write_published(tmp_path / "d", published(10, IDS, **SLIDING))
    target = load_target(write_tiny_target(tmp_path / "t", "gpt_oss", num_hidden_layers=24, layer_types=TYPES))
    draft = load_draft(tmp_path / "d", target)
    prompts = [[3, 50, 7, 120, 9, 8, 60]]
    tokens = decode(target, draft, prompts, mode="cached_block_verify", max_new_tokens=12).tokens
    assert tokens == decode(target, None, prompts, mode="greedy", max_new_tokens=12).tokens
