"""A disk that is full or read-only, at once or half-way: one sentence, and nothing half written.

Where we may mount one the disk is a small tmpfs, else a limit to the size of files (RLIMIT_FSIZE) stands for it.
"""

import json
import os
import resource
import shutil
import subprocess
import sys
import time
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


def start(*words):
    """A command in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "dflash", *map(str, words)],
        env=os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(*words, limit=None):
    """A command whose files have at most so many bytes."""
    process = start(*words)
    if limit is not None:  # it imports for longer than this takes
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (limit, limit))
    return ended(process)


def ended(process):
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
    return [word.format(whole=whole, o=out) if isinstance(word, str) else word for word in command]


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
    said = one_sentence(run(*words_of(COMMANDS[command], whole, disk), limit=limit))
    assert any(word in said.lower() for word in ("no space", "full", "free", "too large")), said
    left = sorted(path.name for path in disk.iterdir())
    # What can be gone on with stays; nothing looks finished.
    assert set(left) <= {"out.building", "out"}, left
    if "out" in left:
        assert not any((disk / "out" / name).exists() for name in ("report.html", "config.json", "meta.json"))


def mount(*words):
    """Mounts; skips where we may not."""
    done = subprocess.run(["mount", *map(str, words)], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"nothing can be mounted here: {done.stderr.strip()}")


@pytest.fixture
def disk(tmp_path):
    """A small disk. What a test mounts over it is taken away too."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount("-t", "tmpfs", "-o", "size=64m", "tmpfs", disk)
    yield disk
    while os.path.ismount(disk):
        subprocess.run(["umount", str(disk)], check=True)


# Written by commands that read no file of the full disk.
READ_ONLY = COMMANDS | {
    "resumed": ("train", "{whole}/cache", "{o}/runs", "--target", "{whole}/target", *STEPS),
    "resumed build": ("build-cache", "{o}/begun", "--target", "{whole}/target", *TEXT),
    "served, results": ("serve-bench", "--target", "{whole}/target", "--base-url", "http://127.0.0.1:9", "--json",
                        "{o}/out.json"),
    "served, report": ("serve-bench", "--target", "{whole}/target", "--base-url", "http://127.0.0.1:9", "--report",
                       "{o}/out"),
}  # fmt: skip


@pytest.mark.parametrize("command", READ_ONLY)
def test_a_disk_that_was_mounted_read_only_is_one_sentence(whole, disk, command):
    (disk / "runs").mkdir()
    (disk / "begun.building").mkdir()
    mount("-o", "remount,ro", disk)
    said = one_sentence(run(*words_of(READ_ONLY[command], whole, disk)))
    assert "Read-only file system" in said
    assert str(disk) in said
    assert ".tmp" not in said  # a name of ours, which nobody gave
    assert sorted(path.name for path in disk.iterdir()) == ["begun.building", "runs"]


@pytest.mark.parametrize(
    ("words", "option"),
    [
        (("--benchmark-json", "{o}/out.json"), "--benchmark-json"),
        (("--report", "{o}/out"), "--report"),
        (("--report", "{o}/runs", "--benchmark-json", "/dev/null"), "--report"),
        (("--update-baselines", "--baselines", "{o}/runs"), "--baselines"),
    ],
)
def test_a_benchmark_is_refused_before_it_measures_what_cannot_be_written(disk, words, option):
    (disk / "runs").mkdir()
    mount("-o", "remount,ro", disk)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "bench", "--run-on", "cpu", "-n", "0", *(w.format(o=disk) for w in words)],
        cwd=ROOT, env=os.environ | {"JAX_PLATFORMS": "cpu"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 4, done.stdout + done.stderr
    (said,) = [line for line in done.stderr.splitlines() if line.strip()]
    assert said.startswith(f"ERROR: {option} names a ")
    assert str(disk) in said


HALF_WAY = {
    "build-cache": ("out.building/settings.json", COMMANDS["build-cache"]),
    "windows": ("out.building/settings.json", (*COMMANDS["windows"], "--num-blocks", 12)),
    "train": ("out/run-1/metadata.json", (*COMMANDS["train"], "--steps", 40)),
}


@pytest.mark.parametrize("command", HALF_WAY)
def test_a_disk_that_becomes_read_only_is_one_sentence_and_what_was_done_stays(whole, disk, command):
    """What the command has open keeps its disk from a remount: one that may not be written is laid over it."""
    file, words = HALF_WAY[command]
    words = words_of(words, whole, disk)
    view = disk.with_name("view")
    view.mkdir()
    mount("--bind", disk, view)
    mount("-o", "remount,bind,ro", view)
    with start(*words) as process:
        try:
            while not (disk / file).exists():
                assert process.poll() is None, process.communicate()
                time.sleep(0.002)
            mount("--bind", view, disk)
            said = one_sentence(ended(process))
        finally:
            process.kill()
            subprocess.run(["umount", str(view)], check=True)
    assert "Read-only file system" in said
    assert not any((disk / "out" / name).exists() for name in ("meta.json", "run-40"))
    subprocess.run(["umount", str(disk)], check=True)
    done = run(*words)
    assert done.returncode == 0, done.stderr
    assert any((disk / "out" / name).exists() for name in ("meta.json", "run-40"))


@pytest.mark.parametrize("command", COMMANDS)
def test_a_place_that_may_not_be_written_is_one_sentence(whole, tmp_path, command):
    """A file where a folder is due: root may write into every folder."""
    (tmp_path / "file").write_text("")
    said = one_sentence(run(*words_of(COMMANDS[command], whole, tmp_path / "file")))
    assert "file" in said
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
