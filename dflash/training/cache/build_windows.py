"""Target -> teacher cache in window form, which earlier loaders read: contexts cut from its text, and what follows."""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import numpy as np
import tyro
from tqdm import tqdm

from dflash.config import BlockSize, Checked, Count, Index, Range
from dflash.models.llama import Llama
from dflash.training.cache.arrays import ArrayWriter, CacheError
from dflash.training.cache.conversations import Conversation, ConversationConfig, check_sources, write_conversations
from dflash.training.cache.sample import Sampler
from dflash.training.cache.source import (
    CacheSource,
    FeatureReader,
    check_layer_ids,
    check_lengths,
    check_offsets,
    common_meta,
    text_record,
    too_little_leaves_nothing,
)
from dflash.training.cache.window_meta import LABELS, OffsetMode
from dflash.training.cache.windows import to_bits, window_specs


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class WindowConfig(Checked):
    """How windows are cut. `ctx_len` counts the anchor, as earlier builders did: ctx_len - 1 tokens are stored.

    Each of `num_blocks` bases gives `rollout_steps` samples, one per step of decoding from it.
    """

    ctx_len: Annotated[int, Range(2)] = 1024
    """windows: context tokens, the anchor included."""
    block_size: BlockSize = 8
    """windows: slots of a block, the anchor included."""
    num_blocks: Count = 256
    """windows: number of contexts."""
    rollout_steps: Count = 1
    """windows: samples from each context, one per step of decoding."""
    accept_len_mode: Annotated[
        Literal["full", "uniform", "geometric"], tyro.conf.arg(name="rollout-accept-len-mode")
    ] = "full"
    """windows: drafted tokens that a synthetic step accepts."""
    accept_len_p: Annotated[float, Range(0, 1, above=True), tyro.conf.arg(name="rollout-accept-len-p")] = 0.35
    """windows: parameter of the geometric mode."""
    position_offsets: tuple[Index, ...] = (0,)
    """Offsets added to the positions of samples, in turn."""
    position_offset_mode: OffsetMode = "per_prompt_rollout"
    """windows: whether the offset changes from sample to sample, or from context to context."""

    @property
    def context(self) -> int:
        """Context tokens of a sample, without its anchor."""
        return self.ctx_len - 1

    @property
    def continuation(self) -> int:
        """The most tokens after the context that the samples of one base need."""
        return self.rollout_steps * self.block_size

    def accept_lens(self, block: int, seed: int) -> np.ndarray:
        """Accept lengths of a base's synthetic steps, int [rollout_steps]."""
        rng, drafted = np.random.default_rng([seed, 1, block]), self.block_size - 1
        if self.accept_len_mode == "full":
            return np.full(self.rollout_steps, drafted)
        if self.accept_len_mode == "uniform":
            return rng.integers(0, self.block_size, self.rollout_steps)
        return np.minimum(rng.geometric(self.accept_len_p, self.rollout_steps) - 1, drafted)

    def offset(self, block: int, step: int) -> int:
        """The offset added to the positions of a sample."""
        index = block if self.position_offset_mode == "per_prompt_rollout" else block * self.rollout_steps + step
        return self.position_offsets[index % len(self.position_offsets)]


def window_contexts(
    conversations: Sequence[Conversation], config: WindowConfig, seed: int
) -> list[tuple[list[int], bool]]:
    """ctx_len - 1 tokens for every base, and whether they are held out.

    A context ends within an answer, at a place drawn by the seed, and reaches back through earlier conversations on the
    same side of the split: real text throughout, no padding. Raises CacheError if there is too little text.
    """
    sides: dict[bool, list[int]] = {False: [], True: []}
    contexts: list[tuple[list[int], bool]] = []
    for number, c in enumerate(conversations):
        text = sides[c.held_out]
        end = len(text) + len(c.prompt) + int(np.random.default_rng([seed, 0, number]).integers(len(c.answer)))
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
    source: CacheSource,
    directory: Path,
    conversations: ConversationConfig,
    config: WindowConfig,
    *,
    layer_ids: Sequence[int],
    batch_size: int = 8,
) -> Path:
    """A cache in window form, as an earlier project's loader reads it; anchors and labels are greedy tokens.

    A sample's features and labels come from the same uncut text, the base's context and its continuation, as in live
    decoding. A killed build resumes where it stopped. Raises CacheError or PromptError.
    """
    target = source.target
    check_layer_ids(target, layer_ids)
    check_sources(conversations, target.config.max_position)
    length = config.context + config.continuation
    check_offsets(target, config.position_offsets, length, "ctx_len - 1 + rollout_steps x block_size")
    check_lengths(target, conversations, (0,))
    meta = _window_meta(source, conversations, config, layer_ids, batch_size)
    samples, hidden = config.num_blocks * config.rollout_steps, target.config.hidden_size
    with ArrayWriter(Path(directory), meta) as writer:
        # Sizes are known before the text, so a full disk is noticed before the target writes any.
        writer.allocate(window_specs(samples, config.context, config.block_size, len(layer_ids), hidden))
        with too_little_leaves_nothing(writer):
            talks = write_conversations(
                target, source.tokenizer, conversations, writer.building / "conversations.jsonl"
            )
            contexts = window_contexts(talks, config, conversations.seed)
        _fill_windows(writer, target, config, contexts, source.reader(layer_ids), batch_size, conversations.seed)
        return writer.finish(meta | text_record(writer.building, talks))


def _fill_windows(
    writer: ArrayWriter,
    target: Llama,
    config: WindowConfig,
    contexts: Sequence[tuple[list[int], bool]],
    read: FeatureReader,
    batch_size: int,
    seed: int,
) -> None:
    steps, longest = config.rollout_steps, config.context + config.continuation
    write = Sampler(target, batch=batch_size, max_prompt_len=config.context, max_new_tokens=config.continuation)
    label = Sampler(target, batch=batch_size, max_prompt_len=longest, max_new_tokens=config.block_size - 1)
    embedding = to_bits(np.asarray(target.embedding.weight[...]))
    with tqdm(total=config.num_blocks, initial=writer.done // steps, desc="windows", unit="block") as bar:
        for first in range(writer.done // steps, config.num_blocks, batch_size):
            blocks = range(first, min(first + batch_size, config.num_blocks))
            for sample, values in _windows(config, blocks, contexts, write, label, read, seed):
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
    seed: int,
) -> Iterator[tuple[int, dict[str, Any]]]:
    """The samples of some bases: each continues its text where the one before it stopped."""
    prompts = [contexts[b][0] for b in blocks]
    continued = write.run(prompts, indices=list(blocks), offsets=[config.offset(b, 0) for b in blocks])
    texts = [np.array([*p, *c], np.int32) for p, c in zip(prompts, continued, strict=True)]
    begins = np.array([np.cumsum([0, *(config.accept_lens(b, seed)[:-1] + 1)]) for b in blocks])
    B = config.block_size
    for step in range(config.rollout_steps):
        offsets, ends = [config.offset(b, step) for b in blocks], begins[:, step] + config.context
        moved = step > 0 and config.position_offset_mode == "cycle_samples"
        if step == 0 or moved:
            features = read(texts, offsets)
        if moved:
            # Far positions round differently, so the most likely next token may be another one there.
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
    source: CacheSource,
    conversations: ConversationConfig,
    config: WindowConfig,
    layer_ids: Sequence[int],
    batch_size: int,
) -> dict[str, Any]:
    """meta.json with the keys that earlier loaders read; null for settings of another runtime."""
    runtime = ("prefill_chunk", "page_size", "hbm_utilization", "sharding_axis_dims", "teacher_easydel_dir", "wall_s")
    data = ("calib_repo_id", "calib_data_files", "max_rows_per_pack")
    return {
        **dict.fromkeys((*runtime, *data)),
        **common_meta(source, conversations, layer_ids),
        "form": "windows",
        "platform": jax.default_backend(),
        "ctx_len": config.context,
        "ctx_len_full": config.ctx_len,
        "block_size": config.block_size,
        "num_blocks": config.num_blocks,
        "rollout_steps": config.rollout_steps,
        "rollout_accept_len_mode": config.accept_len_mode,
        "rollout_accept_len_p": config.accept_len_p,
        # The candidates are the target's own tokens, so committing them or its predictions is the same.
        "rollout_state_evolution": "dflash_commit",
        "num_samples": config.num_blocks * config.rollout_steps,
        "batch_size": batch_size,
        "target_ids_mode": LABELS,
        "seed": conversations.seed,
        "position_offsets": list(config.position_offsets),
        "position_offset_mode": config.position_offset_mode,
        "positions_contiguous": True,
        "ctx_pos_start_file": "ctx_pos_start_i32.npy",
        "anchor_pos_file": "anchor_pos_i32.npy",
    }
