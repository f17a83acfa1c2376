"""Devices: which one a run uses, opened once and on purpose. Importing this module opens none."""

import os
import platform
from pathlib import Path
from typing import Any

import jax

from dflash.config import UserError

KINDS = ("cpu", "gpu", "tpu")


class DeviceError(UserError, RuntimeError):
    """A device that can't be opened: which one, why, and what to do."""


def looks_like_tpu_host() -> bool:
    """Whether this host seems to have a TPU, judged by its files and environment: asking jax would take the chip."""
    if os.environ.get("TPU_NAME") or os.environ.get("TPU_ACCELERATOR_TYPE"):
        return True
    return any(Path("/dev").glob("accel*")) or Path("/dev/vfio/vfio").exists()


# What libtpu says when another process holds the chip; v5 and later name the vfio group.
_HELD = ("already in use", "lockfile", "resource busy")


def _is_held(error: RuntimeError) -> bool:
    return any(words in str(error).lower() for words in _HELD)


def _refusal(kind: str, error: RuntimeError) -> DeviceError:
    reason = " ".join(str(error).split())[:200]
    if "tpu" in kind and _is_held(error):
        return DeviceError(
            "the TPU is held by another process (a TPU belongs to one process at a time): end that process, then run "
            f"again; jax says: {reason}"
        )
    return DeviceError(
        f"no {kind} can be opened here: run on another device (pytest's --run-on, or JAX_PLATFORMS), or install jax "
        f"for {kind}; jax says: {reason}"
    )


def check_width() -> None:
    """Raises DeviceError where jax computes in 64 bits: no program supports it, and no figure was measured with it."""
    config: Any = jax.config  # type checkers do not know jax's flags
    if config.jax_enable_x64:
        raise DeviceError("every program here computes in 32 bits or fewer, and jax is set to 64: unset JAX_ENABLE_X64")


def open_device(kind: str) -> jax.Device:
    """The first device of a kind (cpu, gpu or tpu). Raises DeviceError in one sentence when there is none."""
    check_width()
    try:
        return jax.devices(kind)[0]
    except RuntimeError as error:
        raise _refusal(kind, error) from None


def _platforms() -> str:
    """The platforms that jax was told to use (JAX_PLATFORMS), empty where it may choose."""
    config: Any = jax.config  # type checkers do not know jax's flags
    return config.jax_platforms or ""


def open_default_device() -> jax.Device:
    """The device that jax picks. Raises DeviceError, also if a TPU is held: jax would silently use the CPU."""
    check_width()
    platforms = _platforms()
    try:
        if not platforms and looks_like_tpu_host():
            jax.devices("tpu")
    except RuntimeError as error:
        if _is_held(error):
            raise _refusal("tpu", error) from None
    try:
        return jax.devices()[0]
    except RuntimeError as error:
        raise _refusal(platforms or "device", error) from None


def default_dtype(platform: str) -> str:
    """The default dtype of computation: bfloat16 on an accelerator, float32 on a CPU."""
    return "float32" if platform == "cpu" else "bfloat16"


def cpu_model() -> str:
    """The name of this host's CPU, if the system reports it: jax calls every one of them cpu."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.lower().startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def device_facts(device: jax.Device, *, dp: int = 1, tp: int = 1) -> dict[str, Any]:
    """What a result says about the device it was measured on."""
    return {
        "platform": device.platform,
        "device_kind": device.device_kind,
        "device_count": jax.device_count(device.platform),
        "cpu_count": os.cpu_count(),
        "cpu_model": cpu_model(),
        "mesh": {"dp": dp, "tp": tp},
    }
