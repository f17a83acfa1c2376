"""A draft as a server gets it, checked before one does: servers load broken drafts without a word.

The weights are read in a process of its own, on the CPU: no device is opened here, since a TPU belongs to one process,
and that is the server's.
"""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from dflash.config import ConfigError, DraftConfig, check_draft, read_draft_config, read_target_config
from dflash.serving.server import ServingError
from dflash.weights.huggingface import WeightsError, read_draft, read_json
from dflash.weights.runs import is_root, is_run


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Draft:
    """A `DFlashDraftModel` directory: its config as read, and as written; `block_size` is what it is served with."""

    directory: Path
    config: DraftConfig
    raw: dict[str, Any]
    block_size: int


def load(directory: Path, target: Path, block_size: int | None = None) -> Draft:
    """The draft for a server, with every fault of its config and its tensors in one ServingError."""
    if is_run(directory) or is_root(directory):
        raise ServingError(
            f"a server reads a DFlashDraftModel directory, and {directory} holds training runs: write one with "
            f"`python -m dflash export {directory} NEW_DIR`"
        )
    found = _faults_found_apart(directory, target)
    if found:
        raise ServingError(f"no server gets this draft, {directory}: " + "; ".join(found))
    raw = read_json(directory, "config.json")
    config = read_draft_config(raw, str(directory / "config.json"))
    size = config.block_size if block_size is None else block_size
    if not 2 <= size <= config.block_size:
        raise ServingError(
            f"a draft is served with blocks of 2 up to what it was trained for, {config.block_size}; got {size}"
        )
    return Draft(directory=directory.resolve(), config=config, raw=raw, block_size=size)


def _faults_found_apart(directory: Path, target: Path) -> list[str]:
    """`faults`, in a process of its own."""
    package = str(Path(__file__).parents[2])
    paths = os.pathsep.join(filter(None, (package, os.environ.get("PYTHONPATH"))))
    command = [sys.executable, "-m", "dflash.serving.draft", str(target), str(directory)]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": paths}
    looked = subprocess.run(command, capture_output=True, text=True, env=environment)
    if looked.returncode:
        raise ServingError(f"the draft {directory} could not be checked: {looked.stderr[-1000:]}")
    return json.loads(looked.stdout)


def faults(directory: Path, target: Path) -> list[str]:
    """What is wrong with a draft for this target: exact set of tensors and shapes, layers, mask token, vocabulary."""

    def fits() -> None:
        config = read_draft_config(read_json(directory, "config.json"), str(directory / "config.json"))
        check_draft(config, read_target_config(read_json(target, "config.json"), str(target / "config.json")))

    found: list[str] = []
    for look in (fits, lambda: read_draft(directory)):
        try:
            look()
        except (ConfigError, WeightsError) as error:
            found += [str(error)] if str(error) not in found else []
    return found


if __name__ == "__main__":
    print(json.dumps(faults(Path(sys.argv[2]), Path(sys.argv[1]))))
