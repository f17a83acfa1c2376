"""Drafts of the Linen trainer before the fork's: `step_<n>/draft_params.msgpack`. It has no q/k norm, no bias in fc."""

import re
from pathlib import Path
from typing import Any

import numpy as np
from flax.serialization import msgpack_restore

from dflash.config import ConfigError, DraftConfig, TargetConfig
from dflash.host.disk import DAMAGE, open_file
from dflash.models.draft import Draft
from dflash.weights.dialect import Dialect, digest_of
from dflash.weights.easydel_fork.conventions import (
    ForkDraft,
    canonical_draft,
    fork_config,
    mlp_width,
    recorded_cache,
    recorded_target_config,
    target_settings,
    trained_layer_ids,
)
from dflash.weights.snapshot import WeightsError, read_json

_MSGPACK = "draft_params.msgpack"
_STEP = re.compile(r"step_[0-9]+")


def _find(path: Path) -> Path | None:
    """The file itself, the one in a `step_<n>` directory, or the last of a root of those."""
    if path.name == _MSGPACK and path.is_file():
        return path
    if (path / _MSGPACK).is_file():
        return path / _MSGPACK
    steps = sorted((p for p in path.glob(f"step_*/{_MSGPACK}") if _STEP.fullmatch(p.parent.name)), key=_step_number)
    return steps[-1] if steps else None


def _step_number(file: Path) -> int:
    return int(file.parent.name.removeprefix("step_"))


def _arrays(file: Path) -> dict[str, np.ndarray]:
    arrays: dict[str, np.ndarray] = {}

    def flatten(value: Any, path: tuple[str, ...]) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                flatten(inner, (*path, str(key)))
        else:
            arrays["/".join(path)] = np.asarray(value)

    try:
        with open_file(file) as opened:
            tree = msgpack_restore(opened.read())
        flatten(tree.get("params", tree) if isinstance(tree, dict) else tree, ())
    except (KeyError, AttributeError, *DAMAGE) as error:
        reason = str(error) or type(error).__name__
        raise WeightsError(f"{file} is no msgpack of arrays ({reason}): it is damaged, give another step") from None
    return {_run_path(path): value for path, value in arrays.items()}


def _run_path(path: str) -> str:
    path = re.sub(r"^layers_([0-9]+)/", r"layers/\1/", path)
    path = path.replace("/input_norm/", "/in_norm/").replace("/post_attn_norm/", "/post_norm/")
    path = path.replace("/self_attn/", "/attn/")
    path = re.sub(r"norm/weight$", "norm/scale", path)
    return f"model/{'final_norm/scale' if path == 'norm/scale' else path}/value"


def _config(file: Path, target: TargetConfig | None) -> DraftConfig:
    root = file.parent.parent
    source = str(root / "meta.json")
    raw = read_json(root, "meta.json")
    cache = recorded_cache(raw.get("cache"))
    ids = trained_layer_ids(raw, cache, source, raw.get("cache"))
    target = target or recorded_target_config(raw.get("teacher_snapshot_dir"), source)
    sizes = {
        "hidden_size": target.hidden_size,
        "num_hidden_layers": raw.get("draft_layers"),
        "intermediate_size": mlp_width({"hidden_size": target.hidden_size, **raw}),
        "num_attention_heads": target.num_heads,
        "num_key_value_heads": target.num_kv_heads,
        "head_dim": target.head_dim,
        "rms_norm_eps": target.rms_norm_eps,
        "block_size": raw.get("block_size", cache.get("block_size")),
        "hidden_act": raw.get("hidden_act"),
    }
    if sizes["block_size"] is None:
        raise ConfigError(f"{source} has no block_size, nor is its teacher cache here: add block_size")
    return fork_config(sizes, ids, target_settings(target), fc_bias=False, qk_norm=False, source=source)


def _read(file: Path, dtype: str, config: DraftConfig) -> Draft:
    return canonical_draft(ForkDraft(config=config, arrays=_arrays(file), source=str(file)), dtype)


def _digest(file: Path) -> str:
    return digest_of([file.parent.parent / "meta.json", file])


DIALECT = Dialect(
    name="msgpack of the EasyDeL fork's Linen trainer", find=_find, config=_config, read=_read, digest=_digest
)
