"""Tiny drafts that learn something, for tests: a cache from token rows, and a short training on it."""

from itertools import accumulate

import numpy as np

from dflash.training.batches import TrainingBatches
from dflash.training.cache.arrays import ArrayWriter
from dflash.training.cache.sequences import open_sequences, sequence_specs
from dflash.training.cache.source import FeatureReader
from dflash.training.objective import Objective
from dflash.training.trainer import TrainConfig, Trainer


def write_sequences(target, directory, prompts, answers, layer_ids, held_out=0, read_layer_ids=None):
    """A cache in sequence form of these texts, the last `held_out` held out. It claims `layer_ids` in any case."""
    rows = [[*p, *a] for p, a in zip(prompts, answers, strict=True)]
    bounds = [0, *accumulate(map(len, rows))]
    hidden = target.config.hidden_size
    writer = ArrayWriter(directory, {})
    writer.allocate(sequence_specs(bounds[-1], len(rows), hidden * len(layer_ids)))
    features = FeatureReader(target, read_layer_ids or layer_ids)(rows, [0] * len(rows))
    for i, row in enumerate(rows):
        part = slice(bounds[i], bounds[i + 1])
        writer.arrays["features_u16"][part] = features[i]
        writer.arrays["token_ids"][part] = row
        writer.arrays["loss_mask_u8"][part] = np.arange(len(row)) >= len(prompts[i])
    writer.arrays["sequence_start_i64"][:] = bounds
    writer.arrays["held_out_u8"][:] = np.arange(len(rows)) >= len(rows) - held_out
    meta = {"form": "sequences", "target_layer_ids": list(layer_ids), "num_tokens": bounds[-1]}
    return open_sequences(writer.finish(meta | {"hidden_size": hidden, "num_context_features": len(layer_ids)}))


def train(draft, embedding, head, caches, steps, *, learning_rate, num_anchors=1, weights="uniform"):
    """The draft after `steps` of 32 rows, from the caches in turn."""
    block_size = draft.config.block_size
    config = TrainConfig(
        steps=steps,
        batch_size=32,
        num_anchors=num_anchors,
        learning_rate=learning_rate,
        objective=Objective(weights=weights, chunk=len(head)),
    )
    trainer = Trainer(draft, head, embedding[draft.config.mask_token_id], config)
    batches = [
        TrainingBatches(
            cache,
            cache.rows(held_out=False),
            batch_size=32,
            num_anchors=num_anchors,
            block_size=block_size,
            embedding=embedding,
            seed=0,
        )
        for cache in caches
    ]
    for step in range(steps):
        trainer.step(batches[step % len(caches)](step // len(caches)))
    return trainer.draft()
