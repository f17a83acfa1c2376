"""Target -> teacher cache in window form, which earlier loaders read: contexts cut from its text, and what follows."""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from dflash.models.llama import Llama
from dflash.teacher_cache.arrays import ArrayWriter, CacheError
from dflash.teacher_cache.conversations import (
    Conversation,
    ConversationConfig,
    check_sources,
    write_conversations,
)
from dflash.teacher_cache.sample import Sampler
from dflash.teacher_cache.source import (
    FeatureReader,
    Source,
    check_layer_ids,
    check_offsets,
    common_meta,
    text_record,
    too_little_leaves_nothing,
)
from dflash.teacher_cache.window_meta import LABELS, OFFSET_MODES
from dflash.teacher_cache.windows import to_bits, window_specs

ACCEPT_LEN_MODES = ("full", "uniform", "geometric")


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
        with too_little_leaves_nothing(writer):
            made = write_conversations(target, source.tokenizer, conversations, writer.building / "conversations.jsonl")
            contexts = window_contexts(made, config)
        _fill_windows(writer, target, config, contexts, source.reader(layer_ids), batch_size)
        return writer.finish(meta | text_record(writer.building, made))


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
