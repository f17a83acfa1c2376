"""The forms of drafts on disk: each has a module with one `Dialect`, and `load.DIALECTS` lists them."""

import dataclasses
import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path

from dflash.config import DraftConfig, TargetConfig
from dflash.models.draft import Draft


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Dialect:
    """One form of drafts.

    `find(path)` is the place of the draft of this form that a path means (the path itself, or the latest run of a
    root); None if it means none. `config(place, target)` reads no weights; a form that takes settings from its target
    needs one. `read(place, dtype, config)` reads the draft of this config in float32 or bfloat16. `digest(place)` is a
    SHA-256 of its config and weights. All raise ConfigError or WeightsError with every fault of the files.
    """

    name: str
    find: Callable[[Path], Path | None]
    config: Callable[[Path, TargetConfig | None], DraftConfig]
    read: Callable[[Path, str, DraftConfig], Draft]
    digest: Callable[[Path], str]


def digest_of(files: Iterable[Path]) -> str:
    """SHA-256 of the bytes of these files, one after the other."""
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()
