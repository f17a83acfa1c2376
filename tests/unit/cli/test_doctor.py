"""The doctor: whatever prevents a run is found and named, with what to do; no secret is shown."""

import json
import os
import re
import subprocess
import sys
from collections import namedtuple
from importlib import metadata

import pytest

from dflash import init_draft, load_target, write_draft
from dflash.cli import doctor
from dflash.cli.main import main
from dflash.weights.tiny import write_tiny_target

Usage = namedtuple("Usage", "total used free")


def test_this_host_is_ready():
    """The host that runs the tests has what they need."""
    told = {f.name: f for f in doctor.examine("cpu")}
    assert not [f for f in told.values() if f.verdict == "fix"]

    assert "cpu" in told["devices"].found


@pytest.mark.parametrize("version", ["3.10.9", "2.7"])
def test_an_old_python(version):
    found = doctor.python_version(version)
    assert (found.verdict, found.found) == ("fix", version)
    assert ">=3.11" in found.advice


def test_dependencies_that_are_missing_or_old(monkeypatch):
    asked = ["numpy>=9000", "no-such-thing>=1", "jax>=0.1", 'torch>=9000; extra == "oracle"']
    monkeypatch.setattr(metadata, "requires", lambda name: asked)
    (found,) = doctor.packages()
    assert found.verdict == "fix"
    assert f"numpy>=9000 (here {metadata.version('numpy')}), no-such-thing>=1 (here none)" in found.advice
    assert "torch" not in found.advice
    assert "jax>=0.1" not in found.advice


def installed(monkeypatch, **versions):
    monkeypatch.setattr(metadata, "requires", lambda name: ['libtpu==0.0.42.*; extra == "tpu"', "numpy>=2"])
    monkeypatch.setattr(doctor, "_version", versions.get)


@pytest.mark.parametrize(
    ("version", "here", "verdict", "words"),
    [
        (None, False, "ok", "no TPU seems to be here"),
        (None, True, "fix", "none, on a host with a TPU"),
        ("0.0.42.1", True, "ok", "0.0.42.1"),
        ("0.0.41", True, "fix", "asks for ==0.0.42.*"),
        ("0.0.41", False, "note", "asks for ==0.0.42.*"),
    ],
)
def test_libtpu_is_the_one_that_jax_is_made_for(version, here, verdict, words, monkeypatch):
    installed(monkeypatch, libtpu=version)
    monkeypatch.setattr(doctor, "looks_like_tpu_host", lambda: here)
    found = doctor.libtpu()
    assert found.verdict == verdict
    assert words in found.found
    assert ("[tpu]" in found.advice) == (verdict != "ok")


def jax_opens(monkeypatch, *devices, code=0, stderr=""):
    told = [{"platform": p, "kind": k, "bytes": b} for p, k, b in devices]

    def run(command, **_):
        return subprocess.CompletedProcess(command, code, f"noise\n{json.dumps(told)}\n", stderr)

    monkeypatch.setattr(doctor.subprocess, "run", run)


CHIP = ("tpu", "TPU v5 lite", 16e9)


@pytest.mark.parametrize(("version", "verdict"), [(None, "ok"), ("0.1.0", "fix")])
def test_another_package_with_our_import_name(version, verdict, monkeypatch):
    installed(monkeypatch, dflash=version)
    finding = doctor.namesake()
    assert finding.verdict == verdict
    assert (version or "no other") in finding.found


def test_the_models_that_variables_name_are_looked_at(monkeypatch, tmp_path):
    monkeypatch.delenv("TEACHER_SNAPSHOT_DIR", raising=False)
    monkeypatch.delenv("DRAFT_RUN_DIR", raising=False)
    assert doctor.named_models() == []
    write_tiny_target(tmp_path / "target", "llama")
    monkeypatch.setenv("TEACHER_SNAPSHOT_DIR", str(tmp_path / "target"))
    monkeypatch.setenv("DRAFT_RUN_DIR", f"smollm2-135m,untrained,{tmp_path / 'none'}")
    verdicts = [(f.name, f.verdict) for f in doctor.named_models()]
    assert verdicts == [("TEACHER_SNAPSHOT_DIR", "ok"), ("DRAFT_RUN_DIR", "ok"), ("DRAFT_RUN_DIR", "fix")]
    assert doctor.named_models()[-1].advice.endswith(" or untrained")  # which a benchmark takes
    (tmp_path / "target" / "config.json").write_text("[]")
    assert doctor.named_models()[0].verdict == "fix"


VARIABLES = ("TEACHER_SNAPSHOT_DIR", "DRAFT_RUN_DIR", "DFLASH_TP", "DFLASH_DTYPE")


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """A tiny target that the variables name, without a draft; gives the folder."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    write_tiny_target(tmp_path / "target", "llama", num_hidden_layers=6, num_key_value_heads=4)
    monkeypatch.setenv("TEACHER_SNAPSHOT_DIR", str(tmp_path / "target"))
    return tmp_path


def opened(platform, room, count=1):
    return [{"platform": platform, "kind": "x", "bytes": room}] * count


def test_the_built_in_models_are_counted_without_being_there(monkeypatch):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(doctor, "target_directory", lambda name: pytest.fail("it would be fetched"))
    found = doctor.fit(opened("tpu", 16e9))
    assert found.verdict == "ok"
    assert "target 269 MB" in found.found
    assert "(bfloat16, tp 1, batch 1, 2624 tokens)" in found.found
    assert found.found.endswith("of 16 GB")


def test_what_does_not_fit_is_split_over_as_few_devices_as_hold_it(tiny, monkeypatch):
    whole = sum(doctor._held(doctor._Models.meant("tpu").configs(), "bfloat16", 1).values())
    assert doctor.fit(opened("tpu", whole)).verdict == "ok"
    found = doctor.fit(opened("tpu", whole - 1, 2))
    assert (found.verdict, found.advice) == ("fix", "does not fit: try --tp 2")
    # Its 4 query heads leave nothing for 8.
    found = doctor.fit(opened("tpu", whole * 0.4, 1))
    assert found.advice == "does not fit: try --tp 4 on a host with 4 such devices, here are 1"
    assert doctor.fit(opened("tpu", 10)).advice == "does not fit: use a host with more memory"
    monkeypatch.setenv("DFLASH_TP", "2")
    assert doctor.fit(opened("tpu", whole - 1, 2)).verdict == "ok"
    monkeypatch.setenv("DFLASH_TP", "3")
    assert "tp must divide" in doctor.fit(opened("tpu", whole)).advice
    for wrong in ("x", "0", "9" * 5000):
        monkeypatch.setenv("DFLASH_TP", wrong)
        assert doctor.fit(opened("tpu", whole)).advice.startswith("tp must be")


def test_a_cpu_has_what_is_available_and_no_parts(tiny, monkeypatch):
    monkeypatch.setattr(doctor, "available_memory", lambda: 1000)
    found = doctor.fit(opened("cpu", None))
    assert found.verdict == "fix"
    assert "float32" in found.found
    assert found.advice == "does not fit: use a host with more memory, or try --dtype bfloat16"
    monkeypatch.undo()
    assert 0 < doctor.available_memory() <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def test_drafts_are_counted_together_and_caches_one_by_one(tiny, monkeypatch):
    target = load_target(tiny / "target", "bfloat16")
    for layers in (1, 2):
        write_draft(init_draft(target, num_layers=layers), tiny / f"draft{layers}")

    def held(*names):
        monkeypatch.setenv("DRAFT_RUN_DIR", ",".join(names))
        return doctor._held(doctor._Models.meant("tpu").configs(), "bfloat16", 1)

    one, two, both = held(f"{tiny}/draft1"), held(f"{tiny}/draft2"), held(f"{tiny}/draft1", f"{tiny}/draft2")
    assert both == two | {"draft": one["draft"] + two["draft"]}
    assert held("untrained") == two


def test_what_cannot_be_read_is_a_finding(tiny, monkeypatch):
    write_draft(init_draft(load_target(tiny / "target")), tiny / "draft")
    monkeypatch.setenv("DRAFT_RUN_DIR", str(tiny / "draft"))
    for file in (tiny / "draft" / "config.json", tiny / "target" / "config.json"):
        file.write_text("[" * 100_000)
        found = doctor.fit(opened("cpu", None))
        assert (found.verdict, found.found) == ("fix", "not known")
        assert str(file) in found.advice
    monkeypatch.setenv("TEACHER_SNAPSHOT_DIR", str(tiny / "nowhere"))
    assert "nowhere" in doctor.fit(opened("cpu", None)).advice
    assert doctor.fit("jax opened none").verdict == "note"
    monkeypatch.setenv("TEACHER_SNAPSHOT_DIR", "smollm2-135m")
    monkeypatch.setenv("DRAFT_RUN_DIR", "untrained")
    assert doctor.fit(opened("gpu", None)).advice == "the device does not tell its memory"


def test_devices_are_counted_by_kind(monkeypatch):
    jax_opens(monkeypatch, *[CHIP] * 4)
    found = doctor.devices(doctor.open_devices(), "tpu")
    assert (found.verdict, found.found) == ("ok", "4 x tpu TPU v5 lite (16 GB)")


def test_a_tpu_that_somebody_holds_is_said_with_who(monkeypatch):
    """jax silently uses the CPU; the doctor does not."""
    jax_opens(monkeypatch, ("cpu", "cpu", None))
    monkeypatch.setattr(doctor, "looks_like_tpu_host", lambda: True)
    monkeypatch.setattr(doctor, "holders", lambda: [(176028, "python"), (9, "sglang")])
    found = doctor.devices(doctor.open_devices())
    assert found.verdict == "fix"
    assert "no tpu" in found.found
    assert "end process 176028 (python), 9 (sglang)" in found.advice


def test_a_device_that_fails_or_hangs_is_said(monkeypatch):
    jax_opens(monkeypatch, code=1, stderr="Traceback\nRuntimeError: no backend 'x'\n")
    found = doctor.devices(doctor.open_devices())
    assert (found.verdict, found.found.endswith(": RuntimeError: no backend 'x'")) == ("fix", True)

    def hang(command, timeout, **_):
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(doctor.subprocess, "run", hang)
    assert doctor.devices(doctor.open_devices(seconds=7)).found == "jax opened none within 7 s"


def test_a_missing_gpu_is_not_laid_on_a_tpu(monkeypatch):
    jax_opens(monkeypatch, ("cpu", "cpu", None))
    found = doctor.devices(doctor.open_devices(), "gpu")
    assert found.found.endswith("and no gpu")
    assert found.advice.startswith("install jax for gpu")


def test_who_holds_a_chip_is_read_from_its_open_files(tmp_path):
    for pid, opened in ((12, "/dev/accel0"), (7, "/dev/vfio/3"), (30, "/dev/null"), (os.getpid(), "/dev/accel0")):
        (tmp_path / str(pid) / "fd").mkdir(parents=True)
        (tmp_path / str(pid) / "fd" / "4").symlink_to(opened)
        (tmp_path / str(pid) / "comm").write_text(f"program{pid}\n")
    (tmp_path / "99").mkdir()  # gone meanwhile
    (tmp_path / "self").mkdir()
    assert doctor.holders(tmp_path) == [(7, "program7"), (12, "program12")]
    assert doctor.holders(tmp_path / "nowhere") == []


def test_too_little_space_offers_shared_memory_and_assumes_nothing(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor, "SHARED_MEMORY", tmp_path)
    free = {tmp_path: 50e9}
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda p: Usage(0, 0, free.get(p, 1e9)))
    cache, here = doctor.space(tmp_path / "new" / "cache", tmp_path)
    assert (cache.verdict, here.verdict) == ("ok", "ok")  # not made yet: its parent counts
    free.clear()
    cache, here = doctor.space(tmp_path / "new" / "cache", tmp_path)
    assert (cache.verdict, here.verdict) == ("fix", "fix")
    assert re.match("free 2 GB, .*DFLASH_CACHE_DIR", cache.advice)
    assert "memory" in cache.advice
    monkeypatch.setattr(doctor, "SHARED_MEMORY", tmp_path / "none")
    assert "memory" not in doctor.space(tmp_path, tmp_path)[0].advice


def test_a_folder_that_may_not_be_written(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor.os, "access", lambda path, mode: False)
    assert [f.verdict for f in doctor.space(tmp_path, tmp_path)] == ["fix", "fix"]


def test_a_token_is_never_shown(monkeypatch):
    secret = "hf_abcdefghijklmnop"
    monkeypatch.setenv("HF_TOKEN", secret)
    told = doctor.examine("cpu")
    assert next(f for f in told if f.name == "HF token").found == "set"
    assert secret not in repr(told)


def test_a_token_that_cannot_be_read_is_a_finding(monkeypatch):
    def broken():
        raise NotADirectoryError(20, "Not a directory", "/home/x/token")

    monkeypatch.setattr(doctor.huggingface_hub, "get_token", broken)
    found = doctor.token()
    assert (found.verdict, found.found) == ("fix", "/home/x/token: Not a directory")
    assert "HF_HOME" in found.advice
    monkeypatch.setattr(doctor.huggingface_hub, "get_token", lambda: b"\xff\xfe".decode())
    found = doctor.token()
    assert (found.verdict, found.found) == ("fix", "its file is no text")


def test_the_command_ends_with_1_when_something_needs_fixing(monkeypatch, capsys):
    bad = doctor.Finding(name="devices", verdict="fix", found="none", advice="buy one")
    good = doctor.Finding(name="python", verdict="ok", found="3.11.7")
    command = sys.modules["dflash.cli.doctor"]
    monkeypatch.setattr("sys.argv", ["dflash", "doctor"])
    monkeypatch.setattr(command, "examine", lambda device: [good])
    assert main() == 0
    assert capsys.readouterr().out.splitlines()[-1] == "ready"
    monkeypatch.setattr(command, "examine", lambda device: [good, bad])
    with pytest.raises(SystemExit, match="1"):
        main()
    out = capsys.readouterr().out.splitlines()
    assert out == ["ok    python   3.11.7", "fix   devices  none; buy one", "to fix before a run: devices"]
    monkeypatch.setattr("sys.argv", ["dflash", "doctor", "--json"])
    with pytest.raises(SystemExit, match="1"):
        main()
    told = json.loads(capsys.readouterr().out)
    assert told["ready"] is False
    assert told["findings"][1] == {"name": "devices", "verdict": "fix", "found": "none", "advice": "buy one"}
