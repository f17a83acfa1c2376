"""A directory of .npy arrays of known shape, filled in order, that survives being killed at any byte.

It is made as `<name>.building`. `progress.json` there says how many items are on the disk for good; it is replaced only
after their bytes were flushed, so whatever a kill tore lies behind that mark and is written again. The finished
directory has no trace of it: it is the same, byte for byte, as one that was made in one go.
"""

import dataclasses
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

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
        return int(np.prod(self.shape)) * np.dtype(self.dtype).itemsize


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


def check_room(directory: Path, needed: int) -> None:
    """Raises CacheError when the disk of `directory` has less than `needed` bytes free."""
    directory.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(directory).free
    if needed > free:
        raise CacheError(
            f"this cache needs {needed / 1e9:.2f} GB and {directory} has {free / 1e9:.2f} GB free: make room, or ask "
            "for less (fewer or shorter samples, fewer context features)"
        )


class ArrayWriter:
    """Fills the arrays of a new directory item by item; `done` items of it are on the disk already when it resumes.

    `settings` (JSON) is all that the contents follow from: what other settings began is refused, not mixed. Other files
    that belong to the cache are written into `building` by the caller.
    """

    def __init__(self, directory: Path, settings: Mapping[str, Any]):
        if directory.exists():
            raise CacheError(f"a cache is built into a new directory; {directory} exists: remove it or name another")
        self.directory, self.building = directory, building_dir(directory)
        self.building.mkdir(parents=True, exist_ok=True)
        self._settings = self.building / "settings.json"
        self._progress = self.building / "progress.json"
        self.arrays: dict[str, np.memmap] = {}
        self.done = 0
        text = json.dumps(settings, indent=2, sort_keys=True) + "\n"
        if not self._settings.exists():
            write_atomically(self._settings, text)
        elif (begun := self._settings.read_text(encoding="utf-8")) != text:
            old, new = json.loads(begun), json.loads(text)
            differing = sorted(k for k in old.keys() | new.keys() if old.get(k) != new.get(k))
            raise CacheError(
                f"{self.building} was begun with other settings ({', '.join(differing)}): finish it with those, or "
                "remove it to start anew"
            )

    def allocate(self, specs: Mapping[str, Spec]) -> None:
        """Makes the arrays, or opens those of a run that was killed. Raises CacheError when the disk has no room."""
        if self._progress.exists():
            self.done = int(json.loads(self._progress.read_text(encoding="utf-8"))["done"])
            self.arrays = {n: np.lib.format.open_memmap(self.building / f"{n}.npy", mode="r+") for n in specs}
            return
        check_room(self.building, sum(spec.nbytes for spec in specs.values()))
        for name, spec in specs.items():
            path = self.building / f"{name}.npy"
            self.arrays[name] = np.lib.format.open_memmap(path, mode="w+", dtype=spec.dtype, shape=spec.shape)
        self.commit(0)

    def commit(self, done: int) -> None:
        """Says that the first `done` items are written, once they are on the disk."""
        for array in self.arrays.values():
            array.flush()
        write_atomically(self._progress, json.dumps({"done": done}) + "\n")
        self.done = done

    def finish(self, meta: Mapping[str, Any]) -> Path:
        """Writes meta.json, the mark of a whole cache, and gives the directory its name."""
        write_atomically(self.building / "meta.json", json.dumps(meta, indent=2, sort_keys=True) + "\n")
        self.arrays.clear()
        self._progress.unlink()
        self._settings.unlink()
        self.building.rename(self.directory)
        return self.directory
