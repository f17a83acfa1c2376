"""Devices: opened on purpose, and one sentence when one can't be had."""

import os
from pathlib import Path

import jax
import pytest

from dflash.host import device
from dflash.host.device import DeviceError, device_facts, open_default_device, open_device

# What jax says when another process has the chip, by generation of libtpu.
HELD = {
    "pid": "Backend 'tpu' failed to initialize: ABORTED: The TPU is already in use by process with pid 176028. Not "
    "attempting to load libtpu.so in this process.. Available backends are ['cpu']",
    "lockfile": "Unable to initialize backend 'tpu': ABORTED: Internal error when accessing libtpu multi-process "
    'lockfile. Run "$ sudo rm /tmp/libtpu_lockfile".',
    "vfio": "Unable to initialize backend 'tpu': UNKNOWN: TPU initialization failed: open(/dev/vfio/0): Device or "
    "resource busy: Device or resource busy; Couldn't open iommu group /dev/vfio/0",
}


@pytest.fixture
def jax_says(monkeypatch):
    """Lets jax find no TPU, for the reason given, and the CPU otherwise."""
    asked = []

    def install(text):
        cpus = jax.devices("cpu")

        def devices(kind=None):
            asked.append(kind)
            if kind == "tpu":
                raise RuntimeError(text)
            return cpus

        monkeypatch.setattr(jax, "devices", devices)
        return asked

    return install


@pytest.fixture
def tpu_host(monkeypatch):
    """A host with a TPU where nothing is said about platforms."""
    monkeypatch.setenv("TPU_NAME", "local")
    monkeypatch.setattr(device, "_platforms", lambda: "")


def bare_host(monkeypatch, exists=lambda path: False, found=()):
    for name in [n for n in os.environ if n.startswith("TPU_")]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(Path, "exists", exists)
    monkeypatch.setattr(Path, "glob", lambda self, pattern: iter([self / name for name in found]))


def test_the_cpu_opens():
    assert open_device("cpu").platform == "cpu"
    assert open_default_device().platform == "cpu"


@pytest.mark.parametrize("text", HELD.values(), ids=HELD)
def test_a_held_tpu_is_one_sentence(jax_says, text):
    jax_says(text.replace(". ", ".\n"))
    with pytest.raises(DeviceError) as caught:
        open_device("tpu")
    said = str(caught.value)
    assert said.startswith("the TPU is held by another process")
    assert "end that process" in said
    assert "\n" not in said
    assert caught.value.__cause__ is None


def test_a_device_that_is_not_here_is_one_sentence(jax_says):
    jax_says("Unknown backend tpu. Available backends are ['cpu']")
    with pytest.raises(DeviceError, match=r"^no tpu .*--run-on.*Unknown backend tpu"):
        open_device("tpu")


def test_a_busy_gpu_is_no_held_tpu(monkeypatch):
    def devices(kind=None):
        raise RuntimeError("Unable to initialize backend 'cuda': Device or resource busy")

    monkeypatch.setattr(jax, "devices", devices)
    with pytest.raises(DeviceError, match=r"^no gpu can be opened here"):
        open_device("gpu")


def test_what_jax_says_is_cut_short(jax_says):
    jax_says("no " * 10_000)
    with pytest.raises(DeviceError) as caught:
        open_device("tpu")
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("text", HELD.values(), ids=HELD)
def test_a_held_tpu_is_not_replaced_by_the_cpu(tpu_host, jax_says, text):
    jax_says(text)
    with pytest.raises(DeviceError, match=r"^the TPU is held by another process"):
        open_default_device()


def test_a_host_that_only_looks_like_a_tpu_uses_its_cpu(tpu_host, jax_says):
    asked = jax_says("Unknown backend tpu. Available backends are ['cpu']")
    assert open_default_device().platform == "cpu"
    assert asked == ["tpu", None]


def test_a_tpu_is_left_alone_where_platforms_are_named(tpu_host, monkeypatch, jax_says):
    monkeypatch.setattr(device, "_platforms", lambda: "cpu")
    asked = jax_says(HELD["pid"])
    assert open_default_device().platform == "cpu"
    assert asked == [None]


@pytest.mark.parametrize(("platforms", "said"), [("cuda", "^no cuda can be opened"), ("tpu", "^the TPU is held")])
def test_platforms_that_were_named_and_fail(monkeypatch, platforms, said):
    def devices(kind=None):
        raise RuntimeError(f"Unable to initialize backend '{platforms}': The TPU is already in use")

    monkeypatch.setattr(jax, "devices", devices)
    monkeypatch.setattr(device, "_platforms", lambda: platforms)
    with pytest.raises(DeviceError, match=said):
        open_default_device()


def test_a_bare_host_is_no_tpu_host(monkeypatch):
    bare_host(monkeypatch)
    assert not device.looks_like_tpu_host()


@pytest.mark.parametrize("name", ["TPU_NAME", "TPU_ACCELERATOR_TYPE"])
def test_a_tpu_host_by_its_environment(monkeypatch, name):
    bare_host(monkeypatch)
    monkeypatch.setenv(name, "")
    assert not device.looks_like_tpu_host()
    monkeypatch.setenv(name, "v5litepod-8")
    assert device.looks_like_tpu_host()


def test_a_tpu_host_by_its_files(monkeypatch):
    bare_host(monkeypatch, found=["accel0"])
    assert device.looks_like_tpu_host()
    bare_host(monkeypatch, exists=lambda path: str(path) == "/dev/vfio/vfio")
    assert device.looks_like_tpu_host()


def test_facts_of_a_result():
    facts = device_facts(open_device("cpu"))
    assert facts["platform"] == "cpu"
    assert facts["device_count"] >= 1
    assert isinstance(facts["device_kind"], str)
    assert facts["cpu_model"]


@pytest.mark.parametrize("opened", [device.open_default_device, lambda: device.open_device("cpu"), device.check_width])
def test_64_bits_are_refused(opened):
    with jax.enable_x64(True), pytest.raises(DeviceError, match="unset JAX_ENABLE_X64"):
        opened()
