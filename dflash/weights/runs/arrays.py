"""Arrays on disk in EasyDeL's form: zarr v2 directories with zstd chunks, listed in tensorstore_index.json.

tensorstore reads a missing chunk as zeros. So our index also holds the SHA-256 of every array; for arrays without one
(EasyDeL's own) `lost_chunks` counts missing chunks.
"""

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import tensorstore

from dflash.config import counted_faults, fault_list
from dflash.host.disk import read_object
from dflash.weights.snapshot import ARRAY_INDEX, WeightsError

_INTEGERS = ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")
FLOATS = ("float32", "bfloat16", "float16")
STORED_DTYPES = (*FLOATS, "float64", "bool", *_INTEGERS)
# The version that every reader accepts: older ones look for prefixes only in this one, newer ones in any.
_VERSION = "2.0"
# Files are synced together after all are written, not one by one.
_CONTEXT = tensorstore.Context({"file_io_sync": False})


@dataclasses.dataclass(frozen=True, slots=True)
class Entry:
    """One array of an index. `path` is relative to the run directory; `sha256` is of its bytes in C order."""

    path: str
    shape: tuple[int, ...]
    dtype: str
    sha256: str | None = None


def read_run_object(directory: Path, name: str) -> dict[str, Any]:
    """The JSON object in a file of a run directory. Raises WeightsError when there is none."""
    if not (directory / name).is_file():
        raise WeightsError(f"a run directory needs {name}; {directory} has none: copy the run again")
    return read_object(directory / name, WeightsError, "it is damaged, give another run")


def _spec(path: Path) -> dict[str, Any]:
    return {"driver": "zarr", "kvstore": {"driver": "file", "path": str(path)}}


def _open(path: Path) -> tensorstore.TensorStore:
    """An array to read. Raises ValueError for what would crash tensorstore, or hang it."""
    if any(not (part.is_file() or part.is_dir()) for part in path.rglob("*")):
        raise ValueError("a part of it is no file")
    read_object(path / ".zarray", ValueError, "it is damaged")
    return tensorstore.open(_spec(path), open=True, context=_CONTEXT).result()


def _sha256(value: np.ndarray) -> str:
    return hashlib.sha256(value.reshape(-1).view(np.uint8).data).hexdigest()


def _reason(error: Exception) -> str:
    """What tensorstore says, without the specification that follows."""
    return str(error).split(" [tensorstore_spec=")[0].split(" [source locations=")[0]


def write_array(directory: Path, path: str, value: np.ndarray) -> Entry:
    """Writes an array (a dtype of STORED_DTYPES, any shape) to the zarr directory `path`; returns its index entry."""
    value = np.asarray(value, order="C")
    try:
        return _write_array(directory, path, value)
    except ValueError as error:
        raise WeightsError(
            f"a checkpoint can't be written to {directory.parent} ({_reason(error)}): make room there"
        ) from None


def _write_array(directory: Path, path: str, value: np.ndarray) -> Entry:
    store = tensorstore.open(
        # Without the last key a chunk of zeros may not be written and would look lost.
        _spec(directory / path)
        | {"metadata": {"compressor": {"id": "zstd", "level": 1}}, "store_data_equal_to_fill_value": True},
        create=True,
        dtype=tensorstore.dtype(value.dtype),
        shape=value.shape,
        context=_CONTEXT,
    ).result()
    writing = store.write(value)
    entry = Entry(path, value.shape, value.dtype.name, _sha256(value))
    writing.result()
    return entry


def write_index(directory: Path, prefixes: Mapping[str, Iterable[Entry]]) -> None:
    """Writes tensorstore_index.json: the entries of each prefix (`model`, `tx`)."""
    lists = {prefix: [dataclasses.asdict(entry) for entry in entries] for prefix, entries in prefixes.items()}
    index = {"format": "tensorstore", "version": _VERSION, "prefixes": lists}
    (directory / ARRAY_INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _entry_fault(entry: Any, prefix: str) -> str | None:
    if not isinstance(entry, dict) or not isinstance(entry.get("path"), str):
        return f"{prefix} must list objects with a path, got {entry!r}"
    path, shape, sha256 = PurePosixPath(entry["path"]), entry.get("shape"), entry.get("sha256")
    if path.is_absolute() or ".." in path.parts or path.parts[:1] != (prefix,) or str(path) != entry["path"]:
        return f"a path must stay inside {prefix}/, got {entry['path']!r}"
    if not isinstance(shape, list) or not all(type(n) is int and n >= 0 for n in shape):
        return f"the shape of {path} must be a list of sizes, got {shape!r}"
    if not isinstance(entry.get("dtype"), str) or not isinstance(sha256, str | None):
        return f"dtype and sha256 of {path} must be text, got {entry.get('dtype')!r} and {sha256!r}"
    return None


def read_index(directory: Path) -> dict[str, dict[str, Entry]]:
    """The entries of an index by prefix and path. Raises WeightsError with every fault of the file."""
    raw = read_run_object(directory, ARRAY_INDEX)
    prefixes = raw.get("prefixes")
    if raw.get("format") != "tensorstore" or not isinstance(prefixes, dict):
        raise WeightsError(
            f"{directory / ARRAY_INDEX} must have the format tensorstore and prefixes, got {raw.get('format')!r} and "
            f"{type(prefixes).__name__}: give another run"
        )
    faults: list[str] = []
    index: dict[str, dict[str, Entry]] = {}
    for prefix, entries in prefixes.items():
        index[prefix] = {}
        for entry in entries if isinstance(entries, list) else [entries]:
            fault = _entry_fault(entry, prefix)
            if fault is None and entry["path"] in index[prefix]:
                fault = f"{entry['path']} is listed twice"
            if fault is not None:
                faults.append(fault)
                continue
            sizes = tuple(entry["shape"])
            index[prefix][entry["path"]] = Entry(entry["path"], sizes, entry["dtype"], entry.get("sha256"))
    if faults:
        raise WeightsError(f"{directory / ARRAY_INDEX} can't be used: " + fault_list(faults) + ". Give another run")
    return index


def add_hashes(directory: Path) -> None:
    """Adds the SHA-256 of every array to an index that EasyDeL has just written."""
    hashed = {
        prefix: [dataclasses.replace(e, sha256=_sha256(_read_array(directory, e))) for e in entries.values()]
        for prefix, entries in read_index(directory).items()
    }
    write_index(directory, hashed)


def lost_chunks(directory: Path, entries: Iterable[Entry]) -> list[str]:
    """Every array with missing chunks, and how many: they would be read as zeros."""
    lost = []
    for entry in entries:
        try:
            store = _open(directory / entry.path)
        except (ValueError, OSError):
            lost.append(f"{entry.path} (without a readable .zarray)")
            continue
        assert store.kvstore is not None
        chunk = store.chunk_layout.read_chunk.shape or ()
        wanted = math.prod(math.ceil(n / (c or 1)) for n, c in zip(store.shape, chunk, strict=True))
        chunks = len([key for key in store.kvstore.list().result() if not key.startswith(b".z")])
        if chunks < wanted:
            lost.append(f"{entry.path} ({wanted - chunks} of {wanted} chunks)")
    return lost


def check_chunks(directory: Path, entries: Iterable[Entry], may_be_zero: tuple[str, ...]) -> None:
    """Raises WeightsError for arrays of EasyDeL's own that lack chunks.

    tensorstore may omit chunks of zeros when it writes. A bias or a sink may well be zeros: paths that end so are let
    through. No other weight may be.
    """
    lost = lost_chunks(directory, [e for e in entries if e.sha256 is None and not e.path.endswith(may_be_zero)])
    if lost:
        raise WeightsError(
            f"{directory} was copied incompletely, and weights would be read as zeros {counted_faults(lost)}: copy it "
            "again"
        )


def _read_array(directory: Path, entry: Entry) -> np.ndarray:
    """One array. Raises ValueError if the disk does not match the index."""
    path = directory / entry.path
    if not path.resolve().is_relative_to(directory.resolve()):
        raise ValueError(f"it leads out of the run directory, to {path.resolve()}")
    store = _open(path)
    if (store.shape, store.dtype.name) != (entry.shape, entry.dtype):
        raise ValueError(f"its .zarray says {store.dtype.name} {list(store.shape)}")
    chunk = store.chunk_layout.read_chunk.shape or ()
    # tensorstore allocates a whole chunk, and ends the process if memory runs out.
    if any((c or 1) > max(n, 1) for c, n in zip(chunk, entry.shape, strict=True)):
        raise ValueError(f"its .zarray says chunks of {list(chunk)}, more than the array")
    value = np.asarray(store.read().result(), order="C")
    if entry.sha256 is not None and _sha256(value) != entry.sha256:
        raise ValueError("its bytes are not those that were written, or not all are there")
    return value


def read_arrays(directory: Path, entries: Iterable[Entry]) -> dict[str, np.ndarray]:
    """The arrays by path, in the dtypes of the index, checked against it and their SHA-256.

    Raises WeightsError with every array that has a missing, truncated or changed chunk.
    """
    values, faults = {}, []
    for entry in entries:
        try:
            values[entry.path] = _read_array(directory, entry)
        except (ValueError, OSError) as error:
            faults.append(f"{entry.path} ({_reason(error)})")
    if faults:
        raise WeightsError(
            f"arrays of {directory} are damaged {counted_faults(faults)}. Copy the run again, or give another one"
        )
    return values
