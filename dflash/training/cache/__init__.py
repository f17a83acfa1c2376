"""What training reads: the target's own text and hidden states, made once and memory-mapped.

The sequence form is for training here; the window form is what earlier loaders read.
"""

from pathlib import Path

from dflash.config import ConfigError, TargetConfig, UserError
from dflash.training.cache.arrays import CacheError, building_dir, read_meta
from dflash.training.cache.build_sequences import build_sequences
from dflash.training.cache.build_windows import WindowConfig, build_windows
from dflash.training.cache.conversations import ConversationConfig
from dflash.training.cache.sequences import FORM, SequenceCache, open_sequences
from dflash.training.cache.source import CacheSource
from dflash.training.cache.windows import WindowCache, open_windows
from dflash.weights.load import Borrowed, read_borrowed, target_directory
from dflash.weights.snapshot import snapshot_hash, target_config

__all__ = [
    "CacheError",
    "CacheSource",
    "ConversationConfig",
    "SequenceCache",
    "WindowCache",
    "WindowConfig",
    "build_sequences",
    "build_windows",
    "open_cache",
    "open_with_target",
    "recorded_target",
]


def open_cache(path: str | Path, target: TargetConfig | None = None) -> SequenceCache | WindowCache:
    """The cache at a path, in either form and of any version.

    Its token ids and positions must be within the target's. Raises CacheError.
    """
    path = Path(path)
    if not path.exists():
        unfinished = building_dir(path)
        hint = (
            f"{unfinished} is not finished: run build-cache again" if unfinished.exists() else "build-cache makes one"
        )
        raise CacheError(f"a teacher cache is a directory, or an .npz file; there is none at {path}: {hint}")
    sequences = path.is_dir() and read_meta(path).get("form") == FORM
    return open_sequences(path, target) if sequences else open_windows(path, target)


def open_with_target(path: Path, target: str) -> tuple[SequenceCache | WindowCache, Borrowed, str]:
    """The cache at a path, what a draft borrows of its target, and the hash of the target's snapshot.

    Raises CacheError, and ConfigError if the cache was made with another target.
    """
    directory = target_directory(target)
    cache = open_cache(path, target_config(directory))
    target_hash = snapshot_hash(directory)
    if cache.snapshot_sha256 not in (None, target_hash):
        raise ConfigError(f"{path} was made with another target than {target} (their hashes differ)")
    return cache, read_borrowed(directory), target_hash


def recorded_target(path: Path) -> str:
    """The target that a cache was made with. Raises CacheError where none is recorded, or it is not there any more."""
    open_cache(path)  # says what is wrong with what is no cache
    name = read_meta(path).get("model_snapshot_dir") if path.is_dir() else None
    if not name:
        raise CacheError(f"a draft is trained for the target of its cache, and {path} names none: give --target")
    try:
        target_config(target_directory(str(name)))
    except UserError as error:
        raise CacheError(f"{path} was made with the target {name}, so give --target: {error}") from None
    return str(name)
