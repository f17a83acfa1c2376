"""`python -m dflash export`: training run -> draft directory that other programs read."""

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from dflash.device import open_default_device
from dflash.metrics import finite
from dflash.training.curves import read_metrics
from dflash.weights.easydel import read_run, resolve_run
from dflash.weights.huggingface import write_draft
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


def _without_directories(origin: dict[str, Any]) -> dict[str, Any]:
    """Where a run was begun, with ... for what names a directory."""
    read = {k: "..." if "/" in v else v for k, v in origin["read"].items()}
    return origin | {"read": read, "command": ["..." if "/" in word else word for word in origin["command"]]}


def training_record(run: Path) -> dict[str, Any]:
    """How a run was trained: settings, hashes of what it read, step, last line of metrics, and where it was begun."""
    step = step_of(run)
    provenance = read_object(run, "config.json")["dflash"]["provenance"]
    record = {"step": step, "provenance": {k: v for k, v in provenance.items() if k not in _PATHS}}
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
    """Write a run's draft as a DFlashDraftModel directory, with the record of its training."""
    open_default_device()
    run = resolve_run(args.run_dir)
    write_draft(read_run(run, args.dtype), args.out_dir, finite(training_record(run)))
    print(f"draft: {args.out_dir}")
