"""Tiny random targets and drafts on disk, for tests and a first look: no download, and made in a second.

Weights are drawn wide enough that the next token changes with the context (at the usual 0.02 a random model repeats
itself, and a parity check proves nothing).
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import tokenizers
from safetensors.numpy import save_file
from tokenizers import decoders, models, pre_tokenizers

from dflash.models.families import FAMILIES
from dflash.weights.config_json import read_target_config
from dflash.weights.names import target_tensors

_YARN = {
    "rope_type": "yarn",
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
}


SPECIAL_TOKENS = ("<s>", "</s>", "<|user|>", "<|assistant|>")
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<|assistant|>' if m.role == 'assistant' else '<|user|>' }}"
    "{{ m.role if m.role == 'system' }}{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def tiny_config(family: str = "llama", **changes: Any) -> dict[str, Any]:
    """config.json of a tiny target of that family, as Hugging Face writes it, with `changes` applied."""
    config: dict[str, Any] = {
        "model_type": family,
        "vocab_size": 199,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "eos_token_id": 2,
        "hidden_act": "silu",
    }
    if family == "gpt_oss":
        length = changes.get("max_position_embeddings") or config["max_position_embeddings"]
        trained = max(length // 32, 1)
        config |= {
            "attention_bias": True,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "sliding_window": 16,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "rope_theta": 150000.0,
            "rope_scaling": _YARN | {"original_max_position_embeddings": trained, "factor": length / trained},
            "swiglu_limit": 7.0,
        }
    known = FAMILIES.get(family)
    if known is not None and known.qkv_bias_only:
        del config["attention_bias"]
    return {"architectures": [f"{known.architecture if known else family}ForCausalLM"], **config | changes}


def _draw(rng: np.random.Generator, name: str, shape: tuple[int, ...]) -> np.ndarray:
    if name.endswith("_blocks"):
        return rng.integers(0, 256, shape, dtype=np.uint8)
    if name.endswith("_scales"):
        return rng.integers(119, 123, shape, dtype=np.uint8)
    if "norm" in name:
        return rng.uniform(0.5, 1.5, shape).astype(np.float32)
    if len(shape) == 1 or name.endswith("bias"):
        return rng.normal(0, 0.3, shape).astype(np.float32)
    inputs = shape[-2] if ".experts." in name else shape[-1]
    # An expert multiplies two of its products, so its outputs grow faster than a dense MLP's.
    scale = 1.0 if "embed" in name else (1.0 if ".experts." in name else 1.3) * inputs**-0.5
    return rng.normal(0, scale, shape).astype(np.float32)


def write_tiny_target(
    directory: Path,
    family: str = "llama",
    *,
    seed: int = 0,
    shards: int = 1,
    dtype: str = "float32",
    mxfp4: bool = False,
    **changes: Any,
) -> Path:
    """Writes a random snapshot: config.json and `shards` safetensors files in float32, bfloat16 or float16.

    `mxfp4` packs GPT-OSS's experts. `changes` go into config.json. Returns `directory`.
    """
    raw = tiny_config(family, **changes)
    config = read_target_config(raw)
    rng = np.random.default_rng(seed)
    tensors = {name: _draw(rng, name, shape) for name, shape in target_tensors(config, packed=mxfp4).items()}
    tensors = {name: t if t.dtype == np.uint8 else t.astype(jnp.dtype(dtype)) for name, t in tensors.items()}
    directory.mkdir(parents=True, exist_ok=True)
    raw["dtype"] = raw["torch_dtype"] = dtype
    if mxfp4:
        raw["quantization_config"] = {"quant_method": "mxfp4"}
    (directory / "config.json").write_text(json.dumps(raw, indent=2), encoding="utf-8")
    if shards == 1:
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
        return directory
    names = list(tensors)
    weight_map: dict[str, str] = {}
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        part = {n: tensors[n] for n in names[i::shards]}
        save_file(part, directory / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return directory


def write_tiny_tokenizer(directory: Path, template: str = CHAT_TEMPLATE, extra: Sequence[str] = ()) -> Path:
    """Writes a byte-level tokenizer of 260 tokens, plus one per `extra` pair of bytes, beside a target's weights."""
    tokens = [*SPECIAL_TOKENS, *sorted(pre_tokenizers.ByteLevel.alphabet()), *extra]
    merges = [(t[0], t[1:]) for t in extra]
    backend = tokenizers.Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(SPECIAL_TOKENS))
    backend.save(str(directory / "tokenizer.json"))
    # Without a class transformers takes that of the model's family, which may ask for tokens that this one lacks.
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    config["chat_template"] = template
    (directory / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return directory
