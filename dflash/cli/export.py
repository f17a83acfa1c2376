"""`python -m dflash export`: a draft as a directory that other programs read."""

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import tyro

from dflash.cli.option import refuse_unused
from dflash.config import ConfigError
from dflash.host.device import open_default_device
from dflash.host.disk import read_object
from dflash.metrics import finite
from dflash.training.run import read_metrics
from dflash.weights.export import Consumer, Dtype, export_draft, parse_size
from dflash.weights.load import SHIPPED_DRAFTS, draft_directory, draft_hash, own_run, read_any_draft, target_directory
from dflash.weights.runs.arrays import read_run_object
from dflash.weights.runs.directories import step_of
from dflash.weights.snapshot import WeightsError, target_config

# Directories mean something only on the machine that trained; elsewhere only hashes do.
_PATHS = ("cache_dir", "init_from", "teacher_snapshot_dir")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Export:
    """What `export` takes."""

    run_dir: Annotated[str, tyro.conf.Positional]
    """Run directory, or a directory of runs (its latest), or a DFlashDraftModel directory, or smollm2-135m[-plain]."""
    out_dir: Annotated[Path, tyro.conf.Positional]
    """New draft directory: config.json, safetensors, and training.json with the record of its training."""
    format: Consumer = "z-lab"
    """The program that reads it: z-lab (also SGLang), sglang-jax, or speculators (vLLM)."""
    dtype: Dtype = "bfloat16"
    """Dtype of the weights."""
    max_shard_size: str = "5GB"
    """Largest weight file; larger drafts are split, with an index."""
    target: str | None = None
    """The target's snapshot directory, to check the draft against; required for a speculators config."""
    verifier: str | None = None
    """Name of the target on the hub, for a speculators config."""


def _object(content: dict[str, Any], key: str, path: Path) -> dict[str, Any]:
    """The object under a key of a run's file. Raises WeightsError."""
    value = content.get(key)
    if not isinstance(value, dict):
        raise WeightsError(f"{path} must hold an object {key}, got {value!r:.60}: copy it again from where it was made")
    return value


def _without_directories(value: Any) -> Any:
    """Text of a run's origin, in lists and objects too, with ... for directories."""
    if isinstance(value, list):
        return [_without_directories(v) for v in value]
    if isinstance(value, dict):
        return {k: _without_directories(v) for k, v in value.items()}
    return "..." if isinstance(value, str) and "/" in value else value


def _record_of(draft: Any, sha256: Any) -> dict[str, Any] | None:
    """The record of the draft that a run started from: a run, or a directory with a record.

    None if that is gone or has been replaced. Nothing is fetched.
    """
    if not isinstance(draft, str) or not (draft in SHIPPED_DRAFTS or Path(draft).is_dir()):
        return None
    try:
        if draft_hash(draft) != sha256:
            return None
    except (ConfigError, WeightsError):
        return None
    run = own_run(draft)
    if run is not None:
        return training_record(run)
    return _kept_record(draft_directory(draft))


def _kept_record(directory: Path) -> dict[str, Any] | None:
    """The record that an exported draft's directory keeps; None without one."""
    kept = directory / "training.json"
    return read_object(kept, WeightsError, "export that draft again") if kept.is_file() else None


def training_record(run: Path) -> dict[str, Any]:
    """How a run was trained: settings, hashes of its inputs, step, last line of metrics, and where it was started.

    `init_from` holds the same for the draft that it started from.
    """
    step = step_of(run)
    config = run / "config.json"
    provenance = _object(_object(read_run_object(run, "config.json"), "dflash", config), "provenance", config)
    record = {"step": step, "provenance": {k: v for k, v in provenance.items() if k not in _PATHS}}
    if provenance.get("init_from"):
        record["init_from"] = _record_of(provenance["init_from"], provenance.get("init_from_sha256"))
    settings = run.parent / "run_config.json"
    if settings.is_file():
        content = read_object(settings, WeightsError, "copy it again from where the run was trained")
        record["train"] = content.get("train")
        if "dflash" in content:
            origin = _object(content, "dflash", settings)
            record["dflash"] = origin | {k: _without_directories(origin[k]) for k in ("read", "command") if k in origin}
    # The name of a renamed run does not tell its step.
    metrics = [] if step is None else read_metrics(run.parent / "metrics.jsonl")
    lines = [line for line in metrics if line["step"] <= step]
    return record | ({"metrics": lines[-1]} if lines else {})


def export(args: Annotated[Export, tyro.conf.arg(name="")]) -> None:
    """Write a draft as a directory that other programs read, with the record of its training."""
    if args.format != "speculators":
        refuse_unused(args, ["verifier"], f"for --format speculators, and this one is {args.format}")
    open_default_device()
    shard_bytes = parse_size(args.max_shard_size)
    directory = None if args.target is None else target_directory(args.target)
    # float32 holds values of any stored dtype.
    run = own_run(args.run_dir)
    draft = read_any_draft(args.run_dir, target=None if directory is None else target_config(directory))
    record = _kept_record(draft_directory(args.run_dir)) if run is None else finite(training_record(run))
    export_draft(
        draft,
        args.out_dir,
        consumer=args.format,
        dtype=args.dtype,
        shard_bytes=shard_bytes,
        target_dir=directory,
        verifier=args.verifier,
        record=record,
    )
    print(f"draft: {args.out_dir}")
    if draft.config.vocabulary is not None:
        print(
            f"it learned {draft.config.num_tokens} of {draft.config.vocab_size} tokens, and other programs let it "
            "propose all of them: compare them with --draft-vocab-size all here"
        )
