"""What training a draft costs: a step beside the machine's own rate of matrix products, and whether reading keeps up.

Features are random here, since no timing depends on them; embedding and head are the target's.
"""

import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from dflash.measuring.result import Results, Training, to_json
from dflash.measuring.steps import matmul_rate
from dflash.training.batches import TrainingBatches
from dflash.training.cache.arrays import ArrayWriter
from dflash.training.cache.sequences import SequenceCache, open_sequences, sequence_specs
from dflash.training.trainer import TrainConfig, Trainer, step_flops
from dflash.weights.load import new_draft, read_borrowed, target_directory

SEQUENCES, LENGTH, FEATURES = 128, 320, 4
BATCH, ANCHORS = 8, 32


def _random_cache(directory: Path, hidden: int, vocab: int, layer_ids: tuple[int, ...]) -> tuple[SequenceCache, float]:
    """A cache as building one writes it, 16 sequences a commit; also the bytes per second that this took."""
    rng = np.random.default_rng(0)
    N = SEQUENCES * LENGTH
    features = rng.integers(0, 2**14, (16 * LENGTH, FEATURES * hidden), dtype=np.uint16)
    tokens = rng.integers(0, vocab, N)
    start = time.perf_counter()
    writer = ArrayWriter(directory, {})
    writer.allocate(sequence_specs(N, SEQUENCES, FEATURES * hidden))
    writer.arrays["sequence_start_i64"][:] = np.arange(SEQUENCES + 1) * LENGTH
    for first in range(0, SEQUENCES, 16):
        part = slice(first * LENGTH, (first + 16) * LENGTH)
        writer.arrays["features_u16"][part] = features
        writer.arrays["token_ids"][part] = tokens[part]
        writer.arrays["loss_mask_u8"][part] = 1
        writer.commit(first + 16)
    meta = {"hidden_size": hidden, "num_context_features": FEATURES, "target_layer_ids": layer_ids, "num_tokens": N}
    writer.finish(meta)
    return open_sequences(directory), features.nbytes * (SEQUENCES / 16) / (time.perf_counter() - start)


def _streaming_rate(path: Path, megabytes: int = 512) -> float:
    """Bytes per second of one large file written and flushed."""
    data = np.ones(megabytes * 2**20, np.uint8)
    start = time.perf_counter()
    np.memmap(path, np.uint8, "w+", shape=data.shape)[:] = data
    flushed = np.memmap(path, np.uint8, "r+")
    flushed.flush()
    return data.nbytes / (time.perf_counter() - start)


@pytest.mark.benchmark(group="training")
def test_training_step(
    benchmark: BenchmarkFixture,
    device: jax.Device,
    results: Results,
    tmp_path: Path,
    pytestconfig: pytest.Config,
) -> None:
    options = pytestconfig.option
    borrowed = read_borrowed(target_directory(options.target))
    block = max(options.block_sizes)
    draft = new_draft(borrowed.config, num_layers=options.draft_layers, block_size=block, target_layer_ids=(1, 2, 3, 4))
    cache, written = _random_cache(
        tmp_path / "cache", borrowed.config.hidden_size, borrowed.config.vocab_size, draft.config.target_layer_ids
    )
    streamed = _streaming_rate(tmp_path / "stream")
    config = TrainConfig(batch_size=BATCH, num_anchors=ANCHORS, dtype=options.dtype)
    trainer = Trainer(draft, borrowed.head, borrowed.embedding[draft.config.mask_token_id], config)
    batches = TrainingBatches(
        cache,
        cache.rows(held_out=False),
        batch_size=BATCH,
        num_anchors=ANCHORS,
        block_size=block,
        embedding=borrowed.embedding,
        seed=0,
    )
    read_s: list[float] = []
    rates: list[float] = []

    def setup() -> tuple[tuple[Any], dict[str, Any]]:
        """Outside the clock: the machine's rate is measured between steps, since it changes."""
        rates.append(matmul_rate(options.dtype, rounds=2))
        start = time.perf_counter()
        batch = batches(len(read_s))
        read_s.append(time.perf_counter() - start)
        return (batch,), {}

    def step(batch: Any) -> None:
        jax.block_until_ready(trainer.step(batch))

    benchmark.pedantic(step, setup=setup, rounds=options.rounds, warmup_rounds=1)
    if not benchmark.stats:
        return
    step_s, rate = benchmark.stats.stats.median, float(np.median(rates[1:]))
    flops = step_flops(draft.config, batches(0))
    result = Training(
        case=f"train-b{BATCH}-a{ANCHORS}-s{block}",
        dtype=options.dtype,
        step_s=step_s,
        draft_tokens_per_s=BATCH * ANCHORS * (block - 1) / step_s,
        gflop_s=flops / step_s / 1e9,
        matmul_gflop_s=rate / 1e9,
        matmul_fraction=flops / step_s / rate,
        read_s=float(np.median(read_s[1:])),
        cache_write_gb_s=written / 1e9,
        disk_write_gb_s=streamed / 1e9,
    )
    benchmark.extra_info.update(to_json(result))
    results.measured.append(result)
    assert result.read_s < step_s, f"reading a batch takes {result.read_s:.2f} s, a step {step_s:.2f} s"
