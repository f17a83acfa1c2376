"""The file of a served case: what `pytest --benchmark-json` would have written of it."""

import datetime
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest_benchmark
from pytest_benchmark.plugin import pytest_benchmark_generate_machine_info
from pytest_benchmark.stats import Stats
from pytest_benchmark.utils import get_commit_info

from dflash.metrics import finite
from dflash.provenance import provenance
from dflash.serving.plan import Plan
from dflash.teacher_cache.arrays import write_atomically
from dflash.weights.snapshot import snapshot_hash

# Raise it when a case of the same name measures something else than before.
WORKLOAD_VERSION = 1


def case_facts(plan: Plan, info: dict[str, Any]) -> dict[str, Any]:
    """What names a case and identifies what was measured. The device is the server's, and unknown here."""
    kind, draft = plan.asked.server, plan.draft
    block = f"b{info['block_size']}-" if info["block_size"] else ""
    return {
        "case": f"served-{kind}-{block}c{info['batch_size']}-n{info['max_new_tokens']}",
        "proposer": "draft" if plan.no_draft is None else None,
        "scripted": None,
        "workload_version": WORKLOAD_VERSION,
        "device_kind": f"{kind} server",
        "target": plan.asked.target,
        "target_sha256": snapshot_hash(plan.target),
        "draft": plan.asked.draft or None,
        "draft_sha256": snapshot_hash(draft.directory) if draft else None,
    }


def results_of(info: dict[str, Any], seconds: Sequence[float], command: Sequence[str]) -> dict[str, Any]:
    """A benchmark file with this one case; `seconds` are those of its rounds."""
    stats = Stats()
    for value in seconds:
        stats.update(value)
    benchmark = {
        "group": "serving",
        "name": info["case"],
        "fullname": f"serve-bench[{info['case']}]",
        "params": None,
        "param": None,
        "extra_info": info,
        "options": {},
        "stats": stats.as_dict() | {"data": list(seconds), "iterations": 1},
    }
    return finite(
        {
            "machine_info": pytest_benchmark_generate_machine_info(),
            "commit_info": get_commit_info(),
            "benchmarks": [benchmark],
            "datetime": datetime.datetime.now(datetime.UTC).isoformat(),
            "version": pytest_benchmark.__version__,
            "dflash": provenance([benchmark], command, "unknown") | {"gate": None, "audits": []},
        }
    )


def write_results(path: Path, results: dict[str, Any]) -> None:
    write_atomically(path, json.dumps(results, indent=1, allow_nan=False) + "\n")
