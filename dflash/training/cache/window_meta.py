"""What meta.json says about a window cache, whichever version of the builder wrote it.

Three keys appeared together when the anchor left the context: `ctx_len_full`, `add_one_for_pre_layer_capture` and
`target_ids_mode`. A file without any of them is of the first version: its last context token is the anchor, a layer id
names the layer's *input*, labels are the data's next tokens. No version has only some of them.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

LABELS = "block_verify_target_predict_shifted"
OffsetMode = Literal["cycle_samples", "per_prompt_rollout"]
_SINCE_ANCHOR_LEFT = ("ctx_len_full", "add_one_for_pre_layer_capture", "target_ids_mode")
# Names for the bits of a bfloat16; the oldest files stored the values themselves.
_BFLOAT16 = ("bf16_u16", "bf16", "bfloat16")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class WindowMeta:
    """What a reader needs to know; None where the file doesn't say.

    `ctx_len` counts the stored context tokens, the anchor among them when `anchor_in_context`. `split` records the
    prompts' hashes by side.
    """

    ctx_len: int
    block_size: int
    target_layer_ids: tuple[int, ...]
    add_one_for_pre_layer_capture: bool
    hidden_size: int
    anchor_in_context: bool
    snapshot_sha256: str | None
    split: Mapping[str, Any] | None
    raw: Mapping[str, Any] = dataclasses.field(repr=False)

    @property
    def feature_layer_ids(self) -> tuple[int, ...]:
        """The layer whose *output* each feature is, however the file counts: comparable with a draft's."""
        return tuple(i if self.add_one_for_pre_layer_capture else i - 1 for i in self.target_layer_ids)

    @property
    def anchor_distance(self) -> int:
        """anchor_pos - ctx_pos_start."""
        return self.ctx_len - self.anchor_in_context


def _is_integer(value: Any, lowest: int = 0) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= lowest


class MetaReader:
    """Reads meta.json and collects every fault. A faulty number reads as None, so that the rest is still checked."""

    def __init__(self, raw: Mapping[str, Any]):
        self._whole = raw
        # A null key counts as absent.
        self.raw = {k: v for k, v in raw.items() if v is not None}
        self.faults: list[str] = []
        self.ctx_len = self._integer("ctx_len", 1, required=True)
        self.block_size = self._integer("block_size", 2, required=True)
        self.hidden_size = self._integer("hidden_size", 1, required=True)
        self.layer_ids = self._integers("target_layer_ids", required=True)
        self.features = self._features()
        blocks, steps = self._integer("num_blocks", 1), self._integer("rollout_steps", 1)
        self.num_samples = self._integer("num_samples", 1)
        if self.num_samples is None and blocks is not None:
            self.num_samples = blocks * (steps or 1)
        self.offsets = self._integers("position_offsets")

    def _check(self, good: bool, fault: str) -> None:
        if not good:
            self.faults.append(fault)

    def _integer(self, key: str, lowest: int, required: bool = False) -> int | None:
        value = self.raw.get(key)
        good = _is_integer(value, lowest) if value is not None else not required
        self._check(good, f"{key} must be an integer of at least {lowest}, got {value!r}")
        return value if good else None

    def _integers(self, key: str, required: bool = False) -> tuple[int, ...] | None:
        value = self.raw.get(key)
        good = isinstance(value, list) and len(value) > 0 and all(_is_integer(i) for i in value)
        self._check(good or (value is None and not required), f"{key} must list integers of at least 0, got {value!r}")
        return tuple(value or ()) if good else None

    def _features(self) -> int | None:
        counted = self._integer("num_context_features", 1)
        if self.layer_ids is None:
            return counted
        ids = len(self.layer_ids)
        self._check(counted in (None, ids), f"num_context_features is {counted} for {ids} target_layer_ids")
        return ids

    def _text(self, key: str) -> str | None:
        value = self.raw.get(key)
        self._check(value is None or isinstance(value, str), f"{key} must be text, got {value!r}")
        return value

    def _one_of(self, key: str, allowed: Sequence[str]) -> None:
        value = self.raw.get(key)
        self._check(value is None or value in allowed, f"{key} must be one of {list(allowed)}, got {value!r}")

    def _conventions(self) -> tuple[bool, bool]:
        """anchor_in_context and add_one."""
        present = [k for k in _SINCE_ANCHOR_LEFT if k in self.raw]
        first = not present
        absent = [k for k in _SINCE_ANCHOR_LEFT if k not in present]
        self._check(
            first or not absent,
            f"{', '.join(absent)} missing where {', '.join(present)} is there: no version wrote that, so whether the "
            "anchor is in the context, which layers the ids mean and where labels come from can't be known",
        )
        add_one = self.raw.get("add_one_for_pre_layer_capture", False)
        self._check(isinstance(add_one, bool), f"add_one_for_pre_layer_capture must be true or false, got {add_one!r}")
        if (first or add_one is False) and 0 in (self.layer_ids or ()):
            self.faults.append("target_layer_ids count by a layer's input here; 0 is the embedding, no layer's output")
        full = self._integer("ctx_len_full", 2)
        if full is not None and self.ctx_len is not None:
            self._check(full == self.ctx_len + 1, f"ctx_len_full must be ctx_len + 1 ({self.ctx_len + 1}), got {full}")
        self._one_of("target_ids_mode", (LABELS,))
        return first, bool(add_one)

    def finish(self) -> WindowMeta | None:
        """The meta data; None if there are faults."""
        anchor_in_context, add_one = self._conventions()
        self._one_of("dtype", _BFLOAT16)
        split = self.raw.get("split")
        self._check(split is None or isinstance(split, dict), f"split must be an object, got {split!r}")
        self._one_of("position_offset_mode", get_args(OffsetMode))
        self._text("model_snapshot_dir")
        snapshot_sha256 = self._text("snapshot_sha256")
        self._integer("seed", -(2**63))
        if self.faults:
            return None
        # Each of them is a fault when it is missing.
        ctx_len, block_size, hidden_size = (n or 0 for n in (self.ctx_len, self.block_size, self.hidden_size))
        return WindowMeta(
            ctx_len=ctx_len,
            block_size=block_size,
            target_layer_ids=self.layer_ids or (),
            add_one_for_pre_layer_capture=add_one,
            hidden_size=hidden_size,
            anchor_in_context=anchor_in_context,
            snapshot_sha256=snapshot_sha256,
            split=split,
            raw=self._whole,
        )
