"""Files of this host: written whole or not at all, JSON read from outside, and the folder for what is fetched."""

import contextlib
import errno
import json
import math
import os
import re
import secrets
import struct
import tokenize
import zipfile
import zlib
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import filelock
import platformdirs


def default_cache_dir() -> Path:
    """The folder for downloads: `DFLASH_CACHE_DIR` if set, else the user's cache folder. Creates nothing.

    Raises OSError for the home of a user that does not exist.
    """
    named = os.environ.get("DFLASH_CACHE_DIR")
    folder = expanded(named) if named else Path(platformdirs.user_cache_dir("dflash"))
    if folder.parts[:1] and folder.parts[0].startswith("~"):
        raise FileNotFoundError(
            errno.ENOENT, "DFLASH_CACHE_DIR names the home of a user that does not exist", str(folder)
        )
    return folder.absolute()


def expanded(path: str | Path) -> Path:
    """The path with ~ expanded; unchanged where there is no such user, unlike `Path.expanduser`."""
    return Path(os.path.expanduser(path))  # noqa: PTH111


def nearest(path: Path) -> Path:
    """The path, or the nearest folder above it that is there."""
    return next(p for p in (path, *path.parents) if p.exists())


def _place(path: Path) -> Path:
    """Where a path's content lies: a link's own target, so that a link stays one."""
    return Path(os.path.realpath(path)) if path.is_symlink() else path


def _beside(path: Path) -> Path:
    """A name in the folder of `path` that no other process has."""
    return path.with_name(f".{path.name[:100]}.{secrets.token_hex(6)}.tmp")


def is_device(path: Path) -> bool:
    """Whether a path exists and is neither file nor directory (/dev/stdout, a pipe): written to, never replaced."""
    return path.exists() and not path.is_file() and not path.is_dir()


def check_writable(path: Path) -> None:
    """Raises OSError if no file can be written at `path`: to be asked before work whose result goes there."""
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if is_device(path):
        if not os.access(path, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return
    probe = _beside(_place(path))
    try:
        probe.touch(exist_ok=False)
    except OSError as error:
        error.filename = str(path.parent if isinstance(error, FileNotFoundError) else path)
        raise
    probe.unlink()


def claim(path: Path) -> filelock.BaseFileLock | None:
    """Reserves a file, by a lock beside it, until that is released or the process ends; None if another process has it.

    Raises OSError where no lock can be written.
    """
    lock = filelock.FileLock(path.with_name(f".{path.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        return None
    return lock


def write_atomically(path: Path, content: str | bytes) -> None:
    """Writes beside `path`, under a name that no other process has, flushes to the disk, then renames.

    A link's target is written, and a device as it is. An OSError names `path`.
    """
    data = content.encode() if isinstance(content, str) else content
    if is_device(path):
        path.write_bytes(data)
        return
    place = _place(path)
    temporary = _beside(place)
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(place)
    except BaseException as error:
        if isinstance(error, OSError):
            error.filename, error.filename2 = str(path), None
        with contextlib.suppress(OSError):  # one that was never made, on a disk that may not be written
            temporary.unlink()
        raise


def one_line(text: str) -> str:
    """The text without line breaks and what else would move a terminal's cursor or change its colours."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]+", " ", text).strip()


def size_text(count: float) -> str:
    """A number of bytes in a readable unit: `1.9 MB`."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def open_file(path: Path) -> BinaryIO:
    """Opens a file for reading. Raises OSError, also for a pipe, which might never end."""
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "it is no file", str(path))
    return path.open("rb")


def whole_lines(path: Path) -> tuple[list[bytes], int]:
    """The lines of a file that is appended to, without their breaks, and how many bytes of it they take.

    What a kill left after the last line break is not among them. Raises OSError.
    """
    with open_file(path) as file:
        text = file.read()
    size = text.rfind(b"\n") + 1
    return text[:size].splitlines(), size


# What numpy, zipfile and msgpack raise on bytes that are no array or no archive.
DAMAGE = (
    OSError,
    ValueError,
    EOFError,
    TypeError,
    SyntaxError,
    OverflowError,
    MemoryError,
    RecursionError,
    NotImplementedError,  # an unknown compression
    RuntimeError,  # an encrypted part
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
    tokenize.TokenError,
)


# No JSON file that is read here comes near these; what is beyond them takes memory, or breaks what handles it later.
_MAX_BYTES = 64 << 20
_MAX_DEPTH = 64
_MAX_DIGITS = 40


def _integer(digits: str) -> int:
    if len(digits) > _MAX_DIGITS:
        raise ValueError(f"an integer has {len(digits)} digits")
    return int(digits)


def _number(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"{text[:_MAX_DIGITS]} is beyond every float")
    return value


def _constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON, for the `object_pairs_hook` of whoever reads some. Raises ValueError for a key twice.

    json would take the last value, another reader maybe the first.
    """
    content: dict[str, Any] = {}
    for key, value in pairs:
        if key in content:
            raise ValueError(f"{key!r:.40} occurs twice in one object")
        content[key] = value
    return content


def _nests_deeper(value: Any, depth: int) -> bool:
    level = [value]
    for _ in range(depth):
        level = [v for node in level if isinstance(node, dict | list) for v in _members(node)]
    return bool(level)


def _members(node: dict[str, Any] | list[Any]) -> list[Any]:
    return node if isinstance(node, list) else list(node.values())


def parse_object(text: str | bytes, source: str, error: type[Exception], remedy: str) -> dict[str, Any]:
    """The JSON object in a text, which has finite numbers, no key twice, and no deeper nest than 64.

    Raises `error` in one sentence that names the `source` and ends with the `remedy`.
    """
    try:
        # Strict, unlike json: half of a surrogate pair could not be written anywhere again.
        value = json.loads(
            text if isinstance(text, str) else text.decode("utf-8"),
            object_pairs_hook=unique_keys,
            parse_int=_integer,
            parse_float=_number,
            parse_constant=_constant,
        )
        json.dumps(value, ensure_ascii=False).encode("utf-8")
        if _nests_deeper(value, _MAX_DEPTH):
            raise ValueError(f"it nests deeper than {_MAX_DEPTH}")
    except RecursionError:
        raise error(f"{source} is no valid JSON (it nests deeper than {_MAX_DEPTH}): {remedy}") from None
    except ValueError as reason:
        raise error(f"{source} is no valid JSON ({reason}): {remedy}") from None
    if not isinstance(value, dict):
        raise error(f"{source} must hold a JSON object, got {type(value).__name__}: {remedy}")
    return value


def read_object(path: Path, error: type[Exception], remedy: str) -> dict[str, Any]:
    """The JSON object in a file of at most 64 MiB; see `parse_object`. Raises `error`, also when it can't be read."""
    try:
        with open_file(path) as file:
            text = file.read(_MAX_BYTES + 1)
    except OSError as reason:
        raise error(f"{path} can't be read ({reason.strerror or reason}): {remedy}") from None
    if len(text) > _MAX_BYTES:
        raise error(f"{path} must be JSON of at most {_MAX_BYTES >> 20} MiB, it is larger: {remedy}")
    return parse_object(text, str(path), error, remedy)
