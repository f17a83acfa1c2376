"""A snapshot directory: config.json and safetensors files, checked by their headers, written atomically."""

import dataclasses
import errno
import hashlib
import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from dflash.config import TargetConfig, UserError, counted_faults
from dflash.host.disk import read_object
from dflash.weights.config_json import read_target_config

# Beside the arrays of EasyDeL's directories, in place of safetensors files (`dflash.weights.runs.arrays`).
ARRAY_INDEX = "tensorstore_index.json"


class WeightsError(UserError, ValueError):
    """Weights on disk that can't be used: what is wrong, tensor by tensor, and what to do."""


@dataclasses.dataclass(frozen=True, slots=True)
class Header:
    """Where a tensor of a snapshot is stored, and its dtype (as safetensors names it) and shape."""

    file: Path
    dtype: str
    shape: tuple[int, ...]


class Stored(Protocol):
    """What a file says of a tensor: a `Header`, or an entry of a run's index."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> str: ...


# Shape and dtypes (None: any) of every tensor that there has to be, by name.
Wanted = Mapping[str, tuple[tuple[int, ...], tuple[str, ...] | None]]


def tensor_faults(stored: Mapping[str, Stored], wanted: Wanted) -> list[str]:
    """Every tensor that is missing, unexpected, or of another shape or dtype than wanted."""
    faults = [f"missing {name} {list(shape)}" for name, (shape, _) in wanted.items() if name not in stored]
    for name, tensor in stored.items():
        if name not in wanted:
            faults.append(f"unexpected {name} {list(tensor.shape)}")
            continue
        shape, dtypes = wanted[name]
        if tensor.shape != shape:
            faults.append(f"{name} is {list(tensor.shape)}, must be {list(shape)}")
        if dtypes is not None and tensor.dtype not in dtypes:
            faults.append(f"{name} is {tensor.dtype}, must be one of {list(dtypes)}")
    return faults


def check_tensors(stored: Mapping[str, Stored], wanted: Wanted, where: Path) -> None:
    """Raises WeightsError with every tensor that does not fit the config.json in the directory `where`."""
    if faults := tensor_faults(stored, wanted):
        raise WeightsError(f"{where} does not fit its config.json {counted_faults(faults)}")


def read_json(directory: Path, name: str) -> dict[str, Any]:
    """An object from a JSON file of a snapshot. Raises WeightsError if it is missing or not a JSON object."""
    path = directory / name
    if not directory.is_dir():
        raise WeightsError(f"a snapshot is a directory; {directory} is none: give a local directory or `smollm2-135m`")
    if not path.is_file():
        raise WeightsError(f"a snapshot needs {name}; {directory} has none: is it a Hugging Face snapshot directory?")
    return read_object(path, WeightsError, "fetch the snapshot again")


def target_config(directory: Path) -> TargetConfig:
    """The config of the target in a directory. Raises ConfigError or WeightsError with every fault of the file."""
    return read_target_config(read_json(directory, "config.json"), str(directory / "config.json"))


def holds_weights(directory: Path) -> bool:
    """Whether a directory has the weights of a snapshot, in one file or several."""
    return any((directory / n).is_file() for n in ("model.safetensors", "model.safetensors.index.json"))


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a snapshot, by its index or the single file; names never leave the directory.

    Raises WeightsError if the index is invalid, or names files that are missing or outside the directory.
    """
    if (directory / "model.safetensors").is_file():
        return [directory / "model.safetensors"]
    if not (directory / "model.safetensors.index.json").is_file():
        raise WeightsError(
            f"a snapshot needs model.safetensors or model.safetensors.index.json; {directory} has neither "
            "(pickled .bin weights are not read)"
        )
    weight_map = read_json(directory, "model.safetensors.index.json").get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise WeightsError(f"{directory}/model.safetensors.index.json must hold a weight_map")
    names = sorted({str(n) for n in weight_map.values()})
    bad = [n for n in names if Path(n).name != n or not n.endswith(".safetensors")]
    if bad:
        raise WeightsError(f"weight_map may name .safetensors files of its own directory only, got {bad}")
    missing = [n for n in names if not (directory / n).is_file()]
    if missing:
        raise WeightsError(f"{directory} lacks {missing} named in its index: the download is incomplete")
    return [directory / n for n in names]


def read_headers(files: Sequence[Path]) -> dict[str, Header]:
    """Every tensor of these files by name. Raises WeightsError for a damaged file, or a name in two files."""
    headers: dict[str, Header] = {}
    for path in files:
        try:
            with safe_open(path, framework="numpy") as tensors:
                for name in tensors.keys():  # noqa: SIM118 (a handle, not a dict)
                    if name in headers:
                        raise WeightsError(f"{name} is in {headers[name].file} and in {path}: fetch the snapshot again")
                    part = tensors.get_slice(name)
                    headers[name] = Header(path, part.get_dtype(), tuple(part.get_shape()))
        except (SafetensorError, OSError) as error:
            raise WeightsError(f"{path} can't be read ({error}): it is damaged or cut short, fetch it again") from None
    return headers


def write_snapshot(
    directory: Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray],
    *,
    shard_bytes: int | None = None,
    record: Mapping[str, Any] | None = None,
) -> None:
    """Writes config.json and safetensors, in files of at most `shard_bytes` (a larger tensor gets its own file).

    A `record` of how a draft was trained goes beside them, into training.json, with the draft's hash. Raises
    WeightsError when `directory` exists.
    """
    directory = Path(directory)
    taken = WeightsError(f"a draft is written to a new directory; {directory} exists: remove it or name another")
    if directory.exists():
        raise taken
    directory.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{directory.name}-", dir=directory.parent))
    try:
        _save_shards(temporary, _shards(tensors, shard_bytes))
        (temporary / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        if record is not None:
            whole = {**record, "draft_sha256": snapshot_hash(temporary)}
            text = json.dumps(whole, indent=2, sort_keys=True, allow_nan=False)
            (temporary / "training.json").write_text(text + "\n", encoding="utf-8")
        # Only their owner may read temporary folders and safetensors' files; a server may run as another user.
        for file in temporary.iterdir():
            file.chmod(0o644)
        temporary.chmod(0o755)
        temporary.rename(directory)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        # Another process may have written it in the meantime.
        if isinstance(error, OSError) and error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            raise taken from None
        raise


def _shards(tensors: Mapping[str, np.ndarray], shard_bytes: int | None) -> list[dict[str, np.ndarray]]:
    shards: list[dict[str, np.ndarray]] = [{}]
    filled = 0
    for name, value in tensors.items():
        if shard_bytes is not None and shards[-1] and filled + value.nbytes > shard_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = value
        filled += value.nbytes
    return shards


def _save(tensors: dict[str, np.ndarray], file: Path) -> None:
    try:
        # transformers 4 accepts only the formats pt, tf, flax and mlx.
        save_file(tensors, file, metadata={"format": "pt"})
    except SafetensorError as error:
        raise WeightsError(f"weights can't be written to {file.parent.parent} ({error}): make room there") from None


def _save_shards(directory: Path, shards: Sequence[dict[str, np.ndarray]]) -> None:
    if len(shards) == 1:
        _save(shards[0], directory / "model.safetensors")
        return
    weight_map: dict[str, str] = {}
    for i, shard in enumerate(shards, 1):
        file = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        _save(shard, directory / file)
        weight_map |= dict.fromkeys(shard, file)
    total = sum(value.nbytes for shard in shards for value in shard.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    text = json.dumps(index, indent=2, sort_keys=True) + "\n"
    (directory / "model.safetensors.index.json").write_text(text, encoding="utf-8")


def snapshot_hash(directory: Path) -> str:
    """SHA-256 over config.json and the weight files of a snapshot, as results record it."""
    digest = hashlib.sha256()
    directory = Path(directory)
    read_json(directory, "config.json")
    if (directory / ARRAY_INDEX).is_file():
        arrays = sorted(path for path in (directory / "model").rglob("*") if path.is_file())
        files = [directory / ARRAY_INDEX, *arrays]
    else:
        files = weight_files(directory)
    for path in [directory / "config.json", *files]:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
