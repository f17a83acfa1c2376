"""`python -m dflash plan`: what it refuses, in one sentence, before anything is compiled."""

import importlib.util
from pathlib import Path

import pytest

from dflash.cli.main import main


def _refused(arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    monkeypatch.setattr("sys.argv", ["dflash", "plan", *arguments])
    assert main() == 2
    error = capsys.readouterr().err
    assert error.startswith("dflash: ")
    assert error.count("\n") == 1
    return error


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (["--target", "gpt-oss-21b"], "gpt-oss-20b"),
        (["--target", ""], "gpt-oss-20b"),
        (["--target", "smollm2-135m", "--draft", "smollm2-135m", "--draft-layers", "3"], "--draft-layers is for"),
        (["--target", "smollm2-135m", "--num-anchors", "7"], "--num-anchors is for --training"),
        (["--target", "qwen3-8b", "--batch", "1,x"], "--batch"),
        (["--target", "qwen3-8b", "--batch", "1,"], "integers with commas between them"),
        (["--target", "qwen3-8b", "--context", "1024,4"], "a context has room for a prompt"),
        (["--target", "qwen3-8b", "--dp", "3", "--batch", "6,2"], "divisible by --dp 3, got 2"),
        (["--target", "qwen3-8b", "--training", "--context", "3", "--block-size", "4"], "longer than a block of 4"),
        (["--target", "qwen3-8b", "--block-size", "0"], "block_size"),
        (["--target", "qwen3-8b", "--block-size", "1"], "block_size"),
        (["--target", "qwen3-8b", "--topology", "v6e"], "v6e:2x4"),
        (["--target", "smollm2-135m", "--draft", "smollm2-135m", "--block-size", "64"], "blocks of"),
        (["--target", "gpt-oss-20b", "--experts", "banana"], "float8_e5m2"),
        (["--target", "qwen3-8b", "--experts", "float8_e5m2"], "has none"),
    ],
)
def test_a_mistake_is_one_sentence(
    arguments: list[str], names: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert names in _refused(arguments, monkeypatch, capsys)


def test_every_case_that_can_not_be_is_named_before_anything_is_compiled(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    options = ["--batch", "2,3,5", "--dp", "2", "--context", "8,2048", "--block-size", "16,8"]
    error = _refused(["--target", "qwen3-8b", *options, "--hlo", str(tmp_path / "hlo")], monkeypatch, capsys)
    assert error.count("got 3;") == error.count("got 5;") == 1
    assert "a block of 16 " in error
    assert "a block of 8 " in error
    assert not (tmp_path / "hlo").exists()


@pytest.mark.parametrize(("option", "reason"), [("--json", "Not a directory"), ("--hlo", "names a directory")])
def test_what_can_not_be_written_is_told_first(
    option: str, reason: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    error = _refused(["--target", "qwen3-8b", option, str(tmp_path / "file" / "below")], monkeypatch, capsys)
    assert reason in error
    assert "probe" not in error
    assert (tmp_path / "file").read_text() == ""


def test_without_libtpu_nothing_is_written_and_the_install_command_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    file = tmp_path / "plan.json"
    assert "jax[tpu]" in _refused(["--target", "qwen3-8b", "--json", str(file)], monkeypatch, capsys)
    assert not file.exists()
