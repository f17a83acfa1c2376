"""A run in the formats of other tools: their names, our numbers. Only cases whose tokens were proven are exported.

A draft's own case that is noisy or quick is exported with its status where the format has a place for one. What is
left out is named (`left_out`), and scripted cases are marked, since they show a machine and no draft.
Where a tool's number means something else than ours it is left out, not filled in. `output_throughput` is tok_s_total:
decoding only, where a server's (cases of mode `served`) holds prefill and waiting too.
"""

import csv
import io
import json
from collections.abc import Callable
from typing import Any, Literal, get_args

from dflash.measuring.result import Decode, Failed, ResultError, ResultFile, to_json
from dflash.metrics import HIGHER_IS_BETTER

Format = Literal["github", "bencher", "vllm", "sglang", "csv"]
_UNITS = {"speedup_x": "x", "acceptance_length": "tokens", "tok_s_total": "tok/s", "accept_rate": "fraction"}


def _cases(run: ResultFile, *, doubtful: bool = True) -> list[Decode]:
    """Cases to export; with `doubtful` also a draft's own, proven lossless, whose speed-up is in doubt."""

    def is_doubtful(case: Decode) -> bool:
        return doubtful and case.is_own and bool(case.lossless) and case.speedup_x is not None

    return [c for c in run.decodes if c.counts or is_doubtful(c)]


def _label(case: Decode, name: str = "") -> str:
    return (name or case.case) + ("" if case.is_own else " (scripted)")


def _named(names: dict[str, Any]) -> dict[str, Any]:
    """The entries that were measured."""
    return {name: value for name, value in names.items() if value is not None}


def github(run: ResultFile) -> str:
    """github-action-benchmark, `tool: customBiggerIsBetter`: a list of {name, unit, value, range, extra}."""
    entries = []
    for case in _cases(run):
        for name, unit in _UNITS.items():
            if getattr(case, name) is None:
                continue
            entry = {"name": f"{_label(case)} {name}", "unit": unit, "value": getattr(case, name)}
            if name == "speedup_x" and case.speedup_x_ci95:
                entry["range"] = "{:.3f} to {:.3f}".format(*case.speedup_x_ci95)
            entry["extra"] = f"{case.status}, {case.device_kind}, {case.dtype}, {case.target}, {case.draft}"
            entries.append(entry)
    return _json(entries)


def bencher(run: ResultFile) -> str:
    """Bencher Metric Format, `--adapter json`: {benchmark: {measure: {value, lower_value, upper_value}}}."""
    entries: dict[str, dict[str, dict[str, float]]] = {}
    for case in _cases(run, doubtful=False):
        measures = {n: {"value": getattr(case, n)} for n in HIGHER_IS_BETTER if getattr(case, n) is not None}
        interval = case.speedup_x_ci95
        if interval and "speedup_x" in measures:
            measures["speedup_x"] |= {"lower_value": interval[0], "upper_value": interval[1]}
        entries[_label(case, case.name)] = measures
    return _json(entries)


def _served(case: Decode, when: str) -> dict[str, Any]:
    """What `vllm bench serve` and `sglang.bench_serving` have in common."""
    mean = case.prompt_len_mean
    return {
        "date": when,
        "backend": "dflash",
        "model_id": case.target,
        "label": _label(case),
        "status": case.status,
        "scripted": case.scripted,
        "num_prompts": case.num_prompts,
        "completed": case.num_prompts,
        "max_concurrency": case.batch_size,
        "total_input_tokens": None if mean is None else round(mean * case.num_prompts),
        "total_output_tokens": case.num_output_tokens,
        "output_throughput": case.tok_s_total,
        "median_ttft_ms": case.ttft_ms,
    }


def vllm(run: ResultFile) -> str:
    """One flat object per line, in the names of `vllm bench serve`; its acceptance rates are percent and fractions."""
    return _lines(
        _served(case, run.when)
        | {
            "spec_decode_acceptance_rate": None if case.accept_rate is None else 100 * case.accept_rate,
            "spec_decode_acceptance_length": case.acceptance_length,
            "spec_decode_num_drafts": case.num_drafts,
            "spec_decode_draft_tokens": case.num_draft_tokens,
            "spec_decode_accepted_tokens": case.num_accepted_tokens,
            "spec_decode_per_position_acceptance_rates": case.accept_rate_per_pos,
        }
        for case in _cases(run)
    )


def sglang(run: ResultFile) -> str:
    """One flat object per line, in the names of `sglang.bench_serving --output-file`."""
    return _lines(
        _served(case, run.when) | {"dataset_name": case.prompts, "accept_length": case.acceptance_length}
        for case in _cases(run)
    )


def table(run: ResultFile) -> str:
    """CSV: a line for each case, also those that don't count (their status says so); lists are JSON."""
    cases = [to_json(case) for case in (*run.decodes, *run.failed)]
    names = list(dict.fromkeys(name for case in cases for name in case))
    out = io.StringIO()
    writer = csv.DictWriter(out, names, lineterminator="\n")
    writer.writeheader()
    for case in cases:
        writer.writerow({n: json.dumps(v) if isinstance(v, (list, dict)) else v for n, v in case.items()})
    return out.getvalue()


def _json(value: Any) -> str:
    return json.dumps(value, indent=2, allow_nan=False) + "\n"


def _lines(infos: Any) -> str:
    return "".join(json.dumps(_named(i), allow_nan=False) + "\n" for i in infos)


_WRITERS: dict[str, Callable[[ResultFile], str]] = {
    "github": github,
    "bencher": bencher,
    "vllm": vllm,
    "sglang": sglang,
    "csv": table,
}


def left_out(run: ResultFile, form: Format) -> list[str]:
    """Cases that the format does not hold, each with its status."""
    if form == "csv":
        return []
    exported = _cases(run, doubtful=form != "bencher")
    cases: list[Decode | Failed] = [*run.decodes, *run.failed]
    return [f"{case.case} ({case.status})" for case in cases if case not in exported]


def export(run: ResultFile, form: Format) -> str:
    """The run as text in a tool's format. Raises ResultError when the run has no case to export."""
    if form not in get_args(Format):
        raise ResultError(f"a format is one of {', '.join(get_args(Format))}, got {form!r}")
    if not (run.decodes or run.failed if form == "csv" else _cases(run, doubtful=form != "bencher")):
        names = ", ".join(left_out(run, form)) or "none was measured"
        raise ResultError(f"{run.path} has no decoding case that can be exported ({names}): nothing to export")
    return _WRITERS[form](run)
