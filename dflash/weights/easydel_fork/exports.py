"""Exports of the fork's runs for sglang-jax: a `DFlashDraftModel` by its config, and another network."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dflash.config import ConfigError, DraftConfig, TargetConfig
from dflash.models.draft import Draft
from dflash.weights.dialect import Dialect
from dflash.weights.easydel_fork.conventions import PLUS_ONE, ForkDraft, canonical_draft, fork_config, output_ids
from dflash.weights.huggingface import read_tensors
from dflash.weights.runs.checkpoint import run_path
from dflash.weights.snapshot import holds_weights, read_json, snapshot_hash


def _find(path: Path) -> Path | None:
    if not holds_weights(path):
        return None
    nested = read_json(path, "config.json").get("dflash_config")
    return path if isinstance(nested, dict) and nested.get("use_mask_embedding") else None


def _exported_ids(raw: Mapping[str, Any], source: str) -> list[int]:
    """The layers whose outputs are read. An export may have shifted them by one, so the run decides."""
    notes = raw.get("export_notes")
    notes = notes if isinstance(notes, dict) else {}
    nested = raw["dflash_config"]
    before = notes.get("target_layer_ids_raw", nested.get("target_layer_ids"))
    run = Path(str(raw.get("source_checkpoint")))
    if isinstance(raw.get(PLUS_ONE), bool):
        return output_ids(before, raw[PLUS_ONE], source)
    if (run / "config.json").is_file():
        of_run = read_json(run, "config.json")
        if isinstance(of_run.get(PLUS_ONE), bool):
            return output_ids(of_run.get("target_layer_ids"), of_run[PLUS_ONE], source)
    if "target_layer_ids_mode_resolved" in notes:
        # Written since runs read outputs.
        return output_ids(before, True, source)
    raise ConfigError(
        f"{source} does not say whether its target_layer_ids {before!r} name inputs or outputs of layers, and the run "
        f"it was made of ({raw.get('source_checkpoint')!r}) is not here: add {PLUS_ONE} (true where outputs)"
    )


def _config(directory: Path, target: TargetConfig | None) -> DraftConfig:
    source = str(directory / "config.json")
    raw = read_json(directory, "config.json")
    ids = _exported_ids(raw, source)
    settings = {key: raw.get(key) for key in ("vocab_size", "max_position_embeddings", "rope_theta", "rope_scaling")}
    # An export says nothing of its target's layers.
    settings["num_target_layers"] = max(ids) + 1 if target is None else target.num_layers
    return fork_config(
        raw | {"layer_types": None},
        ids,
        settings,
        fc_bias=True,
        qk_norm=bool(raw["dflash_config"].get("use_qk_norm")),
        source=source,
    )


def _read(directory: Path, dtype: str, config: DraftConfig) -> Draft:
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
        halves = np.array_split(tensors.pop(name), 2)  # an odd one does not fit, which is reported below
        tensors |= {name.replace("gate_up", part): half for part, half in zip(("gate", "up"), halves, strict=True)}
    arrays = {
        run_path(name.removeprefix("model.")): value.T if value.ndim == 2 else value for name, value in tensors.items()
    }
    return canonical_draft(ForkDraft(config=config, arrays=arrays, source=str(directory)), dtype)


DIALECT = Dialect(name="an export of the EasyDeL fork's", find=_find, config=_config, read=_read, digest=snapshot_hash)
