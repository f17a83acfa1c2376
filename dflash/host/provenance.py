"""Where a result comes from: the `dflash` entry of every benchmark file (report/results.schema.json).

Only the parts of the environment that are named here are written, and no device is opened: the measured cases say what
they ran on.
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
ROOT = Path(__file__).parents[2]
# What decides the figures; results and notes beside it do not.
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
    "transformers",
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
# All that a file may say of the environment.
FLAGS = (*_FLAG_LISTS, *_SETTINGS)
# Facts of the measured cases that hold for the run: device, then what was read.
_DEVICE = ("platform", "device_kind", "device_count", "cpu_count", "cpu_model", "kernels", "mesh")
_TARGET = ("target", "target_sha256", "draft", "draft_sha256")
_PROMPTS = ("prompts", "prompts_sha256", "chat_template_args", "template_date")
_READ = (*_TARGET, *_PROMPTS, "cache_sha256")
# Tokens (plural) and tokenizers are what language models read, not secrets.
_NAMES = r"token(?!s|iz)|secret|passw|credential|(?:api|access|private)[-_]?key|(?<![a-z])auth(?![a-z])|authorization"
_SECRET_NAME = re.compile(_NAMES, re.IGNORECASE)
# As in `Authorization: Bearer ...`, and of a URL's query.
_SCHEME = re.compile(r"(?:^|\W)bearer:?$|authorization\W+basic$", re.IGNORECASE)
_SECRET_QUERY = re.compile(rf"([?&][\w.-]*(?:{_NAMES})[\w.-]*=)[^&#\s]+", re.IGNORECASE)
_SECRET_VALUE = re.compile(r"\b(?:hf_|ghp_|gho_|github_pat_|glpat-|sk-|xox[bp]-|AKIA)[\w-]{6,}|(?<=://)[^/\s]+(?=@)")
_HIDDEN = "***"


def check_words(words: Sequence[str], error: type[Exception]) -> None:
    """Raises `error` for a word that is no text: its bytes can't be decoded, so no result could record it."""
    for word in words:
        try:
            word.encode()
        except UnicodeEncodeError:
            raise error(
                f"words of a command are {sys.getfilesystemencoding()}, since results record them; {word!r:.80} has "
                "other bytes: write or rename it so"
            ) from None


def redact(command: Sequence[str], secrets: Sequence[str] = ()) -> list[str]:
    """The words of a command with secrets as ***: by their form, by their option's name, by a variable that holds them.

    The environment is read for this, and only for this. `secrets` are further ones.
    """
    held = [*secrets, *(v for n, v in os.environ.items() if _SECRET_NAME.search(n) and len(v) >= 8)]
    words: list[str] = []
    for word in command:
        follows = bool(words) and "=" not in words[-1] and _names_secret(words[-1])
        name, sign, _ = word.partition("=")
        if (follows and not word.startswith("-")) or _SCHEME.search(" ".join(words[-2:])):
            word = _HIDDEN
        elif sign and " " not in name and _names_secret(name):
            word = f"{name}={_HIDDEN}"
        elif " " in word:  # a command line in one word, as in --server-args
            option = f"{name}=" if sign and " " not in name else ""
            word = option + " ".join(redact(word.removeprefix(option).split(" "), secrets))
        for value in held:
            word = word.replace(value, _HIDDEN)
        words.append(_SECRET_VALUE.sub(_HIDDEN, _SECRET_QUERY.sub(rf"\1{_HIDDEN}", word)))
    return words


def _names_secret(option: str) -> bool:
    return bool(_SECRET_NAME.search(option)) and (option.startswith("-") or option.isupper())


def flags() -> dict[str, str]:
    """An allow-list of settings that change what is computed; values of flags that are paths are left out."""
    settings = {name: os.environ[name] for name in _SETTINGS if os.environ.get(name)}
    for name in _FLAG_LISTS:
        words = [w for w in os.environ.get(name, "").split() if w.startswith("--")]
        if words:
            settings[name] = " ".join(w.split("=")[0] + "=..." if "/" in w else w for w in words)
    return {name: " ".join(redact(text.split())) for name, text in settings.items()}


def git() -> dict[str, Any] | None:
    """Commit of this checkout, and whether a file that decides the figures differs from it; None outside a checkout."""

    def ask(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, encoding="utf-8")
        except OSError:  # git is not installed
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    # Installed inside somebody else's repository, git would report that one.
    if not ask("ls-files", str(Path(__file__))):
        return None
    changed = ask("status", "--porcelain", "--", *(s for s in _SOURCES if (ROOT / s).exists()))
    return {"commit": ask("rev-parse", "HEAD"), "dirty": bool(changed)}


def sources_sha256() -> str:
    """SHA-256 of the code that decides the figures, file by file, without git."""
    code = hashlib.sha256()
    for folder in ("dflash", "bench"):
        for path in sorted(p for p in (ROOT / folder).rglob("*") if p.suffix in (".py", ".cc", ".h")):
            code.update(f"{path.relative_to(ROOT)} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return code.hexdigest()


def versions() -> dict[str, str]:
    """Installed versions of the packages that matter."""
    installed = {}
    for name in ("dflash-bench", *_PACKAGES):
        try:
            installed[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return installed


def compile_cache() -> str:
    """The state of jax's cache of compiled programs: off, cold (empty) or warm. Call before anything is compiled."""
    config: Any = jax.config  # its flags are unknown to type checkers
    directory = config.jax_compilation_cache_dir
    if not directory or not config.jax_enable_compilation_cache:
        return "off"
    if "://" in directory:  # a bucket: checking it would need a network
        return "unknown"
    return "warm" if Path(directory).is_dir() and any(Path(directory).iterdir()) else "cold"


def provenance(benchmarks: Sequence[dict[str, Any]], command: Sequence[str], cache: str) -> dict[str, Any]:
    """The provenance of a benchmark file. `benchmarks` are the file's; `cache` is what `compile_cache` returned first.

    A fact that differs between cases (as in a sweep over drafts) is a list of its values; the cases say which applies.
    """
    infos = [b["extra_info"] for b in benchmarks]

    def facts(names: Sequence[str]) -> dict[str, Any]:
        distinct: dict[str, list[Any]] = {n: [] for n in names}
        for info in infos:
            for name in names:
                if info.get(name) is not None and info[name] not in distinct[name]:
                    distinct[name].append(info[name])
        return {n: values[0] if len(values) == 1 else values for n, values in distinct.items() if values}

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
    """The provenance of a `python -m dflash` command: `facts` name device, inputs and seeds, as a benchmark's do."""
    return provenance([{"extra_info": dict(facts)}], ["dflash", *sys.argv[1:]], cache)
