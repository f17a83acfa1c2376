"""A run in the formats of other tools: their names, our numbers. Only cases whose tokens were proven are exported.

Where a tool's number means something else than ours it is left out, not filled in. `output_throughput` is tok_s_total:
decoding only, where a server's (cases of mode `served`) holds prefill and waiting too.
"""

import csv
import io
import json
from collections.abc import Callable
from typing import Any, Literal, get_args

from dflash.metrics import HIGHER_IS_BETTER
from dflash.report.run import Info, ReportError, Run, counts

Format = Literal["github", "bencher", "vllm", "sglang", "csv"]
_UNITS = {"speedup_x": "x", "acceptance_length": "tokens", "tok_s_total": "tok/s", "accept_rate": "fraction"}


def _cases(run: Run) -> list[Info]:
    return [c for c in run.decodes if counts(c)]


def _named(names: dict[str, Any]) -> Info:
    """Without what was not measured."""
    return {name: value for name, value in names.items() if value is not None}


def github(run: Run) -> str:
    """github-action-benchmark, `tool: customBiggerIsBetter`: a list of {name, unit, value, range, extra}."""
    found = []
    for case in _cases(run):
        for name, unit in _UNITS.items():
            if case.get(name) is None:
                continue
            entry = {"name": f"{case['case']} {name}", "unit": unit, "value": case[name]}
            if name == "speedup_x" and case.get("speedup_x_ci95"):
                entry["range"] = "{:.3f} to {:.3f}".format(*case["speedup_x_ci95"])
            entry["extra"] = (
                f"{case.get('device_kind')}, {case.get('dtype')}, {case.get('target')}, {case.get('draft')}"
            )
            found.append(entry)
    return _json(found)


def bencher(run: Run) -> str:
    """Bencher Metric Format, `--adapter json`: {benchmark: {measure: {value, lower_value, upper_value}}}."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for case in _cases(run):
        measures = {n: {"value": case[n]} for n in HIGHER_IS_BETTER if case.get(n) is not None}
        interval = case.get("speedup_x_ci95")
        if interval and "speedup_x" in measures:
            measures["speedup_x"] |= {"lower_value": interval[0], "upper_value": interval[1]}
        found[case["name"]] = measures
    return _json(found)


def _served(case: Info, when: str) -> Info:
    """What `vllm bench serve` and `sglang.bench_serving` call alike."""
    mean = case.get("prompt_len_mean")
    return {
        "date": when,
        "backend": "dflash",
        "model_id": case.get("target"),
        "label": case["case"],
        "num_prompts": case.get("num_prompts"),
        "completed": case.get("num_prompts"),
        "max_concurrency": case.get("batch_size"),
        "total_input_tokens": None if mean is None else round(mean * case["num_prompts"]),
        "total_output_tokens": case.get("num_output_tokens"),
        "output_throughput": case.get("tok_s_total"),
        "median_ttft_ms": case.get("ttft_ms"),
    }


def vllm(run: Run) -> str:
    """One flat object a line, in the names of `vllm bench serve`; its acceptance rates are percent and fractions."""
    return _lines(
        _served(case, run.when)
        | {
            "spec_decode_acceptance_rate": None if case.get("accept_rate") is None else 100 * case["accept_rate"],
            "spec_decode_acceptance_length": case.get("acceptance_length"),
            "spec_decode_num_drafts": case.get("num_drafts"),
            "spec_decode_draft_tokens": case.get("num_draft_tokens"),
            "spec_decode_accepted_tokens": case.get("num_accepted_tokens"),
            "spec_decode_per_position_acceptance_rates": case.get("accept_rate_per_pos"),
        }
        for case in _cases(run)
    )


def sglang(run: Run) -> str:
    """One flat object a line, in the names of `sglang.bench_serving --output-file`."""
    return _lines(
        _served(case, run.when) | {"dataset_name": case.get("prompts"), "accept_length": case.get("acceptance_length")}
        for case in _cases(run)
    )


def table(run: Run) -> str:
    """CSV: a line for each case, also those that don't count (their status says so); lists are JSON."""
    cases = [*run.decodes, *run.failed]
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


_WRITERS: dict[str, Callable[[Run], str]] = {
    "github": github,
    "bencher": bencher,
    "vllm": vllm,
    "sglang": sglang,
    "csv": table,
}


def export(run: Run, form: Format) -> str:
    """The run as text in a tool's format. Raises ReportError when the run has no case to export."""
    if form not in get_args(Format):
        raise ReportError(f"a format is one of {', '.join(get_args(Format))}, got {form!r}")
    if not (run.decodes or run.failed if form == "csv" else _cases(run)):
        raise ReportError(f"{run.path} has no decoding case whose tokens were proven: nothing to export")
    return _WRITERS[form](run)
