"""What a cache is made with: a target, its tokenizer, and whose forward gives the features; and the record of them."""

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from dflash.metrics import round_up
from dflash.models import mesh
from dflash.models.llama import Llama
from dflash.models.mesh import ROWS, WHOLE
from dflash.text.prompts import PromptError
from dflash.text.tokenizer import Tokenizer
from dflash.training.cache.arrays import ArrayWriter, CacheError
from dflash.training.cache.conversations import Conversation, ConversationConfig, load_openings, split_record


@partial(jax.jit, static_argnames=("graph", "layer_ids"))
def _features(graph: Any, weights: Any, tokens: Array, positions: Array, layer_ids: tuple[int, ...]) -> Array:
    """tokens and positions int32 [B, T] -> bits of bfloat16, uint16 [B, T, K*H]."""

    def run(weights: Any, tokens: Array, positions: Array) -> Array:
        target = nnx.merge(graph, weights)
        B, T = tokens.shape
        _, outputs, _ = target.hidden(tokens, layer_ids=layer_ids, positions=positions)
        rows = jnp.stack(outputs).reshape(-1, B, T).transpose(1, 2, 0)
        return jax.lax.bitcast_convert_type(rows.astype(jnp.bfloat16), jnp.uint16)

    there = mesh.of(graph, weights)
    # Rows that dp does not divide are read on every device.
    split = ROWS if tokens.shape[0] % mesh.ways(there, mesh.DP) == 0 else WHOLE
    return mesh.spread(run, there, (mesh.weight_specs(weights), split, split), split)(weights, tokens, positions)


class FeatureReader:
    """Runs the target over token sequences for the outputs of some layers. Models are passed split: no weight moves."""

    def __init__(self, target: Llama, layer_ids: Sequence[int]):
        self._graph, self._weights = nnx.split(target)
        self._layer_ids = tuple(layer_ids)

    def __call__(
        self, rows: Sequence[Sequence[int] | np.ndarray], starts: Sequence[int] | np.ndarray
    ) -> list[np.ndarray]:
        """uint16 [len(row), K*H] for every row; a row's first token is at its position in `starts`."""
        length = round_up(max(map(len, rows)), 64)
        tokens = np.zeros((len(rows), length), np.int32)
        for padded, row in zip(tokens, rows, strict=True):
            padded[: len(row)] = row
        positions = np.asarray(starts, np.int32)[:, None] + np.arange(length, dtype=np.int32)
        bits = self._bits(tokens, positions)
        return [bits[i, : len(row)] for i, row in enumerate(rows)]

    def lower(self, batch: int, length: int) -> jax.stages.Lowered:
        """The program for `batch` rows of `length` tokens, lowered for the devices that the target lies on."""
        tokens = jax.ShapeDtypeStruct((batch, length), jnp.int32)
        return _features.lower(self._graph, self._weights, tokens, tokens, self._layer_ids)

    def _bits(self, tokens: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """tokens and positions int32 [B, T] -> bits of bfloat16, uint16 [B, T, K*H]."""
        return np.asarray(_features(self._graph, self._weights, tokens, positions, self._layer_ids))


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class CacheSource:
    """The target that a cache is made with; its snapshot's name and hash go into the cache.

    Features are the target's own, unless another implementation's forward gives them (`make_reader`, given layer ids);
    the cache records its `name`.
    """

    target: Llama
    tokenizer: Tokenizer
    snapshot_dir: str
    snapshot_hash: str
    name: str = "dflash"
    make_reader: Callable[[Sequence[int]], FeatureReader] | None = None

    def reader(self, layer_ids: Sequence[int]) -> FeatureReader:
        """The reader of these layers' outputs."""
        return FeatureReader(self.target, layer_ids) if self.make_reader is None else self.make_reader(layer_ids)


def check_layer_ids(target: Llama, layer_ids: Sequence[int]) -> None:
    """Raises CacheError unless these name different layers of the target."""
    last = target.config.num_layers - 1
    if not layer_ids or len(set(layer_ids)) < len(layer_ids) or not all(0 <= i <= last for i in layer_ids):
        raise CacheError(f"target_layer_ids name different layers, 0..{last}, got {list(layer_ids)}")


def check_offsets(target: Llama, offsets: Sequence[int], length: int, of: str) -> None:
    """Raises CacheError unless `length` tokens from every offset stay within the target's positions.

    `of` names the settings that make up the length.
    """
    limit = target.config.max_position
    if length > limit:
        raise CacheError(f"a text stays within the target's {limit} positions; {of} comes to {length}: lower them")
    bad = [o for o in offsets if o < 0 or o + length > limit]
    if bad or not offsets:
        raise CacheError(
            f"position offsets are at least 0 and leave room for {length} tokens within {limit} positions; got "
            f"{bad or 'none'}: use at most {limit - length}"
        )


def check_lengths(target: Llama, conversations: ConversationConfig, offsets: Sequence[int]) -> None:
    """Raises CacheError unless the longest conversation fits within the target's positions, from every offset."""
    longest = conversations.max_prompt_len + conversations.max_new_tokens
    check_offsets(target, offsets, longest, "max_prompt_len + max_new_tokens")


def common_meta(source: CacheSource, conversations: ConversationConfig, layer_ids: Sequence[int]) -> dict[str, Any]:
    """What both forms record of the target and the text."""
    return {
        "model_snapshot_dir": source.snapshot_dir,
        "snapshot_sha256": source.snapshot_hash,
        "target_layer_ids": list(layer_ids),
        "add_one_for_pre_layer_capture": True,
        "hidden_size": source.target.config.hidden_size,
        "vocab_size": source.target.config.vocab_size,
        "max_position": source.target.config.max_position,
        "num_context_features": len(layer_ids),
        "dtype": "bf16_u16",
        "computed_in": str(source.target.dtype),
        "teacher": source.name,
        "conversations": dataclasses.asdict(conversations) | {"openings": load_openings(conversations.openings)},
        **source.tokenizer.facts,
    }


@contextlib.contextmanager
def too_little_leaves_nothing(writer: ArrayWriter) -> Iterator[None]:
    """Discards a build that these settings can never finish, because it would refuse settings that can."""
    try:
        yield
    except (CacheError, PromptError):
        writer.discard()
        raise


def text_record(building: Path, talks: Sequence[Conversation]) -> dict[str, Any]:
    """What ties a cache to its text: features and labels follow from the text and the target."""
    data = (building / "conversations.jsonl").read_bytes()
    return {
        "conversations_sha256": hashlib.sha256(data).hexdigest(),
        "split": split_record(talks),
        "dropped_unknown_ids": sum(json.loads(line)["dropped"] for line in data.splitlines()),
    }
