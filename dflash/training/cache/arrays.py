"""A directory of .npy arrays of known shape, filled in order, that survives being killed at any byte.

It is made in `<name>.building/cache`. `progress.json` beside it says how many items are safely on the disk. It is
replaced only after their bytes were flushed, so anything damaged by a kill lies after that mark and is written again.
The last step is one rename. The finished directory is the same, byte for byte, as one made without interruption.
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

from dflash.config import TargetConfig, UserError
from dflash.host.disk import open_file, read_object, size_text, write_atomically


class CacheError(UserError, ValueError):
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
        """The header of its file."""
        file = io.BytesIO()
        descr = np.lib.format.dtype_to_descr(np.dtype(self.dtype))
        np.lib.format.write_array_header_1_0(file, {"descr": descr, "fortran_order": False, "shape": self.shape})
        return file.getvalue()


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """What token ids and positions of a cache stay below: the target's vocabulary and its last position."""

    vocab_size: int = 2**31
    max_position: int = 2**31

    @classmethod
    def of(cls, target: TargetConfig | None, meta: Mapping[str, Any]) -> Self:
        """Those of the target; without one, those that the cache says its target had. Ids are int32 in any case."""
        if target is not None:
            return cls(vocab_size=target.vocab_size, max_position=target.max_position)
        names = [f.name for f in dataclasses.fields(cls)]
        return cls(**{name: meta[name] for name in names if type(meta.get(name)) is int})

    def token_faults(self, name: str, ids: np.ndarray) -> list[str]:
        """The fault of token ids that the target does not have, in a list; empty for good ones."""
        low, high = np.min(ids, initial=0), np.max(ids, initial=0)
        if 0 <= low <= high < self.vocab_size:
            return []
        return [f"{name} must be token ids of the target, 0 to {self.vocab_size - 1}, got {low} to {high}"]

    def position_faults(self, name: str, starts: np.ndarray, lengths: np.ndarray | int) -> list[str]:
        """The same of rows of these lengths whose first tokens have the positions `starts`."""
        ends = np.asarray(starts, np.int64) + lengths
        low, high = np.min(starts, initial=0), np.max(ends, initial=0)
        if low >= 0 and high <= self.max_position:
            return []
        return [f"{name} must leave every row within the target's {self.max_position} positions, got {low} to {high}"]


def building_dir(directory: Path) -> Path:
    """Where `directory` is built until it is complete."""
    return directory.with_name(directory.name + ".building")


def read_meta(directory: Path) -> dict[str, Any]:
    """meta.json of a complete cache. Raises CacheError for a directory that isn't one."""
    path, building = directory / "meta.json", building_dir(directory)
    unfinished = directory if (directory / "settings.json").exists() else building if building.exists() else None
    if not path.is_file() and unfinished:
        raise CacheError(f"a cache is read when it is complete; {unfinished} is not finished: run build-cache again")
    if not path.is_file():
        raise CacheError(f"a teacher cache is a directory with a meta.json, or an .npz file; {directory} is neither")
    return read_object(path, CacheError, "build the cache again")


def _is_whole(path: Path, spec: Spec) -> bool:
    """Whether a file has the header and the length of its array."""
    if not path.is_file() or path.stat().st_size != len(spec.header) + spec.nbytes:
        return False
    with path.open("rb") as file:
        return file.read(len(spec.header)) == spec.header


class ArrayWriter:
    """Fills the arrays of a new directory item by item; when it resumes, `done` items are already on the disk.

    `settings` (JSON) is everything that the contents depend on; a directory begun with other settings is refused. The
    caller writes other files of the cache into `building`. There is one writer at a time: it holds a lock until it
    finishes, closes or dies.
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
            # Another process may have finished it in the meantime.
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
        """Writes the settings, or compares them with those of a killed run."""
        if not os.path.lexists(self._settings):
            write_atomically(self._settings, text)
        elif (earlier := _text_of(self._settings)) != text:
            names = _differing(earlier, text)
            raise CacheError(
                f"{self._root} was begun with other settings ({', '.join(names)}): finish it with those, or "
                "remove it to start over"
            )
        if not self.building.exists():
            # Without the arrays the mark means nothing: a kill between the last rename and the end leaves this.
            self._progress.unlink(missing_ok=True)
            self.building.mkdir()

    def allocate(self, specs: Mapping[str, Spec]) -> None:
        """Makes the arrays, or opens those of a killed run. Raises CacheError if the disk has no room.

        If one of those has lost its tail or its header, all items are made again.
        """
        paths = {name: self.building / f"{name}.npy" for name in specs}
        self._check_room(sum(s.nbytes for s in specs.values()), [p for p in paths.values() if p.exists()])
        done = self._read_progress()
        if done is not None and all(_is_whole(paths[name], spec) for name, spec in specs.items()):
            for path in paths.values():  # a copy may have lost what was reserved
                _reserve(path)
            self.arrays = {n: np.lib.format.open_memmap(path, mode="r+") for n, path in paths.items()}
            self.done = done
            return
        self._progress.unlink(missing_ok=True)
        for name, spec in specs.items():
            paths[name].unlink(missing_ok=True)
            self.arrays[name] = np.lib.format.open_memmap(paths[name], mode="w+", dtype=spec.dtype, shape=spec.shape)
            _reserve(paths[name])
        self.commit(0)

    def _read_progress(self) -> int | None:
        try:
            return int(json.loads(_text_of(self._progress))["done"])
        except (ValueError, TypeError, KeyError, RecursionError):
            return None

    def _check_room(self, total: int, present: list[Path]) -> None:
        """What a killed run's arrays already occupy counts as free."""
        needed = total - sum(path.stat().st_blocks * 512 for path in present)
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
            f"this cache needs {size_text(needed)} and {self.directory.parent} has {size_text(free)} free: make "
            f"room, or ask for less (fewer or shorter samples, fewer context features){kept}"
        )

    def commit(self, done: int) -> None:
        """Records that the first `done` items are written, once they are on the disk."""
        for array in self.arrays.values():
            array.flush()
        write_atomically(self._progress, json.dumps({"done": done}) + "\n")
        self.done = done

    def finish(self, meta: Mapping[str, Any]) -> Path:
        """Writes meta.json, the mark of a complete cache, and renames the directory to its final name."""
        write_atomically(self.building / "meta.json", json.dumps(meta, indent=2, sort_keys=True) + "\n")
        self.building.rename(self.directory)
        self.discard()
        return self.directory

    def discard(self) -> None:
        """Removes what was begun and closes."""
        shutil.rmtree(self._root, ignore_errors=True)
        self.close()

    def close(self) -> None:
        """Releases the lock; what is committed stays."""
        self.arrays.clear()
        self._lock.release(force=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _reserve(path: Path) -> None:
    """Takes the disk's space for the whole file: written through a map, a full disk would end the process."""
    with path.open("r+b") as file:
        os.posix_fallocate(file.fileno(), 0, path.stat().st_size)


def _text_of(path: Path) -> str:
    """A small file of ours; empty where there is none that can be read."""
    try:
        with open_file(path) as file:
            return file.read().decode("utf-8", errors="replace")
    except OSError:
        return ""


def _differing(earlier: str, text: str) -> list[str]:
    try:
        old, new = json.loads(earlier), json.loads(text)
        return sorted(k for k in old.keys() | new.keys() if old.get(k) != new.get(k))
    except (ValueError, AttributeError, RecursionError):
        return ["they can't be read"]
