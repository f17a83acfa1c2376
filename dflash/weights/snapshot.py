"""A snapshot directory: config.json and safetensors files, checked by their headers, written atomically."""

import dataclasses
import errno
import hashlib
import json
import shutil
import stat
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
# All weights, or where there are several files the one of each tensor.
_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"


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
    return any((directory / n).is_file() for n in (_SINGLE, _INDEX))


def _weight_map(directory: Path) -> dict[str, str]:
    """The file of every tensor, as the index of a snapshot has it; empty for a snapshot in one file.

    Raises WeightsError if there are neither weights nor an index, or the index is invalid.
    """
    if (directory / _SINGLE).is_file():
        return {}
    if not (directory / _INDEX).is_file():
        raise WeightsError(
            f"a snapshot needs {_SINGLE} or {_INDEX}; {directory} has neither (pickled .bin weights are not read)"
        )
    weight_map = read_json(directory, _INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise WeightsError(f"{directory / _INDEX} must hold a weight_map")
    return {tensor: str(file) for tensor, file in weight_map.items()}


def _file_fault(directory: Path, name: str) -> str:
    """Why a name in an index leads to no file; empty if it does. Names never leave the directory."""
    if Path(name).name != name or not name.endswith(".safetensors"):
        return f"foreign {name!r:.80}: the index may name .safetensors files of its own directory only"
    try:
        found = stat.S_ISREG((directory / name).stat().st_mode)
    except FileNotFoundError:
        found = False
    except (OSError, ValueError) as reason:  # ValueError for a null character
        return f"unreadable {name!r:.80}, which the index names ({getattr(reason, 'strerror', None) or reason})"
    return "" if found else f"missing {name!r:.80}, which the index names"


def _files_and_faults(directory: Path, weight_map: Mapping[str, str]) -> tuple[list[Path], list[str]]:
    """The files that are there, and a fault for each other name of the index."""
    if not weight_map:
        return [directory / _SINGLE], []
    looked_at = {name: _file_fault(directory, name) for name in sorted(set(weight_map.values()))}
    files = [directory / name for name, fault in looked_at.items() if not fault]
    return files, [fault for fault in looked_at.values() if fault]


def _check_whole(directory: Path, faults: Sequence[str]) -> None:
    if faults:
        raise WeightsError(f"the weights in {directory} can't be used {counted_faults(faults)}. Fetch them again")


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a snapshot, by its index or the single file, unopened.

    Raises WeightsError if the index is invalid, and with every file that it names and the directory lacks.
    """
    files, faults = _files_and_faults(directory, _weight_map(directory))
    _check_whole(directory, faults)
    return files


def _read_header(file: Path) -> dict[str, Header]:
    """The tensors of one file by name. Raises SafetensorError or OSError."""
    headers: dict[str, Header] = {}
    with safe_open(file, framework="numpy") as tensors:
        for name in tensors.keys():  # noqa: SIM118 (a handle, not a dict)
            part = tensors.get_slice(name)
            headers[name] = Header(file, part.get_dtype(), tuple(part.get_shape()))
    return headers


def _map_faults(weight_map: Mapping[str, str], read: Mapping[str, Mapping[str, Header]]) -> list[str]:
    """Every tensor that is not in the file that the index names, of those files that could be read."""
    places: dict[str, list[str]] = {}
    for file, headers in read.items():
        for name in headers:
            places.setdefault(name, []).append(file)
    twice = {name: " and in ".join(files) for name, files in places.items() if len(files) > 1}
    faults = [f"duplicate tensor {name!r:.80}, in {files}" for name, files in twice.items()]
    for name, file in weight_map.items():
        if file not in read or name in read[file]:
            continue
        if name in places:
            faults.append(f"misplaced tensor {name!r:.80}: it is in {places[name][0]}, and the index says {file}")
        else:
            faults.append(f"missing tensor {name!r:.80}: the index says that it is in {file}")
    return faults


def read_headers(directory: Path) -> dict[str, Header]:
    """Every tensor of a snapshot by name.

    Raises WeightsError with every file that its index should not name, is missing or damaged, every tensor in two
    files, and every one that is not in the file that the index names. Tensors that the index leaves out are read too:
    what a network has no use for is told by its config (`check_tensors`).
    """
    weight_map = _weight_map(directory)
    files, faults = _files_and_faults(directory, weight_map)
    read: dict[str, dict[str, Header]] = {}
    for path in files:
        try:
            read[path.name] = _read_header(path)
        except (SafetensorError, OSError) as error:
            faults.append(f"damaged {path.name!r:.80}, or cut short ({error})")
    _check_whole(directory, faults + _map_faults(weight_map, read))
    return {name: header for headers in read.values() for name, header in headers.items()}


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
        _save(shards[0], directory / _SINGLE)
        return
    weight_map: dict[str, str] = {}
    for i, shard in enumerate(shards, 1):
        file = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        _save(shard, directory / file)
        weight_map |= dict.fromkeys(shard, file)
    total = sum(value.nbytes for shard in shards for value in shard.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    text = json.dumps(index, indent=2, sort_keys=True) + "\n"
    (directory / _INDEX).write_text(text, encoding="utf-8")


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
