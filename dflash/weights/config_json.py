"""config.json: the targets and drafts that Hugging Face's files describe, read and written.

Every fault of one file is collected and raised in one error.
"""

import base64
import sys
from typing import Any

from dflash.config import (
    FAMILIES,
    ConfigError,
    ConvConfig,
    DraftConfig,
    ExpertsConfig,
    RopeConfig,
    SelectorConfig,
    TargetConfig,
    build_target_layer_ids,
)


def _is_number(value: Any) -> bool:
    # Not isfinite: it can't take an integer that no float can hold.
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


# Lists of this length are made before all is checked; a wrong number must not take the memory.
_MAX_LAYERS = 10_000


class _Reader:
    """Reads keys of one config.json and keeps every fault, so that the user sees them all at once."""

    def __init__(self, raw: dict[str, Any], source: str):
        self.raw, self.source, self.faults = raw, source, list[str]()

    def number(
        self, key: str, default: Any = None, *, kind: type = int, minimum: float = 1, maximum: float = 2**31 - 1
    ) -> Any:
        value = self.raw.get(key)
        value = default if value is None else value
        if value is None:
            self.faults.append(f"{key} is missing")
        elif not _is_number(value):
            self.faults.append(f"{key} must be a number, got {value!r}")
        elif value < minimum or (kind is int and value != int(value)):
            self.faults.append(f"{key} must be {kind.__name__} >= {minimum}, got {value!r}")
        elif value > maximum:
            self.faults.append(f"{key} must be at most {maximum}, got {value!r}")
        else:
            return kind(value)
        return kind(max(minimum, 1))

    def flag(self, key: str, default: bool = False) -> bool:
        value = self.raw.get(key)
        value = default if value is None else value
        self.check(isinstance(value, bool), f"{key} must be true or false, got {value!r}")
        return bool(value)

    def expect(self, key: str, allowed: tuple[Any, ...], default: Any) -> Any:
        value = self.raw.get(key, default)
        if value not in allowed:
            self.faults.append(f"{key} must be one of {list(allowed)}, got {value!r}")
            return allowed[0]
        return value

    def check(self, good: bool, fault: str) -> None:
        if not good:
            self.faults.append(fault)

    def finish(self) -> None:
        if self.faults:
            raise ConfigError(f"{self.source} can't be used: " + "; ".join(self.faults))


_ROPE_KEYS = {
    "default": set(),
    "linear": {"factor"},
    "llama3": {"factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"},
    "yarn": {"factor"},
}


def _read_rope(reader: _Reader, max_position: int, default_theta: float) -> RopeConfig:
    """Rotary settings of transformers 4 (`rope_theta`, `rope_scaling`) and 5 (`rope_parameters`)."""
    raw = reader.raw
    scaling = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if not isinstance(scaling, dict):
        reader.faults.append(f"rope_scaling must be an object, got {scaling!r}")
        return RopeConfig(theta=1.0)
    theta = scaling.get("rope_theta", raw.get("rope_theta", default_theta))
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if not isinstance(kind, str) or kind not in _ROPE_KEYS:
        reader.faults.append(f"rope type must be one of {sorted(_ROPE_KEYS)}, got {kind!r}")
        return RopeConfig(theta=1.0)
    missing = sorted(k for k in _ROPE_KEYS[kind] if scaling.get(k) is None)
    reader.check(not missing, f"rope type {kind} needs {missing}")
    reader.check(_is_number(theta) and theta > 1, f"rope_theta must be above 1, got {theta!r}")
    original = scaling.get("original_max_position_embeddings") or raw.get("original_max_position_embeddings")
    fields = ("low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow", "attention_factor", "mscale")
    given = {k: scaling[k] for k in (*fields, "mscale_all_dim", "truncate") if scaling.get(k) is not None}
    numbers = {"factor": scaling.get("factor"), "original_max_position_embeddings": original, **given}
    for key, value in numbers.items():
        good = isinstance(value, bool) if key == "truncate" else value is None or (_is_number(value) and value > 0)
        rule = "true or false" if key == "truncate" else "a number above 0"
        reader.check(good, f"{key} of rope type {kind} must be {rule}, got {value!r}")
    if reader.faults:
        return RopeConfig(theta=1.0)
    return RopeConfig(
        theta=float(theta),
        kind=kind,
        factor=float(scaling.get("factor") or 1.0),
        original_max_position=int(original or max_position) if kind in ("llama3", "yarn") else 0,
        **given,
    )


def _read_windows(reader: _Reader, num_layers: int, family: str) -> tuple[int | None, ...]:
    """Per-layer windows from `layer_types` and `sliding_window`; GPT-OSS alternates when `layer_types` is absent."""
    raw = reader.raw
    types, qwen = raw.get("layer_types"), family in ("qwen2", "qwen3")
    if qwen and raw.get("use_sliding_window") is False:
        # EasyDeL writes `layer_types` without looking at this key. It decides: the __post_init__ of transformers'
        # Qwen2Config and Qwen3Config then sets sliding_window to None, whatever `layer_types` says.
        return (None,) * num_layers
    if types is None and family == "gpt_oss":
        types = ["sliding_attention" if i % 2 == 0 else "full_attention" for i in range(num_layers)]
    elif types is None and qwen and reader.flag("use_sliding_window"):
        first = reader.number("max_window_layers", 28, minimum=0)
        types = ["sliding_attention" if i >= first else "full_attention" for i in range(num_layers)]
    elif types is None:
        types = ["full_attention"] * num_layers
    if not isinstance(types, list) or not all(isinstance(t, str) for t in types):
        reader.faults.append(f"layer_types must be a list of names, got {types!r}")
        return (None,) * num_layers
    unknown = sorted(set(types) - {"full_attention", "sliding_attention"})
    reader.check(not unknown, f"layer_types may hold full_attention and sliding_attention, got {unknown}")
    reader.check(len(types) == num_layers, f"layer_types has {len(types)} entries for {num_layers} layers")
    if "sliding_attention" not in types:
        return (None,) * num_layers
    window = reader.number("sliding_window")
    return tuple(window if t == "sliding_attention" else None for t in types)


def _read_heads(reader: _Reader, hidden_size: int, family: str) -> tuple[int, int, int]:
    heads = reader.number("num_attention_heads")
    kv_heads = reader.number("num_key_value_heads", heads)
    # What an absent key means differs by family in transformers.
    head_dim = reader.number("head_dim", {"qwen3": 128, "gpt_oss": 64}.get(family, max(hidden_size // heads, 1)))
    reader.check(heads % kv_heads == 0, f"num_attention_heads {heads} is no multiple of num_key_value_heads {kv_heads}")
    reader.check(head_dim % 2 == 0, f"head_dim must be even for rotary embedding, got {head_dim}")
    return heads, kv_heads, head_dim


def read_target_config(raw: dict[str, Any], source: str = "config.json") -> TargetConfig:
    """The target that a Hugging Face config.json describes. Raises ConfigError with every fault in it."""
    reader = _Reader(raw, source)
    family = reader.expect("model_type", FAMILIES, None)
    hidden_size = reader.number("hidden_size")
    num_layers = reader.number("num_hidden_layers", maximum=_MAX_LAYERS)
    max_position = reader.number("max_position_embeddings")
    heads, kv_heads, head_dim = _read_heads(reader, hidden_size, family)
    gpt_oss = family == "gpt_oss"
    if not gpt_oss:
        reader.expect("hidden_act", ("silu",), "silu")
    bias = reader.flag("attention_bias", gpt_oss)
    experts = None
    if gpt_oss:
        count, per_token = reader.number("num_local_experts"), reader.number("num_experts_per_tok", 4)
        reader.check(per_token <= count, f"num_experts_per_tok {per_token} is above num_local_experts {count}")
        limit = reader.number("swiglu_limit", 7.0, kind=float, minimum=0)
        alpha = reader.number("swiglu_alpha", 1.702, kind=float, minimum=0)
        experts = ExpertsConfig(count=count, per_token=per_token, limit=limit, alpha=alpha)
        # transformers fills in YaRN when the keys are absent, other readers plain rotary: ask instead of guessing.
        reader.check(bool(raw.get("rope_parameters") or raw.get("rope_scaling")), "rope_scaling is missing")
    config = TargetConfig(
        family=family,
        vocab_size=reader.number("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=reader.number("intermediate_size"),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        max_position=max_position,
        rms_norm_eps=reader.number("rms_norm_eps", 1e-5 if gpt_oss else 1e-6, kind=float, minimum=0),
        rope=_read_rope(reader, max_position, 150000.0 if gpt_oss else 10000.0),
        windows=_read_windows(reader, num_layers, family),
        # transformers' default differs by family: Llama and Qwen write the key, and leave it out when false.
        tie_embeddings=reader.flag("tie_word_embeddings"),
        # Qwen2 has these three biases always and has no key for them.
        qkv_bias=bias or family == "qwen2",
        o_bias=bias and family != "qwen2",
        mlp_bias=family == "llama" and reader.flag("mlp_bias"),
        qk_norm=family == "qwen3",
        sinks=gpt_oss,
        experts=experts,
    )
    reader.finish()
    return config


DRAFT_ARCHITECTURES = ("DFlashDraftModel", "DFlash2DraftModel")
# What drafts of older trainers have beyond the canonical form: field -> key in dflash_config, and the canonical value.
_EXTRAS = {
    "learned_mask": ("learned_mask", False),
    "fc_bias": ("fc_bias", False),
    "mlp_bias": ("mlp_bias", False),
    "qk_norm": ("use_qk_norm", True),
}


def draft_extras(config: DraftConfig) -> dict[str, bool]:
    """What of a draft is not canonical, by its key in dflash_config; empty for a canonical one."""
    values = {key: (getattr(config, field), plain) for field, (key, plain) in _EXTRAS.items()}
    return {key: value for key, (value, plain) in values.items() if value != plain}


def _read_extras(reader: "_Reader", nested: dict[str, Any]) -> dict[str, bool]:
    values = {field: nested.get(key, plain) for field, (key, plain) in _EXTRAS.items()}
    for field, value in values.items():
        reader.check(isinstance(value, bool), f"dflash_config.{_EXTRAS[field][0]} must be true or false, got {value!r}")
    return values


def _read_vocabulary(reader: _Reader, nested: dict[str, Any], vocab_size: int) -> bytes | None:
    """The tokens that a draft proposes: base64 of a bit per token of the target's vocabulary."""
    value = nested.get("draft_vocabulary")
    if value is None:
        return None
    try:
        bits = base64.b64decode(value, validate=True)
    except (TypeError, ValueError):
        bits = b""
    number = int.from_bytes(bits, "little")
    fits = len(bits) == -(-vocab_size // 8) and 0 < number < 2**vocab_size
    reader.check(fits, f"dflash_config.draft_vocabulary must be base64 of {vocab_size} bits, some of them set")
    return bits if fits else None


def _read_second(
    reader: _Reader, merged: dict[str, Any], hidden_size: int, vocab_size: int
) -> tuple[ConvConfig, SelectorConfig]:
    """What a DFlash 2 draft has beside a DFlash one's parts."""
    limits = {
        "conv_kernel_size": _MAX_LAYERS,
        "conv_group_size": hidden_size,
        "selector_rank": hidden_size,
        "selector_top_k": vocab_size,
    }
    values = list[int]()
    for key, most in limits.items():
        value = merged.get(key)
        fits = _is_integer(value) and 1 <= (value or 0) <= most
        reader.check(fits, f"{key} must be an integer from 1 to {most}, got {value!r}")
        values.append(value if isinstance(value, int) and fits else 1)
    kernel, group, rank, top_k = values
    reader.check(hidden_size % group == 0, f"conv_group_size must divide hidden_size {hidden_size}, got {group}")
    return ConvConfig(kernel_size=kernel, group_size=group), SelectorConfig(rank=rank, top_k=top_k)


def read_draft_config(raw: dict[str, Any], source: str = "config.json") -> DraftConfig:
    """The draft that a `DFlashDraftModel` config.json describes. Raises ConfigError with every fault in it."""
    reader = _Reader(raw, source)
    architectures = raw.get("architectures")
    reader.check(
        isinstance(architectures, list) and architectures[:1] in ([name] for name in DRAFT_ARCHITECTURES),
        f"architectures must be one of {list(DRAFT_ARCHITECTURES)}, got {architectures}",
    )
    nested = raw.get("dflash_config") or {}
    if not isinstance(nested, dict):
        reader.faults.append(f"dflash_config must be an object, got {nested!r}")
        nested = {}
    reader.expect("hidden_act", ("silu",), "silu")
    # An older export changed the network under the same architecture name; it would load and propose rubbish.
    reader.check(
        not nested.get("use_mask_embedding"),
        "dflash_config.use_mask_embedding is not of the canonical draft: load_draft converts it",
    )
    extras = _read_extras(reader, nested)
    for key, plain in (("input_embedding_scale", 1.0), ("output_multiplier", 1.0), ("final_logit_softcapping", None)):
        value = nested.get(key, raw.get(key))
        reader.check(value in (None, plain), f"{key} must be {plain}, got {value!r}: it is not supported")

    hidden_size = reader.number("hidden_size")
    num_layers = reader.number("num_hidden_layers", maximum=_MAX_LAYERS)
    max_position = reader.number("max_position_embeddings", 32768)
    # The reference reads the file as a Qwen3 config, so what an absent key means is Qwen3's.
    heads, kv_heads, head_dim = _read_heads(reader, hidden_size, "qwen3")
    merged = {**raw, **nested}
    layer_ids = merged.get("target_layer_ids")
    good = isinstance(layer_ids, list) and layer_ids and all(_is_integer(i) and i >= 0 for i in layer_ids)
    num_target_layers = reader.number("num_target_layers", max(layer_ids or [0]) + 1 if good else None)
    if layer_ids is None:
        try:
            layer_ids = list(build_target_layer_ids(num_target_layers, num_layers))
        except ConfigError as error:
            reader.faults.append(str(error))
    else:
        reader.check(bool(good), f"target_layer_ids must be layer numbers >= 0, got {layer_ids!r}")
    block = merged.get("block_size", 16)
    reader.check(_is_integer(block) and block >= 2, f"block_size must be an integer >= 2, got {block!r}")
    mask = merged.get("mask_token_id")
    reader.check(_is_integer(mask), f"mask_token_id must be a token id, got {mask!r}")

    windows = _read_windows(reader, num_layers, "qwen3")
    causal = None if raw.get("is_causal") is None else reader.flag("is_causal")
    attention_bias = reader.flag("attention_bias")
    rope = _read_rope(reader, max_position, 10000.0)
    vocab_size = reader.number("vocab_size")
    second = isinstance(architectures, list) and architectures[:1] == ["DFlash2DraftModel"]
    vocabulary = _read_vocabulary(reader, nested, vocab_size)
    proposed = vocab_size if vocabulary is None else int.from_bytes(vocabulary, "little").bit_count()
    conv, selector = _read_second(reader, merged, hidden_size, proposed) if second else (None, None)
    intermediate_size = reader.number("intermediate_size")
    eps = reader.number("rms_norm_eps", 1e-6, kind=float, minimum=0)
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
    scaling: dict[str, Any] = {
        "rope_type": rope.kind,
        "factor": rope.factor,
        "original_max_position_embeddings": rope.original_max_position,
    }
    extra = {
        "llama3": ("low_freq_factor", "high_freq_factor"),
        "yarn": ("beta_fast", "beta_slow", "truncate", "attention_factor", "mscale", "mscale_all_dim"),
    }
    scaling |= {k: v for k in extra.get(rope.kind, ()) if (v := getattr(rope, k)) is not None}
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
