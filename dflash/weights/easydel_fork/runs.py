"""Runs of the fork's trainer: `run-<step>/` in EasyDeL's layout, without our entries in config.json."""

from pathlib import Path
from typing import Any

from dflash.config import DraftConfig, TargetConfig
from dflash.models.draft import Draft
from dflash.weights.dialect import Dialect, digest_of
from dflash.weights.easydel_fork.conventions import (
    FLOATS,
    ForkDraft,
    canonical_draft,
    fork_config,
    mlp_width,
    recorded_cache,
    recorded_target_config,
    target_settings,
    trained_layer_ids,
    wanted_arrays,
)
from dflash.weights.runs.arrays import check_chunks, read_arrays, read_index, read_run_object
from dflash.weights.runs.directories import run_at
from dflash.weights.snapshot import ARRAY_INDEX, check_tensors, read_json


def _find(path: Path) -> Path | None:
    run = run_at(path)
    return None if run is None or "dflash" in read_run_object(run, "config.json") else run


def _config(run: Path, target: TargetConfig | None) -> DraftConfig:
    source = str(run / "config.json")
    raw = read_run_object(run, "config.json")
    settings: dict[str, Any] = {}
    for path in (run.parent / "run_config.json", run / "easydel-training-arguments.json"):
        settings |= read_json(path.parent, path.name) if path.is_file() else {}
    cache = settings.get("cache_dir")
    ids = trained_layer_ids(raw, recorded_cache(cache), source, cache)
    snapshot = settings.get("teacher_snapshot_dir") or settings.get("model_snapshot_dir")
    target = target or recorded_target_config(snapshot, source)
    return fork_config(
        raw | {"num_hidden_layers": raw.get("num_layers"), "intermediate_size": mlp_width(raw)},
        ids,
        target_settings(target),
        fc_bias=True,
        qk_norm=raw.get("qk_norm") is not False,
        source=source,
    )


def _read(run: Path, dtype: str, config: DraftConfig) -> Draft:
    entries = read_index(run).get("model", {})
    # Before anything is read: an array may be said to have any size.
    check_tensors(entries, {path: (shape, FLOATS) for path, shape in wanted_arrays(config).items()}, run)
    check_chunks(run, entries.values(), ("/bias/value",))
    draft = ForkDraft(config=config, arrays=read_arrays(run, entries.values()), source=str(run))
    return canonical_draft(draft, dtype)


def _digest(run: Path) -> str:
    """Over every chunk: the fork's index holds no hashes."""
    chunks = sorted(path for path in (run / "model").rglob("*") if path.is_file())
    return digest_of([run / "config.json", run / ARRAY_INDEX, *chunks])


DIALECT = Dialect(name="a run of the EasyDeL fork", find=_find, config=_config, read=_read, digest=_digest)
