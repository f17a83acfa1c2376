"""Other tools' formats: their names, our numbers, and nothing that was not proven or not measured."""

import csv
import io
import json

import pytest
import sample_runs
from sample_runs import decode, file_of

from dflash.measuring.result import ResultError, read_file
from dflash.report.other_tools import export, left_out


def read(tmp_path, benchmarks):
    path = tmp_path / "run.json"
    path.write_text(json.dumps(file_of(benchmarks)))
    return read_file(path)


@pytest.fixture
def run(tmp_path):
    """Two cases that count, one of them unexplained, and one whose tokens differ."""
    odd, wrong = decode(8, batch_size=4), decode(16)
    odd["extra_info"]["status"] = "unexplained"
    wrong["extra_info"] |= {"lossless": False, "status": "invalid"}
    return read(tmp_path, [decode(8), odd, wrong, sample_runs.step()])


@pytest.fixture
def case(run):
    return run.decodes[0]


def test_github_action_benchmark(run, case):
    entries = json.loads(export(run, "github"))
    assert all(set(e) >= {"name", "unit", "value"} and isinstance(e["value"], float) for e in entries)
    assert len({e["name"] for e in entries}) == len(entries) == 8  # 2 cases, 4 figures that are better when bigger
    first = entries[0]
    assert (first["name"], first["unit"]) == ("block-b8-n64-draft speedup_x", "x")
    assert first["value"] == case.speedup_x
    assert [float(x) for x in first["range"].split(" to ")] == pytest.approx(case.speedup_x_ci95, abs=1e-3)
    assert not any("ms" in e["unit"] for e in entries)


def test_bencher(run, case):
    found = json.loads(export(run, "bencher"))
    assert len(found) == 2
    measures = found[case.name]
    low, high = case.speedup_x_ci95
    assert measures["speedup_x"] == {"value": case.speedup_x, "lower_value": low, "upper_value": high}
    assert measures["tpot_ms"] == {"value": case.tpot_ms}
    assert all(isinstance(m["value"], (int, float)) for b in found.values() for m in b.values())


def test_vllm(run, case):
    record, batched = (json.loads(line) for line in export(run, "vllm").splitlines())
    assert record["spec_decode_acceptance_rate"] == pytest.approx(100 * case.accept_rate)
    assert record["spec_decode_acceptance_length"] == case.acceptance_length
    assert record["spec_decode_acceptance_length"] == 1 + record["spec_decode_accepted_tokens"] / 100
    assert record["spec_decode_per_position_acceptance_rates"] == case.accept_rate_per_pos
    assert record["output_throughput"] == case.tok_s_total
    assert (record["total_input_tokens"], record["total_output_tokens"]) == (317, 212)
    assert (record["max_concurrency"], batched["max_concurrency"]) == (1, 4)


def test_sglang(run, case):
    record, _ = (json.loads(line) for line in export(run, "sglang").splitlines())
    assert record["accept_length"] == case.acceptance_length
    assert record["output_throughput"] == case.tok_s_total
    assert record["completed"] == 4


def test_csv_has_every_case_with_its_status(run):
    rows = list(csv.DictReader(io.StringIO(export(run, "csv"))))
    assert [r["status"] for r in rows] == ["ok", "unexplained", "invalid"]
    assert float(rows[0]["speedup_x"]) == run.decodes[0].speedup_x
    assert json.loads(rows[0]["accept_histogram"]) == run.decodes[0].accept_histogram


@pytest.mark.parametrize("form", ["github", "bencher", "vllm", "sglang", "csv"])
def test_what_failed_is_a_line_of_the_csv_alone(tmp_path, form):
    path = tmp_path / "run.json"
    path.write_text(json.dumps(file_of([decode(8)], failed=[sample_runs.failed()])))
    text = export(read_file(path), form)
    assert ("block-b8-n64-k64-draft" in text) == (form == "csv")
    if form == "csv":
        last = list(csv.DictReader(io.StringIO(text)))[-1]
        assert (last["status"], last["speedup_x"]) == ("failed", "")
        assert last["error"] == "out of memory: allocating 7 GiB <x>"


@pytest.mark.parametrize("form", ["github", "bencher", "vllm", "sglang", "csv"])
def test_a_drafts_own_case_is_never_dropped_in_silence(tmp_path, form):
    noisy, script = decode(8), decode(8, proposer="a7")
    noisy["extra_info"] |= {"status": "too-noisy", "too_noisy": "the halves differ"}
    run = read(tmp_path, [noisy, script])
    text = export(run, form)
    assert ("block-b8-n64-draft" in text) == (form != "bencher")
    assert ("too-noisy" in text) == (form != "bencher")
    assert left_out(run, form) == (["block-b8-n64-draft (too-noisy)"] if form == "bencher" else [])
    assert "scripted" in text


def test_what_is_left_out_is_named(run):
    assert left_out(run, "github") == ["block-b16-n64-draft (invalid)"]
    assert left_out(run, "csv") == []


@pytest.mark.parametrize("form", ["github", "bencher", "vllm", "sglang"])
def test_what_was_not_measured_is_left_out(tmp_path, form):
    case = decode()
    case["extra_info"] |= {"ttft_ms": None, "accept_rate": None, "speedup_x_ci95": None}
    text = export(read(tmp_path, [case]), form)
    assert "null" not in text
    assert "ttft" not in text
    assert "accept_rate" not in text


@pytest.mark.parametrize("form", ["github", "bencher", "vllm", "sglang", "csv"])
def test_a_run_without_cases_is_refused(tmp_path, form):
    with pytest.raises(ResultError, match="nothing to export"):
        export(read(tmp_path, [sample_runs.step()]), form)


def test_a_format_that_is_none_is_refused(run):
    with pytest.raises(ResultError, match=r"format .*github, bencher, vllm, sglang, csv, got 'yaml'"):
        export(run, "yaml")
