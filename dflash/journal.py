"""What a sweep measured so far: a line of JSON for each case, on the disk as soon as its figures are known.

It lies beside the benchmark file, `x.cases.jsonl` for `x.json`, and is only ever added to: delete it to forget. A
record counts for a case of the same identity, which is the hash of everything that decides its result.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

Record = dict[str, Any]
# A case that failed, or was too noisy to count, is measured again.
_AGAIN = ("failed", "invalid")


class JournalError(ValueError):
    """A journal that can't be read: which one, and what to do."""


def identity(facts: Any) -> str:
    """SHA-256 of anything that JSON can hold, whatever the order of its names."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True, allow_nan=False).encode()).hexdigest()


def journal_path(json_file: Path) -> Path:
    """Where the journal of a benchmark file lies."""
    return json_file.with_suffix(".cases.jsonl")


class Journal:
    """Records are {identity, info, seconds}. With `path` None nothing is kept; with `resume` what is there counts."""

    def __init__(self, path: Path | None, *, resume: bool = False):
        """Raises JournalError for a file that is no journal."""
        self._path = path
        self._known: dict[str, Record] = {}
        if path is not None and path.exists():
            records = _read(path)
            if resume:
                self._known = {r["identity"]: r for r in records if r["info"]["status"] not in _AGAIN}

    def find(self, identity: str) -> Record | None:
        """The record of an earlier run, or None where the case has to be measured."""
        return self._known.get(identity)

    def add(self, identity: str, info: dict[str, Any], seconds: list[float]) -> None:
        """Writes a record; when this returns it is on the disk."""
        if self._path is None:
            return
        line = json.dumps({"identity": identity, "info": info, "seconds": seconds}, allow_nan=False)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())


def _read(path: Path) -> list[Record]:
    """Every whole record. A line that a kill tore is cut off, so that the next one starts on a line of its own."""
    text = path.read_bytes()
    whole = text[: text.rfind(b"\n") + 1]
    try:
        records = [json.loads(line) for line in whole.splitlines()]
        _ = [(r["identity"], r["info"]["status"], r["seconds"]) for r in records]
    except (ValueError, TypeError, KeyError) as error:
        raise JournalError(
            f"{path} must hold identity, info and seconds of a case in each line; delete it to start anew ({error!r})"
        ) from None
    if len(whole) < len(text):
        os.truncate(path, len(whole))
    return records
