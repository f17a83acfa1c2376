"""Drafts of the EasyDeL fork that had a DFlash trainer, as canonical ones: the same network, in our conventions.

Upstream EasyDeL has no drafts. The fork's lie in three forms, each with a module beside this one: runs of its trainer,
exports of those, and what the Linen trainer before it left. What they do otherwise, and what becomes of it:

- a learned mask vector, biases in fc and MLP, no q/k norm: kept, as the extras of `DraftConfig`;
- q/k norm without weights *after* RoPE: norm and rotation change places, except for YaRN's factor m, which such a norm
  divides out. So q and k are multiplied by m (the norm's epsilon then weighs the same) and the norm's weights are 1/m;
- query head h reads kv head h % G (tiled): the query heads are reordered;
- `target_layer_ids` may name a layer's *input*: then the output of the layer before it is meant;
- YaRN's range of frequencies is rounded whatever `truncate` says.
"""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dflash.config import ConfigError, DraftConfig, TargetConfig, counted_faults
from dflash.host.disk import DAMAGE, parse_object
from dflash.models.draft import Draft
from dflash.models.layers import rope_attention_factor
from dflash.weights.config_json import read_draft_config, write_rope
from dflash.weights.runs.checkpoint import join_draft, run_arrays
from dflash.weights.snapshot import WeightsError, read_json, target_config

# What the fork's config.json has for its own use; each is read, or has no part in the network.
_FORK_KEYS = {"num_layers", "mlp_ratio", "num_context_features", "qk_norm", "remat", "target_layer_ids"}
_FORK_KEYS |= {"add_one_for_pre_layer_capture", "source_checkpoint", "export_notes", "dflash_config"}
PLUS_ONE = "add_one_for_pre_layer_capture"
FLOATS = ("float32", "float16", "bfloat16")
_NORMS = ("/q_norm/scale/value", "/k_norm/scale/value")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ForkDraft:
    """A draft as the fork left it: `config` in canonical terms, `arrays` in its order of heads, by EasyDeL's paths."""

    config: DraftConfig
    arrays: Mapping[str, np.ndarray]
    source: str


def output_ids(ids: Any, outputs: bool, source: str) -> list[int]:
    """The layers whose outputs are read. Raises ConfigError if the input of layer 0 is meant, which is no output."""
    if not isinstance(ids, list) or not ids or not all(type(i) is int for i in ids):
        raise ConfigError(f"{source}: target_layer_ids must be a list of layer numbers, got {ids!r}")
    if outputs:
        return ids
    if 0 in ids:
        raise ConfigError(
            f"{source}: its target_layer_ids {ids} name inputs of layers, and the input of layer 0 is the embedding, "
            "no layer's output: such a draft has no canonical equivalent"
        )
    return [i - 1 for i in ids]


def trained_layer_ids(raw: Mapping[str, Any], cache: Mapping[str, Any], file: str, recorded: Any) -> list[int]:
    """The layers whose outputs are read: from the trainer's own file, else from the teacher cache it was trained on."""
    if raw.get("target_layer_ids") is not None and isinstance(raw.get(PLUS_ONE), bool):
        return output_ids(raw["target_layer_ids"], raw[PLUS_ONE], file)
    if cache.get("target_layer_ids") is not None:
        # The oldest caches lack the key, and hold inputs.
        return output_ids(cache["target_layer_ids"], cache.get(PLUS_ONE, False), file)
    raise ConfigError(
        f"{file} does not say which layers its draft reads, and the teacher cache it names ({recorded!r}) is not here: "
        f"add target_layer_ids, and {PLUS_ONE} (true where they name outputs of layers, false where inputs)"
    )


def fork_config(
    sizes: Mapping[str, Any],
    layer_ids: list[int],
    target: Mapping[str, Any],
    *,
    fc_bias: bool,
    qk_norm: bool,
    source: str,
) -> DraftConfig:
    """The canonical config: `sizes` and `target` (vocabulary, positions, rope) by Hugging Face's keys.

    Raises ConfigError with every fault.
    """
    scaling = target.get("rope_scaling") or {}
    if isinstance(scaling, dict) and scaling.get("rope_type", scaling.get("type")) == "yarn":
        scaling = scaling | {"truncate": True}
    extras = {"learned_mask": True, "fc_bias": fc_bias, "mlp_bias": True, "use_qk_norm": qk_norm}
    vocab_size = target.get("vocab_size")
    # The mask is a vector, so the id is not used.
    unused = vocab_size - 1 if type(vocab_size) is int else 0
    sizes_kept = {key: value for key, value in sizes.items() if key not in _FORK_KEYS}
    raw = sizes_kept | dict(target) | {"rope_scaling": scaling or None, "architectures": ["DFlashDraftModel"]}
    raw |= {"attention_bias": True, "hidden_act": "silu" if raw.get("hidden_act") == "swish" else raw.get("hidden_act")}
    raw["dflash_config"] = {"target_layer_ids": layer_ids, "mask_token_id": unused, **extras}
    config = read_draft_config(raw, source)
    count = sizes.get("num_context_features")
    if count not in (None, config.num_features):
        raise ConfigError(f"{source}: num_context_features is {count}, but target_layer_ids are {layer_ids}")
    return config


def mlp_width(raw: Mapping[str, Any]) -> Any:
    """The width of the MLP; None if it can't be known."""
    hidden, ratio = raw.get("hidden_size"), raw.get("mlp_ratio")
    if not isinstance(hidden, int) or not isinstance(ratio, int | float):
        return None
    return round(hidden * ratio) if math.isfinite(hidden * ratio) else None


def target_settings(target: TargetConfig) -> dict[str, Any]:
    """What the fork's configs take from their target, by Hugging Face's keys."""
    return {
        "vocab_size": target.vocab_size,
        "max_position_embeddings": target.max_position,
        "num_target_layers": target.num_layers,
        **write_rope(target.rope),
    }


def recorded_target_config(recorded: Any, source: str) -> TargetConfig:
    """The config of the target that a trainer recorded the directory of. Raises ConfigError if it is missing."""
    if not isinstance(recorded, str) or not (Path(recorded) / "config.json").is_file():
        raise ConfigError(
            f"{source} leaves vocabulary and rotary settings to its target, and the one it names ({recorded!r}) is not "
            "here: name the target's snapshot directory (--target)"
        )
    return target_config(Path(recorded))


def recorded_cache(recorded: Any) -> dict[str, Any]:
    """The meta data of the teacher cache whose path a trainer recorded; empty if it is missing."""
    path = Path(recorded) if isinstance(recorded, str) and recorded else None
    if path is not None and (path / "meta.json").is_file():
        return read_json(path, "meta.json")
    if path is not None and path.suffix == ".npz" and path.is_file():
        remedy = "move it away, or repair it"
        try:
            with path.open("rb") as file, np.load(file) as arrays:
                meta = str(arrays["meta"])
        except (KeyError, *DAMAGE) as error:
            raise ConfigError(f"{path} is no teacher cache with meta data ({error}): {remedy}") from None
        return parse_object(meta, f"meta of {path}", ConfigError, remedy)
    return {}


def wanted_arrays(config: DraftConfig) -> dict[str, tuple[int, ...]]:
    """Paths and shapes of a draft's arrays as the fork has them: EasyDeL's, without q/k norms."""
    return {path: shape for path, shape in run_arrays(config).items() if not path.endswith(_NORMS)}


def check_arrays(draft: ForkDraft) -> None:
    """Raises WeightsError with every array that is missing, unexpected, misshapen or not a float."""
    wanted = wanted_arrays(draft.config)
    faults = [f"missing {path} {list(shape)}" for path, shape in wanted.items() if path not in draft.arrays]
    for path, value in draft.arrays.items():
        if path not in wanted:
            faults.append(f"unexpected {path} {list(value.shape)}")
        elif value.shape != wanted[path]:
            faults.append(f"{path} is {list(value.shape)}, must be {list(wanted[path])}")
        elif value.dtype.name not in FLOATS:
            faults.append(f"{path} is {value.dtype.name}, must be one of {', '.join(FLOATS)}")
    if faults:
        raise WeightsError(f"{draft.source} does not fit its config {counted_faults(faults)}")


def _canonical(c: DraftConfig, theirs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    groups, repeats = c.num_kv_heads, c.num_heads // c.num_kv_heads
    order = np.arange(c.num_heads).reshape(repeats, groups).T.reshape(-1)
    factor = np.float32(rope_attention_factor(c.rope) if c.qk_norm else 1.0)
    arrays = {path: np.asarray(value, np.float32) for path, value in theirs.items()}
    for i in range(c.num_layers):
        attention = f"model/layers/{i}/attn"
        q, k, out = (f"{attention}/{part}_proj" for part in "qko")
        for path in (f"{q}/kernel/value", f"{q}/bias/value"):
            value = arrays[path]
            heads = value.reshape(*value.shape[:-1], c.num_heads, c.head_dim)[..., order, :]
            arrays[path] = heads.reshape(value.shape) * factor
        for path in (f"{k}/kernel/value", f"{k}/bias/value"):
            arrays[path] = arrays[path] * factor
        rows = arrays[f"{out}/kernel/value"].reshape(c.num_heads, c.head_dim, -1)[order]
        arrays[f"{out}/kernel/value"] = rows.reshape(-1, rows.shape[-1])
        if c.qk_norm:
            arrays |= {f"{attention}{norm}": np.full(c.head_dim, 1 / factor, np.float32) for norm in _NORMS}
    return arrays


def canonical_draft(draft: ForkDraft, dtype: str) -> Draft:
    """The canonical draft, in `dtype` (float32 or bfloat16). Raises WeightsError when its arrays do not fit."""
    check_arrays(draft)
    return join_draft(draft.config, _canonical(draft.config, draft.arrays), dtype)
