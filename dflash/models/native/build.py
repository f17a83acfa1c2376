"""Compiles `kernels.cc` into a library in the user's cache folder, once per kind of CPU, compiler and jaxlib."""

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

import jax
import jaxlib

from dflash.host.disk import default_cache_dir

FOLDER = Path(__file__).parent
SOURCE = FOLDER / "kernels.cc"
COMPILE_SECONDS = 300


class BuildError(Exception):
    """There are no native kernels; the message says why."""


def library() -> Path:
    """The compiled kernels: from the cache folder, or compiled now where that has none that can be loaded.

    Raises BuildError if that fails.
    """
    compiler = _compiler()
    flags = _flags()
    folder = _folder()
    path = folder / f"{_key(compiler, flags)}.so"
    if not _loads(path):
        _compile(compiler, flags, path)
    return path


def _loads(path: Path) -> bool:
    """Whether a library exists and is complete: a truncated one would turn the kernels off for good."""
    try:
        ctypes.CDLL(str(path))
    except OSError:
        return False
    return True


def _folder() -> Path:
    try:
        return default_cache_dir() / "native"
    except OSError as error:
        raise BuildError(f"there is no cache folder: {error.strerror}, {error.filename}") from None


def _compiler() -> list[str]:
    """The command of the C++ compiler: CXX if set, else the first of the usual names."""
    named = os.environ.get("CXX")
    if named:
        try:
            command = shlex.split(named)
        except ValueError as error:  # a quotation mark without its other
            raise BuildError(f"CXX must be a command, got {named[:60]!r} ({error})") from None
        if not command or shutil.which(command[0]) is None:
            raise BuildError(f"CXX names {''.join(command[:1])[:60]!r}, which is not a program on the PATH")
        return command
    for name in ("c++", "g++", "clang++"):
        program = shutil.which(name)
        if program:
            return [program]
    raise BuildError("no C++ compiler found (install one, or name it in CXX)")


def _flags() -> list[str]:
    native = "-march=native" if platform.machine().lower() in ("x86_64", "amd64") else "-mcpu=native"
    # No -ffast-math: the kernels promise the order in which an output is summed.
    return ["-O3", native, "-std=c++17", "-ffp-contract=fast", "-shared", "-fPIC", "-w"]


def _key(compiler: list[str], flags: list[str]) -> str:
    """What the library depends on, as the name of its file."""
    sources = [path.read_text() for path in sorted(FOLDER.iterdir()) if path.suffix in (".cc", ".h")]
    version = _run([*compiler, "--version"]).stdout
    parts = [*sources, version, *compiler, *flags, jaxlib.__version__, platform.machine(), _cpu_features()]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _cpu_features() -> str:
    """What -march=native compiles for (machines may share a cache folder): flags on Linux, else the CPU's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.lower().startswith(("flags", "features"))), platform.processor())


def _compile(compiler: list[str], flags: list[str], path: Path) -> None:
    """Compiles under a temporary name, then renames, so that two processes may do so at once."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
        os.close(handle)
    except OSError as error:
        raise BuildError(f"the cache folder {path.parent} can't be written: {error}") from error
    try:
        done = _run([*compiler, *flags, f"-I{jax.ffi.include_dir()}", str(SOURCE), "-o", temporary])
        if done.returncode != 0:
            first = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr[-300:])
            raise BuildError(f"{shlex.join(compiler)} failed with exit code {done.returncode}: {first.strip()}")
        Path(temporary).replace(path)
    finally:
        Path(temporary).unlink(missing_ok=True)


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=COMPILE_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{shlex.join(command[:1])} could not be run: {error}") from error
