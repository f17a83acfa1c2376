"""`python -m dflash evaluate`: a draft's acceptance, offline."""

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import tyro

from dflash import metrics
from dflash.config import ConfigError, check_draft
from dflash.device import device_facts, open_default_device
from dflash.evaluate import Evaluator, summarise, walk
from dflash.provenance import compile_cache, of_command
from dflash.report import acceptance_table
from dflash.teacher_cache import open_cache
from dflash.teacher_cache.arrays import write_atomically
from dflash.teacher_cache.sequences import SequenceCache
from dflash.weights.huggingface import read_borrowed
from dflash.weights.load import model_facts, read_any_draft, target_directory
from dflash.weights.snapshot import snapshot_hash


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Evaluate:
    """What `evaluate` takes."""

    cache_dir: Annotated[Path, tyro.conf.Positional]
    """Teacher cache, in either form."""
    draft: Annotated[str, tyro.conf.Positional]
    """DFlashDraftModel directory, run directory, a directory of runs (its latest), or smollm2-135m."""
    target: str = "smollm2-135m"
    """Snapshot directory of the target that the cache was made with."""
    rows: Literal["held_out", "train", "all"] = "held_out"
    """Which side of the split; what a draft scores on its training rows says nothing of decoding."""
    num_samples: int = 256
    """Windows or sequences, drawn by the seed; every anchor of a sequence is scored."""
    seed: int = 0
    """Seed of that draw."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of computation."""
    vocab_chunk_size: int = 2048
    """Rows of the head that are multiplied at a time."""
    out_json: Path | None = None
    """Where to write the summary with every block's figures."""


def evaluate(args: Annotated[Evaluate, tyro.conf.arg(name="")]) -> None:
    """Score a draft at the anchors of a teacher cache, on held-out prompts unless told otherwise."""
    facts = device_facts(open_default_device())
    compiled = compile_cache()
    cache = open_cache(args.cache_dir)
    directory = target_directory(args.target)
    if cache.snapshot_sha256 not in (None, snapshot_hash(directory)):
        raise ConfigError(f"{args.cache_dir} was made with another target than {args.target} (their hashes differ)")
    borrowed = read_borrowed(directory)
    draft = read_any_draft(args.draft, args.dtype, borrowed.config)
    check_draft(draft.config, borrowed.config)
    rows = np.arange(len(cache)) if args.rows == "all" else cache.rows(args.rows == "held_out")
    if not len(rows):
        raise ConfigError(
            f"{args.cache_dir} has no {args.rows} rows: it says nothing of a split, or has too few prompts; "
            "--rows all scores every row, and says so"
        )
    chosen = np.sort(np.random.default_rng(args.seed).permutation(rows)[: args.num_samples])
    evaluator = Evaluator(borrowed.embedding, borrowed.head, chunk=args.vocab_chunk_size)
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
    for line in acceptance_table(summary):
        print(line)
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
