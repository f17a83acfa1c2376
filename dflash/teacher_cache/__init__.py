"""What training reads: the target's hidden states and its own text, made once and memory-mapped.

The sequence form is for training here; the window form is what earlier loaders read.
"""

import json
from pathlib import Path

from dflash.teacher_cache.arrays import CacheError, building_dir
from dflash.teacher_cache.build import Source, WindowConfig, build_sequences, build_windows
from dflash.teacher_cache.conversations import ConversationConfig
from dflash.teacher_cache.sequences import FORM, SequenceCache, open_sequences
from dflash.teacher_cache.windows import WindowCache, open_windows

__all__ = [
    "CacheError",
    "ConversationConfig",
    "SequenceCache",
    "Source",
    "WindowCache",
    "WindowConfig",
    "build_sequences",
    "build_windows",
    "open_cache",
]


def open_cache(path: str | Path) -> SequenceCache | WindowCache:
    """The cache at a path, in either form and of any version. Raises CacheError."""
    path = Path(path)
    if not path.exists():
        unfinished = building_dir(path)
        hint = (
            f"{unfinished} is not finished: run build-cache again" if unfinished.exists() else "build-cache makes one"
        )
        raise CacheError(f"a teacher cache is a directory, or an .npz file; there is none at {path}: {hint}")
    meta = path / "meta.json"
    if meta.is_file() and json.loads(meta.read_text(encoding="utf-8")).get("form") == FORM:
        return open_sequences(path)
    return open_windows(path)
