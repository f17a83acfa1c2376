"""Snapshots by their names on the Hugging Face hub: from its local cache, else from the network where there is one."""

import re
from pathlib import Path

from dflash.host import hub
from dflash.host.hub import HubError
from dflash.weights.snapshot import WeightsError, weight_files

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# The files of a snapshot that are read: no pickles, and no copies in other formats in subfolders.
_READ = ["*.json", "*.jinja", "*.model", "*.safetensors", "*.txt"]
_LEFT = ["*/*"]


def is_name(text: str | Path) -> bool:
    """Whether this names a repository of the hub, such as Qwen/Qwen3-0.6B: nothing lies at that path."""
    return isinstance(text, str) and _NAME.fullmatch(text) is not None and not Path(text).exists()


def directory_of(name_or_dir: str | Path, kind: str = "model") -> Path:
    """A directory as it is, or that of a model of the hub; `kind` is what an error calls it.

    Raises HubError, and WeightsError for what is no name.
    """
    if not isinstance(name_or_dir, str | Path):
        raise WeightsError(f"a {kind} is named by text or a path, got {name_or_dir!r:.60}")
    # Path("") is the working directory.
    if not str(name_or_dir).strip():
        raise WeightsError(
            f"a {kind} is named by its directory, or by its name on the hub, got {name_or_dir!r}: name one; a variable "
            "of the shell that is not set gives an empty name"
        )
    return snapshot(str(name_or_dir)) if is_name(name_or_dir) else Path(name_or_dir)


def snapshot(name: str) -> Path:
    """The directory of a model of the hub: from its local cache if that is complete, else downloaded.

    A cached snapshot is not updated, so that a measurement stays one of the same weights; `hf download NAME` fetches
    a newer one. Raises HubError.
    """
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        cached = Path(huggingface_hub.snapshot_download(name, local_files_only=True))
    except (LocalEntryNotFoundError, OSError, ValueError):
        cached = None
    if cached is not None and _is_whole(cached):
        return cached
    there = "is incomplete in the local cache" if cached else "is in no local cache"
    if not hub.reachable():
        raise HubError(
            f"there is no directory {name}, and the model of that name {there}, and the hub is out of reach: run "
            f"hf download {name} where there is a network, or name a directory"
        )
    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=_READ, ignore_patterns=_LEFT))
    except Exception as fault:
        raise HubError(
            f"there is no directory {name}, and the hub gives no model of that name: {hub.described(fault)}; correct "
            "the name, or run hf auth login where the model asks for it"
        ) from None


def _is_whole(directory: Path) -> bool:
    """Whether config and all weights are there: a download may have been cut off."""
    try:
        weight_files(directory)
    except WeightsError:
        return False
    return (directory / "config.json").is_file()
