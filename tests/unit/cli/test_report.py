"""`python -m dflash report` and `export-results`, from arguments to files, and what they refuse."""

import json
import sys

import pytest
import sample_runs

from dflash.cli import main as cli


@pytest.fixture
def runs(tmp_path):
    """Two files of the same case, a day apart."""
    paths = [tmp_path / "old.json", tmp_path / "new.json"]
    for day, path in enumerate(paths, 1):
        path.write_text(json.dumps(sample_runs.file_of([sample_runs.decode()], f"2026-01-0{day}T00:00:00+00:00")))
    return paths


@pytest.fixture
def run(monkeypatch, capsys):
    """(exit code, stdout, stderr) of a command."""

    def command(*arguments):
        monkeypatch.setattr(sys, "argv", ["dflash", *map(str, arguments)])
        code = cli.main()
        said = capsys.readouterr()
        return code, said.out, said.err

    return command


def test_report_writes_a_page_and_says_where(run, runs, tmp_path):
    old, new = runs
    out = tmp_path / "deep" / "out"
    assert run("report", new, old, "--out", out) == (0, f"{out / 'report.html'}\n", "")
    assert "Change since 2026-01-01" in (out / "report.md").read_text()
    assert not list(out.glob("*.tmp"))


def test_export_prints_or_writes(run, runs, tmp_path):
    code, printed, err = run("export-results", runs[0], "--format", "github")
    assert (code, err) == (0, "")
    assert json.loads(printed)[0]["name"] == "block-b8-n64-draft speedup_x"
    assert run("export-results", runs[0], "--format", "github", "--out", tmp_path / "x.json") == (0, "", "")
    assert (tmp_path / "x.json").read_text() == printed


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["report", "{}/none.json"], "none.json can't be read"),
        (["report", "{}/new.json", "{}/none.json"], "none.json can't be read"),
        (["report", "{}/new.json", "--out", "{}/old.json"], "old.json"),
        (["export-results", "{}/new.json", "--format", "csv", "--out", "{}/none/x"], "none/x"),
    ],
    ids=["missing", "older", "out", "export"],
)
def test_mistakes_are_one_sentence(run, runs, tmp_path, arguments, said):
    code, out, err = run(*(a.format(tmp_path) for a in arguments))
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("dflash: ")
    assert said in err
