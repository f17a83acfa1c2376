"""The directories of a training run: `<root>/run-<step>/`, complete or absent, the newest few kept.

A run is complete when its metadata.json exists, which is written last. A directory that is being written or removed has
a hidden name; whoever finds one while holding the root's lock may remove it, since its owner is dead.
"""

import contextlib
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

import filelock

from dflash.weights.snapshot import ARRAY_INDEX, WeightsError, holds_weights

MARKER = "metadata.json"
_NAME = re.compile(r"run-(0|[1-9][0-9]*)")
_HIDDEN = re.compile(r"\.run-[0-9]+\.[0-9a-f]+")
_LOCK = ".runs.lock"
_LOCK_TIMEOUT_S = 10
# What the EasyDeL fork's trainer left when it ran on many hosts, and why it is not read.
_MANY_HOSTS = {
    "model/graphstate.pkl": "a pickle can run any program and is not read",
    "model/graphstate.msgpack": "what it holds depends on the flax that wrote it, and is not read",
}


def step_of(directory: Path) -> int | None:
    """The step in the name `run-<step>`; None for any other name."""
    match = _NAME.fullmatch(directory.name)
    return int(match[1]) if match else None


def _missing(directory: Path) -> list[str]:
    """What this run directory lacks to be complete."""
    there = {MARKER: (directory / MARKER).is_file(), "model/": (directory / "model").is_dir()}
    return [name for name, good in there.items() if not good]


def _runs(root: Path) -> dict[int, Path]:
    """Every directory `run-<step>` of a root by its step, complete or not."""
    if not root.is_dir():
        return {}
    return {step: path for path in root.iterdir() if (step := step_of(path)) is not None and path.is_dir()}


def completed_runs(root: Path) -> dict[int, Path]:
    """The complete runs of a root by step, ascending; none for a root that does not exist."""
    return {step: path for step, path in sorted(_runs(Path(root)).items()) if not _missing(path)}


def latest_run(root: Path) -> Path | None:
    """The complete run of a root with the largest step; incomplete ones are ignored."""
    runs = completed_runs(root)
    return runs[max(runs)] if runs else None


def newest_run(root: Path) -> Path | None:
    """The run of a root with the largest step, complete or not."""
    runs = _runs(Path(root))
    return runs[max(runs)] if runs else None


def is_run(directory: Path) -> bool:
    """Whether this is a run directory, complete or not: by its index, by the files of many hosts, or by its name."""
    if any((directory / name).is_file() for name in (ARRAY_INDEX, *_MANY_HOSTS)):
        return True
    return directory.is_dir() and step_of(directory) is not None and not is_root(directory)


def is_root(directory: Path) -> bool:
    """Whether runs are or will be written here."""
    return bool(_runs(directory)) or (directory / "run_config.json").is_file()


def check_run(directory: Path) -> None:
    """Raises WeightsError unless this is a complete, readable run directory."""
    if not is_run(directory):
        raise WeightsError(
            f"{directory} is no run directory (it has no {ARRAY_INDEX}): name a run-<step> directory, or find the "
            "latest one of a root with resolve_run"
        )
    missing = _missing(directory)
    if missing:
        raise WeightsError(
            f"{directory} is incomplete, it has no {' and no '.join(missing)}: its writer was stopped, or not all was "
            "copied; give another run"
        )
    for name, reason in _MANY_HOSTS.items():
        if (directory / name).is_file():
            raise WeightsError(f"{directory} holds {name}; {reason}: save the run with tensorstore")


def resolve_run(path: Path) -> Path:
    """The run directory that `path` names: itself, or the latest complete run of a root.

    Raises WeightsError for an incomplete or pickled run, and for a root without a complete run.
    """
    path = Path(path)
    if is_run(path):
        check_run(path)
        return path
    latest = latest_run(path)
    if latest is None:
        incomplete = sorted(p.name for p in _runs(path).values())
        raise WeightsError(
            f"{path} holds no complete run-<step> directory (incomplete ones: {incomplete or 'none'}): give a run "
            "directory, or train until the first checkpoint"
        )
    check_run(latest)
    return latest


def run_at(path: Path) -> Path | None:
    """What `resolve_run` gives; None for a path that is neither a run nor a root of them, or an exported draft."""
    if holds_weights(path) or not (is_run(path) or is_root(path)):
        return None
    return resolve_run(path)


def _hidden(root: Path, step: int) -> Path:
    return root / f".run-{step}.{secrets.token_hex(6)}"


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sync_tree(directory: Path) -> None:
    for folder, _, files in os.walk(directory):
        for name in files:
            _sync(Path(folder, name))
        _sync(Path(folder))


@contextlib.contextmanager
def _locked(root: Path) -> Iterator[None]:
    """Holds the root's lock, which a killed process loses. Raises WeightsError if another writer has it."""
    try:
        with filelock.FileLock(root / _LOCK, timeout=_LOCK_TIMEOUT_S):
            yield
    except filelock.Timeout:
        raise WeightsError(f"one process at a time writes runs to {root}; another one does: stop it") from None


def _remove_older(root: Path, step: int, keep: int) -> None:
    """Removes complete runs before `step` beyond the newest `keep - 1`."""
    older = [path for s, path in completed_runs(root).items() if s < step]
    for path in older[: max(len(older) - (keep - 1), 0)]:
        doomed = path.rename(_hidden(root, step))  # half removed, it would be an incomplete run
        shutil.rmtree(doomed, ignore_errors=True)


@contextlib.contextmanager
def new_run(root: Path, step: int, keep: int | None) -> Iterator[Path]:
    """A hidden directory to fill; it becomes `run-<step>` if the block succeeds and is removed otherwise.

    Then removes earlier runs beyond the last `keep`, counting this one. Raises WeightsError when a complete
    `run-<step>` is there, or another process writes to the root.
    """
    if type(step) is not int or step < 0 or (keep is not None and (type(keep) is not int or keep < 1)):
        raise ValueError(f"step must be an integer >= 0, keep one >= 1 or None; got {step!r} and {keep!r}")
    root.mkdir(parents=True, exist_ok=True)
    final = root / f"run-{step}"
    with _locked(root):
        for litter in [path for path in root.iterdir() if _HIDDEN.fullmatch(path.name)]:
            shutil.rmtree(litter, ignore_errors=True)
        if final.is_dir() and not _missing(final):
            raise WeightsError(f"a run is written once; {final} is there: remove it, or write to another root")
        scratch = _hidden(root, step)
        try:
            scratch.mkdir()
            yield scratch
            _sync_tree(scratch)
            if os.path.lexists(final):  # incomplete: no reader accepts it
                shutil.rmtree(final.rename(_hidden(root, step)), ignore_errors=True)
            scratch.rename(final)
        except BaseException:
            shutil.rmtree(scratch, ignore_errors=True)
            raise
        _sync(root)
        if keep is not None:
            _remove_older(root, step, keep)
