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
        (["--target", "qwen3-8b", "--batch", "1,x"], "--batch"),
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


@pytest.mark.parametrize("option", ["--json", "--hlo"])
def test_what_can_not_be_written_is_told_first(
    option: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    said = _refused(["--target", "qwen3-8b", option, str(tmp_path / "file" / "below")], monkeypatch, capsys)
    assert "Not a directory" in said
    assert (tmp_path / "file").read_text() == ""


def test_without_libtpu_nothing_is_written_and_the_install_command_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    file = tmp_path / "plan.json"
    assert "jax[tpu]" in _refused(["--target", "qwen3-8b", "--json", str(file)], monkeypatch, capsys)
    assert not file.exists()
