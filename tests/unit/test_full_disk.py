"""A disk that is full, at once or half-way, and one that may not be written: one sentence, and nothing half written.

Where we may mount one the disk is a small tmpfs, else a limit to the size of files (RLIMIT_FSIZE) stands for it.
"""

import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import sample_runs

from dflash import init_draft, load_target, write_draft
from dflash.weights.tiny import write_tiny_target, write_tiny_tokenizer

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow
TEXT = ("--num-conversations", 16, "--held-out", 0.25, "--max-prompt-len", 64, "--max-user-turn", 40)
TEXT += ("--max-new-tokens", 24, "--batch-size", 16, "--target-layer-ids", 0, 2)
STEPS = ("--steps", 2, "--batch-size", 8, "--num-anchors", 4, "--save-every", 1, "--vocab-chunk-size", 260)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Everything that the commands read, on a disk with room."""
    folder = tmp_path_factory.mktemp("whole")
    stops = {"vocab_size": 260, "eos_token_id": [1, *range(100, 107)]}
    write_tiny_tokenizer(write_tiny_target(folder / "target", **stops))
    write_draft(init_draft(load_target(folder / "target"), target_layer_ids=(0, 2)), folder / "draft")
    (folder / "new.json").write_text(json.dumps(sample_runs.file_of(sample_runs.sweep())))
    done = run("build-cache", folder / "cache", "--target", folder / "target", *TEXT)
    assert done.returncode == 0, done.stderr
    return folder


def run(*words, limit=None):
    """A command in a process of its own, whose files have at most so many bytes."""
    process = subprocess.Popen(
        [sys.executable, "-m", "dflash", *map(str, words)],
        env=os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    if limit is not None:  # it imports for longer than this takes
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (limit, limit))
    out, told = process.communicate(timeout=600)
    return subprocess.CompletedProcess(process.args, process.returncode, out, told)


@pytest.fixture(params=[4096, 200_000], ids=["full at once", "full half-way"])
def small(request, tmp_path):
    """(a directory with room for this many bytes, the limit of files that stands for it or None)."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = (
        shutil.which("mount")
        and not subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={request.param}", "tmpfs", str(disk)],
            capture_output=True,
            check=False,
        ).returncode
    )
    yield disk, None if mounted else request.param // 4
    if mounted:
        subprocess.run(["umount", str(disk)], check=True)


COMMANDS = {
    "build-cache": ("build-cache", "{o}/out", "--target", "{whole}/target", *TEXT),
    "windows": ("build-cache", "{o}/out", "--target", "{whole}/target", *TEXT, "--form", "windows", "--ctx-len", 16,
                "--block-size", 4, "--num-blocks", 64),
    "train": ("train", "{whole}/cache", "{o}/out", "--target", "{whole}/target", *STEPS),
    "export": ("export", "{whole}/draft", "{o}/out", "--dtype", "float32"),
    "report": ("report", "{whole}/new.json", "--out", "{o}/out"),
    "export-results": ("export-results", "{whole}/new.json", "--format", "csv", "--out", "{o}/out.csv"),
    "evaluate": ("evaluate", "{whole}/cache", "{whole}/draft", "--target", "{whole}/target", "--rows", "all",
                 "--vocab-chunk-size", 260, "--out-json", "{o}/out.json"),
}  # fmt: skip
# Of what these write 200 kB hold all.
SMALL = ("export-results", "evaluate", "report")


def words_of(command, whole, out):
    return [word.format(whole=whole, o=out) if isinstance(word, str) else word for word in COMMANDS[command]]


def one_sentence(done):
    told = [line for line in done.stderr.replace("\r", "\n").splitlines() if line.strip() and "%|" not in line]
    assert done.returncode == 2, done.stderr
    assert len(told) == 1, done.stderr
    assert told[0].startswith("dflash: ")
    return told[0]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_disk_that_fills_is_one_sentence(whole, small, command):
    disk, limit = small
    if command in SMALL and not (limit is None and shutil.disk_usage(disk).total < 10_000):
        return
    said = one_sentence(run(*words_of(command, whole, disk), limit=limit))
    assert any(word in said.lower() for word in ("no space", "full", "free", "too large")), said
    left = sorted(path.name for path in disk.iterdir())
    # What can be gone on with stays; nothing looks finished.
    assert set(left) <= {"out.building", "out"}, left
    if "out" in left:
        assert not any((disk / "out" / name).exists() for name in ("report.html", "config.json", "meta.json"))


@pytest.mark.parametrize("command", COMMANDS)
def test_a_place_that_may_not_be_written_is_one_sentence(whole, tmp_path, command):
    """A file where a folder is due: root may write into every folder."""
    (tmp_path / "file").write_text("")
    said = one_sentence(run(*words_of(command, whole, tmp_path / "file")))
    assert "file" in said
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
