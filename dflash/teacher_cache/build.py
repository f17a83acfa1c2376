"""Target -> teacher cache: its text (conversations.jsonl), then what its layers say of every token."""

import contextlib
import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from tqdm import tqdm

from dflash.models.llama import Llama
from dflash.prompts import PromptError
from dflash.teacher_cache.arrays import ArrayWriter, CacheError
from dflash.teacher_cache.conversations import (
    Conversation,
    ConversationConfig,
    check_sources,
    split_record,
    write_conversations,
)
from dflash.teacher_cache.sample import Sampler
from dflash.teacher_cache.sequences import FORM, sequence_specs
from dflash.teacher_cache.window_meta import LABELS, OFFSET_MODES
from dflash.teacher_cache.windows import to_bits, window_specs
from dflash.tokenizer import Tokenizer

ACCEPT_LEN_MODES = ("full", "uniform", "geometric")


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


def _common_meta(source: Source, conversations: ConversationConfig, layer_ids: Sequence[int]) -> dict[str, Any]:
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


def build_sequences(
    source: Source,
    directory: Path,
    conversations: ConversationConfig,
    *,
    layer_ids: Sequence[int],
    position_offsets: Sequence[int] = (0,),
    batch_size: int = 16,
) -> Path:
    """A cache in sequence form. Sequence i is read from position offset i modulo their number.

    A killed build goes on where it stopped. Raises CacheError or PromptError.
    """
    target = source.target
    check_layer_ids(target, layer_ids)
    check_sources(conversations)
    check_offsets(target, position_offsets, conversations.max_prompt_len + conversations.max_new_tokens)
    settings = {
        "form": FORM,
        "position_offsets": list(position_offsets),
        **_common_meta(source, conversations, layer_ids),
    }
    with ArrayWriter(Path(directory), settings) as writer:
        with _too_little_leaves_nothing(writer):
            made = write_conversations(target, source.tokenizer, conversations, writer.building / "conversations.jsonl")
        _write_sequences(writer, made, source.reader(layer_ids), settings, batch_size)
        counts = {"num_sequences": len(made), "num_tokens": sum(len(c.prompt) + len(c.answer) for c in made)}
        return writer.finish(settings | counts | _text_record(writer.building, made))


def _write_sequences(
    writer: ArrayWriter,
    made: Sequence[Conversation],
    read: FeatureReader,
    settings: Mapping[str, Any],
    batch_size: int,
) -> None:
    rows = [[*c.prompt, *c.answer] for c in made]
    bounds = [0, *accumulate(map(len, rows))]
    offsets = settings["position_offsets"]
    writer.allocate(sequence_specs(bounds[-1], len(rows), settings["hidden_size"] * settings["num_context_features"]))
    arrays = writer.arrays
    arrays["sequence_start_i64"][:] = bounds
    arrays["held_out_u8"][:] = [c.held_out for c in made]
    arrays["ctx_pos_start_i32"][:] = [offsets[i % len(offsets)] for i in range(len(made))]
    with tqdm(total=bounds[-1], initial=bounds[writer.done], desc="features", unit="token") as bar:
        for first in range(writer.done, len(rows), batch_size):
            batch = range(first, min(first + batch_size, len(rows)))
            features = read([rows[i] for i in batch], arrays["ctx_pos_start_i32"][batch.start : batch.stop])
            for i, values in zip(batch, features, strict=True):
                part = slice(bounds[i], bounds[i + 1])
                arrays["features_u16"][part] = values
                arrays["token_ids"][part] = rows[i]
                arrays["loss_mask_u8"][part] = np.arange(len(rows[i])) >= len(made[i].prompt)
            writer.commit(batch.stop)
            bar.update(bounds[batch.stop] - bounds[batch.start])


@contextlib.contextmanager
def _too_little_leaves_nothing(writer: ArrayWriter) -> Iterator[None]:
    """What these settings can never finish is not kept: it would refuse the settings that can."""
    try:
        yield
    except (CacheError, PromptError):
        writer.discard()
        raise


def _text_record(building: Path, made: Sequence[Conversation]) -> dict[str, Any]:
    """What binds a cache to its text: features and labels follow from it and the target."""
    data = (building / "conversations.jsonl").read_bytes()
    return {"conversations_sha256": hashlib.sha256(data).hexdigest(), "split": split_record(made)}


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class WindowConfig:
    """What windows are cut from. `ctx_len` counts the anchor, as earlier builders did: ctx_len - 1 tokens are stored.

    Every one of `num_blocks` bases gives `rollout_steps` samples: decoding that goes on from it, with accept lengths
    drawn by `accept_len_mode` (full, uniform, or geometric with `accept_len_p`). The offset of a sample's positions
    changes from sample to sample (cycle_samples) or from base to base (per_prompt_rollout).
    """

    ctx_len: int = 1024
    block_size: int = 8
    num_blocks: int = 256
    rollout_steps: int = 1
    accept_len_mode: str = "full"
    accept_len_p: float = 0.35
    position_offsets: tuple[int, ...] = (0,)
    position_offset_mode: str = "per_prompt_rollout"
    seed: int = 0

    def __post_init__(self) -> None:
        faults = [
            f"{name} must be at least {least}, got {getattr(self, name)}"
            for name, least in (("ctx_len", 2), ("block_size", 2), ("num_blocks", 1), ("rollout_steps", 1))
            if getattr(self, name) < least
        ]
        for name, known in (("accept_len_mode", ACCEPT_LEN_MODES), ("position_offset_mode", OFFSET_MODES)):
            if getattr(self, name) not in known:
                faults.append(f"{name} must be one of {list(known)}, got {getattr(self, name)!r}")
        if not 0 < self.accept_len_p <= 1:
            faults.append(f"accept_len_p is a probability above 0, got {self.accept_len_p}")
        if faults:
            raise CacheError("; ".join(faults))

    @property
    def context(self) -> int:
        """Context tokens of a sample, without its anchor."""
        return self.ctx_len - 1

    @property
    def continuation(self) -> int:
        """Tokens after the context that the samples of one base need at most."""
        return self.rollout_steps * self.block_size

    def accept_lens(self, block: int) -> np.ndarray:
        """Accept lengths of a base's synthetic steps, int [rollout_steps]."""
        rng, drafted = np.random.default_rng([self.seed, 1, block]), self.block_size - 1
        if self.accept_len_mode == "full":
            return np.full(self.rollout_steps, drafted)
        if self.accept_len_mode == "uniform":
            return rng.integers(0, self.block_size, self.rollout_steps)
        return np.minimum(rng.geometric(self.accept_len_p, self.rollout_steps) - 1, drafted)

    def offset(self, block: int, step: int) -> int:
        """What is added to the positions of a sample."""
        index = block if self.position_offset_mode == "per_prompt_rollout" else block * self.rollout_steps + step
        return self.position_offsets[index % len(self.position_offsets)]


def window_contexts(conversations: Sequence[Conversation], config: WindowConfig) -> list[tuple[list[int], bool]]:
    """ctx_len - 1 tokens for every base, and whether they are held out.

    A context ends within an answer, at a place drawn by the seed, and reaches back through the conversations before it
    on the same side of the split: real text all the way, no padding. Raises CacheError when there is too little of it.
    """
    sides: dict[bool, list[int]] = {False: [], True: []}
    contexts: list[tuple[list[int], bool]] = []
    for number, c in enumerate(conversations):
        text = sides[c.held_out]
        end = len(text) + len(c.prompt) + int(np.random.default_rng([config.seed, 0, number]).integers(len(c.answer)))
        text += [*c.prompt, *c.answer]
        if end >= config.context:
            contexts.append((text[end - config.context : end], c.held_out))
    if len(contexts) < config.num_blocks:
        raise CacheError(
            f"{len(conversations)} conversations give {len(contexts)} contexts of {config.context} tokens, and "
            f"{config.num_blocks} are asked for: make more conversations, or shorten the context"
        )
    return contexts[: config.num_blocks]


def build_windows(
    source: Source,
    directory: Path,
    conversations: ConversationConfig,
    config: WindowConfig,
    *,
    layer_ids: Sequence[int],
    batch_size: int = 8,
) -> Path:
    """A cache in window form: what the seeds' loader reads. Anchor and labels are the target's own greedy tokens.

    A sample's features and labels come from one and the same text, the base's context and its continuation, none of it
    cut off: what live decoding sees. A killed build goes on where it stopped. Raises CacheError or PromptError.
    """
    target = source.target
    check_layer_ids(target, layer_ids)
    check_sources(conversations)
    check_offsets(target, config.position_offsets, config.context + config.continuation)
    meta = _window_meta(source, conversations, config, layer_ids, batch_size)
    samples, hidden = config.num_blocks * config.rollout_steps, target.config.hidden_size
    with ArrayWriter(Path(directory), meta) as writer:
        # Sizes are known before the text is: a disk without room is seen before the target has written any.
        writer.allocate(window_specs(samples, config.context, config.block_size, len(layer_ids), hidden))
        with _too_little_leaves_nothing(writer):
            made = write_conversations(target, source.tokenizer, conversations, writer.building / "conversations.jsonl")
            contexts = window_contexts(made, config)
        _fill_windows(writer, target, config, contexts, source.reader(layer_ids), batch_size)
        return writer.finish(meta | _text_record(writer.building, made))


def _fill_windows(
    writer: ArrayWriter,
    target: Llama,
    config: WindowConfig,
    contexts: Sequence[tuple[list[int], bool]],
    read: FeatureReader,
    batch_size: int,
) -> None:
    steps, longest = config.rollout_steps, config.context + config.continuation
    write = Sampler(target, batch=batch_size, max_prompt_len=config.context, max_new_tokens=config.continuation)
    label = Sampler(target, batch=batch_size, max_prompt_len=longest, max_new_tokens=config.block_size - 1)
    embedding = to_bits(np.asarray(target.embedding.weight[...]))
    with tqdm(total=config.num_blocks, initial=writer.done // steps, desc="windows", unit="block") as bar:
        for first in range(writer.done // steps, config.num_blocks, batch_size):
            blocks = range(first, min(first + batch_size, config.num_blocks))
            for sample, values in _windows(config, blocks, contexts, write, label, read):
                for name, value in values.items():
                    writer.arrays[name][sample] = value
                writer.arrays["anchor_embedding_u16"][sample] = embedding[values["anchor_ids"]]
            writer.commit(blocks.stop * steps)
            bar.update(len(blocks))


def _windows(
    config: WindowConfig,
    blocks: range,
    contexts: Sequence[tuple[list[int], bool]],
    write: Sampler,
    label: Sampler,
    read: FeatureReader,
) -> Iterator[tuple[int, dict[str, Any]]]:
    """The samples of some bases: each reads its text on from where the one before it left off."""
    prompts = [contexts[b][0] for b in blocks]
    continued = write.run(prompts, indices=list(blocks), offsets=[config.offset(b, 0) for b in blocks])
    texts = [np.array([*p, *c], np.int32) for p, c in zip(prompts, continued, strict=True)]
    begins = np.array([np.cumsum([0, *(config.accept_lens(b)[:-1] + 1)]) for b in blocks])
    B = config.block_size
    for step in range(config.rollout_steps):
        offsets, ends = [config.offset(b, step) for b in blocks], begins[:, step] + config.context
        moved = step > 0 and config.position_offset_mode == "cycle_samples"
        if step == 0 or moved:
            features = read(texts, offsets)
        if moved:
            # Far positions round differently, so what is most likely next may be another token than it was elsewhere.
            known = [text[: end + 1].tolist() for text, end in zip(texts, ends, strict=True)]
            labels = label.run(known, indices=list(blocks), offsets=offsets)
        else:
            labels = [text[end + 1 : end + B].tolist() for text, end in zip(texts, ends, strict=True)]
        for row, block in enumerate(blocks):
            begin, end = begins[row, step], ends[row]
            yield (
                block * config.rollout_steps + step,
                {
                    "context_features_u16": features[row][begin:end],
                    "target_ids": labels[row],
                    "anchor_ids": texts[row][end],
                    "ctx_token_ids": texts[row][begin:end],
                    "ctx_pos_start_i32": offsets[row] + begin,
                    "anchor_pos_i32": offsets[row] + end,
                    "held_out_u8": contexts[block][1],
                },
            )


def _window_meta(
    source: Source, conversations: ConversationConfig, config: WindowConfig, layer_ids: Sequence[int], batch_size: int
) -> dict[str, Any]:
    """meta.json with the keys that earlier loaders read; null where a key was another runtime's setting."""
    runtime = ("prefill_chunk", "page_size", "hbm_utilization", "sharding_axis_dims", "teacher_easydel_dir", "wall_s")
    data = ("calib_repo_id", "calib_data_files", "max_rows_per_pack")
    return {
        **dict.fromkeys((*runtime, *data)),
        **_common_meta(source, conversations, layer_ids),
        "form": "windows",
        "platform": jax.default_backend(),
        "ctx_len": config.context,
        "ctx_len_full": config.ctx_len,
        "block_size": config.block_size,
        "num_blocks": config.num_blocks,
        "rollout_steps": config.rollout_steps,
        "rollout_accept_len_mode": config.accept_len_mode,
        "rollout_accept_len_p": config.accept_len_p,
        # The candidates are the target's own tokens, so committing those or its predictions is the same.
        "rollout_state_evolution": "dflash_commit",
        "num_samples": config.num_blocks * config.rollout_steps,
        "batch_size": batch_size,
        "target_ids_mode": LABELS,
        "seed": config.seed,
        "position_offsets": list(config.position_offsets),
        "position_offset_mode": config.position_offset_mode,
        "positions_contiguous": True,
        "ctx_pos_start_file": "ctx_pos_start_i32.npy",
        "anchor_pos_file": "anchor_pos_i32.npy",
    }
