"""The file of a served case, as `pytest --benchmark-json` would have written it."""

import datetime
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest_benchmark
from pytest_benchmark.plugin import pytest_benchmark_generate_machine_info
from pytest_benchmark.stats import Stats
from pytest_benchmark.utils import get_commit_info

from dflash.host.disk import write_atomically
from dflash.host.provenance import provenance
from dflash.measuring.result import Served, to_json
from dflash.metrics import finite
from dflash.serving.deployment import Deployment
from dflash.weights.snapshot import snapshot_hash

# Increase it when a case of the same name measures something different.
WORKLOAD_VERSION = 1


def origin(deployment: Deployment, block_size: int | None, concurrency: int, max_new_tokens: int) -> dict[str, Any]:
    """What names a case and identifies the measurement. The device is the server's and unknown here."""
    kind, draft = deployment.adapter.name, deployment.draft
    block = f"b{block_size}-" if block_size else ""
    return {
        "case": f"served-{kind}-{block}c{concurrency}-n{max_new_tokens}",
        "proposer": "draft" if deployment.no_draft is None else None,
        "scripted": None,
        "workload_version": WORKLOAD_VERSION,
        "device_kind": f"{kind} server",
        "sampling": deployment.options.sampling.facts,
        "target": deployment.options.target,
        "target_sha256": deployment.target_sha256,
        "draft": deployment.options.draft or None,
        "draft_sha256": snapshot_hash(draft.directory) if draft else None,
    }


def results_of(case: Served, seconds: Sequence[float], command: Sequence[str]) -> dict[str, Any]:
    """A benchmark file with this one case; `seconds` are those of its rounds."""
    stats = Stats()
    for value in seconds:
        stats.update(value)
    benchmark = {
        "group": "serving",
        "name": case.case,
        "fullname": f"serve-bench[{case.case}]",
        "params": None,
        "param": None,
        "extra_info": to_json(case),
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
