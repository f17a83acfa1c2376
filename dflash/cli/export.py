"""`python -m dflash export`: training run -> draft directory that other programs read."""

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from dflash.device import open_default_device
from dflash.weights.easydel import resolve_run
from dflash.weights.huggingface import write_draft
from dflash.weights.load import read_any_draft
from dflash.weights.runs import step_of
from dflash.weights.zarr import read_object

# Directories say something on the machine that trained; elsewhere only hashes do.
_PATHS = ("cache_dir", "init_from", "teacher_snapshot_dir")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Export:
    """What `export` takes."""

    run_dir: Annotated[Path, tyro.conf.Positional]
    """Run directory, or a directory of runs (its latest)."""
    out_dir: Annotated[Path, tyro.conf.Positional]
    """New DFlashDraftModel directory: config.json, model.safetensors, and training.json with the run's record."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Dtype of the weights."""


def training_record(run: Path) -> dict[str, Any]:
    """How a run was trained: its settings, hashes of what it read, its step and its last line of metrics."""
    step = step_of(run)
    provenance = read_object(run, "config.json")["dflash"]["provenance"]
    record = {"step": step, "provenance": {k: v for k, v in provenance.items() if k not in _PATHS}}
    settings, metrics = run.parent / "run_config.json", run.parent / "metrics.jsonl"
    if settings.is_file():
        record["train"] = json.loads(settings.read_text(encoding="utf-8"))["train"]
    if metrics.is_file():
        lines = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
        record["metrics"] = next((line for line in reversed(lines) if line["step"] <= step), None)
    return record


def export(args: Annotated[Export, tyro.conf.arg(name="")]) -> None:
    """Write a run's draft as a DFlashDraftModel directory, with the record of its training."""
    open_default_device()
    run = resolve_run(args.run_dir)
    draft = read_any_draft(run, args.dtype)
    write_draft(draft, args.out_dir, training_record(run))
    print(f"draft: {args.out_dir}")
