"""config.json: the targets and drafts that Hugging Face's files describe, read and written.

Whatever a file states is used, compared or refused: a reader takes the keys that it knows, and what is left and is not
known to change nothing is refused by name. Every fault of one file is collected and raised in one error.
"""

import base64
import math
import sys
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from dflash.config import (
    ConfigError,
    ConvConfig,
    DraftConfig,
    ExpertsConfig,
    RopeConfig,
    SelectorConfig,
    TargetConfig,
    TargetShape,
    fault_list,
)
from dflash.models.families import FAMILIES, Family


def _is_number(value: Any) -> bool:
    # Not isfinite, which can't take an integer too large for a float.
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _shown(value: Any) -> str:
    """A value in a message. A list of what may stand there looks like what may stand there."""
    return f"the list {value!r}" if isinstance(value, list) else repr(value)


# Lists of this length are made before everything is checked; a wrong number must not exhaust the memory.
MAX_LAYERS = 10_000

# What of a config.json is no part of the network: who wrote it, how it trains, what it is sampled with.
_HARMLESS_NAMES = """
architectures auto_map model_type name_or_path tokenizer_class transformers_version transformers.js_config dtype
torch_dtype unsloth_version is_llama_config is_decoder problem_type task_specific_params finetuning_task id2label
label2id bos_token_id eos_token_id pad_token_id sep_token_id decoder_start_token_id attention_dropout hidden_dropout
initializer_range router_aux_loss_coef output_router_logits pretraining_tp use_cache output_attentions
output_hidden_states output_scores return_dict return_dict_in_generate chunk_size_feed_forward max_length min_length
do_sample early_stopping num_beams num_beam_groups diversity_penalty temperature top_k top_p typical_p
repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size num_return_sequences
remove_invalid_values
"""
# Settings of EasyDeL 0.3.0, which stand beside the model's in its directories: how it runs.
_EASYDEL_NAMES = """
sharding_axis_dims sharding_dcn_axis_dims sharding_axis_names attn_mechanism decode_attn_mechanism mla_attn_mechanism
mla_attn_dtype mla_attn_softmax_dtype blocksize_k blocksize_q blocksize_b moe_tiling_size_batch moe_tiling_size_seqlen
moe_tiling_size_dim partition_axis use_sharded_kv_caching use_sharding_constraint backend platform easy_method bits
scan_ring_attention scan_attention_layers use_scan_mlp scan_mlp_chunk_size scan_layers sequence_axis_name
gradient_checkpointing gradient_checkpointing_targets precompute_masks lmhead_chunksize kv_cache_quantization_config
use_qmm_best_config qmm_platform_override qmm_tpu_path_override kv_cache_sharding_sequence_axis_name
flash_attention_backward_pass_impl attn_dtype kvdtype attn_softmax_dtype fcm_max_ratio fcm_min_ratio
hardware_abstraction pallas_m_block_size pallas_k_block_size pallas_n_block_size moe_method moe_force_xla_gmm
use_expert_tensor_mode use_ring_of_experts fsdp_is_ep_bound sp_is_ep_bound operation_configs number_rep_kv resid_pdrop
embd_pdrop
"""
HARMLESS = frozenset(_HARMLESS_NAMES.split() + _EASYDEL_NAMES.split())


class Reader:
    """Takes the keys of one JSON object and keeps every fault, so that the user sees them all at once."""

    def __init__(self, raw: Mapping[str, Any], source: str, *, prefix: str = "", faults: list[str] | None = None):
        self.raw, self.source, self._prefix = raw, source, prefix
        self._left = set(raw)
        self.faults = list[str]() if faults is None else faults

    def take(self, key: str, default: Any = None) -> Any:
        """The value of a key, the default where it is absent or null; it counts as used."""
        self._left.discard(key)
        value = self.raw.get(key)
        return default if value is None else value

    def number(
        self, key: str, default: Any = None, *, kind: type = int, minimum: float = 1, maximum: float = 2**31 - 1
    ) -> Any:
        value = self.take(key, default)
        if value is None:
            self.faults.append(f"{key} is missing")
        elif not _is_number(value):
            self.faults.append(f"{key} must be a number, got {_shown(value)}")
        elif value < minimum or (kind is int and value != int(value)):
            what = "an integer" if kind is int else "a number"
            self.faults.append(f"{key} must be {what} of at least {minimum}, got {value!r}")
        elif value > maximum:
            self.faults.append(f"{key} must be at most {maximum}, got {value!r}")
        else:
            return kind(value)
        return kind(max(minimum, 1))

    def flag(self, key: str, default: bool = False) -> bool:
        value = self.take(key, default)
        self.check(isinstance(value, bool), f"{self._prefix}{key} must be true or false, got {value!r}")
        return bool(value)

    def expect(self, key: str, allowed: Sequence[Any], default: Any) -> Any:
        """A value that must be one of these."""
        value = self.take(key, default)
        if value not in allowed:
            self.faults.append(f"{self._prefix}{key} must be one of {list(allowed)}, got {_shown(value)}")
            return allowed[0]
        return value

    def compare(self, key: str, other: Any, name: str) -> None:
        """A key that repeats what stands under another name."""
        value = self.take(key, other)
        self.check(value == other, f"{self._prefix}{key} is {value!r}, and {name} is {other!r}: they must agree")

    def object(self, key: str) -> "Reader":
        """A reader of the object under a key, of nothing where it is absent; its faults are this one's."""
        value = self.take(key, {})
        self.check(isinstance(value, dict), f"{key} must be an object, got {value!r}")
        raw = value if isinstance(value, dict) else {}
        return Reader(raw, self.source, prefix=f"{self._prefix}{key}.", faults=self.faults)

    def check(self, good: bool, fault: str) -> None:
        if not good:
            self.faults.append(fault)

    def refuse_rest(self, harmless: Collection[str] = ()) -> None:
        """A fault for every key that was not read. Null, false and what is empty say that something is off."""
        for key in sorted(self._left):
            value = self.raw[key]
            off = value is None or value is False or value in ({}, [])
            if not (off or key.startswith("_") or key in harmless):
                text = repr(value)
                self.faults.append(f"{self._prefix}{key} is not known, and may change the model: got {text[:60]}")

    def finish(self) -> None:
        """Raises ConfigError with every fault."""
        if self.faults:
            raise ConfigError(f"{self.source} can't be used: " + fault_list(self.faults))


_LAYER_TYPES = ("full_attention", "sliding_attention")
_ROPE_NEEDS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "high_freq_factor", "low_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor",),
}
_ROPE_FIELDS = {
    "llama3": ("low_freq_factor", "high_freq_factor"),
    "yarn": ("beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim", "truncate"),
}


# No trained model's rotary settings come near these ends, and frequencies between them are finite.
_LEAST_ROPE, _LARGEST_ROPE = 1e-6, 1e15


def _rope_rule(key: str, value: Any) -> str:
    """What a rotary setting must be, where this one is not; empty for a good one."""
    if key == "truncate":
        return "" if isinstance(value, bool) else "true or false"
    if key == "original_max_position_embeddings":
        # transformers writes some lengths as 8192.0.
        good = _is_number(value) and 1 <= value < 2**31 and value == int(value)
        return "" if good else "a whole number above 0"
    good = _is_number(value) and _LEAST_ROPE <= value <= _LARGEST_ROPE
    return "" if good else f"a number from {_LEAST_ROPE:g} to {_LARGEST_ROPE:g}"


def _read_rope_object(rope: Reader, max_position: int, default_theta: float) -> RopeConfig:
    """One object of rotary settings, with `rope_theta` and the original length put in where they stand beside it."""
    before = len(rope.faults)
    kind = rope.take("rope_type", rope.take("type", "default"))
    rope.compare("type", kind, "rope_type")
    if not isinstance(kind, str) or kind not in _ROPE_NEEDS:
        rope.faults.append(f"rope type must be one of {sorted(_ROPE_NEEDS)}, got {_shown(kind)}")
        return RopeConfig(theta=1.0)
    theta = rope.take("rope_theta", default_theta)
    rope.check(_is_number(theta) and theta > 1, f"rope_theta must be above 1, got {theta!r}")
    rope.check(not _is_number(theta) or theta <= _LARGEST_ROPE, f"rope_theta must be at most {_LARGEST_ROPE:g}")
    rope.expect("partial_rotary_factor", (1,), 1)
    fields = _ROPE_FIELDS.get(kind, ())
    values = {key: rope.take(key) for key in ("factor", "original_max_position_embeddings", *fields)}
    missing = [key for key in _ROPE_NEEDS[kind] if values.get(key) is None]
    rope.check(not missing, f"rope type {kind} needs {missing}")
    for key, value in values.items():
        rule = _rope_rule(key, value)
        rope.check(value is None or not rule, f"{key} of rope type {kind} must be {rule}, got {value!r}")
    rope.refuse_rest()
    if len(rope.faults) > before:
        return RopeConfig(theta=1.0)
    factor, length = float(values["factor"] or 1), int(values["original_max_position_embeddings"] or max_position)
    rope.check(factor == 1 or kind != "default", f"factor is {factor:g}, but its rope type is missing")
    # Readers of such a file disagree: some take the factor, some the ratio of the two lengths.
    rope.check(
        kind != "yarn" or round(factor * length) == max_position,
        f"max_position_embeddings is {max_position}, and YaRN's factor {factor:g} of an original length of {length} is "
        f"{factor * length:g}: write that one, or correct the factor",
    )
    given = {key: values[key] for key in fields if values[key] is not None}
    original = length if kind in _ROPE_FIELDS else 0
    read = RopeConfig(theta=float(theta), kind=kind, factor=factor, original_max_position=original, **given)
    rope.check(read.low_freq_factor < read.high_freq_factor, "low_freq_factor must be below high_freq_factor")
    rope.check(read.beta_slow <= read.beta_fast, "beta_slow must not be above beta_fast")
    return read


def _read_rope(reader: Reader, max_position: int, default_theta: float, *, required: bool = False) -> RopeConfig:
    """Rotary settings of transformers 4 (`rope_theta`, `rope_scaling`) and 5 (`rope_parameters`), which must agree."""
    beside = {key: reader.take(key) for key in ("rope_theta", "original_max_position_embeddings")}
    beside = {key: value for key, value in beside.items() if value is not None}
    reader.expect("partial_rotary_factor", (1,), 1)
    objects: list[Reader] = []
    for key in ("rope_parameters", "rope_scaling"):
        settings = reader.object(key)
        nested = [settings.object(name) for name in _LAYER_TYPES if settings.raw.get(name) is not None]
        if nested:
            settings.refuse_rest()
        objects += nested or ([settings] if settings.raw else [])
    # transformers fills YaRN in where a family has it and the keys are absent, other readers plain rotary.
    reader.check(bool(objects) or not required, "rope_scaling is missing")
    ropes = []
    for settings in objects or [Reader({}, "", faults=reader.faults)]:
        for key, value in beside.items():
            settings.compare(key, value, f"{key} beside it")
        full = Reader(beside | dict(settings.raw), "", prefix="rope ", faults=reader.faults)
        ropes.append(_read_rope_object(full, max_position, default_theta))
    reader.check(all(rope == ropes[0] for rope in ropes), "rotary settings must be the same wherever they stand")
    # GPT-OSS's name for what its rotary settings say too.
    reader.compare("initial_context_length", ropes[0].original_max_position or max_position, "the original length")
    return ropes[0]


def _read_windows(reader: Reader, num_layers: int, family: Family) -> tuple[int | None, ...]:
    """Per-layer windows from `layer_types` and `sliding_window`, as the family has them."""
    types = reader.take("layer_types")
    optional = reader.take("use_sliding_window") if family.optional_windows else None
    reader.check(optional is None or isinstance(optional, bool), f"use_sliding_window must be a flag, got {optional!r}")
    if family.optional_windows:
        first = reader.number("max_window_layers", 28, minimum=0)
    if optional is False or (types is None and family.optional_windows and not optional):
        # EasyDeL writes `layer_types` without looking at the flag. It decides: the __post_init__ of transformers'
        # Qwen2Config and Qwen3Config then sets sliding_window to None, whatever `layer_types` says.
        reader.take("sliding_window")
        return (None,) * num_layers
    if types is None:
        first, every = (0, 2) if family.alternating else (first if family.optional_windows else num_layers, 1)
        types = [_LAYER_TYPES[i >= first and (i - first) % every == 0] for i in range(num_layers)]
    if not isinstance(types, list) or not all(isinstance(t, str) for t in types):
        reader.faults.append(f"layer_types must be a list of names, got {types!r}")
        return (None,) * num_layers
    unknown = sorted(set(types) - set(_LAYER_TYPES))
    reader.check(not unknown, f"layer_types may hold full_attention and sliding_attention, got {unknown}")
    reader.check(len(types) == num_layers, f"layer_types has {len(types)} entries for {num_layers} layers")
    if "sliding_attention" not in types:
        # In these families a file may state a window that no layer uses.
        if family.optional_windows or family.alternating:
            reader.take("sliding_window")
        return (None,) * num_layers
    window = reader.number("sliding_window")
    return tuple(window if t == "sliding_attention" else None for t in types)


def _read_heads(reader: Reader, hidden_size: int, family: Family) -> tuple[int, int, int]:
    heads = reader.number("num_attention_heads")
    kv_heads = reader.number("num_key_value_heads", heads)
    head_dim = reader.number("head_dim", family.head_dim or max(hidden_size // heads, 1))
    reader.check(heads % kv_heads == 0, f"num_attention_heads {heads} is no multiple of num_key_value_heads {kv_heads}")
    reader.check(head_dim % 2 == 0, f"head_dim must be even for rotary embedding, got {head_dim}")
    return heads, kv_heads, head_dim


def _read_experts(reader: Reader) -> ExpertsConfig:
    count, per_token = reader.number("num_local_experts"), reader.number("num_experts_per_tok", 4)
    reader.check(per_token <= count, f"num_experts_per_tok {per_token} is above num_local_experts {count}")
    reader.compare("experts_per_token", per_token, "num_experts_per_tok")
    limit = reader.number("swiglu_limit", 7.0, kind=float, minimum=0)
    reader.compare("mlp_activations_limit", limit, "swiglu_limit")  # EasyDeL's name
    alpha = reader.number("swiglu_alpha", 1.702, kind=float, minimum=0)
    return ExpertsConfig(count=count, per_token=per_token, limit=limit, alpha=alpha)


def _check_quantization(reader: Reader, family: Family) -> None:
    """Raises ConfigError at once: nothing fits quantised weights, and that is the one reason."""
    quantization = reader.take("quantization_config", {})
    method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
    if quantization and not (family.experts and method == "mxfp4"):
        raise ConfigError(
            f"{reader.source} can't be used: its weights are quantised ({str(method)[:60]}), and only GPT-OSS's mxfp4 "
            "is read: give the snapshot before quantisation"
        )


def read_target_config(raw: Mapping[str, Any], source: str = "config.json") -> TargetConfig:
    """The target that a Hugging Face config.json describes. Raises ConfigError with every fault in it."""
    reader = Reader(raw, source)
    name = reader.expect("model_type", tuple(FAMILIES), None)
    family = FAMILIES[name]
    _check_quantization(reader, family)
    hidden_size = reader.number("hidden_size")
    num_layers = reader.number("num_hidden_layers", maximum=MAX_LAYERS)
    max_position = reader.number("max_position_embeddings")
    heads, kv_heads, head_dim = _read_heads(reader, hidden_size, family)
    reader.expect("hidden_act", ("silu",), "silu")
    reader.expect("is_causal", (True,), True)
    bias = not family.qkv_bias_only and reader.flag("attention_bias", family.bias)
    config = TargetConfig(
        family=name,
        vocab_size=reader.number("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=reader.number("intermediate_size"),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        max_position=max_position,
        rms_norm_eps=reader.number("rms_norm_eps", family.rms_norm_eps, kind=float, minimum=0),
        rope=_read_rope(reader, max_position, family.rope_theta, required=family.experts),
        windows=_read_windows(reader, num_layers, family),
        # transformers' default differs by family: Llama and Qwen write the key, and omit it when it is false.
        tie_embeddings=reader.flag("tie_word_embeddings"),
        qkv_bias=bias or family.qkv_bias_only,
        o_bias=bias,
        mlp_bias=family.mlp_bias and reader.flag("mlp_bias"),
        qk_norm=family.qk_norm,
        sinks=family.sinks,
        experts=_read_experts(reader) if family.experts else None,
    )
    reader.refuse_rest(HARMLESS)
    reader.finish()
    return config


def read_target_shape(raw: dict[str, Any], source: str = "config.json") -> TargetShape:
    """What a draft must fit of any target, of whatever family and format. Raises ConfigError with every fault in it."""
    text = raw.get("text_config")
    # Of a model that reads pictures too, what reads text.
    reader = Reader(text if isinstance(text, dict) and "hidden_size" not in raw else raw, source)
    shape = TargetShape(
        num_layers=reader.number("num_hidden_layers", maximum=MAX_LAYERS),
        hidden_size=reader.number("hidden_size"),
        vocab_size=reader.number("vocab_size"),
    )
    reader.finish()
    return shape


DRAFT_ARCHITECTURES = ("DFlashDraftModel", "DFlash2DraftModel")
# What drafts of other trainers have beyond the canonical form: field -> key in dflash_config, and the canonical value.
_EXTRAS = {
    "learned_mask": ("learned_mask", False),
    "fc_bias": ("fc_bias", False),
    "mlp_bias": ("mlp_bias", False),
    "qk_norm": ("use_qk_norm", True),
}


def draft_extras(config: DraftConfig) -> dict[str, bool]:
    """The parts of a draft that are not canonical, by key in dflash_config; empty for a canonical one."""
    values = {key: (getattr(config, field), plain) for field, (key, plain) in _EXTRAS.items()}
    return {key: value for key, (value, plain) in values.items() if value != plain}


def _read_vocabulary(nested: Reader, vocab_size: int) -> bytes | None:
    """The tokens that a draft proposes: base64 of a bit per token of the target's vocabulary."""
    value = nested.take("draft_vocabulary")
    if value is None:
        return None
    try:
        bits = base64.b64decode(value, validate=True)
    except (TypeError, ValueError):
        bits = b""
    number = int.from_bytes(bits, "little")
    fits = len(bits) == math.ceil(vocab_size / 8) and 0 < number < 2**vocab_size
    nested.check(fits, f"dflash_config.draft_vocabulary must be base64 of {vocab_size} bits, some of them set")
    return bits if fits else None


def _read_second(
    reader: Reader, nested: Reader, hidden_size: int, vocab_size: int
) -> tuple[ConvConfig, SelectorConfig]:
    """The parts that a DFlash 2 draft has and a DFlash draft lacks."""
    limits = {
        "conv_kernel_size": MAX_LAYERS,
        "conv_group_size": hidden_size,
        "selector_rank": hidden_size,
        "selector_top_k": vocab_size,
    }
    values = list[int]()
    for key, most in limits.items():
        value = _take_either(reader, nested, key)
        fits = _is_integer(value) and 1 <= (value or 0) <= most
        reader.check(fits, f"{key} must be an integer from 1 to {most}, got {value!r}")
        values.append(value if isinstance(value, int) and fits else 1)
    kernel, group, rank, top_k = values
    reader.check(hidden_size % group == 0, f"conv_group_size must divide hidden_size {hidden_size}, got {group}")
    return ConvConfig(kernel_size=kernel, group_size=group), SelectorConfig(rank=rank, top_k=top_k)


def _take_either(reader: Reader, nested: Reader, key: str, default: Any = None) -> Any:
    """A setting of a draft, which may stand in dflash_config, beside it, or in both places."""
    outer, inner = reader.take(key), nested.take(key)
    reader.check(None in (outer, inner) or outer == inner, f"{key} is {outer!r}, and {inner!r} in dflash_config")
    either = outer if inner is None else inner
    return default if either is None else either


def read_draft_config(raw: Mapping[str, Any], source: str = "config.json") -> DraftConfig:
    """The draft that a `DFlashDraftModel` config.json describes. Raises ConfigError with every fault in it."""
    if "speculators_config" in raw:
        raise ConfigError(f"{source} is written for speculators: export the draft without --format speculators")
    reader = Reader(raw, source)
    architectures = raw.get("architectures")
    reader.check(
        isinstance(architectures, list) and architectures[:1] in ([name] for name in DRAFT_ARCHITECTURES),
        f"architectures must be a list that begins with one of {list(DRAFT_ARCHITECTURES)}, got "
        f"{_shown(architectures)}",
    )
    nested = reader.object("dflash_config")
    reader.expect("hidden_act", ("silu",), "silu")
    # Exports of the EasyDeL fork have another network under the same name; it would load and propose rubbish.
    reader.check(
        not nested.take("use_mask_embedding"),
        "dflash_config.use_mask_embedding is not of the canonical draft: load_draft converts it",
    )
    extras = {field: nested.flag(key, plain) for field, (key, plain) in _EXTRAS.items()}
    for key, plain in (("input_embedding_scale", 1.0), ("output_multiplier", 1.0), ("final_logit_softcapping", None)):
        value = _take_either(reader, nested, key, plain)
        reader.check(value == plain, f"{key} must be {plain}, got {value!r}: it is not supported")

    hidden_size = reader.number("hidden_size")
    reader.compare("target_hidden_size", hidden_size, "hidden_size")  # sglang-jax's key
    num_layers = reader.number("num_hidden_layers", maximum=MAX_LAYERS)
    before = len(reader.faults)
    max_position = reader.number("max_position_embeddings", 32768)
    positions_known = len(reader.faults) == before
    # The reference reads the file as a Qwen3 config, so what an absent key means is Qwen3's.
    family = FAMILIES["qwen3"]
    heads, kv_heads, head_dim = _read_heads(reader, hidden_size, family)
    num_target_layers = reader.number("num_target_layers")
    layer_ids = _take_either(reader, nested, "target_layer_ids")
    good = isinstance(layer_ids, list) and bool(layer_ids) and all(_is_integer(i) and i >= 0 for i in layer_ids)
    reader.check(good, f"target_layer_ids must be numbers of layers from 0, got {layer_ids!r}")
    block = _take_either(reader, nested, "block_size", 16)
    good = _is_integer(block) and block >= 2
    reader.check(good, f"block_size must be an integer of at least 2, got {_shown(block)}")
    reader.check(
        not good or not positions_known or block <= max_position,
        f"block_size must be at most {max_position}, since a block lies within max_position_embeddings, got {block!r}",
    )
    mask = _take_either(reader, nested, "mask_token_id")
    reader.check(_is_integer(mask), f"mask_token_id must be a token id, got {mask!r}")

    windows = _read_windows(reader, num_layers, family)
    causal = None if raw.get("is_causal") is None else reader.flag("is_causal")
    attention_bias = reader.flag("attention_bias")
    rope = _read_rope(reader, max_position, family.rope_theta)
    vocab_size = reader.number("vocab_size")
    second = isinstance(architectures, list) and architectures[:1] == ["DFlash2DraftModel"]
    vocabulary = _read_vocabulary(nested, vocab_size)
    proposed = vocab_size if vocabulary is None else int.from_bytes(vocabulary, "little").bit_count()
    conv, selector = _read_second(reader, nested, hidden_size, proposed) if second else (None, None)
    intermediate_size = reader.number("intermediate_size")
    eps = reader.number("rms_norm_eps", family.rms_norm_eps, kind=float, minimum=0)
    nested.refuse_rest()
    # A draft has neither embedding nor head of its own to be tied.
    reader.refuse_rest({"tie_word_embeddings", *HARMLESS})
    reader.finish()
    assert isinstance(layer_ids, list)
    assert isinstance(block, int)
    assert isinstance(mask, int)
    return DraftConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        max_position=max_position,
        rms_norm_eps=eps,
        rope=rope,
        windows=windows,
        # The reference: a sliding layer is causal within the block unless is_causal says otherwise.
        causal=tuple(w is not None if causal is None else causal for w in windows),
        block_size=block,
        mask_token_id=mask,
        target_layer_ids=tuple(layer_ids),
        num_target_layers=num_target_layers,
        attention_bias=attention_bias,
        **extras,
        conv=conv,
        selector=selector,
        vocabulary=vocabulary,
    )


def write_rope(rope: RopeConfig) -> dict[str, Any]:
    """`rope_theta` and `rope_scaling` as Hugging Face configs spell them; `read_target_config` reads them back."""
    if rope.kind == "default":
        return {"rope_theta": rope.theta, "rope_scaling": None}
    scaling: dict[str, Any] = {"rope_type": rope.kind, "factor": rope.factor}
    if rope.original_max_position:
        scaling["original_max_position_embeddings"] = rope.original_max_position
    scaling |= {k: v for k in _ROPE_FIELDS.get(rope.kind, ()) if (v := getattr(rope, k)) is not None}
    return {"rope_theta": rope.theta, "rope_scaling": scaling}


def write_draft_config(config: DraftConfig, dtype: str) -> dict[str, Any]:
    """config.json of a canonical draft directory: z-lab's keys, readable by `read_draft_config`."""
    causal = set(config.causal)
    by_window = config.causal == tuple(w is not None for w in config.windows)
    if not by_window and len(causal) > 1:
        raise ConfigError(f"is_causal is one key for all layers; can't write causal={list(config.causal)}")
    windows = {w for w in config.windows if w is not None}
    if len(windows) > 1:
        raise ConfigError(f"sliding_window is one key for all layers; can't write windows={list(config.windows)}")
    if (config.conv is None) != (config.selector is None):
        raise ConfigError("a DFlash 2 draft has both convolutions and a selector; this one has only one of them")
    second: dict[str, int] = {}
    if config.conv is not None and config.selector is not None:
        second = {
            "conv_kernel_size": config.conv.kernel_size,
            "conv_group_size": config.conv.group_size,
            "selector_rank": config.selector.rank,
            "selector_top_k": config.selector.top_k,
        }
    out = {
        "architectures": [DRAFT_ARCHITECTURES[bool(second)]],
        "model_type": "qwen3",
        "dtype": dtype,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_position,
        "rms_norm_eps": config.rms_norm_eps,
        "hidden_act": "silu",
        "attention_bias": config.attention_bias,
        "layer_types": ["full_attention" if w is None else "sliding_attention" for w in config.windows],
        "sliding_window": min(windows) if windows else None,
        "use_sliding_window": bool(windows),
        "num_target_layers": config.num_target_layers,
        "block_size": config.block_size,
        "dflash_config": {
            "target_layer_ids": list(config.target_layer_ids),
            "mask_token_id": config.mask_token_id,
            "block_size": config.block_size,
            **draft_extras(config),
            **second,
            **({} if config.vocabulary is None else {"draft_vocabulary": base64.b64encode(config.vocabulary).decode()}),
        },
        **write_rope(config.rope),
    }
    return out if by_window else {**out, "is_causal": config.causal[0]}
