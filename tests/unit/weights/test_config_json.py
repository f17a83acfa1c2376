"""config.json of targets and drafts: what every key means, and every fault of a file reported at once."""

import dataclasses
import functools
import re

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dflash.config import (
    ConfigError,
    DraftConfig,
    ExpertsConfig,
    RopeConfig,
    TargetConfig,
)
from dflash.models.families import FAMILIES
from dflash.weights.config_json import read_draft_config, read_target_config, write_draft_config, write_rope
from dflash.weights.tiny import tiny_config

LLAMA = TargetConfig(
    family="llama",
    vocab_size=199,
    hidden_size=64,
    intermediate_size=96,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    max_position=131072,
    rms_norm_eps=1e-5,
    rope=RopeConfig(theta=10000.0),
    windows=(None,) * 4,
)
GPT_OSS_ROPE = RopeConfig(theta=150000.0, kind="yarn", factor=32.0, original_max_position=4096, truncate=False)
# What each family has beside the sizes.
EXPECTED = {
    "llama": {},
    "qwen2": {"qkv_bias": True},
    "qwen3": {"qk_norm": True},
    "gpt_oss": {
        "rope": GPT_OSS_ROPE,
        "windows": (16, None, 16, None),
        "qkv_bias": True,
        "o_bias": True,
        "sinks": True,
        "experts": ExpertsConfig(count=8, per_token=2, limit=7.0, alpha=1.702),
    },
}

# As z-lab publishes one, at the sizes of `tiny_config`.
DRAFT = {
    "architectures": ["DFlashDraftModel"],
    "model_type": "qwen3",
    "vocab_size": 199,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "rope_scaling": None,
    "hidden_act": "silu",
    "attention_bias": False,
    "layer_types": ["sliding_attention", "full_attention"],
    "sliding_window": 8,
    "use_sliding_window": True,
    "num_target_layers": 8,
    "block_size": 4,
    "dflash_config": {"target_layer_ids": [1, 5], "mask_token_id": 7},
}
DRAFT_EXPECTED = DraftConfig(
    vocab_size=199,
    hidden_size=64,
    intermediate_size=96,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    max_position=4096,
    rms_norm_eps=1e-6,
    rope=RopeConfig(theta=1000000.0),
    windows=(8, None),
    causal=(True, False),
    block_size=4,
    mask_token_id=7,
    target_layer_ids=(1, 5),
    num_target_layers=8,
)


def without(raw, *keys):
    return {k: v for k, v in raw.items() if k not in keys}


def refusal(read, raw):
    with pytest.raises(ConfigError) as caught:
        read(raw, "somewhere/config.json")
    said = str(caught.value)
    assert said.startswith("somewhere/config.json can't be used: ")
    return said


# ---- targets


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_each_family(family, tied):
    expected = dataclasses.replace(LLAMA, family=family, tie_embeddings=tied, **EXPECTED[family])
    assert read_target_config(tiny_config(family, tie_word_embeddings=tied)) == expected
    assert expected.num_layers == 4


HEAD_DIMS = {"llama": 16, "qwen2": 16, "qwen3": 128, "gpt_oss": 64}


@pytest.mark.parametrize("family", FAMILIES)
def test_an_absent_key_is_the_familys_default_and_so_is_null(family):
    optional = ["head_dim", "num_key_value_heads", "rms_norm_eps", "tie_word_embeddings", "attention_bias"]
    optional += ["swiglu_limit", "layer_types"]
    absent = without(tiny_config(family), "hidden_act", "rope_theta", *optional)
    config = read_target_config(absent)
    assert config == read_target_config(absent | dict.fromkeys(optional))
    gpt_oss = family == "gpt_oss"
    assert config.head_dim == HEAD_DIMS[family]
    assert config.num_kv_heads == config.num_heads == 4
    assert config.rms_norm_eps == (1e-5 if gpt_oss else 1e-6)
    assert config.rope.theta == (150000.0 if gpt_oss else 10000.0)
    assert not config.tie_embeddings
    assert (config.qkv_bias, config.o_bias) == (family in ("qwen2", "gpt_oss"), gpt_oss)
    assert config.windows == ((16, None, 16, None) if gpt_oss else (None,) * 4)


def test_biases_are_where_the_family_has_them():
    def biases(family, **keys):
        c = read_target_config(tiny_config(family, **keys))
        return c.qkv_bias, c.o_bias, c.mlp_bias

    assert biases("llama", attention_bias=True, mlp_bias=True) == (True, True, True)
    assert biases("llama", attention_bias=False, mlp_bias=True) == (False, False, True)
    assert biases("qwen2", attention_bias=False, mlp_bias=False) == (True, False, False)
    assert biases("qwen3", attention_bias=True) == biases("gpt_oss") == (True, True, False)
    for family, key in (("qwen2", "attention_bias"), ("qwen3", "mlp_bias"), ("gpt_oss", "mlp_bias")):
        assert f"{key} is not known" in refusal(read_target_config, tiny_config(family, **{key: True}))


ROPES = {
    "default": ({"rope_type": "default"}, {}),
    "linear": ({"rope_type": "linear", "factor": 4.0}, {"kind": "linear", "factor": 4.0}),
    "llama3": (
        {
            "rope_type": "llama3",
            "factor": 8,
            "low_freq_factor": 1.5,
            "high_freq_factor": 3.0,
            "original_max_position_embeddings": 8192,
        },
        {
            "kind": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.5,
            "high_freq_factor": 3.0,
            "original_max_position": 8192,
        },
    ),
    "yarn": (
        {
            "rope_type": "yarn",
            "factor": 2.0,
            "truncate": False,
            "beta_fast": 16.0,
            "mscale": 0.7,
            "original_max_position_embeddings": 65536,
        },
        {
            "kind": "yarn",
            "factor": 2.0,
            "truncate": False,
            "beta_fast": 16.0,
            "mscale": 0.7,
            "original_max_position": 65536,
        },
    ),
}


@pytest.mark.parametrize("kind", ROPES)
def test_rotary_settings_of_transformers_4_and_5_are_the_same(kind):
    scaling, fields = ROPES[kind]
    expected = RopeConfig(theta=500.0, **fields)
    oldest = without(scaling, "rope_type") | {"type": scaling["rope_type"]}
    spellings = [
        {"rope_theta": 500.0, "rope_scaling": oldest},
        {"rope_theta": 500.0, "rope_scaling": scaling},
        {"rope_parameters": scaling | {"rope_theta": 500.0}},
        {"rope_theta": 500.0, "rope_parameters": scaling | {"rope_theta": 500.0}, "rope_scaling": scaling},
        {"rope_parameters": {"full_attention": scaling | {"rope_theta": 500.0}}},
        {"rope_theta": 500.0, "rope_parameters": {"full_attention": scaling, "sliding_attention": dict(scaling)}},
        {"rope_theta": 500.0, "rope_scaling": scaling | {"partial_rotary_factor": 1.0}, "partial_rotary_factor": 1},
        write_rope(expected),
    ]
    for spelling in spellings:
        assert read_target_config(without(tiny_config(), "rope_theta") | spelling).rope == expected, spelling


@pytest.mark.parametrize(
    ("scaling", "message"),
    [
        ({"rope_type": "dynamic", "factor": 2.0}, "rope type .*got 'dynamic'"),
        ({"type": "yarn"}, r"rope type yarn .*\['factor'\]"),
        (
            {"rope_type": "llama3", "factor": 8.0},
            r"llama3 .*\['high_freq_factor', 'low_freq_factor', 'original_max_position_embeddings'\]",
        ),
        ({"rope_type": "linear", "factor": "8"}, "factor .*linear .*a number .*, got '8'"),
        ({"rope_type": "linear", "factor": 1e300}, r"factor .*1e-06 to 1e\+15, got 1e\+300"),
        ({"rope_type": "linear", "factor": 1e-300}, "factor .*got 1e-300"),
        (
            {"rope_type": "yarn", "factor": 1e308, "original_max_position_embeddings": 1e308},
            r"factor .*1e\+308; original_max_position_embeddings .*whole number above 0, got 1e\+308",
        ),
        (
            {"rope_type": "yarn", "factor": 262144, "original_max_position_embeddings": 0.5},
            r"original_max_position_embeddings .*whole number above 0, got 0\.5",
        ),
        ({"rope_type": "yarn", "factor": 2.0, "beta_fast": 1e308, "beta_slow": 1.0}, "beta_fast .*got 1e"),
        ({"rope_type": "yarn", "factor": 2.0, "beta_fast": 1.0, "beta_slow": 32.0}, "beta_slow .*above beta_fast"),
        ({"rope_type": "yarn", "factor": 2.0, "beta_slow": 33.0}, "beta_slow .*above beta_fast"),
        (ROPES["llama3"][0] | {"low_freq_factor": 3.0}, "low_freq_factor .*below high_freq_factor"),
        ({"rope_type": "yarn", "factor": 2.0, "truncate": 1}, "truncate .*yarn .*true or false, got 1"),
        ("yarn", "rope_scaling .*object, got 'yarn'"),
        ({"rope_type": "linear", "factor": 2.0, "type": "yarn"}, "type is 'yarn'.* rope_type is 'linear'"),
        ({"rope_theta": 500.0}, r"rope_theta is 500\.0.* is 10000\.0"),
        ({"factor": 4.0}, "factor is 4.* rope type .*missing"),
        ({"rope_type": "linear", "factor": 2.0, "beta_fast": 3.0}, "beta_fast is not known.* got 3"),
        ({"rope_type": "default", "mrope_section": [16, 24, 24]}, r"mrope_section is not known.* got \[16, 24, 24\]"),
        ({"rope_type": "yarn", "factor": 2.0, "long_factor": [1.0]}, r"long_factor is not known.* got \[1\.0\]"),
        ({"rope_type": "linear", "factor": 2.0, "partial_rotary_factor": 0.5}, r"partial_rotary_factor .*got 0\.5"),
        # The two lengths of such a file say another factor than the factor.
        (
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 131072},
            "max_position_embeddings is 131072, .*factor 4 .*131072 is 524288",
        ),
        ({"rope_type": "yarn", "factor": 4.0}, "factor 4 .*131072 is 524288"),
        (
            {"full_attention": {"rope_type": "default"}, "sliding_attention": {"rope_type": "linear", "factor": 2.0}},
            "rotary settings .*the same",
        ),
        ({"full_attention": {"rope_type": "default"}, "factor": 2.0}, r"rope_scaling\.factor is not known"),
    ],
)
def test_rotary_settings_that_can_not_be(scaling, message):
    assert re.search(message, refusal(read_target_config, tiny_config(rope_scaling=scaling)))


def test_rotary_settings_of_two_kinds_must_agree():
    both = {"rope_parameters": {"rope_type": "default"}, "rope_scaling": {"rope_type": "linear", "factor": 2.0}}
    assert "rotary settings must be the same" in refusal(read_target_config, tiny_config(**both))
    assert "rope_theta must be above 1, got 1.0" in refusal(read_target_config, tiny_config(rope_theta=1.0))
    assert "partial_rotary_factor must be one of [1], got 0.5" in refusal(
        read_target_config, tiny_config(partial_rotary_factor=0.5)
    )
    refused = refusal(read_target_config, tiny_config("gpt_oss", initial_context_length=8192))
    assert re.search("initial_context_length is 8192.* 4096", refused)
    assert read_target_config(tiny_config("gpt_oss", initial_context_length=4096, experts_per_token=2)).experts
    assert "experts_per_token is 4, and num_experts_per_tok is 2" in refusal(
        read_target_config, tiny_config("gpt_oss", experts_per_token=4)
    )


UNKNOWN = {
    "logits_scaling": 8.0,
    "embedding_multiplier": 12,
    "attn_logit_softcapping": 50.0,
    "num_experts": 128,
    "use_qk_norm": True,
    "rope_interleaved": True,
    "compression_config": {"format": "pack-quantized"},
    "quantization": {"bits": 4, "group_size": 64},
    "sliding_window": 4096,
    "kv_sharing": ["a", "b"],
}


def test_a_key_that_nobody_knows_is_refused_by_name():
    for key, value in UNKNOWN.items():
        refused = refusal(read_target_config, tiny_config("llama", **{key: value}))
        assert f"{key} is not known" in refused
        assert f"got {value!r}" in refused
    refused = refusal(read_target_config, tiny_config("llama", **UNKNOWN))
    assert [key for key in UNKNOWN if f"{key} is not known" not in refused] == []
    assert "kv_sharing is not known" in refusal(read_draft_config, DRAFT | {"kv_sharing": True})
    nested = DRAFT["dflash_config"] | {"markov_rank": 256}
    assert "dflash_config.markov_rank is not known" in refusal(read_draft_config, DRAFT | {"dflash_config": nested})


def test_what_changes_nothing_is_taken():
    harmless = {
        "torch_dtype": "bfloat16",
        "bos_token_id": 1,
        "use_cache": True,
        "attention_dropout": 0.0,
        "pretraining_tp": 1,
        "_name_or_path": "somewhere",
        "transformers.js_config": {"kv_cache_dtype": {}},
        "sharding_axis_dims": [1, -1, 1, 1, 1],
    }
    off = {"rope_interleaved": False, "use_mrope": False, "logits_scaling": None, "pruned_heads": {}, "extra": []}
    assert read_target_config(tiny_config() | harmless | off) == read_target_config(tiny_config())


@pytest.mark.parametrize("quantization", [{"quant_method": "gptq", "bits": 4}, {"quant_method": "fp8"}, {"a": 1}, "x"])
@pytest.mark.parametrize("family", FAMILIES)
def test_quantised_weights_are_refused_by_their_method_alone(family, quantization):
    refused = refusal(read_target_config, {"model_type": family, "quantization_config": quantization})
    method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
    assert re.search(rf"somewhere/config\.json .*quantised \({method}\).* mxfp4", refused)
    assert "; " not in refused  # one fault


def test_mxfp4_is_gpt_osss_alone():
    mxfp4 = {"quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}}
    assert read_target_config(tiny_config("gpt_oss", **mxfp4)) == read_target_config(tiny_config("gpt_oss"))
    assert "quantised (mxfp4)" in refusal(read_target_config, tiny_config("llama", **mxfp4))


def test_gpt_oss_must_say_its_rotary_settings():
    assert "rope_scaling is missing" in refusal(read_target_config, without(tiny_config("gpt_oss"), "rope_scaling"))


MIXED = ["full_attention", "sliding_attention", "sliding_attention", "full_attention"]


def test_windows():
    def windows(family, **changes):
        return read_target_config(tiny_config(family, **changes)).windows

    assert windows("llama", sliding_window=None) == (None,) * 4
    assert windows("gpt_oss", layer_types=MIXED, sliding_window=12) == (None, 12, 12, None)
    assert windows("qwen3", layer_types=MIXED, sliding_window=12) == (None, 12, 12, None)
    # Qwen's older form: all layers from one on.
    older = {"sliding_window": 12, "max_window_layers": 3}
    assert windows("qwen2", **older, use_sliding_window=True) == (None, None, None, 12)
    assert windows("qwen2", **older, use_sliding_window=False) == (None,) * 4
    assert windows("qwen2", **older) == (None,) * 4
    # What EasyDeL writes of a Qwen without windows contradicts itself.
    for family in ("qwen2", "qwen3"):
        told = {"layer_types": MIXED, "sliding_window": 12}
        assert windows(family, **told, use_sliding_window=False) == (None,) * 4
        assert windows(family, **told, use_sliding_window=True) == (None, 12, 12, None)
    assert windows("gpt_oss", **told, use_sliding_window=False) == (None, 12, 12, None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer_types": MIXED}, "sliding_window is missing"),
        ({"layer_types": MIXED, "sliding_window": 0}, "sliding_window .*1, got 0"),
        ({"layer_types": MIXED[:3], "sliding_window": 12}, "layer_types .*3 .*4 layers"),
        ({"layer_types": ["linear_attention"] * 4}, r"got \['linear_attention'\]"),
        ({"layer_types": "full_attention"}, "layer_types .*list.* got 'full_attention'"),
    ],
)
def test_layer_types_that_can_not_be(changes, message):
    assert re.search(message, refusal(read_target_config, tiny_config(**changes)))


def test_every_fault_of_a_target_is_told_at_once():
    faults = {
        "model_type": ("mamba", "model_type must be one of ['llama', 'qwen2', 'qwen3', 'gpt_oss'], got 'mamba'"),
        "vocab_size": (None, "vocab_size is missing"),
        "hidden_size": ("64", "hidden_size must be a number, got '64'"),
        "intermediate_size": (9.5, "intermediate_size must be an integer of at least 1, got 9.5"),
        "num_hidden_layers": (10**12, "num_hidden_layers must be at most 10000, got 1000000000000"),
        "num_key_value_heads": (3, "num_attention_heads 4 is no multiple of num_key_value_heads 3"),
        "head_dim": (7, "head_dim must be even for rotary embedding, got 7"),
        "max_position_embeddings": (0, "max_position_embeddings must be an integer of at least 1, got 0"),
        "rms_norm_eps": (float("nan"), "rms_norm_eps must be a number, got nan"),
        "rope_theta": (True, "rope_theta must be above 1, got True"),
        "hidden_act": ("gelu", "hidden_act must be one of ['silu'], got 'gelu'"),
        "tie_word_embeddings": ("false", "tie_word_embeddings must be true or false, got 'false'"),
    }
    for part in (dict(list(faults.items())[:8]), dict(list(faults.items())[8:])):
        said = refusal(read_target_config, tiny_config() | {k: value for k, (value, _) in part.items()})
        assert [s for _, s in part.values() if s not in said] == []
    said = refusal(read_target_config, tiny_config() | {k: value for k, (value, _) in faults.items()})
    assert said.count("; ") == 10
    assert "; and 2 more" in said


def test_more_experts_awake_than_there_are():
    raw = tiny_config("gpt_oss", num_experts_per_tok=9)
    assert "num_experts_per_tok 9 is above num_local_experts 8" in refusal(read_target_config, raw)


# ---- drafts


def test_a_published_draft():
    assert read_draft_config(DRAFT) == DRAFT_EXPECTED


def test_settings_of_a_draft_may_be_in_dflash_config_or_beside_it():
    settings = {"target_layer_ids": [1, 5], "mask_token_id": 7, "block_size": 4}
    plain = without(DRAFT, "dflash_config", "block_size")
    assert read_draft_config(plain | settings) == DRAFT_EXPECTED
    assert read_draft_config(plain | {"dflash_config": settings}) == DRAFT_EXPECTED
    assert read_draft_config(plain | settings | {"dflash_config": settings}) == DRAFT_EXPECTED
    beside = {"target_layer_ids": [0], "mask_token_id": 0, "block_size": 99}
    said = refusal(read_draft_config, plain | beside | {"dflash_config": settings})
    assert "block_size is 99, and 4 in dflash_config" in said
    assert [key for key in beside if f"{key} is {beside[key]!r}, and" not in said] == []


def test_defaults_of_a_draft():
    optional = ["head_dim", "num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "rope_theta"]
    plain = without(DRAFT, "layer_types", "use_sliding_window", "hidden_act", "attention_bias", "block_size", *optional)
    draft = read_draft_config(plain | {"dflash_config": {"mask_token_id": 7, "target_layer_ids": [1, 5]}})
    assert (draft.head_dim, draft.num_kv_heads, draft.max_position) == (128, 4, 32768)
    assert (draft.rms_norm_eps, draft.rope) == (1e-6, RopeConfig(theta=10000.0))
    assert (draft.windows, draft.causal) == ((None, None), (False, False))
    assert draft.block_size == 16


def test_what_training_fixed_is_never_guessed():
    guess = {"dflash_config": {"mask_token_id": 7}}
    assert re.search("target_layer_ids .*got None", refusal(read_draft_config, DRAFT | guess))
    assert "num_target_layers is missing" in refusal(read_draft_config, without(DRAFT, "num_target_layers"))
    guess = {"dflash_config": {"target_layer_ids": [1, 5]}}
    assert re.search("mask_token_id .*got None", refusal(read_draft_config, DRAFT | guess))


@pytest.mark.parametrize(("is_causal", "causal"), [(None, (True, False)), (True, (True,) * 2), (False, (False,) * 2)])
def test_a_sliding_layer_is_causal_unless_is_causal_says_otherwise(is_causal, causal):
    assert read_draft_config(DRAFT | {"is_causal": is_causal}).causal == causal


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"windows": (None, None), "causal": (False, False)},
        {"causal": (False, False)},
        {"causal": (True, True)},
        {"rope": GPT_OSS_ROPE, "max_position": 131072, "attention_bias": True, "target_layer_ids": (3, 0, 1)},
    ],
)
def test_a_written_draft_config_reads_the_same(changes):
    config = dataclasses.replace(DRAFT_EXPECTED, **changes)
    raw = write_draft_config(config, "bfloat16")
    assert raw["dtype"] == "bfloat16"
    assert read_draft_config(raw) == config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"causal": (False, True)}, "is_causal .*one"),
        ({"windows": (8, 9), "causal": (True, True)}, "sliding_window .*one"),
    ],
)
def test_a_draft_that_config_json_can_not_say_is_not_written(changes, message):
    with pytest.raises(ConfigError, match=message):
        write_draft_config(dataclasses.replace(DRAFT_EXPECTED, **changes), "float32")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_mask_embedding": True}, r"dflash_config\.use_mask_embedding .*canonical"),
        ({"mlp_bias": 1}, r"dflash_config\.mlp_bias .*true or false, got 1"),
        ({"use_qk_norm": 0}, r"dflash_config\.use_qk_norm .*true or false, got 0"),
        ({"selector_rank": 16}, r"dflash_config\.selector_rank is not known.* got 16"),
        ({"input_embedding_scale": 8.0}, r"input_embedding_scale .*1\.0, got 8\.0"),
        ({"output_multiplier": 0.5}, r"output_multiplier .*1\.0, got 0\.5"),
        ({"final_logit_softcapping": 30.0}, r"final_logit_softcapping .*None, got 30\.0"),
    ],
)
def test_what_another_export_does_otherwise_is_refused_by_name(settings, message):
    refused = refusal(read_draft_config, DRAFT | {"dflash_config": DRAFT["dflash_config"] | settings})
    assert re.search(message, refused)


def test_what_other_drafts_have_beyond_the_canonical_form_comes_back():
    extras = {"learned_mask": True, "fc_bias": True, "mlp_bias": True, "qk_norm": False}
    config = dataclasses.replace(DRAFT_EXPECTED, **extras)
    written = write_draft_config(config, "float32")
    assert written["dflash_config"].items() >= {"learned_mask": True, "use_qk_norm": False}.items()
    assert read_draft_config(written) == config
    plain = write_draft_config(DRAFT_EXPECTED, "float32")["dflash_config"]
    assert not plain.keys() & {"learned_mask", "fc_bias", "mlp_bias", "use_qk_norm"}


def test_settings_that_change_nothing_are_taken():
    off = dict.fromkeys(["use_mask_embedding", "mlp_bias", "fc_bias"], False)
    plain = {"input_embedding_scale": 1.0, "output_multiplier": 1, "final_logit_softcapping": None}
    raw = DRAFT | {"dflash_config": DRAFT["dflash_config"] | off | plain}
    assert read_draft_config(raw) == DRAFT_EXPECTED


def test_every_fault_of_a_draft_is_told_at_once():
    faults = {
        "architectures": (
            ["Qwen3ForCausalLM"],
            "architectures must be a list that begins with one of ['DFlashDraftModel', 'DFlash2DraftModel'], got the "
            "list ['Qwen3ForCausalLM']",
        ),
        "vocab_size": (None, "vocab_size is missing"),
        "num_hidden_layers": (0, "num_hidden_layers must be an integer of at least 1, got 0"),
        "is_causal": ("no", "is_causal must be true or false, got 'no'"),
        "block_size": (1, "block_size must be an integer of at least 2, got 1"),
        "dflash_config": (
            {"target_layer_ids": [1, -1], "mask_token_id": "<mask>", "use_mask_embedding": True},
            "target_layer_ids must be numbers of layers from 0, got [1, -1]",
        ),
    }
    said = refusal(read_draft_config, DRAFT | {k: value for k, (value, _) in faults.items()})
    nested = ["mask_token_id must be a token id, got '<mask>'", "dflash_config.use_mask_embedding is not of"]
    assert [s for s in [*(s for _, s in faults.values()), *nested] if s not in said] == []


BEYOND = "block_size must be at most 4096, since a block lies within max_position_embeddings, got"


@pytest.mark.parametrize("place", ["beside", "dflash_config"])
@pytest.mark.parametrize("size", [4097, 2**31 - 1, 2**40, 10**30])
def test_a_block_is_no_longer_than_the_positions(size, place):
    raw = DRAFT | {"dflash_config": dict(DRAFT["dflash_config"])}
    raw.pop("block_size")
    (raw if place == "beside" else raw["dflash_config"])["block_size"] = size
    assert f"{BEYOND} {size}" in refusal(read_draft_config, raw)


def test_a_block_may_fill_the_positions_and_is_not_judged_by_ones_that_are_wrong():
    assert read_draft_config(DRAFT | {"max_position_embeddings": 4}).block_size == 4
    assert "must be at most 3," in refusal(read_draft_config, DRAFT | {"max_position_embeddings": 3})
    assert "must be at most 1," in refusal(read_draft_config, DRAFT | {"max_position_embeddings": 1})
    for wrong in (0, -5, "many", [4096], 2**31):
        assert "block" not in refusal(read_draft_config, DRAFT | {"max_position_embeddings": wrong})


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"hidden_act": ["silu"]}, "hidden_act must be one of ['silu'], got the list ['silu']"),
        ({"hidden_act": []}, "hidden_act must be one of ['silu'], got the list []"),
        ({"hidden_act": "['silu']"}, "hidden_act must be one of ['silu'], got \"['silu']\""),
        ({"vocab_size": [64]}, "vocab_size must be a number, got the list [64]"),
        ({"vocab_size": 0.5}, "vocab_size must be an integer of at least 1, got 0.5"),
        ({"rms_norm_eps": -1}, "rms_norm_eps must be a number of at least 0, got -1"),
        ({"rope_scaling": {"rope_type": ["yarn"]}}, "'yarn'], got the list ['yarn']"),
        ({"block_size": [4], "dflash_config": {}}, "block_size must be an integer of at least 2, got the list [4]"),
        ({"architectures": "DFlashDraftModel"}, "must be a list that begins with one of ['DFlashDraftModel', "),
        ({"architectures": "DFlashDraftModel"}, "'DFlash2DraftModel'], got 'DFlashDraftModel'"),
        ({"architectures": []}, "'DFlash2DraftModel'], got the list []"),
    ],
)
def test_what_came_is_not_shown_as_what_may_come(changes, said):
    assert said in refusal(read_draft_config, DRAFT | changes)


# ---- any file


KINDS = ["default", "yarn", "llama3", "sliding_attention", "full_attention", "silu"]
WORDS = st.sampled_from(KINDS) | st.text(max_size=3)
KEYS = st.sampled_from(["rope_type", "factor", "rope_theta", "truncate", "mask_token_id", "target_layer_ids"])
NUMBERS = st.integers(-2, 70) | st.sampled_from([10**12, 10**400, -(10**400)]) | st.floats()
JSON = st.recursive(
    st.none() | st.booleans() | NUMBERS | WORDS,
    lambda values: st.lists(values, max_size=4) | st.dictionaries(KEYS, values, max_size=4),
    max_leaves=6,
)
READERS = {family: (functools.partial(tiny_config, family), read_target_config) for family in FAMILIES}
READERS["draft"] = (lambda: dict(DRAFT), read_draft_config)


@pytest.mark.parametrize("kind", READERS)
@settings(derandomize=True, deadline=None, max_examples=300, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_any_json_is_a_config_or_a_config_error(kind, data):
    valid, read = READERS[kind]
    names = sorted(valid() | dict.fromkeys(["rope_parameters", "is_causal", "mlp_bias", "max_window_layers"]))
    raw = valid() | data.draw(st.dictionaries(st.sampled_from(names), JSON, min_size=1, max_size=3))
    raw = without(raw, *data.draw(st.sets(st.sampled_from(names), max_size=2)))
    try:
        config = read(raw)
    except ConfigError:
        return
    hash(config)  # no list or object of the file got through


# ---- which layers
