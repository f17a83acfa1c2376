"""Target -> teacher cache in sequence form: its text (conversations.jsonl), then its features of every token."""

import math
from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from dflash.host.ahead import ahead
from dflash.training.cache.arrays import ArrayWriter
from dflash.training.cache.conversations import Conversation, ConversationConfig, check_sources, write_conversations
from dflash.training.cache.sequences import FORM, sequence_specs
from dflash.training.cache.source import (
    CacheSource,
    FeatureReader,
    check_layer_ids,
    check_lengths,
    common_meta,
    text_record,
    too_little_leaves_nothing,
)


def build_sequences(
    source: CacheSource,
    directory: Path,
    conversations: ConversationConfig,
    *,
    layer_ids: Sequence[int],
    position_offsets: Sequence[int] = (0,),
    batch_size: int = 16,
) -> Path:
    """A cache in sequence form. Sequence i is read from position offset i modulo their number, `batch_size` at a time.

    A killed build resumes where it stopped. Raises CacheError or PromptError.
    """
    target = source.target
    check_layer_ids(target, layer_ids)
    check_sources(conversations, target.config.max_position)
    check_lengths(target, conversations, position_offsets)
    settings = {
        "form": FORM,
        "position_offsets": list(position_offsets),
        **common_meta(source, conversations, layer_ids),
    }
    with ArrayWriter(Path(directory), settings) as writer:
        with too_little_leaves_nothing(writer):
            talks = write_conversations(
                target, source.tokenizer, conversations, writer.building / "conversations.jsonl"
            )
        _write_sequences(writer, talks, source.reader(layer_ids), settings, batch_size)
        counts = {"num_sequences": len(talks), "num_tokens": sum(len(c.prompt) + len(c.answer) for c in talks)}
        return writer.finish(settings | counts | text_record(writer.building, talks))


def _write_sequences(
    writer: ArrayWriter,
    talks: Sequence[Conversation],
    read: FeatureReader,
    settings: Mapping[str, Any],
    batch_size: int,
) -> None:
    rows = [[*c.prompt, *c.answer] for c in talks]
    bounds = [0, *accumulate(map(len, rows))]
    offsets = settings["position_offsets"]
    writer.allocate(sequence_specs(bounds[-1], len(rows), settings["hidden_size"] * settings["num_context_features"]))
    arrays = writer.arrays
    arrays["sequence_start_i64"][:] = bounds
    arrays["held_out_u8"][:] = [c.held_out for c in talks]
    arrays["ctx_pos_start_i32"][:] = [offsets[i % len(offsets)] for i in range(len(talks))]
    first = writer.done

    def read_batch(number: int) -> tuple[range, list[np.ndarray]]:
        batch = range(first + number * batch_size, min(first + (number + 1) * batch_size, len(rows)))
        # The last batch is padded, since every shape compiles a program.
        filled = [rows[i] for i in batch] + [[0]] * (min(batch_size, len(rows)) - len(batch))
        starts = np.zeros(len(filled), np.int32)
        starts[: len(batch)] = arrays["ctx_pos_start_i32"][batch.start : batch.stop]
        return batch, read(filled, starts)

    with tqdm(total=bounds[-1], initial=bounds[first], desc="features", unit="token") as bar:
        # One batch ahead, so that the device computes while the disk writes.
        for _, (batch, features), _ in ahead(read_batch, 0, math.ceil((len(rows) - first) / batch_size), depth=1):
            for i, values in zip(batch, features, strict=False):
                part = slice(bounds[i], bounds[i + 1])
                arrays["features_u16"][part] = values
                arrays["token_ids"][part] = rows[i]
                arrays["loss_mask_u8"][part] = np.arange(len(rows[i])) >= len(talks[i].prompt)
            writer.commit(batch.stop)
            bar.update(bounds[batch.stop] - bounds[batch.start])
