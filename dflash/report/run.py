"""A benchmark file as the report reads it: cases by what they measured."""

import dataclasses
import json
from pathlib import Path
from typing import Any

Info = dict[str, Any]


class ReportError(ValueError):
    """A file that no report can be made of: what it should be, what it is, and what to do."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """One run. Every info is a benchmark's `extra_info` with `name` (its pytest id) added.

    `gate` is what the baselines said of the cases, None where nothing was held to one; `audits` are figures of audits;
    `failed` are decoding cases that could not be measured: no figures, but `error`.
    """

    path: Path
    when: str
    machine: Info
    commit: Info
    provenance: Info
    decodes: list[Info]
    steps: list[Info]
    acceptances: list[Info]
    trainings: list[Info]
    peers: list[Info]
    gate: Info | None
    audits: list[Info]
    failed: list[Info]

    @property
    def short_when(self) -> str:
        """Day and minute, UTC."""
        return self.when[:16].replace("T", " ")


def read_run(path: Path) -> Run:
    """Reads what `--benchmark-json` wrote. Raises ReportError when it is something else."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ReportError(f"a report reads a file of pytest's --benchmark-json; {path}: {error.strerror}") from None
    except ValueError as error:
        raise ReportError(f"a report reads a JSON file of pytest's --benchmark-json; {path} is none: {error}") from None
    benchmarks = raw.get("benchmarks") if isinstance(raw, dict) else None
    if not isinstance(benchmarks, list) or not all(isinstance(b, dict) and "extra_info" in b for b in benchmarks):
        raise ReportError(f"{path} is no file of pytest's --benchmark-json: it has no list of benchmarks")
    infos = [b["extra_info"] | {"name": b.get("fullname", "")} for b in benchmarks]
    told = raw.get("dflash") or {}
    run = Run(
        path=path,
        when=str(raw.get("datetime", "")),
        machine=raw.get("machine_info") or {},
        commit=raw.get("commit_info") or {},
        provenance=told,
        decodes=[i for i in infos if "speedup_x" in i and "block_size" in i],
        steps=[i for i in infos if i.get("verify_ms") and i.get("step_ms")],
        acceptances=[i for i in infos if "accept_rate_per_pos" in i and "speedup_x" not in i],
        trainings=[i for i in infos if "draft_tokens_per_s" in i],
        peers=[i for i in infos if "faster_x" in i],
        gate=told.get("gate"),
        audits=told.get("audits") or [],
        failed=told.get("failed") or [],
    )
    if not any((run.decodes, run.steps, run.acceptances, run.trainings, run.peers, run.failed)):
        raise ReportError(f"{path} holds nothing that `pytest bench` of this project measures: run it, then report")
    return run


def is_own(case: Info) -> bool:
    """Whether a draft proposed by itself here; scripted cases show a machine, not a draft."""
    return case.get("proposer") in (None, "draft", "untrained") or not str(case["proposer"]).lstrip("a").isdigit()


def counts(case: Info) -> bool:
    """Whether a speed-up may be compared and published: measured, tokens proven, not too noisy, with an interval.

    An unexplained one counts: it is what was measured, whatever the cost model says.
    """
    return bool(case["lossless"]) and case["speedup_x"] is not None and case["status"] in ("ok", "unexplained")
