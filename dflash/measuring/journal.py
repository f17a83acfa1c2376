"""What a sweep has measured so far: a line of JSON for each case, on the disk as soon as its figures are known.

It lies beside the benchmark file, `x.cases.jsonl` for `x.json`, and is only ever appended to; delete it to start over.
A record applies to a case with the same identity, the hash of everything that decides its result.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any, NamedTuple

from dflash.host.disk import parse_object, whole_lines
from dflash.measuring.result import Decode, Failed, from_json, to_json

# A case that failed, or was too noisy to count, is measured again.
_AGAIN = ("failed", "invalid", "too-noisy")


class Record(NamedTuple):
    """A case that was measured, or failed: its hash, its result, and the seconds of its rounds."""

    identity: str
    info: Decode | Failed
    seconds: list[float]


class JournalError(ValueError):
    """A journal that can't be read: which one, and what to do."""


def identity(facts: Any) -> str:
    """SHA-256 of any JSON value, independent of the order of its keys."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True, allow_nan=False).encode()).hexdigest()


def journal_path(json_file: Path) -> Path:
    """The path of a benchmark file's journal."""
    return json_file.with_suffix(".cases.jsonl")


class Journal:
    """Records are {identity, info, seconds}. With `path` None nothing is kept; `resume` uses the records that exist."""

    def __init__(self, path: Path | None, *, resume: bool = False):
        """Raises JournalError if the file is not a journal."""
        self._path = path
        self._known: dict[str, Record] = {}
        if path is not None and os.path.lexists(path):
            records = _read(path)
            if resume:
                self._known = {r.identity: r for r in records if r.info.status not in _AGAIN}

    def find(self, identity: str) -> Record | None:
        """The record of an earlier run; None if the case must be measured."""
        return self._known.get(identity)

    def add(self, record: Record) -> None:
        """Writes a record; when this returns it is on the disk."""
        if self._path is None:
            return
        line = json.dumps(record._asdict() | {"info": to_json(record.info)}, allow_nan=False)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())


def _read(path: Path) -> list[Record]:
    """Every complete record. A line cut short by a kill is removed, so that the next record starts on its own line."""
    try:
        lines, size = whole_lines(path)
    except OSError as error:
        raise JournalError(f"{path} can't be read ({error.strerror}); delete it to start over") from None
    try:
        records = [_record(parse_object(line, "a line", ValueError, "")) for line in lines]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise JournalError(
            f"{path} must hold identity, info and seconds of a case in each line; delete it to start over ({error})"
        ) from None
    if size < path.stat().st_size:
        os.truncate(path, size)
    return records


def _record(raw: dict[str, Any]) -> Record:
    """Raises ValueError, TypeError or KeyError for what `Journal.add` did not write."""
    kind: type[Decode] | type[Failed] = Failed if raw["info"]["status"] == "failed" else Decode
    return Record(str(raw["identity"]), from_json(raw["info"], kind), [float(s) for s in raw["seconds"]])
