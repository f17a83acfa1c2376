"""What a cache is made with: a target, its tokenizer, whose forward reads the text; what every cache says of them."""

import contextlib
import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from dflash.models.llama import Llama
from dflash.prompts import PromptError
from dflash.teacher_cache.arrays import ArrayWriter, CacheError
from dflash.teacher_cache.conversations import (
    Conversation,
    ConversationConfig,
    split_record,
)
from dflash.tokenizer import Tokenizer


@partial(jax.jit, static_argnames=("graph", "layer_ids"))
def _features(graph: Any, weights: Any, tokens: Array, positions: Array, layer_ids: tuple[int, ...]) -> Array:
    """tokens and positions int32 [B, T] -> bits of bfloat16, uint16 [B, T, K*H]."""
    target = nnx.merge(graph, weights)
    B, T = tokens.shape
    _, outputs, _ = target.hidden(tokens, layer_ids=layer_ids, positions=positions)
    rows = jnp.stack(outputs).reshape(-1, B, T).transpose(1, 2, 0)
    return jax.lax.bitcast_convert_type(rows.astype(jnp.bfloat16), jnp.uint16)


class FeatureReader:
    """Runs the target over token sequences for the outputs of some layers; models go in split, so weights stay put."""

    def __init__(self, target: Llama, layer_ids: Sequence[int]):
        self._graph, self._weights = nnx.split(target)
        self._layer_ids = tuple(layer_ids)

    def __call__(
        self, rows: Sequence[Sequence[int] | np.ndarray], starts: Sequence[int] | np.ndarray
    ) -> list[np.ndarray]:
        """uint16 [len(row), K*H] for every row, whose first token is at position `starts` of that row."""
        length = -(-max(map(len, rows)) // 64) * 64
        tokens = np.zeros((len(rows), length), np.int32)
        for padded, row in zip(tokens, rows, strict=True):
            padded[: len(row)] = row
        positions = np.asarray(starts, np.int32)[:, None] + np.arange(length, dtype=np.int32)
        bits = self._bits(tokens, positions)
        return [bits[i, : len(row)] for i, row in enumerate(rows)]

    def _bits(self, tokens: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """tokens and positions int32 [B, T] -> bits of bfloat16, uint16 [B, T, K*H]."""
        return np.asarray(_features(self._graph, self._weights, tokens, positions, self._layer_ids))


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """The target that a cache is made with: its snapshot's name and hash go into the cache.

    Features are the target's own, unless another `teacher`'s forward gives them: `make_reader` of layer ids.
    """

    target: Llama
    tokenizer: Tokenizer
    snapshot_dir: str
    snapshot_hash: str
    teacher: str = "dflash"
    make_reader: Callable[[Sequence[int]], FeatureReader] | None = None

    def reader(self, layer_ids: Sequence[int]) -> FeatureReader:
        """What reads the outputs of these layers."""
        return FeatureReader(self.target, layer_ids) if self.make_reader is None else self.make_reader(layer_ids)


def check_layer_ids(target: Llama, layer_ids: Sequence[int]) -> None:
    """Raises CacheError unless these name different layers of the target."""
    last = target.config.num_layers - 1
    if not layer_ids or len(set(layer_ids)) < len(layer_ids) or not all(0 <= i <= last for i in layer_ids):
        raise CacheError(f"target_layer_ids name different layers, 0..{last}, got {list(layer_ids)}")


def check_offsets(target: Llama, offsets: Sequence[int], length: int) -> None:
    """Raises CacheError unless `length` tokens from every offset stay within the target's positions."""
    limit = target.config.max_position
    bad = [o for o in offsets if o < 0 or o + length > limit]
    if bad or not offsets:
        raise CacheError(
            f"position offsets are at least 0 and leave room for {length} tokens within {limit} positions; got "
            f"{bad or 'none'}: use at most {limit - length}"
        )


def common_meta(source: Source, conversations: ConversationConfig, layer_ids: Sequence[int]) -> dict[str, Any]:
    """What both forms say of the target and the text."""
    return {
        "model_snapshot_dir": source.snapshot_dir,
        "snapshot_sha256": source.snapshot_hash,
        "target_layer_ids": list(layer_ids),
        "add_one_for_pre_layer_capture": True,
        "hidden_size": source.target.config.hidden_size,
        "num_context_features": len(layer_ids),
        "dtype": "bf16_u16",
        "computed_in": str(source.target.dtype),
        "teacher": source.teacher,
        "conversations": dataclasses.asdict(conversations),
    }


@contextlib.contextmanager
def too_little_leaves_nothing(writer: ArrayWriter) -> Iterator[None]:
    """What these settings can never finish is not kept: it would refuse the settings that can."""
    try:
        yield
    except (CacheError, PromptError):
        writer.discard()
        raise


def text_record(building: Path, made: Sequence[Conversation]) -> dict[str, Any]:
    """What binds a cache to its text: features and labels follow from it and the target."""
    data = (building / "conversations.jsonl").read_bytes()
    return {"conversations_sha256": hashlib.sha256(data).hexdigest(), "split": split_record(made)}
