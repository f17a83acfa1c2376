"""The sequence form of the teacher cache: tokens, features and loss mask once per token, anchors drawn when training.

A window holds ctx_len rows of features for one anchor. Here a row is stored once and serves every anchor after it, so a
conversation of 300 tokens with 200 anchors takes 300 rows instead of 200 windows. The window form remains for other
programs, and for anchors that must see a window of exactly ctx_len tokens.

    meta.json                what was read, by hash; layer ids; the split
    conversations.jsonl      the text, as token ids
    features_u16.npy         uint16 [N, K*H], bits of bfloat16, N tokens of all sequences one after another
    token_ids.npy            int32 [N]
    loss_mask_u8.npy         uint8 [N], 1 for a token of an answer
    sequence_start_i64.npy   int64 [M+1], where each of M sequences begins, and N
    ctx_pos_start_i32.npy    int32 [M], the position of its first token
    held_out_u8.npy          uint8 [M], 1 when its prompt is held out
"""

import dataclasses
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dflash.config import TargetConfig, fault_list
from dflash.host.disk import DAMAGE, open_file
from dflash.metrics import round_up
from dflash.training.cache.arrays import CacheError, Limits, Spec, read_meta

FORM = "sequences"
ARRAYS: dict[str, np.dtype] = {
    "features_u16": np.dtype(np.uint16),
    "token_ids": np.dtype(np.int32),
    "loss_mask_u8": np.dtype(np.uint8),
    "sequence_start_i64": np.dtype(np.int64),
    "ctx_pos_start_i32": np.dtype(np.int32),
    "held_out_u8": np.dtype(np.uint8),
}


def sequence_specs(tokens: int, sequences: int, width: int) -> dict[str, Spec]:
    """The arrays for N tokens, M sequences and features of K*H."""
    shapes = {
        "features_u16": (tokens, width),
        "token_ids": (tokens,),
        "loss_mask_u8": (tokens,),
        "sequence_start_i64": (sequences + 1,),
        "ctx_pos_start_i32": (sequences,),
        "held_out_u8": (sequences,),
    }
    return {name: Spec(dtype=ARRAYS[name], shape=shape) for name, shape in shapes.items()}


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class SequenceCache:
    """A cache in sequence form, memory-mapped; arrays as in the module's docstring, `bounds` is sequence_start."""

    directory: Path
    meta: Mapping[str, Any]
    features: np.ndarray
    token_ids: np.ndarray
    loss_mask: np.ndarray
    bounds: np.ndarray
    pos_start: np.ndarray
    held_out: np.ndarray

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence, rounded up to 64: the context length of every batch."""
        return round_up(int(np.diff(self.bounds).max()), 64)

    def __len__(self) -> int:
        return len(self.pos_start)

    @property
    def hidden_size(self) -> int:
        return int(self.meta["hidden_size"])

    @property
    def max_block_size(self) -> int:
        """The longest sequence: the labels are the tokens themselves, and a longer block has none at its end."""
        return self.longest

    @property
    def snapshot_sha256(self) -> str | None:
        """Hash of the target's snapshot."""
        return self.meta.get("snapshot_sha256")

    @property
    def split(self) -> Mapping[str, Any] | None:
        """The `split_record` of the prompts."""
        return self.meta.get("split")

    @property
    def sha256(self) -> str:
        """Hash of meta.json, which contains the hashes of the inputs."""
        return hashlib.sha256((self.directory / "meta.json").read_bytes()).hexdigest()

    @property
    def feature_layer_ids(self) -> tuple[int, ...]:
        """The layers of the target whose outputs the features are."""
        return tuple(self.meta["target_layer_ids"])

    def rows(self, held_out: bool) -> np.ndarray:
        """Numbers of the sequences on one side of the split that have room for an anchor and a label."""
        answers = np.add.reduceat(np.asarray(self.loss_mask, np.int64), self.bounds[:-1])
        return np.flatnonzero((np.asarray(self.held_out) == held_out) & (answers >= 2))


def open_sequences(directory: Path, target: TargetConfig | None = None) -> SequenceCache:
    """The cache in a directory, with ids and positions of its target.

    Raises CacheError with every fault: missing files, dtypes, sizes that disagree, values out of their range.
    """
    directory = Path(directory)
    meta = read_meta(directory)
    faults = _meta_faults(meta)
    arrays: dict[str, np.ndarray] = {}
    for name, dtype in ARRAYS.items():
        path = directory / f"{name}.npy"
        try:
            open_file(path).close()  # which a pipe does not stand, and np.load would wait for
            arrays[name] = np.load(path, mmap_mode="r", allow_pickle=False)
        except DAMAGE as error:
            faults.append(f"{name}.npy can't be read ({error})")
            continue
        if arrays[name].dtype != dtype:
            faults.append(f"{name}.npy is {arrays[name].dtype}, must be {dtype}")
    if not faults:
        faults += _disagreements(meta, arrays, Limits.of(target, meta))
    if faults:
        raise CacheError(f"{directory} is no complete sequence cache: " + fault_list(faults) + ". Build it again")
    return SequenceCache(
        directory=directory,
        meta=meta,
        features=arrays["features_u16"],
        token_ids=arrays["token_ids"],
        loss_mask=arrays["loss_mask_u8"],
        bounds=np.asarray(arrays["sequence_start_i64"]),
        pos_start=arrays["ctx_pos_start_i32"],
        held_out=arrays["held_out_u8"],
    )


def _meta_faults(meta: Mapping[str, Any]) -> list[str]:
    faults = []
    for key in ("hidden_size", "num_context_features", "num_tokens"):
        value = meta.get(key)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            faults.append(f"{key} must be an integer of at least 1, got {value!r}")
    ids = meta.get("target_layer_ids")
    if not isinstance(ids, list) or not all(isinstance(i, int) and i >= 0 for i in ids):
        faults.append(f"target_layer_ids must list layer numbers, got {ids!r}")
    elif len(ids) != meta.get("num_context_features"):
        faults.append(f"num_context_features is {meta.get('num_context_features')!r} for {len(ids)} target_layer_ids")
    return faults


def _disagreements(meta: Mapping[str, Any], arrays: Mapping[str, np.ndarray], limits: Limits) -> list[str]:
    """Shapes that are not what the meta data asks for, and values that no array of its name may have."""
    bounds = arrays["sequence_start_i64"]
    width = meta["hidden_size"] * meta["num_context_features"]
    expected = sequence_specs(meta["num_tokens"], max(bounds.size - 1, 1), width)
    faults = [
        f"{name}.npy is {list(arrays[name].shape)}, must be {list(spec.shape)}"
        for name, spec in expected.items()
        if arrays[name].shape != spec.shape
    ]
    if not faults and (bounds[0] != 0 or bounds[-1] != meta["num_tokens"] or (np.diff(bounds) < 1).any()):
        faults.append("sequence_start_i64.npy must rise from 0 to the number of tokens")
    faults += limits.token_faults("token_ids.npy", arrays["token_ids"])
    if not faults:
        faults += limits.position_faults("ctx_pos_start_i32.npy", arrays["ctx_pos_start_i32"], np.diff(bounds))
    for name in ("loss_mask_u8", "held_out_u8"):
        if np.max(arrays[name], initial=0) > 1:
            faults.append(f"{name}.npy must be 0 or 1, got {np.max(arrays[name])}")
    return faults
