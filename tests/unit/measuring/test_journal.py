"""The journal of a sweep: what is found again, what is not, and what a kill leaves."""

import json

import pytest
import sample_runs

from dflash.measuring.journal import Journal, JournalError, Record, identity, journal_path
from dflash.measuring.result import Failed, from_json

INFO = sample_runs.case(speedup_x=2.5)


@pytest.fixture
def path(tmp_path):
    return journal_path(tmp_path / "x.json")


def test_an_identity_is_that_of_the_facts():
    assert identity({"a": 1, "b": [2, None]}) == identity({"b": [2, None], "a": 1})
    assert identity({"a": 1}) != identity({"a": 2})
    with pytest.raises(ValueError, match="not JSON compliant"):
        identity({"a": float("nan")})


def test_a_record_is_on_the_disk_and_found_when_resumed(path):
    assert path.name == "x.cases.jsonl"
    Journal(path).add(Record("one", INFO, [1.5, 1.25]))
    assert Journal(path, resume=True).find("one") == Record("one", INFO, [1.5, 1.25])
    assert Journal(path, resume=True).find("two") is None
    assert Journal(path).find("one") is None
    Journal(path).add(Record("one", sample_runs.case(speedup_x=3.0), [1.0]))
    assert Journal(path, resume=True).find("one").info.speedup_x == 3.0
    assert len(path.read_text().splitlines()) == 2


@pytest.mark.parametrize(
    ("status", "found"),
    [
        ("ok", True),
        ("unexplained", True),
        ("quick", True),
        ("no-baseline", True),
        ("invalid", False),
        ("too-noisy", False),
        ("failed", False),
    ],
)
def test_what_does_not_count_is_measured_again(path, status, found):
    failed = from_json(sample_runs.failed(), Failed)
    Journal(path).add(Record("one", failed if status == "failed" else sample_runs.case(status=status), []))
    assert (Journal(path, resume=True).find("one") is not None) == found


def test_a_line_that_a_kill_tore_is_cut_off(path):
    Journal(path).add(Record("one", INFO, [1.0]))
    whole = path.read_bytes()
    for torn in (b'{"identity": "tw', b"{", whole[:-1]):
        path.write_bytes(whole + torn)
        journal = Journal(path, resume=True)
        assert journal.find("one")
        journal.add(Record("three", INFO, [2.0]))
        assert [json.loads(line)["identity"] for line in path.read_text().splitlines()] == ["one", "three"]


@pytest.mark.parametrize("text", ["no json\n", "[]\n", '{"identity": "one"}\n', "7\n", '{"identity": 1, "info": 7}\n'])
def test_what_is_no_journal_is_refused(path, text):
    path.write_text(text)
    with pytest.raises(JournalError, match=r"x\.cases\.jsonl must hold .*delete it"):
        Journal(path)
    assert path.read_text() == text


def test_without_a_file_nothing_is_kept(tmp_path):
    journal = Journal(None, resume=True)
    journal.add(Record("one", INFO, [1.0]))
    assert journal.find("one") is None
    assert list(tmp_path.iterdir()) == []
