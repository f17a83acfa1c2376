"""A draft as a server gets it, checked first, because servers silently load broken drafts.

Only configs and file headers are read, and no device is opened: a TPU belongs to one process, and that is the server.
"""

import dataclasses
from pathlib import Path
from typing import Any

from dflash.config import ConfigError, DraftConfig
from dflash.serving.connection import ServingError
from dflash.weights.config_json import read_target_shape
from dflash.weights.export import check_directory
from dflash.weights.load import find_draft
from dflash.weights.snapshot import holds_weights, read_json


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ServedDraft:
    """A `DFlashDraftModel` directory: its config as read, and as written; `block_size` is what it is served with."""

    directory: Path
    config: DraftConfig
    raw: dict[str, Any]
    block_size: int


def served_draft(name_or_dir: str | Path, target: Path, block_size: int | None = None) -> ServedDraft:
    """The draft for a server, with every fault of its config and its tensors in one ServingError.

    Of the target's config its layers, width and vocabulary are read: a server may run families that we can't. Raises
    WeightsError where no draft is, HubError for a name that the hub does not have.
    """
    _, directory = find_draft(name_or_dir)
    if not holds_weights(directory):
        raise ServingError(
            f"a server reads a DFlashDraftModel directory, and {name_or_dir} holds training runs: write one with "
            f"`python -m dflash export {name_or_dir} NEW_DIR`"
        )
    shape = read_target_shape(read_json(target, "config.json"), str(target / "config.json"))
    try:
        config = check_directory(directory, shape)
    except ConfigError as error:
        raise ServingError(f"no server gets this draft, {directory}: {error}") from None
    if config.conv is not None:
        raise ServingError(
            f"no server knows DFlash 2 drafts, and {directory} is one: they would drop parts of it; name a plain "
            "DFlash draft (smollm2-135m-plain for the target smollm2-135m)"
        )
    size = config.block_size if block_size is None else block_size
    if not 2 <= size <= config.block_size:
        raise ServingError(
            f"a draft is served with blocks of 2 up to what it was trained for, {config.block_size}; got {size}"
        )
    raw = read_json(directory, "config.json")
    return ServedDraft(directory=directory.resolve(), config=config, raw=raw, block_size=size)
