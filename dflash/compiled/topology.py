"""TPUs that are described, not present: their devices for the compiler, and what is known of each kind of chip."""

import contextlib
import dataclasses
import importlib.util
import os
import re
from collections.abc import Iterator
from typing import Any

import jax
from jax.experimental import topologies

from dflash.config import UserError

# What libtpu reads when it is loaded: no look at a cloud's metadata, no lock against others that only compile, no
# warnings about a host that is none.
_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v6e-8",
}


class TopologyError(UserError, ValueError):
    """A topology that can't be compiled for: the rule, what came, and what to do."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Chip:
    """A device of a kind, as jax sees it.

    `hbm_bytes` is what the compiler lets a program use. `bytes_per_cycle` is the compiler's own figure for reading HBM,
    found with products of 8 columns, below the published one. `flops_per_cycle` (bfloat16), `clock_hz` and
    `link_bytes_per_s` (all links of the chip together, one way) are published.
    """

    name: str
    hbm_bytes: float
    bytes_per_cycle: float
    flops_per_cycle: float
    clock_hz: float
    link_bytes_per_s: float


_GIB = 2**30
# By the `device_kind` that jax gives. A v4's device here is one of the chip's two cores.
CHIPS = {
    "TPU v4": Chip(
        name="v4",
        hbm_bytes=15.25 * _GIB,
        bytes_per_cycle=438,
        flops_per_cycle=4 * 2 * 128 * 128,
        clock_hz=1.05e9,
        link_bytes_per_s=150e9,
    ),
    "TPU v5 lite": Chip(
        name="v5e",
        hbm_bytes=15.75 * _GIB,
        bytes_per_cycle=409,
        flops_per_cycle=4 * 2 * 128 * 128,
        clock_hz=1.5e9,
        link_bytes_per_s=200e9,
    ),
    "TPU v5": Chip(
        name="v5p",
        hbm_bytes=95.74 * _GIB,
        bytes_per_cycle=1022,
        flops_per_cycle=8 * 2 * 128 * 128,
        clock_hz=1.75e9,
        link_bytes_per_s=600e9,
    ),
    "TPU v6 lite": Chip(
        name="v6e",
        hbm_bytes=31.25 * _GIB,
        bytes_per_cycle=817,
        flops_per_cycle=4 * 2 * 256 * 256,
        clock_hz=1.75e9,
        link_bytes_per_s=448e9,
    ),
}
KINDS = {"v4": 3, "v5e": 2, "v5p": 3, "v6e": 2}  # dimensions of a topology's name


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Topology:
    """Devices that programs can be lowered for, and nothing can run on."""

    name: str
    devices: tuple[Any, ...]
    chip: Chip


@contextlib.contextmanager
def _environment() -> Iterator[None]:
    """Variables for libtpu while it is loaded, and unset afterwards."""
    before = {name: os.environ.get(name) for name in _ENVIRONMENT}
    os.environ.update({name: value for name, value in _ENVIRONMENT.items() if before[name] is None})
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)


def _host_of(name: str) -> tuple[str, int]:
    """The topology of at least a whole host that holds this one, and how many of its devices are meant (0: all).

    Raises TopologyError.
    """
    match = re.fullmatch(r"(v\w+):(\d+(?:x\d+)*)", name)
    kind, sizes = (match[1], [int(s) for s in match[2].split("x")]) if match else ("", [])
    if KINDS.get(kind) != len(sizes) or min(sizes, default=0) < 1:
        raise TopologyError(
            "a topology is a chip and the sizes of its grid, such as v5e:2x4, v6e:2x4, v6e:1x1, v5p:2x2x1 or v4:2x2x1; "
            f"got {name!r}"
        )
    if max(sizes) == 1:
        return f"{kind}:" + "x".join(["2", "2", "1"][: len(sizes)]), 1
    return name, 0


def describe(name: str) -> Topology:
    """A topology by libtpu's name for it (`v6e:2x4`), or one chip of it (`v6e:1x1`). Opens no device.

    Puts jax on the CPU of this process, where no backend runs yet: it must not take a TPU to ask about one. Raises
    TopologyError in one sentence, also where libtpu is not installed.
    """
    host, count = _host_of(name)
    if importlib.util.find_spec("libtpu") is None:
        raise TopologyError(
            "the TPU's compiler comes with libtpu, which is not installed here (Linux on x86-64, no TPU needed): "
            'pip install "jax[tpu]", or this project with its extra [tpu]'
        )
    jax.config.update("jax_platforms", "cpu")
    try:
        with _environment():
            devices: list[Any] = topologies.get_topology_desc(platform="tpu", topology_name=host).devices
    except (RuntimeError, ValueError) as error:
        message = " ".join(str(error).split())[:200]
        if "lockfile" in message or "already in use" in message:
            raise TopologyError(
                "libtpu is locked by another process (one that runs on this host's TPU, or was killed): end that "
                f"process, then run again; libtpu says: {message}"
            ) from None
        raise TopologyError(f"libtpu knows no topology {name}: name one that exists; it says: {message}") from None
    kind = devices[0].device_kind
    if kind not in CHIPS:
        raise TopologyError(f"a topology must be of one of {sorted(KINDS)}; {name} is of {kind!r}")
    return Topology(name=name, devices=tuple(devices[:count] if count else devices), chip=CHIPS[kind])
