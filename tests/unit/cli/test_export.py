"""`python -m dflash export`: what it writes for whom, and what it says to mistakes."""

import json
import sys

import numpy as np
import pytest

from dflash.cli import main as cli
from dflash.models.draft import pack_tokens
from dflash.weights.huggingface import read_tensors, write_draft
from dflash.weights.load import draft_hash, read_any_draft
from dflash.weights.runs.checkpoint import write_run
from dflash.weights.tiny import write_tiny_target

FULL = {"windows": (None, None), "causal": (False, False), "num_target_layers": 4}


@pytest.fixture(scope="module")
def work(draw_draft, tmp_path_factory):
    """A directory of runs, and their target."""
    work = tmp_path_factory.mktemp("work")
    write_tiny_target(work / "target", num_hidden_layers=4)
    write_tiny_target(work / "other", num_hidden_layers=2, vocab_size=150)
    provenance = {"cache_dir": "/somewhere", "cache_sha256": "ab"}
    write_run(draw_draft(**FULL), work / "runs", 7, optimizer_state=None, provenance=provenance, keep=None)
    extra = draw_draft(**FULL | {"learned_mask": True, "fc_bias": True})
    write_run(extra, work / "extras", 1, optimizer_state=None, provenance={}, keep=None)
    return work


@pytest.fixture
def export(monkeypatch, capsys, work):
    def export(*arguments):
        monkeypatch.chdir(work)
        monkeypatch.setattr(sys, "argv", ["dflash", "export", *map(str, arguments)])
        code = cli.main()
        out, err = capsys.readouterr()
        return code, out, err

    return export


def test_a_run_becomes_a_directory_with_its_record(export, work):
    assert export("runs", "plain")[:2] == (0, "draft: plain\n")
    record = json.loads((work / "plain" / "training.json").read_text())
    assert (record["step"], record["provenance"]) == (7, {"cache_sha256": "ab"})
    assert json.loads((work / "plain" / "config.json").read_text())["dtype"] == "bfloat16"
    assert {value.dtype.name for value in read_tensors(work / "plain").values()} == {"bfloat16"}
    modes = {file.stat().st_mode & 0o777 for file in (work / "plain").iterdir()}
    assert modes == {0o644}  # whoever serves it


def test_a_record_holds_that_of_the_draft_it_started_from(export, work, draw_draft):
    known = draft_hash(work / "runs")
    provenance = {"init_from": str(work / "runs"), "init_from_sha256": known}
    write_run(draw_draft(**FULL), work / "later", 3, optimizer_state=None, provenance=provenance, keep=None)
    assert export("later", "whole")[0] == 0
    record = json.loads((work / "whole" / "training.json").read_text())
    assert record["provenance"] == {"init_from_sha256": known}
    assert record["init_from"] == {"step": 7, "provenance": {"cache_sha256": "ab"}}
    for start, kept in ((work / "whole", record), (work / "target", None), (work / "gone", None)):
        provenance = {"init_from": str(start)} | ({"init_from_sha256": draft_hash(start)} if start.is_dir() else {})
        name = f"from-{start.name}"
        write_run(draw_draft(**FULL), work / name, 1, optimizer_state=None, provenance=provenance, keep=None)
        assert export(name, f"{name}-draft")[0] == 0
        told = json.loads((work / f"{name}-draft" / "training.json").read_text())["init_from"]
        assert (told and {k: told[k] for k in record}) == kept


def test_another_draft_at_the_place_of_the_one_it_started_from_is_not_recorded(export, work, draw_draft, monkeypatch):
    """A run that says it started from where it lies itself would be its own record without end."""
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("it asked the hub"))
    for name, start in (("loop", "loop"), ("moved", str(work / "runs")), ("hub", "who/what"), ("number", 5)):
        provenance = {"init_from": start, "init_from_sha256": "cd"}
        write_run(draw_draft(**FULL), work / name, 1, optimizer_state=None, provenance=provenance, keep=None)
        assert export(name, f"{name}-draft")[0] == 0
        assert json.loads((work / f"{name}-draft" / "training.json").read_text())["init_from"] is None


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("run_config.json", {"dflash": None}, "run_config.json must hold an object dflash, got None"),
        ("run-1/config.json", {"provenance": []}, "config.json must hold an object provenance, got []"),
        ("run-1/config.json", {"provenance": None}, "config.json must hold an object provenance, got None"),
    ],
)
def test_a_damaged_record_is_one_sentence(export, work, draw_draft, tmp_path, file, content, said):
    write_run(draw_draft(**FULL), tmp_path / "r", 1, optimizer_state=None, provenance={}, keep=None)
    path = tmp_path / "r" / file
    held = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(held | content if "run_config" in file else held | {"dflash": held["dflash"] | content}))
    code, _, err = export(tmp_path / "r", "x")
    assert (code, said in err, "Traceback" in err, (work / "x").exists()) == (2, True, False, False)


def test_directories_stay_at_home(export, work, draw_draft, tmp_path):
    write_run(draw_draft(**FULL), tmp_path / "r", 1, optimizer_state=None, provenance={}, keep=None)
    origin = {"read": {"target": ["/a/b", "c"], "draft": None}, "command": ["dflash", "/x/y"], "git": None}
    (tmp_path / "r" / "run_config.json").write_text(json.dumps({"train": {}, "dflash": origin}))
    assert export(tmp_path / "r", "home")[0] == 0
    told = json.loads((work / "home" / "training.json").read_text())["dflash"]
    assert told == {"read": {"target": ["...", "c"], "draft": None}, "command": ["dflash", "..."], "git": None}


def test_every_option_reaches_the_directory(export, work):
    more = ("--dtype", "float16", "--max-shard-size", "40KB", "--target", "target")
    assert export("runs", "several", "--format", "sglang-jax", *more)[0] == 0
    config = json.loads((work / "several" / "config.json").read_text())
    assert (config["dtype"], config["target_hidden_size"]) == ("float16", 64)
    assert len(list((work / "several").glob("model-*.safetensors"))) > 3
    assert export("runs", "spec", "--format", "speculators", "--target", "target", "--verifier", "a/b")[0] == 0
    config = json.loads((work / "spec" / "config.json").read_text())
    assert config["speculators_config"]["verifier"]["name_or_path"] == "a/b"


def test_what_a_reduced_vocabulary_means_for_others_is_said(export, work, draw_draft):
    config = draw_draft(**FULL).config
    learned = pack_tokens(np.arange(50), config.vocab_size)
    write_draft(draw_draft(**FULL, vocabulary=learned), work / "few")
    for form in ("z-lab", "sglang-jax"):
        code, out, _ = export("few", f"few-{form}", "--format", form)
        assert (code, "50 of 199" in out, "--draft-vocab-size all" in out) == (0, True, True)
    assert "--draft-vocab-size" not in export("runs", "learned-all")[1]


def test_an_exported_directory_is_exported_again(export, work):
    assert export("runs", "first", "--dtype", "float32")[0] == 0
    assert export("first", "second", "--dtype", "float32")[0] == 0
    assert read_any_draft(work / "second").config == read_any_draft(work / "first").config
    first, second = (json.loads((work / name / "training.json").read_text()) for name in ("first", "second"))
    assert second == first
    assert export("second", "narrower")[0] == 0
    third = json.loads((work / "narrower" / "training.json").read_text())
    assert third["draft_sha256"] == draft_hash(work / "narrower") != first["draft_sha256"]
    assert third | {"draft_sha256": ""} == first | {"draft_sha256": ""}


def test_a_draft_of_the_package_is_exported_with_its_record(export, work):
    assert export("smollm2-135m-plain", "packaged")[0] == 0
    record = json.loads((work / "packaged" / "training.json").read_text())
    assert record["step"] > 0
    assert record["draft_sha256"] == draft_hash(work / "packaged")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("runs", "target"), "new directory; target exists"),
        (("runs", "x", "--max-shard-size", "5 lumps"), "bytes, KB, MB or GB, such as 5GB; got '5 lumps'"),
        (("runs", "x", "--format", "speculators"), "(--target)"),
        (("extras", "x"), "{'learned_mask': True, 'fc_bias': True}"),
        (("runs", "x", "--target", "other"), "its vocabulary has 199 tokens, the target's 150"),
        (("nowhere", "x"), "nowhere holds no draft"),
    ],
)
def test_mistakes_are_told_and_leave_nothing(export, work, arguments, said):
    code, _, err = export(*arguments)
    assert code == 2
    assert said in err
    assert "Traceback" not in err
    assert not (work / "x").exists()
