"""Where a result comes from: what every benchmark file says of itself, under `dflash` (data/results.schema.json).

Nothing of the environment is written but what is named here, and no device is opened: what was measured said already
what it ran on.
"""

import hashlib
import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

SCHEMA_VERSION = 1
ROOT = Path(__file__).parents[1]
# What decides the figures; results and notes that lie beside it don't.
_SOURCES = ("dflash", "bench", "conftest.py", "pytest.ini", "pyproject.toml")
_PACKAGES = (
    "jax",
    "jaxlib",
    "libtpu",
    "flax",
    "optax",
    "numpy",
    "tensorstore",
    "easydel",
    "pytest",
    "pytest-benchmark",
)
_FLAG_LISTS = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")
_SETTINGS = (
    "DFLASH_NATIVE",
    "JAX_DEFAULT_MATMUL_PRECISION",
    "JAX_ENABLE_X64",
    "JAX_NUM_CPU_DEVICES",
    "JAX_PLATFORMS",
    "OMP_NUM_THREADS",
)
# Facts of the measured cases that hold for the run: device, then what was read.
_DEVICE = ("platform", "device_kind", "device_count", "cpu_count", "cpu_model", "kernels", "mesh")
_READ = ("target", "target_sha256", "draft", "draft_sha256", "prompts", "prompts_sha256", "cache_sha256")
# Tokens in the plural, and tokenizers, are what language models read.
_SECRET_NAME = re.compile(r"token(?!s|iz)|secret|passw|credential|(?:api|access|private)[-_]?key", re.IGNORECASE)
_SECRET_VALUE = re.compile(r"\b(?:hf_|ghp_|gho_|github_pat_|glpat-|sk-|xox[bp]-|AKIA)[\w-]{6,}|(?<=://)[^/@\s]+(?=@)")
_HIDDEN = "***"


def redact(command: Sequence[str]) -> list[str]:
    """The words of a command with secrets as ***: by their form, by their option's name, by a variable that holds them.

    The environment is read for this, and only for this.
    """
    held = [v for n, v in os.environ.items() if _SECRET_NAME.search(n) and len(v) >= 8]
    words: list[str] = []
    for word in command:
        follows = bool(words) and "=" not in words[-1] and _names_secret(words[-1])
        name, sign, _ = word.partition("=")
        if follows and not word.startswith("-"):
            word = _HIDDEN
        elif sign and " " not in name and _names_secret(name):
            word = f"{name}={_HIDDEN}"
        elif " " in word:  # a command line in one word, as --server-args has it
            option = f"{name}=" if sign and " " not in name else ""
            word = option + " ".join(redact(word.removeprefix(option).split(" ")))
        for value in held:
            word = word.replace(value, _HIDDEN)
        words.append(_SECRET_VALUE.sub(_HIDDEN, word))
    return words


def _names_secret(option: str) -> bool:
    return bool(_SECRET_NAME.search(option)) and (option.startswith("-") or option.isupper())


def flags() -> dict[str, str]:
    """Settings that change what is computed, by allow-list; a flag's value that is a path is left out."""
    found = {name: os.environ[name] for name in _SETTINGS if os.environ.get(name)}
    for name in _FLAG_LISTS:
        words = [w for w in os.environ.get(name, "").split() if w.startswith("--")]
        if words:
            found[name] = " ".join(w.split("=")[0] + "=..." if "/" in w else w for w in words)
    return {name: " ".join(redact(text.split())) for name, text in found.items()}


def git() -> dict[str, Any] | None:
    """Commit of this checkout, and whether a file that decides the figures differs from it; None without a checkout."""

    def ask(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, encoding="utf-8")
        except OSError:  # no git here
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    # Installed below somebody else's repository, git would speak of that one.
    if not ask("ls-files", str(Path(__file__))):
        return None
    changed = ask("status", "--porcelain", "--", *(s for s in _SOURCES if (ROOT / s).exists()))
    return {"commit": ask("rev-parse", "HEAD"), "dirty": bool(changed)}


def sources_sha256() -> str:
    """SHA-256 of the code that decides the figures, file by file; it needs no git and no commit."""
    code = hashlib.sha256()
    for folder in ("dflash", "bench"):
        for path in sorted(p for p in (ROOT / folder).rglob("*") if p.suffix in (".py", ".cc", ".h")):
            code.update(f"{path.relative_to(ROOT)} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return code.hexdigest()


def versions() -> dict[str, str]:
    """Versions of what is installed of the packages that matter."""
    found = {}
    for name in ("dflash-bench", *_PACKAGES):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def compile_cache() -> str:
    """jax's cache of compiled programs as it is now: off, cold (empty) or warm. Ask before anything is compiled."""
    config: Any = jax.config  # its flags are unknown to type checkers
    directory = config.jax_compilation_cache_dir
    if not directory or not config.jax_enable_compilation_cache:
        return "off"
    if "://" in directory:  # a bucket: looking into it would need a network
        return "unknown"
    return "warm" if Path(directory).is_dir() and any(Path(directory).iterdir()) else "cold"


def provenance(benchmarks: Sequence[dict[str, Any]], command: Sequence[str], cache: str) -> dict[str, Any]:
    """What a benchmark file says of itself. `benchmarks` are the file's own, `cache` what `compile_cache` said first.

    A fact that differs between cases (a sweep over drafts) is a list of its values; the cases say which is whose.
    """
    infos = [b["extra_info"] for b in benchmarks]

    def facts(names: Sequence[str]) -> dict[str, Any]:
        found: dict[str, list[Any]] = {n: [] for n in names}
        for info in infos:
            for name in names:
                if info.get(name) is not None and info[name] not in found[name]:
                    found[name].append(info[name])
        return {n: values[0] if len(values) == 1 else values for n, values in found.items() if values}

    return {
        "schema_version": SCHEMA_VERSION,
        "git": git(),
        "versions": versions(),
        "device": facts(_DEVICE),
        "read": facts(_READ),
        "seeds": {name: seed for info in infos for name, seed in (info.get("seeds") or {}).items()} or None,
        "flags": flags(),
        "command": redact(command),
        "compile_cache": cache,
    }


def of_command(facts: Mapping[str, Any], cache: str) -> dict[str, Any]:
    """The same of `python -m dflash ...`: `facts` name the device, what was read and the seeds, as a benchmark's do."""
    return provenance([{"extra_info": dict(facts)}], ["dflash", *sys.argv[1:]], cache)
