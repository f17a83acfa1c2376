"""Directories of arrays that survive being killed at any byte, one writer at a time."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dflash.training.cache import arrays as arrays_module
from dflash.training.cache.arrays import ArrayWriter, CacheError, Spec, building_dir

N = 6
SPECS = {
    "wide": Spec(dtype=np.dtype(np.uint16), shape=(N, 5, 3)),
    "ids": Spec(dtype=np.dtype(np.int32), shape=(N,)),
    "marks": Spec(dtype=np.dtype(np.uint8), shape=(N,)),
}
SETTINGS = {"seed": 0, "layers": [1, 2]}


def begin(directory, **changes):
    writer = ArrayWriter(directory, SETTINGS | changes)
    writer.allocate(SPECS)
    return writer


def fill(writer, stop, step=2):
    """Items whose values follow from their numbers, `step` at a time."""
    while writer.done < stop:
        end = min(writer.done + step, stop)
        for array in writer.arrays.values():
            for item in range(writer.done, end):
                array[item] = np.random.default_rng(item).integers(0, 200, array.shape[1:])
        writer.commit(end)


def build(directory, step=2):
    """Builds what is missing."""
    with begin(directory) as writer:
        fill(writer, N, step)
        return writer.finish(SETTINGS | {"items": N})


def begun(directory, done):
    """A build that ended after `done` items."""
    with begin(directory) as writer:
        fill(writer, done)
    return building_dir(directory) / "cache"


def contents(directory):
    return {p.name: p.read_bytes() for p in sorted(directory.iterdir())}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    directory = build(tmp_path_factory.mktemp("whole") / "cache")
    assert [p.name for p in directory.parent.iterdir()] == ["cache"]
    return contents(directory)


class Killed(BaseException):
    """What no handler expects."""


# ---- kills


def test_a_whole_directory_holds_arrays_and_meta_and_no_more(whole):
    assert sorted(whole) == ["ids.npy", "marks.npy", "meta.json", "wide.npy"]
    assert json.loads(whole["meta.json"]) == SETTINGS | {"items": N}


def test_a_kill_at_every_step_costs_nothing(tmp_path, whole, monkeypatch):
    """The process ends before its k-th flush, rename or removal, for every k; the next one resumes."""
    left = [0]

    def stop(owner, name):
        real = getattr(owner, name)

        def step(*args, **kwargs):
            left[0] -= 1
            if left[0] == 0:
                raise Killed
            return real(*args, **kwargs)

        monkeypatch.setattr(owner, name, step)

    for owner, name in ((np.memmap, "flush"), (Path, "replace"), (Path, "mkdir"), (Path, "rename"), (os, "fsync")):
        stop(owner, name)
    kills = 0
    while True:
        left[0], directory = kills + 1, tmp_path / str(kills)
        try:
            build(directory)
            break
        except Killed:
            kills += 1
        left[0] = -1
        assert contents(build(directory)) == whole
    assert kills > 4 * 4


@pytest.mark.parametrize("name", ["replace", "rename"])
def test_a_kill_while_finishing_does_not_start_anew(tmp_path, whole, monkeypatch, name):
    writer = begin(tmp_path / "c")
    fill(writer, N)
    with monkeypatch.context() as patch:
        patch.setattr(Path, name, lambda *_: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            writer.finish(SETTINGS | {"items": N})
    writer.close()
    with pytest.raises(CacheError, match=r"other settings \(seed\)"):
        begin(tmp_path / "c", seed=1)
    with begin(tmp_path / "c") as again:
        assert again.done == N
    assert contents(build(tmp_path / "c")) == whole


def test_a_kill_after_the_last_rename_leaves_a_whole_directory(tmp_path, whole, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda *_, **__: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            build(tmp_path / "c")
    assert contents(tmp_path / "c") == whole
    assert building_dir(tmp_path / "c").exists()
    # What it left behind is no reason to believe that a new build had items already.
    shutil.rmtree(tmp_path / "c")
    with begin(tmp_path / "c") as writer:
        assert writer.done == 0
    assert contents(build(tmp_path / "c")) == whole


@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.integers(0, N), st.data())
def test_nothing_behind_the_mark_matters(tmp_path_factory, whole, done, data):
    """Bytes behind the committed items garbled, files cut there: the same directory comes of it."""
    directory = tmp_path_factory.getbasetemp() / "torn"
    for old in (directory, building_dir(directory)):
        shutil.rmtree(old, ignore_errors=True)
    cache = begun(directory, done)
    for name, spec in SPECS.items():
        path = cache / f"{name}.npy"
        raw = path.read_bytes()
        mark = len(spec.header) + done * (spec.nbytes // N)
        rest = data.draw(st.binary(max_size=len(raw) - mark))
        path.write_bytes(raw[:mark] + rest + raw[mark + len(rest) :] * data.draw(st.booleans()))
    assert contents(build(directory, step=3)) == whole


@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.sampled_from(sorted(SPECS)), st.integers(0, 127), st.integers(1, 255))
def test_a_damaged_header_is_made_again_with_its_items(tmp_path_factory, whole, name, place, change):
    directory = tmp_path_factory.getbasetemp() / "header"
    for old in (directory, building_dir(directory)):
        shutil.rmtree(old, ignore_errors=True)
    path = begun(directory, 4) / f"{name}.npy"
    raw = bytearray(path.read_bytes())
    raw[place] ^= change
    path.write_bytes(raw)
    with begin(directory) as writer:
        assert writer.done == 0
    assert contents(build(directory)) == whole


@pytest.mark.parametrize("length", [0, 6, 128, 150])
def test_a_lost_tail_never_leaves_a_hole_in_committed_items(tmp_path, whole, length):
    path = begun(tmp_path / "c", 4) / "wide.npy"
    path.write_bytes(path.read_bytes()[:length])
    (path.parent / "ids.npy").unlink()
    assert contents(build(tmp_path / "c")) == whole


def test_a_kill_while_damage_is_mended_does_not_trust_the_old_mark(tmp_path, whole, monkeypatch):
    (begun(tmp_path / "c", 4) / "ids.npy").unlink()
    with monkeypatch.context() as patch:
        patch.setattr(ArrayWriter, "commit", lambda *_: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            begin(tmp_path / "c")
    assert contents(build(tmp_path / "c")) == whole


@pytest.mark.parametrize("text", ["", "{", "[]", '{"done": null}', "\x00"])
def test_a_mark_that_says_nothing_is_no_mark(tmp_path, whole, text):
    begun(tmp_path / "c", 4)
    (building_dir(tmp_path / "c") / "progress.json").write_text(text)
    assert contents(build(tmp_path / "c")) == whole


CHILD = """
import sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
import test_arrays
print("ready", flush=True)
test_arrays.build(Path(sys.argv[2]), step=1)
"""


@pytest.mark.slow
def test_sigkill_at_random_times(tmp_path, whole):
    """Real processes, really killed; the last one gets through."""
    rng, directory, killed = random.Random(5), tmp_path / "c", 0
    for attempt in range(5):
        command = [sys.executable, "-c", CHILD, str(Path(__file__).parent), str(directory)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
            assert child.stdout.readline() == "ready\n"
            if attempt < 4:
                time.sleep(rng.uniform(0, 0.006))
                child.send_signal(signal.SIGKILL)
            killed += child.wait(60) == -signal.SIGKILL
        if directory.exists():
            break
    assert killed > 0
    assert contents(directory) == whole


# ---- refusals


def test_other_settings_are_refused_by_name(tmp_path):
    begun(tmp_path / "c", 2)
    with pytest.raises(CacheError, match=r"c\.building .*settings \(layers, new, seed\)"):
        begin(tmp_path / "c", seed=1, layers=[1], new=True)
    build(tmp_path / "c")
    with pytest.raises(CacheError, match="c exists: remove it"):
        begin(tmp_path / "c")
    assert [p.name for p in tmp_path.iterdir()] == ["c"]


@pytest.mark.parametrize("text", ["", "{", "[1]", "\x00"])
def test_settings_that_cannot_be_read_are_refused(tmp_path, text):
    begun(tmp_path / "c", 2)
    (building_dir(tmp_path / "c") / "settings.json").write_text(text)
    with pytest.raises(CacheError, match=r"settings \(.*can't be read.*remove it"):
        begin(tmp_path / "c")


@pytest.fixture
def free(monkeypatch):
    """Says how many bytes the disk has left."""

    def free(amount):
        usage = namedtuple("Usage", "total used free")(9e9, 8e9, amount)
        monkeypatch.setattr(arrays_module.shutil, "disk_usage", lambda _: usage)

    return free


def test_a_full_disk_is_seen_first_and_less_may_be_asked_for(tmp_path, free):
    free(1_000_000)
    writer = ArrayWriter(tmp_path / "c", SETTINGS)
    with pytest.raises(CacheError, match=r"needs 1\.2 MB and .* has 1 MB free"):
        writer.allocate({"big": Spec(dtype=np.dtype(np.uint8), shape=(1_200_000,))})
    assert not list(tmp_path.iterdir())
    with ArrayWriter(tmp_path / "c", SETTINGS | {"seed": 1}) as writer:
        writer.allocate({"big": Spec(dtype=np.dtype(np.uint8), shape=(900_000,))})


def test_text_that_is_made_already_outlives_a_full_disk(tmp_path, free):
    free(100)
    with ArrayWriter(tmp_path / "c", SETTINGS) as writer:
        (writer.building / "text").write_text("made")
        with pytest.raises(CacheError, match=r"stays in .*c\.building"):
            writer.allocate(SPECS)
    free(10_000)
    with begin(tmp_path / "c") as writer:
        assert (writer.building / "text").read_text() == "made"


def test_room_is_reserved_so_that_going_on_needs_none(tmp_path, free):
    big = {"big": Spec(dtype=np.dtype(np.uint8), shape=(64, 65536))}
    with ArrayWriter(tmp_path / "c", SETTINGS) as writer:
        writer.allocate(big)
        assert (writer.building / "big.npy").stat().st_blocks * 512 >= 64 * 65536
        writer.arrays["big"][:48] = 1
        writer.commit(48)
    free(0)
    with ArrayWriter(tmp_path / "c", SETTINGS) as writer:
        writer.allocate(big)
        assert writer.done == 48


def test_what_a_copy_has_lost_of_it_is_reserved_anew(tmp_path, free):
    big = {"big": Spec(dtype=np.dtype(np.uint8), shape=(64, 65536))}
    with ArrayWriter(tmp_path / "c", SETTINGS) as writer:
        writer.allocate(big)
        path = writer.building / "big.npy"
        head, size = path.read_bytes()[:4096], path.stat().st_size
    path.write_bytes(head)
    os.truncate(path, size)  # sparse
    free(15 * 65536)
    with ArrayWriter(tmp_path / "c", SETTINGS) as writer, pytest.raises(CacheError, match=r"needs 4\.19 MB"):
        writer.allocate(big)
    free(65 * 65536)
    with ArrayWriter(tmp_path / "c", SETTINGS) as writer:
        writer.allocate(big)
    assert path.stat().st_blocks * 512 >= 64 * 65536


def test_one_writer_at_a_time(tmp_path, whole):
    first = begin(tmp_path / "c")
    fill(first, 2)
    with pytest.raises(CacheError, match=r"another .*c\.building: wait"):
        begin(tmp_path / "c")
    fill(first, N)
    first.finish(SETTINGS | {"items": N})
    assert contents(tmp_path / "c") == whole
    with begin(tmp_path / "d"):
        pass
    with begin(tmp_path / "d") as again:
        assert again.done == 0
