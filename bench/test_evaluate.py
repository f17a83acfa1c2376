"""What a draft is accepted at, offline: held-out prompts of a teacher cache (`--teacher-cache DIR`)."""

from typing import Any

import jax
import numpy as np
import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from dflash.config import ConfigError
from dflash.evaluate import Evaluator, summarise, walk
from dflash.metrics import finite
from dflash.models.draft import Draft
from dflash.sweep import drafts
from dflash.teacher_cache import CacheError, SequenceCache, open_cache
from dflash.weights.huggingface import read_borrowed
from dflash.weights.load import UNTRAINED, target_directory

SEQUENCES = 32


@pytest.mark.benchmark(group="evaluate")
def test_offline_acceptance(
    benchmark: BenchmarkFixture, draft: Draft, facts: dict[str, Any], device: jax.Device, pytestconfig: pytest.Config
) -> None:
    options = pytestconfig.option
    if not options.teacher_cache:
        pytest.skip("no teacher cache: --teacher-cache DIR names one (python -m dflash build-cache makes it)")
    borrowed = read_borrowed(target_directory(options.target))
    evaluator = Evaluator(borrowed.embedding, borrowed.head)
    try:
        cache = open_cache(options.teacher_cache)
        rows = cache.rows(held_out=True)
        if not len(rows):
            pytest.fail(f"{options.teacher_cache} has no held-out prompts to evaluate on", pytrace=False)
        chosen = np.sort(np.random.default_rng(0).permutation(rows)[:SEQUENCES])
        blocks = benchmark.pedantic(evaluator.score, (draft, cache, chosen), rounds=1, warmup_rounds=0)
    except (CacheError, ConfigError) as error:
        pytest.exit(str(error), pytest.ExitCode.USAGE_ERROR)
    info = {
        **facts,
        "case": "offline",
        "cache_sha256": cache.sha256,
        "rows": "held_out",
        "block_size": draft.config.block_size,
        **summarise(blocks, draft.config.block_size),
    }
    if isinstance(cache, SequenceCache):
        live = summarise(blocks.take(walk(blocks)), draft.config.block_size)
        info["live_acceptance_length"] = live["acceptance_length"]
    benchmark.extra_info.update(finite(info))
    least = options.min_acceptance_length
    reached = info.get("live_acceptance_length", info["acceptance_length"])
    assert not (least and drafts(options)[0] != UNTRAINED) or reached >= float(least), (
        f"acceptance_length {reached:.2f} < {least} on held-out prompts"
    )
