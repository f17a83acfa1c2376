"""A directory of .npy arrays of known shape, filled in order, that survives being killed at any byte.

It is made in `<name>.building/cache`. `progress.json` beside that says how many items are on the disk for good; it is
replaced only after their bytes were flushed, so whatever a kill tore lies behind that mark and is written again. The
last step is one rename: the finished directory is the same, byte for byte, as one that was made in one go.
"""

import dataclasses
import io
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import filelock
import numpy as np


class CacheError(ValueError):
    """A teacher cache that can't be read or built: the rule, what came, and what to do."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Spec:
    """An array to be filled: dtype and shape."""

    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape, dtype=object)) * np.dtype(self.dtype).itemsize

    @property
    def header(self) -> bytes:
        """What its file begins with."""
        file = io.BytesIO()
        descr = np.lib.format.dtype_to_descr(np.dtype(self.dtype))
        np.lib.format.write_array_header_1_0(file, {"descr": descr, "fortran_order": False, "shape": self.shape})
        return file.getvalue()


def building_dir(directory: Path) -> Path:
    """Where `directory` is being made until it is whole."""
    return directory.with_name(directory.name + ".building")


def write_atomically(path: Path, text: str) -> None:
    """Text under a temporary name beside `path`, flushed to the disk, then renamed."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def read_meta(directory: Path) -> dict[str, Any]:
    """meta.json of a whole cache. Raises CacheError for a directory that isn't one."""
    path, building = directory / "meta.json", building_dir(directory)
    unfinished = directory if (directory / "settings.json").exists() else building if building.exists() else None
    if not path.is_file() and unfinished:
        raise CacheError(f"a cache is read when it is whole; {unfinished} is not finished: run build-cache again")
    if not path.is_file():
        raise CacheError(f"a teacher cache is a directory with a meta.json, or an .npz file; {directory} is neither")
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CacheError(f"{path} is no valid JSON ({error}): build the cache again") from None
    if not isinstance(meta, dict):
        raise CacheError(f"{path} must hold a JSON object, got {type(meta).__name__}: build the cache again")
    return meta


def _is_whole(path: Path, spec: Spec) -> bool:
    """Whether a file has the header and the length that its array must have."""
    if not path.is_file() or path.stat().st_size != len(spec.header) + spec.nbytes:
        return False
    with path.open("rb") as file:
        return file.read(len(spec.header)) == spec.header


class ArrayWriter:
    """Fills the arrays of a new directory item by item; `done` items of it are on the disk already when it resumes.

    `settings` (JSON) is all that the contents follow from: what other settings began is refused, not mixed. Other files
    that belong to the cache are written into `building` by the caller. One writer at a time: it holds a lock until it
    is finished, closed or gone.
    """

    def __init__(self, directory: Path, settings: Mapping[str, Any]):
        self.directory, self._root = directory, building_dir(directory)
        self.building = self._root / "cache"
        self._settings, self._progress = self._root / "settings.json", self._root / "progress.json"
        self.arrays: dict[str, np.memmap] = {}
        self.done = 0
        self._check_new()
        self._lock = filelock.FileLock(self._root / "lock")
        self._root.mkdir(parents=True, exist_ok=True)
        try:
            self._lock.acquire(timeout=0)
        except filelock.Timeout:
            raise CacheError(
                f"a cache is built by one process at a time; another one is building {self._root}: wait until it ends"
            ) from None
        try:
            # The other process may have finished it just now.
            self._check_new()
            self._begin(json.dumps(settings, indent=2, sort_keys=True) + "\n")
        except CacheError:
            self.close()
            raise

    def _check_new(self) -> None:
        if self.directory.exists():
            raise CacheError(
                f"a cache is built into a new directory; {self.directory} exists: remove it or name another"
            )

    def _begin(self, text: str) -> None:
        """Keeps the settings, or compares them with those of the run that was killed."""
        if not self._settings.exists():
            write_atomically(self._settings, text)
        elif (begun := self._settings.read_text(encoding="utf-8", errors="replace")) != text:
            differing = _differing(begun, text)
            raise CacheError(
                f"{self._root} was begun with other settings ({', '.join(differing)}): finish it with those, or "
                "remove it to start anew"
            )
        if not self.building.exists():
            # Without its arrays a mark says nothing: this is what a kill leaves between the last rename and the end.
            self._progress.unlink(missing_ok=True)
            self.building.mkdir()

    def allocate(self, specs: Mapping[str, Spec]) -> None:
        """Makes the arrays, or opens those of a run that was killed. Raises CacheError when the disk has no room.

        When one of those has lost its tail or its header, all items are made again.
        """
        paths = {name: self.building / f"{name}.npy" for name in specs}
        self._check_room(sum(s.nbytes for s in specs.values()), [p for p in paths.values() if p.exists()])
        done = self._read_progress()
        if done is not None and all(_is_whole(paths[name], spec) for name, spec in specs.items()):
            self.arrays = {n: np.lib.format.open_memmap(path, mode="r+") for n, path in paths.items()}
            self.done = done
            return
        self._progress.unlink(missing_ok=True)
        for name, spec in specs.items():
            self.arrays[name] = np.lib.format.open_memmap(paths[name], mode="w+", dtype=spec.dtype, shape=spec.shape)
        self.commit(0)

    def _read_progress(self) -> int | None:
        try:
            return int(json.loads(self._progress.read_text(encoding="utf-8"))["done"])
        except (OSError, ValueError, TypeError, KeyError):
            return None

    def _check_room(self, total: int, begun: list[Path]) -> None:
        """Arrays are sparse files: what a killed run left has not taken all of its room."""
        needed = total - sum(path.stat().st_blocks * 512 for path in begun)
        free = shutil.disk_usage(self._root).free
        if needed <= free:
            return
        kept = ""
        if any(self.building.iterdir()):
            kept = (
                f"; what was made so far stays in {self._root} for the same settings: remove it before asking for less"
            )
        else:
            self.discard()
        raise CacheError(
            f"this cache needs {needed / 1e9:.2f} GB and {self.directory.parent} has {free / 1e9:.2f} GB free: make "
            f"room, or ask for less (fewer or shorter samples, fewer context features){kept}"
        )

    def commit(self, done: int) -> None:
        """Says that the first `done` items are written, once they are on the disk."""
        for array in self.arrays.values():
            array.flush()
        write_atomically(self._progress, json.dumps({"done": done}) + "\n")
        self.done = done

    def finish(self, meta: Mapping[str, Any]) -> Path:
        """Writes meta.json, the mark of a whole cache, and gives the directory its name."""
        write_atomically(self.building / "meta.json", json.dumps(meta, indent=2, sort_keys=True) + "\n")
        self.building.rename(self.directory)
        self.discard()
        return self.directory

    def discard(self) -> None:
        """Removes what was begun, and closes."""
        shutil.rmtree(self._root, ignore_errors=True)
        self.close()

    def close(self) -> None:
        """Lets another writer go on. What is committed stays."""
        self.arrays.clear()
        self._lock.release(force=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _differing(begun: str, text: str) -> list[str]:
    try:
        old, new = json.loads(begun), json.loads(text)
        return sorted(k for k in old.keys() | new.keys() if old.get(k) != new.get(k))
    except (ValueError, AttributeError, RecursionError):
        return ["they can't be read"]
