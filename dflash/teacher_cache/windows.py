"""The window form of the teacher cache: one context window, one anchor and its labels per sample.

    meta.json                     what was read, and how
    context_features_u16.npy      uint16 [N, ctx_len, K*H], bits of bfloat16: outputs of K target layers, side by side
    anchor_embedding_u16.npy      uint16 [N, H], the target's embedding of the anchor
    target_ids.npy                int32 [N, B-1], labels of block slots 1..B-1
    anchor_ids.npy                int32 [N]
    ctx_token_ids.npy             int32 [N, ctx_len]
    ctx_pos_start_i32.npy         int32 [N], position of context token 0
    anchor_pos_i32.npy            int32 [N] = ctx_pos_start + ctx_len
    held_out_u8.npy               uint8 [N], ours: 1 when the sample's prompt is held out

The reader takes every older version of it, and the .npz before them. What a version does not say but what follows from
it is filled in; what can't be known is refused by name. A sample takes ctx_len * K * H * 2 bytes and little more.
"""

import dataclasses
import hashlib
import json
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from dflash.teacher_cache.arrays import CacheError, Spec

LABELS = "block_verify_target_predict_shifted"
REQUIRED = ("context_features_u16", "anchor_embedding_u16", "target_ids", "anchor_ids")


def to_bits(x: np.ndarray) -> np.ndarray:
    """float32 or bfloat16 -> bits of bfloat16 as uint16, rounded to nearest even."""
    return np.asarray(x).astype(ml_dtypes.bfloat16).view(np.uint16)


def from_bits(bits: np.ndarray) -> np.ndarray:
    """uint16 -> the bfloat16 that it spells, without a copy."""
    return np.asarray(bits).view(ml_dtypes.bfloat16)


def window_specs(samples: int, context: int, block_size: int, features: int, hidden: int) -> dict[str, Spec]:
    """The arrays for N samples of `context` tokens (the anchor not counted), K features of H."""
    shapes: dict[str, tuple[type, tuple[int, ...]]] = {
        "context_features_u16": (np.uint16, (samples, context, features * hidden)),
        "anchor_embedding_u16": (np.uint16, (samples, hidden)),
        "target_ids": (np.int32, (samples, block_size - 1)),
        "anchor_ids": (np.int32, (samples,)),
        "ctx_token_ids": (np.int32, (samples, context)),
        "ctx_pos_start_i32": (np.int32, (samples,)),
        "anchor_pos_i32": (np.int32, (samples,)),
        "held_out_u8": (np.uint8, (samples,)),
    }
    return {name: Spec(dtype=np.dtype(kind), shape=shape) for name, (kind, shape) in shapes.items()}


def bytes_per_sample(context: int, block_size: int, features: int, hidden: int) -> int:
    """What one sample takes on disk: 23.57 MB at GPT-OSS-20B's hidden size with 1023 tokens and 4 features."""
    return sum(spec.nbytes for spec in window_specs(1, context, block_size, features, hidden).values())


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class WindowMeta:
    """What a reader needs to know of a cache of any version.

    `feature_layer_ids` name the layers whose *output* each feature is, whatever convention the file counted by.
    `anchor_in_context`: the last context token is the anchor itself (the first version), so the draft must not see it
    there again. `labels_from`: `target` (its own greedy tokens) or `data` (the text's next tokens).
    """

    ctx_len: int
    block_size: int
    hidden_size: int
    feature_layer_ids: tuple[int, ...]
    anchor_in_context: bool
    labels_from: str
    raw: Mapping[str, Any]


def read_meta(raw: Mapping[str, Any], where: str) -> WindowMeta:
    """Raises CacheError with all that is missing, contradictory or unknown."""
    faults = []

    def integer(key: str, least: int) -> int:
        value = raw.get(key)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            faults.append(f"{key} must be an integer of at least {least}, got {value!r}")
            return least
        return value

    ctx_len, block, hidden = integer("ctx_len", 1), integer("block_size", 2), integer("hidden_size", 1)
    ids = raw.get("target_layer_ids")
    if not isinstance(ids, list) or not ids or not all(isinstance(i, int) and i >= 0 for i in ids):
        faults.append(f"target_layer_ids must be layer numbers, got {ids!r}")
        ids = [1]
    if raw.get("num_context_features", len(ids)) != len(ids):
        faults.append(f"num_context_features is {raw['num_context_features']!r} for {len(ids)} target_layer_ids")
    if raw.get("dtype", "bf16_u16") != "bf16_u16":
        faults.append(f"dtype must be bf16_u16, got {raw['dtype']!r}")
    # The first version had neither of these keys: it counted layers by their input and kept the anchor in the context.
    after = raw.get("add_one_for_pre_layer_capture", "ctx_len_full" in raw)
    if not isinstance(after, bool):
        faults.append(f"add_one_for_pre_layer_capture must be true or false, got {after!r}")
    elif not after and 0 in ids:
        faults.append("target_layer_ids counts by a layer's input, and 0 is then the embedding, no layer's output")
    full = raw.get("ctx_len_full", ctx_len)
    if full not in (ctx_len, ctx_len + 1):
        faults.append(f"ctx_len_full must be ctx_len + 1 (the anchor), got {full!r} for {ctx_len}")
    labels = raw.get("target_ids_mode")
    if labels not in (None, LABELS):
        faults.append(f"target_ids_mode must be {LABELS}, got {labels!r}")
    if faults:
        raise CacheError(f"{where} can't be used: " + "; ".join(faults) + ". Build the cache again")
    return WindowMeta(
        ctx_len=ctx_len,
        block_size=block,
        hidden_size=hidden,
        feature_layer_ids=tuple(i if after else i - 1 for i in ids),
        anchor_in_context=full == ctx_len,
        labels_from="data" if labels is None else "target",
        raw=raw,
    )


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Samples:
    """Some samples: context_features and anchor_embedding bfloat16 [n, C, K*H] and [n, H]; int32 labels [n, B-1],

    anchor_ids, ctx_pos_start, anchor_pos [n]. C is ctx_len without the anchor.
    """

    context_features: np.ndarray
    anchor_embedding: np.ndarray
    target_ids: np.ndarray
    anchor_ids: np.ndarray
    ctx_pos_start: np.ndarray
    anchor_pos: np.ndarray


class WindowCache:
    """A cache in window form, memory-mapped (an .npz is read whole: its parts are compressed)."""

    def __init__(self, path: Path, meta: WindowMeta, arrays: Mapping[str, np.ndarray]):
        self.path, self.meta, self._arrays = path, meta, arrays

    def __len__(self) -> int:
        return len(self._arrays["target_ids"])

    @property
    def context(self) -> int:
        """Context tokens that a draft may see: ctx_len, without the anchor where that was counted in."""
        return self.meta.ctx_len - self.meta.anchor_in_context

    @property
    def feature_layer_ids(self) -> tuple[int, ...]:
        return self.meta.feature_layer_ids

    @property
    def hidden_size(self) -> int:
        return self.meta.hidden_size

    @property
    def max_block_size(self) -> int | None:
        """Labels were made for blocks of this size."""
        return self.meta.block_size

    @property
    def snapshot_sha256(self) -> str | None:
        """Hash of the target's snapshot; older caches don't say."""
        return self.meta.raw.get("snapshot_sha256")

    @property
    def split(self) -> Mapping[str, Any] | None:
        """What `split_record` said of the prompts; older caches don't say."""
        return self.meta.raw.get("split")

    @property
    def sha256(self) -> str:
        """Hash of the meta data."""
        return hashlib.sha256(json.dumps(self.meta.raw, sort_keys=True, default=str).encode()).hexdigest()

    def rows(self, held_out: bool) -> np.ndarray:
        """Samples on one side of the split. Where nothing was split, all are training rows."""
        flags = self._arrays.get("held_out_u8")
        return (
            np.flatnonzero(np.asarray(flags) == held_out)
            if flags is not None
            else np.arange(0 if held_out else len(self))
        )

    def samples(self, rows: Sequence[int] | np.ndarray) -> Samples:
        """These samples, read from the disk."""
        rows = np.asarray(rows)
        start = self._arrays.get("ctx_pos_start_i32")
        starts = np.zeros(len(rows), np.int32) if start is None else np.asarray(start[rows], np.int32)
        return Samples(
            context_features=from_bits(self._arrays["context_features_u16"][rows, : self.context]),
            anchor_embedding=from_bits(self._arrays["anchor_embedding_u16"][rows]),
            target_ids=np.asarray(self._arrays["target_ids"][rows]),
            anchor_ids=np.asarray(self._arrays["anchor_ids"][rows]),
            ctx_pos_start=starts,
            anchor_pos=starts + self.context,
        )


def _directory_arrays(directory: Path, raw: Mapping[str, Any]) -> tuple[dict[str, np.ndarray], list[str]]:
    """Every array that is there, by its canonical name, and the faults of the files."""
    files = {name: f"{name}.npy" for name in (*REQUIRED, "ctx_token_ids", "held_out_u8")}
    files["ctx_pos_start_i32"] = raw.get("ctx_pos_start_file") or "ctx_pos_start_i32.npy"
    files["anchor_pos_i32"] = raw.get("anchor_pos_file") or "anchor_pos_i32.npy"
    arrays, faults = {}, []
    for name, file in files.items():
        if not isinstance(file, str) or Path(file).name != file:
            faults.append(f"meta.json names {file!r}, and a file of a cache lies in its own directory")
        elif (directory / file).is_file():
            try:
                arrays[name] = np.load(directory / file, mmap_mode="r", allow_pickle=False)
            except (OSError, ValueError, EOFError) as error:
                faults.append(f"{file} can't be read ({error})")
        elif name in REQUIRED:
            faults.append(f"{file} is missing")
    return arrays, faults


def _npz_arrays(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray], list[str]]:
    """Meta and arrays of the file from before the directories; bfloat16 may stand there as raw two-byte values."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            found = {name: archive[name] for name in archive.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise CacheError(f"{path} can't be read ({error}): it is damaged or cut short") from None
    faults = []
    raw: Any = {}
    try:
        raw = json.loads(str(found.pop("meta")))
    except KeyError:
        faults.append("it holds no meta")
    except json.JSONDecodeError as error:
        faults.append(f"its meta is no JSON ({error})")
    for old in ("context_features", "anchor_embedding"):
        value = found.pop(old, None)
        if value is not None and value.dtype.kind == "V" and value.dtype.itemsize == 2:
            found[f"{old}_u16"] = value.view(np.uint16)
        elif value is not None:
            faults.append(f"{old} is {value.dtype}, must be raw bfloat16 (two bytes each)")
    faults += [f"{name} is missing" for name in REQUIRED if name not in found]
    return raw if isinstance(raw, dict) else {}, found, faults


def _disagreements(meta: WindowMeta, arrays: Mapping[str, np.ndarray]) -> list[str]:
    samples = len(arrays["target_ids"])
    features = len(meta.feature_layer_ids)
    specs = window_specs(samples, meta.ctx_len, meta.block_size, features, meta.hidden_size)
    faults = []
    for name, array in arrays.items():
        spec = specs.get(name)
        if spec is None:
            continue
        if array.dtype != spec.dtype:
            faults.append(f"{name} is {array.dtype}, must be {spec.dtype}")
        if array.shape != spec.shape:
            faults.append(f"{name} is {list(array.shape)}, must be {list(spec.shape)}")
    counted = meta.raw.get("num_samples", samples)
    if counted != samples:
        faults.append(f"num_samples is {counted!r} for {samples} samples")
    if faults or "anchor_pos_i32" not in arrays:
        return faults
    start = np.asarray(arrays["ctx_pos_start_i32"]) if "ctx_pos_start_i32" in arrays else np.zeros(samples, np.int32)
    context = meta.ctx_len - meta.anchor_in_context
    wrong = np.flatnonzero(np.asarray(arrays["anchor_pos_i32"]) != start + context)
    return (
        [f"anchor_pos must be ctx_pos_start + {context}; it is not in samples {wrong[:8].tolist()}"]
        if len(wrong)
        else []
    )


def open_windows(path: Path) -> WindowCache:
    """The cache in a directory or an .npz. Raises CacheError with every fault of it."""
    path = Path(path)
    if path.is_file():
        raw, arrays, faults = _npz_arrays(path)
    elif (path / "meta.json").is_file():
        raw = json.loads((path / "meta.json").read_text(encoding="utf-8"))
        arrays, faults = _directory_arrays(path, raw)
    else:
        raise CacheError(f"a teacher cache is complete when it has a meta.json; {path} has none: build it again")
    try:
        meta = read_meta(raw, str(path))
    except CacheError as error:
        faults.append(str(error))
    else:
        faults += [] if faults else _disagreements(meta, arrays)
    if faults:
        raise CacheError(f"{path} is no whole window cache: " + "; ".join(faults))
    return WindowCache(path, meta, arrays)
