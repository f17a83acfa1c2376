"""Devices: which one a run uses, opened once and on purpose. Importing this opens none."""

import os
from pathlib import Path
from typing import Any

import jax
import numpy as np

KINDS = ("cpu", "gpu", "tpu")


class DeviceError(RuntimeError):
    """A device that can't be had: which one, why, and what to do."""


def looks_like_tpu_host() -> bool:
    """Whether this host seems to have a TPU, from its files and environment: asking jax would take the chip."""
    if os.environ.get("TPU_NAME") or os.environ.get("TPU_ACCELERATOR_TYPE"):
        return True
    return any(Path("/dev").glob("accel*")) or Path("/dev/vfio/vfio").exists()


def open_device(kind: str) -> jax.Device:
    """The first device of a kind (cpu, gpu or tpu). Raises DeviceError in one sentence when there is none."""
    try:
        return jax.devices(kind)[0]
    except RuntimeError as error:
        text = " ".join(str(error).split())
    if kind == "tpu" and any(word in text.lower() for word in ("in use", "lockfile", "libtpu_lockfile", "already")):
        raise DeviceError(
            "the TPU is held by another process (a TPU belongs to one process at a time): end that process, then run "
            f"again; jax says: {text[:200]}"
        )
    raise DeviceError(
        f"no {kind} can be opened here: run on another device (--run-on), or install jax for {kind}; "
        f"jax says: {text[:200]}"
    )


def device_facts(device: jax.Device) -> dict[str, Any]:
    """What a result says of the device it was measured on."""
    return {
        "platform": device.platform,
        "device_kind": device.device_kind,
        "device_count": jax.device_count(device.platform),
        "cpu_count": os.cpu_count(),
    }


def weight_bytes(arrays: Any) -> int:
    """Bytes of all arrays in a pytree."""
    return sum(int(np.prod(a.shape)) * a.dtype.itemsize for a in jax.tree.leaves(arrays))
