"""`python -m dflash export`: a draft as a directory that other programs read."""

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Any

import tyro

from dflash.device import open_default_device
from dflash.metrics import finite
from dflash.training.curves import read_metrics
from dflash.weights.export import Consumer, Dtype, export_draft, parse_size
from dflash.weights.load import draft_directory, is_own_run, read_any_draft, target_config, target_directory
from dflash.weights.runs import resolve_run, step_of
from dflash.weights.zarr import read_object

# Directories say something on the machine that trained; elsewhere only hashes do.
_PATHS = ("cache_dir", "init_from", "teacher_snapshot_dir")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Export:
    """What `export` takes."""

    run_dir: Annotated[str, tyro.conf.Positional]
    """Run directory, or a directory of runs (its latest), or a DFlashDraftModel directory, or smollm2-135m."""
    out_dir: Annotated[Path, tyro.conf.Positional]
    """New draft directory: config.json, safetensors, and training.json with the run's record."""
    format: Consumer = "z-lab"
    """Who reads it: z-lab (also SGLang), sglang-jax, or speculators (vLLM)."""
    dtype: Dtype = "bfloat16"
    """Dtype of the weights."""
    max_shard_size: str = "5GB"
    """Largest weight file; what is larger becomes several, with an index."""
    target: str | None = None
    """The target's snapshot directory, which the draft is then held against; a speculators config needs it."""
    verifier: str | None = None
    """Name of the target on the hub, for a speculators config."""


def _without_directories(origin: dict[str, Any]) -> dict[str, Any]:
    """Where a run was begun, with ... for what names a directory."""
    read = {k: "..." if "/" in v else v for k, v in origin["read"].items()}
    return origin | {"read": read, "command": ["..." if "/" in word else word for word in origin["command"]]}


def _record_of(draft: str) -> dict[str, Any] | None:
    """The record of the draft that a run started from, as far as it is still there: a run, or a directory with one."""
    directory = draft_directory(draft)
    if is_own_run(directory):
        return training_record(resolve_run(directory))
    kept = directory / "training.json"
    return json.loads(kept.read_text(encoding="utf-8")) if kept.is_file() else None


def training_record(run: Path) -> dict[str, Any]:
    """How a run was trained: settings, hashes of what it read, step, last line of metrics, and where it was begun.

    Under `init_from` stands the same of the draft that it started from.
    """
    step = step_of(run)
    provenance = read_object(run, "config.json")["dflash"]["provenance"]
    record = {"step": step, "provenance": {k: v for k, v in provenance.items() if k not in _PATHS}}
    if provenance.get("init_from"):
        record["init_from"] = _record_of(provenance["init_from"])
    settings = run.parent / "run_config.json"
    if settings.is_file():
        begun = json.loads(settings.read_text(encoding="utf-8"))
        record["train"] = begun["train"]
        if "dflash" in begun:
            record["dflash"] = _without_directories(begun["dflash"])
    # A run that was renamed says nothing of its step.
    metrics = [] if step is None else read_metrics(run.parent / "metrics.jsonl")
    lines = [line for line in metrics if line["step"] <= step]
    return record | ({"metrics": lines[-1]} if lines else {})


def export(args: Annotated[Export, tyro.conf.arg(name="")]) -> None:
    """Write a draft as a directory that other programs read, with the record of its training."""
    open_default_device()
    shard_bytes = parse_size(args.max_shard_size)
    directory = None if args.target is None else target_directory(args.target)
    # float32 holds what is stored in any dtype.
    draft = read_any_draft(args.run_dir, target=None if directory is None else target_config(directory))
    export_draft(
        draft,
        args.out_dir,
        consumer=args.format,
        dtype=args.dtype,
        shard_bytes=shard_bytes,
        target_dir=directory,
        verifier=args.verifier,
        record=finite(training_record(resolve_run(Path(args.run_dir)))) if is_own_run(args.run_dir) else None,
    )
    print(f"draft: {args.out_dir}")
