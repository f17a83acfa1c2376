"""What training reads: the target's hidden states and its own text, made once and memory-mapped.

The sequence form is for training here; the window form is what earlier loaders read.
"""

from pathlib import Path

from dflash.teacher_cache.arrays import CacheError, building_dir, read_meta
from dflash.teacher_cache.build_sequences import build_sequences
from dflash.teacher_cache.build_windows import WindowConfig, build_windows
from dflash.teacher_cache.conversations import ConversationConfig
from dflash.teacher_cache.sequences import FORM, SequenceCache, open_sequences
from dflash.teacher_cache.source import Source
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
    sequences = path.is_dir() and read_meta(path).get("form") == FORM
    return open_sequences(path) if sequences else open_windows(path)
