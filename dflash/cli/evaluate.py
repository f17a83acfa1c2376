"""`python -m dflash evaluate`: a draft's acceptance, offline."""

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import tyro

from dflash import metrics
from dflash.config import Checked, Computed, ConfigError, Count, Seed
from dflash.host.device import device_facts, open_default_device
from dflash.host.disk import check_writable, write_atomically
from dflash.host.provenance import compile_cache, of_command
from dflash.measuring.result import Offline, Results, from_json
from dflash.models.mesh import open_mesh
from dflash.report.sections import acceptance_section, render
from dflash.training.cache import open_with_target
from dflash.training.cache.sequences import SequenceCache
from dflash.training.evaluate import Evaluator, summarise, walk
from dflash.weights.load import model_facts, read_any_draft


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Evaluate(Checked):
    """What `evaluate` takes."""

    cache_dir: Annotated[Path, tyro.conf.Positional]
    """Teacher cache, in either form."""
    draft: Annotated[str, tyro.conf.Positional]
    """DFlashDraftModel directory, run directory, a directory of runs (its latest), or smollm2-135m[-plain]."""
    target: str = "smollm2-135m"
    """Snapshot directory of the target that the cache was made with."""
    rows: Literal["held_out", "train", "all"] = "held_out"
    """Which side of the split; a draft's score on its training rows says nothing about decoding."""
    num_samples: Count = 256
    """Windows or sequences, drawn by the seed; every anchor of a sequence is scored."""
    seed: Seed = 0
    """Seed of that draw."""
    dtype: Computed = "float32"
    """Dtype of computation."""
    vocab_chunk_size: Count = 2048
    """Rows of the head multiplied at a time."""
    tp: Count = 1
    """Devices that the vocabulary is split over."""
    dp: Count = 1
    """Devices, times tp, that the rows of a batch are split over."""
    out_json: Path | None = None
    """File for the summary with every block's figures."""


def evaluate(args: Annotated[Evaluate, tyro.conf.arg(name="")]) -> None:
    """Score a draft at the anchors of a teacher cache, on held-out prompts by default."""
    if args.out_json is not None:
        check_writable(args.out_json)
    device = open_default_device()
    mesh, facts = open_mesh(device, dp=args.dp, tp=args.tp), device_facts(device, dp=args.dp, tp=args.tp)
    compiled = compile_cache()
    cache, borrowed, _ = open_with_target(args.cache_dir, args.target)
    draft = read_any_draft(args.draft, args.dtype, borrowed.config)
    rows = np.arange(len(cache)) if args.rows == "all" else cache.rows(args.rows == "held_out")
    if not len(rows):
        raise ConfigError(
            f"{args.cache_dir} has no {args.rows} rows: it records no split, or has too few prompts; "
            "--rows all scores every row, and says so"
        )
    chosen = np.sort(np.random.default_rng(args.seed).permutation(rows)[: args.num_samples])
    evaluator = Evaluator(borrowed.embedding, borrowed.head, chunk=args.vocab_chunk_size, devices=mesh)
    blocks = evaluator.score(draft, cache, chosen)
    summary = {
        "cache_dir": str(args.cache_dir),
        "draft_run_dir": args.draft,
        "teacher_snapshot_dir": args.target,
        "rows": args.rows,
        "ctx_len": None if isinstance(cache, SequenceCache) else cache.context,
        "block_size": draft.config.block_size,
        **summarise(blocks, draft.config.block_size),
    }
    if isinstance(cache, SequenceCache):
        figures = summarise(blocks.take(walk(blocks)), draft.config.block_size)
        summary |= {f"live_{name}": figures[name] for name in ("num_samples", "accept_len_mean", "acceptance_length")}
    scored = Results(measured=[from_json(summary | {"case": "offline"}, Offline)])
    print("\n".join(render(acceptance_section(scored))))
    if args.out_json is not None:
        facts |= model_facts(args.target, args.draft) | {"cache_sha256": cache.sha256, "seeds": {"rows": args.seed}}
        out = {
            "summary": summary,
            "dflash": of_command(facts, compiled),
            "sample_idxs": blocks.row.tolist(),
            "anchors": blocks.anchor.tolist(),
            "accept_len": blocks.accept_len.tolist(),
            "token_acc": (blocks.right / np.maximum(blocks.labels, 1)).tolist(),
            "ctx_pos_start": blocks.ctx_pos_start.tolist(),
        }
        write_atomically(args.out_json, json.dumps(metrics.finite(out), allow_nan=False) + "\n")
