"""The window form of the teacher cache: one context window, one anchor and its labels per sample.

    meta.json                     what was read, and how
    context_features_u16.npy      uint16 [N, C, K*H], bits of bfloat16: outputs of K target layers, side by side
    anchor_embedding_u16.npy      uint16 [N, H], the target's embedding of the anchor
    target_ids.npy                int32 [N, B-1], labels of block slots 1..B-1
    anchor_ids.npy                int32 [N]
    ctx_token_ids.npy             int32 [N, C], C = ctx_len
    ctx_pos_start_i32.npy         int32 [N], position of context token 0
    anchor_pos_i32.npy            int32 [N] = ctx_pos_start + ctx_len
    held_out_u8.npy               uint8 [N], ours: 1 when the sample's prompt is held out

Written in this layout, the newest; earlier layouts and the .npz before them are also read. What a version leaves out
but implies is filled in; what can't be known is refused by name. Features are not checked for being finite, which would
mean reading them all.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from dflash.config import TargetConfig, fault_list
from dflash.host.disk import DAMAGE
from dflash.training.cache.arrays import CacheError, Limits, Spec, read_meta
from dflash.training.cache.npz import read_npz
from dflash.training.cache.window_meta import MetaReader, WindowMeta

# Name -> dtype and axes. L is B-1, F is K*H.
LAYOUT: dict[str, tuple[type, str]] = {
    "context_features_u16": (np.uint16, "NCF"),
    "anchor_embedding_u16": (np.uint16, "NH"),
    "target_ids": (np.int32, "NL"),
    "anchor_ids": (np.int32, "N"),
    "ctx_token_ids": (np.int32, "NC"),
    "ctx_pos_start_i32": (np.int32, "N"),
    "anchor_pos_i32": (np.int32, "N"),
    "held_out_u8": (np.uint8, "N"),
}
REQUIRED = ("context_features_u16", "anchor_embedding_u16", "target_ids")


def to_bits(x: np.ndarray) -> np.ndarray:
    """float32 or bfloat16 -> bits of bfloat16 as uint16, rounded to nearest even."""
    x = np.asarray(x)
    if x.dtype not in (np.float32, ml_dtypes.bfloat16):
        raise TypeError(f"bits are taken of float32 or bfloat16, got {x.dtype}: bits become values with from_bits")
    return x.astype(ml_dtypes.bfloat16, copy=False).view(np.uint16)


def from_bits(bits: np.ndarray) -> np.ndarray:
    """uint16 -> the bfloat16 with those bits, without a copy."""
    bits = np.asarray(bits)
    if bits.dtype != np.uint16:
        raise TypeError(f"bits of bfloat16 are uint16, got {bits.dtype}")
    return bits.view(ml_dtypes.bfloat16)


def window_specs(samples: int, context: int, block_size: int, features: int, hidden: int) -> dict[str, Spec]:
    """The arrays for N samples of `context` tokens (the anchor not counted), K features of H."""
    sizes = {"N": samples, "C": context, "H": hidden, "F": features * hidden, "L": block_size - 1}
    return {n: Spec(dtype=np.dtype(d), shape=tuple(sizes[a] for a in axes)) for n, (d, axes) in LAYOUT.items()}


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Samples:
    """n samples of a window cache.

    context_features bfloat16 [n, C, K*H], feature k in columns k*H to (k+1)*H; anchor_embedding bfloat16 [n, H]. The
    others are int32: target_ids [n, B-1], ctx_pos_start [n], and anchor_ids [n], None if the version lacks them. C is
    the cache's `context`, which never includes the anchor.
    """

    context_features: np.ndarray
    anchor_embedding: np.ndarray
    target_ids: np.ndarray
    ctx_pos_start: np.ndarray
    anchor_ids: np.ndarray | None


class WindowCache:
    """A cache of any version, memory-mapped; `samples` reads only the rows asked for."""

    def __init__(self, path: Path, meta: WindowMeta, arrays: Mapping[str, np.ndarray]):
        self.path, self.meta, self._arrays = path, meta, arrays

    def __len__(self) -> int:
        return len(self._arrays["target_ids"])

    @property
    def context(self) -> int:
        """Context tokens that a draft may see: ctx_len, minus the anchor if it was counted."""
        return self.meta.anchor_distance

    @property
    def feature_layer_ids(self) -> tuple[int, ...]:
        """The layers of the target whose outputs the features are."""
        return self.meta.feature_layer_ids

    @property
    def hidden_size(self) -> int:
        return self.meta.hidden_size

    @property
    def has_anchor_ids(self) -> bool:
        """Whether the anchors' token ids are stored beside their embeddings; the first versions lack them."""
        return "anchor_ids" in self._arrays

    @property
    def max_block_size(self) -> int:
        """Labels were made for blocks of this size."""
        return self.meta.block_size

    @property
    def snapshot_sha256(self) -> str | None:
        """Hash of the target's snapshot; older caches don't say."""
        return self.meta.snapshot_sha256

    @property
    def split(self) -> Mapping[str, Any] | None:
        """The `split_record` of the prompts; older caches don't say."""
        return self.meta.split

    @property
    def sha256(self) -> str:
        """Hash of the meta data."""
        return hashlib.sha256(json.dumps(self.meta.raw, sort_keys=True).encode()).hexdigest()

    def rows(self, held_out: bool) -> np.ndarray:
        """Samples on one side of the split; without a split, all are training rows."""
        flags = self._arrays.get("held_out_u8", np.zeros(len(self), np.uint8))
        return np.flatnonzero(np.asarray(flags) == held_out)

    def labels(self, rows: np.ndarray) -> np.ndarray:
        """The target_ids of these samples alone, int32 [n, B-1]: features are a thousand times as large."""
        return np.asarray(self._arrays["target_ids"][rows])

    def samples(self, rows: Sequence[int] | np.ndarray) -> Samples:
        """These samples, in this order, read from the disk."""
        rows = np.asarray(rows)
        rows = rows.astype(np.int64) if rows.size == 0 else rows
        if rows.ndim != 1 or rows.dtype.kind not in "iu":
            raise TypeError(f"samples are asked for by a list of integers, got {rows.dtype} {list(rows.shape)}")
        if len(rows) and not 0 <= rows.min() <= rows.max() < len(self):
            raise IndexError(f"samples are 0..{len(self) - 1}, got {rows.min()}..{rows.max()}")

        def read(name: str) -> np.ndarray:
            return np.ascontiguousarray(self._arrays[name][rows])

        placed = "ctx_pos_start_i32" in self._arrays
        return Samples(
            context_features=from_bits(read("context_features_u16")[:, : self.context]),
            anchor_embedding=from_bits(read("anchor_embedding_u16")),
            target_ids=read("target_ids"),
            ctx_pos_start=read("ctx_pos_start_i32") if placed else np.zeros(len(rows), np.int32),
            anchor_ids=read("anchor_ids") if self.has_anchor_ids else None,
        )


def open_windows(path: str | Path, target: TargetConfig | None = None) -> WindowCache:
    """The cache in a directory, or an .npz from before those, with ids and positions of its target.

    Raises CacheError with every fault of it.
    """
    path = Path(path)
    raw, arrays, faults = read_npz(path, LAYOUT) if path.is_file() else _read_directory(path)
    if not isinstance(raw, dict):
        faults.append(f"meta must be a JSON object, got {type(raw).__name__}")
        raw = {}
    reader = MetaReader(raw)
    meta = reader.finish()
    faults += reader.faults + [f"{name} is missing" for name in REQUIRED if name not in arrays]
    faults += _misshapen(arrays, reader) or _wrong_values(arrays, reader, meta, Limits.of(target, raw))
    if faults or meta is None:
        raise CacheError(f"{path} is no usable window cache: " + fault_list(faults) + ". Build it again")
    return WindowCache(path, meta, arrays)


def _read_directory(directory: Path) -> tuple[dict[str, Any], dict[str, np.ndarray], list[str]]:
    """meta.json, every array that exists, and the faults of the files."""
    raw = read_meta(directory)
    named = {f"{n}_i32": raw.get(f"{n}_file") for n in ("ctx_pos_start", "anchor_pos")}
    arrays: dict[str, np.ndarray] = {}
    faults: list[str] = []
    for name in LAYOUT:
        file = named.get(name) or f"{name}.npy"
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".npy"):
            faults.append(f"meta.json may name .npy files of its own directory only, got {file!r} for {name}")
        elif (directory / file).is_file():
            try:
                arrays[name] = np.load(directory / file, mmap_mode="r", allow_pickle=False)
            except DAMAGE as error:
                faults.append(f"{file} can't be read ({error})")
        elif named.get(name):
            faults.append(f"{file} is missing, and meta.json names it")
    return raw, arrays, faults


def _misshapen(arrays: Mapping[str, np.ndarray], meta: MetaReader) -> list[str]:
    """Arrays whose dtype or shape contradicts the meta data or another array."""
    F = meta.features * meta.hidden_size if meta.features and meta.hidden_size else None
    L = meta.block_size - 1 if meta.block_size else None
    N = meta.num_samples or next((len(a) for a in arrays.values() if a.ndim), None)
    known = {"N": N, "C": meta.ctx_len, "F": F, "H": meta.hidden_size, "L": L}
    faults = []
    for name, array in arrays.items():
        dtype, axes = LAYOUT[name]
        shape = [known[a] for a in axes]
        if array.dtype != dtype:
            faults.append(f"{name} is {array.dtype}, must be {np.dtype(dtype)}")
        if array.ndim != len(shape) or any(w not in (None, n) for w, n in zip(shape, array.shape, strict=True)):
            wanted = ", ".join("?" if w is None else str(w) for w in shape)
            faults.append(f"{name} is {list(array.shape)}, must be [{wanted}]")
    return faults


def _wrong_values(
    arrays: Mapping[str, np.ndarray], reader: MetaReader, meta: WindowMeta | None, limits: Limits
) -> list[str]:
    """Ids and positions that the target does not have, positions that disagree, positions that can't be known."""
    tokens = ("target_ids", "anchor_ids", "ctx_token_ids")
    faults = [fault for name in tokens if name in arrays for fault in limits.token_faults(name, arrays[name])]
    flags = arrays.get("held_out_u8")
    if flags is not None and np.max(flags, initial=0) > 1:
        faults.append(f"held_out_u8 must be 0 or 1, got {np.max(flags)}")
    start = arrays.get("ctx_pos_start_i32")
    if start is None and any(reader.offsets or ()):
        faults.append("ctx_pos_start_i32 is missing and position_offsets are not all 0: positions can't be known")
    if meta is None:
        return faults
    begin = np.asarray(0 if start is None else start, np.int64)
    faults += limits.position_faults("ctx_pos_start", begin, meta.anchor_distance + meta.block_size)
    if "anchor_pos_i32" not in arrays:
        return faults
    wrong = np.flatnonzero(arrays["anchor_pos_i32"] != begin + meta.anchor_distance)
    if len(wrong):
        rule = f"anchor_pos must be ctx_pos_start + {meta.anchor_distance}"
        faults.append(f"{rule}; it is not in {len(wrong)} samples, {wrong[:8].tolist()} first")
    return faults
