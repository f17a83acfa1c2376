"""Where older trainers leave their drafts: EasyDeL runs, exports of those, and the msgpack files of a Linen trainer."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flax.serialization import msgpack_restore

from dflash.config import ConfigError, TargetConfig
from dflash.weights.huggingface import read_tensors
from dflash.weights.older import (
    OlderDraft,
    older_config,
    output_ids,
    recorded_cache,
    recorded_target,
    target_settings,
)
from dflash.weights.runs import is_root, is_run, resolve_run
from dflash.weights.snapshot import WeightsError, holds_weights, read_json
from dflash.weights.zarr import read_arrays, read_index, read_object

_MSGPACK = "draft_params.msgpack"
_STEP = re.compile(r"step_[0-9]+")
_PLUS_ONE = "add_one_for_pre_layer_capture"


def _layer_ids(told: Mapping[str, Any], cache: Mapping[str, Any], file: str, recorded: Any) -> list[int]:
    """The layers whose outputs are read: by the trainer's own file, else by the teacher cache it was trained on."""
    if told.get("target_layer_ids") is not None and isinstance(told.get(_PLUS_ONE), bool):
        return output_ids(told["target_layer_ids"], told[_PLUS_ONE], file)
    if cache.get("target_layer_ids") is not None:
        # The oldest caches lack the key, and hold inputs.
        return output_ids(cache["target_layer_ids"], cache.get(_PLUS_ONE, False), file)
    raise ConfigError(
        f"{file} does not say which layers its draft reads, and the teacher cache it names ({recorded!r}) is not here: "
        f"add target_layer_ids, and {_PLUS_ONE} (true where they name outputs of layers, false where inputs)"
    )


# ---- EasyDeL


def is_older_run(run: Path) -> bool:
    """Whether a complete run directory is an older trainer's."""
    return "dflash" not in read_object(run, "config.json")


def read_older_run(run: Path, target: TargetConfig | None) -> OlderDraft:
    """`run-<step>` of the older EasyDeL trainer. Raises ConfigError or WeightsError."""
    source = str(run / "config.json")
    raw = read_object(run, "config.json")
    settings: dict[str, Any] = {}
    for path in (run.parent / "run_config.json", run / "easydel-training-arguments.json"):
        settings |= read_json(path.parent, path.name) if path.is_file() else {}
    cache = settings.get("cache_dir")
    ids = _layer_ids(raw, recorded_cache(cache), source, cache)
    snapshot = settings.get("teacher_snapshot_dir") or settings.get("model_snapshot_dir")
    target = target or recorded_target(snapshot, source)
    config = older_config(
        raw | {"num_hidden_layers": raw.get("num_layers"), "intermediate_size": _width(raw)},
        ids,
        target_settings(target),
        fc_bias=True,
        qk_norm=raw.get("qk_norm") is not False,
        source=source,
    )
    entries = read_index(run).get("model", {})
    return OlderDraft(config=config, arrays=read_arrays(run, entries.values()), source=str(run))


def _width(raw: Mapping[str, Any]) -> Any:
    """The width of the MLP, None where it can't be known."""
    hidden, ratio = raw.get("hidden_size"), raw.get("mlp_ratio")
    if not isinstance(hidden, int) or not isinstance(ratio, int | float):
        return None
    return round(hidden * ratio)


# ---- exports of EasyDeL runs


def is_older_export(directory: Path) -> bool:
    """Whether a directory with a config.json and safetensors is an older trainer's export."""
    nested = read_json(directory, "config.json").get("dflash_config")
    return isinstance(nested, dict) and bool(nested.get("use_mask_embedding"))


def _exported_ids(raw: Mapping[str, Any], source: str) -> list[int]:
    """The layers whose outputs are read. An export may have moved them by one, so what the run said counts."""
    notes = raw.get("export_notes")
    notes = notes if isinstance(notes, dict) else {}
    nested = raw["dflash_config"]
    before = notes.get("target_layer_ids_raw", nested.get("target_layer_ids"))
    run = Path(str(raw.get("source_checkpoint")))
    if isinstance(raw.get(_PLUS_ONE), bool):
        return output_ids(before, raw[_PLUS_ONE], source)
    if (run / "config.json").is_file():
        told = read_json(run, "config.json")
        if isinstance(told.get(_PLUS_ONE), bool):
            return output_ids(told.get("target_layer_ids"), told[_PLUS_ONE], source)
    if "target_layer_ids_mode_resolved" in notes:
        # Written since runs read outputs.
        return output_ids(before, True, source)
    raise ConfigError(
        f"{source} does not say whether its target_layer_ids {before!r} name inputs or outputs of layers, and the run "
        f"it was made of ({raw.get('source_checkpoint')!r}) is not here: add {_PLUS_ONE} (true where outputs)"
    )


def _exported_array(name: str) -> str:
    """The path in a run of a tensor of its export."""
    path = name.removeprefix("model.").replace(".", "/")
    names = {
        "input_layernorm": "in_norm",
        "post_attention_layernorm": "post_norm",
        "self_attn": "attn",
    }
    path = "/".join(names.get(part, part) for part in path.split("/"))
    path = re.sub(r"norm/weight$", "norm/scale", path).replace("/weight", "/kernel")
    return f"model/{'final_norm/scale' if path == 'norm/scale' else path}/value"


def read_older_export(directory: Path) -> OlderDraft:
    """A `DFlashDraftModel` directory that was exported from an older run. Raises ConfigError or WeightsError."""
    source = str(directory / "config.json")
    raw = read_json(directory, "config.json")
    tensors = read_tensors(directory)
    if not any(name.startswith("model.") for name in tensors):
        raise ConfigError(
            f"{directory} was exported from a draft trained in torch, whose attention has sinks: a canonical draft has "
            "none, so it has no exact equivalent"
        )
    if "model.fc.bias" not in tensors:
        raise ConfigError(
            f"{directory} was exported without the bias of fc (--keep-fc-bias), which is lost: export again"
        )
    norms = [name for name in tensors if name.endswith(("q_norm.weight", "k_norm.weight"))]
    trained = [name for name in norms if (tensors.pop(name) != 1).any()]
    if trained:
        raise ConfigError(
            f"{directory}: {trained} must be ones, which stand for a norm without weights after RoPE; other weights "
            "have no canonical equivalent there"
        )
    for name in [name for name in tensors if ".gate_up_proj." in name]:
        halves = np.array_split(tensors.pop(name), 2)  # an odd one does not fit, as is told below
        tensors |= {name.replace("gate_up", part): half for part, half in zip(("gate", "up"), halves, strict=True)}
    arrays = {_exported_array(name): value.T if value.ndim == 2 else value for name, value in tensors.items()}
    nested = raw["dflash_config"]
    keys = ("vocab_size", "max_position_embeddings", "rope_theta", "rope_scaling")
    config = older_config(
        raw | {"layer_types": None},
        _exported_ids(raw, source),
        {key: raw.get(key) for key in keys},
        fc_bias=True,
        qk_norm=bool(nested.get("use_qk_norm")),
        source=source,
    )
    return OlderDraft(config=config, arrays=arrays, source=str(directory))


# ---- Flax Linen


def linen_step(path: Path) -> Path | None:
    """The msgpack file that `path` means: itself, in a `step_<n>` directory, or the last of a root of those."""
    if path.name == _MSGPACK and path.is_file():
        return path
    if (path / _MSGPACK).is_file():
        return path / _MSGPACK
    steps = sorted((p for p in path.glob(f"step_*/{_MSGPACK}") if _STEP.fullmatch(p.parent.name)), key=_step_number)
    return steps[-1] if steps else None


def _step_number(file: Path) -> int:
    return int(file.parent.name.removeprefix("step_"))


def _linen_arrays(file: Path) -> dict[str, np.ndarray]:
    try:
        tree = msgpack_restore(file.read_bytes())
    except (ValueError, TypeError, KeyError) as error:
        raise WeightsError(f"{file} is no msgpack of arrays ({error}): it is damaged, give another step") from None
    arrays: dict[str, np.ndarray] = {}

    def flatten(value: Any, path: tuple[str, ...]) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                flatten(inner, (*path, str(key)))
        else:
            arrays["/".join(path)] = np.asarray(value)

    flatten(tree.get("params", tree) if isinstance(tree, dict) else tree, ())
    return {_linen_path(path): value for path, value in arrays.items()}


def _linen_path(path: str) -> str:
    path = re.sub(r"^layers_([0-9]+)/", r"layers/\1/", path)
    path = path.replace("/input_norm/", "/in_norm/").replace("/post_attn_norm/", "/post_norm/")
    path = path.replace("/self_attn/", "/attn/")
    path = re.sub(r"norm/weight$", "norm/scale", path)
    return f"model/{'final_norm/scale' if path == 'norm/scale' else path}/value"


def read_linen(file: Path, target: TargetConfig | None) -> OlderDraft:
    """The parameters of the older Linen trainer: no q/k norm, no bias in fc. Raises ConfigError or WeightsError."""
    root = file.parent.parent
    source = str(root / "meta.json")
    raw = read_json(root, "meta.json")
    cache = recorded_cache(raw.get("cache"))
    ids = _layer_ids(raw, cache, source, raw.get("cache"))
    target = target or recorded_target(raw.get("teacher_snapshot_dir"), source)
    sizes = {
        "hidden_size": target.hidden_size,
        "num_hidden_layers": raw.get("draft_layers"),
        "intermediate_size": _width({"hidden_size": target.hidden_size, **raw}),
        "num_attention_heads": target.num_heads,
        "num_key_value_heads": target.num_kv_heads,
        "head_dim": target.head_dim,
        "rms_norm_eps": target.rms_norm_eps,
        "block_size": raw.get("block_size", cache.get("block_size")),
        "hidden_act": raw.get("hidden_act"),
    }
    if sizes["block_size"] is None:
        raise ConfigError(f"{source} has no block_size, nor is its teacher cache here: add block_size")
    config = older_config(sizes, ids, target_settings(target), fc_bias=False, qk_norm=False, source=source)
    return OlderDraft(config=config, arrays=_linen_arrays(file), source=str(file))


# ---- any of them


def read_older(path: Path, target: TargetConfig | None) -> OlderDraft | None:
    """The older draft that `path` means, None where it means none. Raises ConfigError or WeightsError."""
    file = linen_step(path)
    if file is not None:
        return read_linen(file, target)
    if holds_weights(path):
        return read_older_export(path) if is_older_export(path) else None
    if not (is_run(path) or is_root(path)):
        return None
    run = resolve_run(path)
    return read_older_run(run, target) if is_older_run(run) else None
