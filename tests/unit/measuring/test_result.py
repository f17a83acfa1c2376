"""Records of results: what comes back is what went out, the schema is theirs, and what breaks them is one sentence."""

import json
from pathlib import Path

import pytest
import sample_runs
from sample_runs import GONE, damaged

from dflash.measuring import result
from dflash.measuring.result import Decode, ResultError, from_json, read_file, to_json

SCHEMA = Path(result.__file__).parents[1] / "report" / "results.schema.json"
INFO = ("benchmarks", 0, "extra_info")


@pytest.fixture
def read(tmp_path):
    def read(content):
        path = tmp_path / "run.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return read_file(path)

    return read


def test_the_schema_of_the_package_is_that_of_the_records():
    """`python -m dflash.measuring.result > dflash/report/results.schema.json` writes it anew."""
    assert json.loads(SCHEMA.read_text()) == result.schema()


def test_every_kind_comes_back_as_it_went_out(read):
    more = {"audits": [sample_runs.audit()], "failed": [sample_runs.failed()], "gate": sample_runs.gate()}
    file = read(sample_runs.file_of(sample_runs.sweep(), **more))
    assert {type(r) for r in file.measured} == set(result.KINDS.values()) - {result.Served, result.Peer}
    for record in (*file.measured, *file.provenance.audits, *file.provenance.failed, file.provenance.gate):
        assert from_json(json.loads(json.dumps(to_json(record), allow_nan=False)), type(record)) == record


def test_what_is_no_number_is_null():
    assert to_json(sample_runs.case(residual=float("nan")))["residual"] is None


def test_benchmarks_of_others_are_not_read(read):
    other = sample_runs.benchmark("test_other.py::test_it", None, {"speedup_x": "fast"})
    assert [type(r) for r in read(sample_runs.file_of([sample_runs.decode(), other])).measured] == [Decode]


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        (("dflash",), GONE, "schema_version 1, got None"),
        (("dflash",), [], "schema_version 1, got None"),
        (("dflash", "schema_version"), 99, "schema_version 1, got 99"),
        (("dflash", "schema_version"), True, "schema_version 1, got True"),
        (("dflash", "gate"), [], "dflash.gate: Input should be an object"),
        (("dflash", "failed", 0, "error"), "", "dflash.failed.0.error: "),
        (("dflash", "failed", 0, "status"), "ok", "dflash.failed.0.status: Input should be 'failed'"),
        (("dflash", "audits", 0, "parity"), None, "dflash.audits.0.parity: Input should be an object"),
        (("benchmarks",), None, "benchmarks: "),
        (("benchmarks", 0), "text", "benchmarks.0: Input should be an object"),
        (("benchmarks", 0, "extra_info"), [], "benchmarks.0.extra_info: Input should be an object"),
        ((*INFO, "lossless"), GONE, "benchmarks.0.extra_info: lossless: Field required"),
        ((*INFO, "scripted"), "a7", "benchmarks.0.extra_info: scripted: "),
        ((*INFO, "speedup_x_ci95"), [1.0], "speedup_x_ci95.1: Field required"),
        ((*INFO, "speedup_x"), 1e308, "speedup_x: Input should be less"),
        ((*INFO, "speedup_x"), 5e-324, "speedup_x: Input should be greater"),
        ((*INFO, "prompt_len_mean"), 1e308, "prompt_len_mean: Input should be less"),
        ((*INFO, "between_runs"), 1000.0, "between_runs: Input should be less"),
        ((*INFO, "first_divergence"), {"prompt": 0}, "first_divergence.token: Field required"),
    ],
    ids=lambda v: ".".join(map(str, v)) if isinstance(v, tuple) else "gone" if v is GONE else str(v)[-40:],
)
def test_a_damaged_file_is_refused_by_its_place(read, path, value, said):
    more = {"audits": [sample_runs.audit()], "failed": [sample_runs.failed()], "gate": sample_runs.gate()}
    file = damaged(sample_runs.file_of(sample_runs.sweep(), **more), path, value)
    with pytest.raises(ResultError) as error:
        read(file)
    assert said in str(error.value)
    assert "run.json" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "no valid JSON"),
        ("[" * 100_000, "nests deeper"),
        ('{"dflash": ' + "7" * 5000 + "}", "5000 digits"),
        ("[]", "must hold a JSON object"),
        ('{"benchmarks": []}', "schema_version 1, got None"),
        (json.dumps(sample_runs.file_of([])), "holds nothing"),
    ],
    ids=["no-json", "nested", "digits", "list", "foreign", "empty"],
)
def test_what_is_no_result_file_is_refused(read, content, said):
    with pytest.raises(ResultError, match=said) as error:
        read(content)
    assert "run.json" in str(error.value)
    assert len(str(error.value)) < 500


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(ResultError, match="No such file"):
        read_file(tmp_path / "none.json")
