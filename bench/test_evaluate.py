"""Offline acceptance of a draft on the held-out prompts of a teacher cache (`--teacher-cache DIR`)."""

from typing import Any

import jax
import numpy as np
import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from dflash.config import UserError
from dflash.measuring.cases import drafts
from dflash.measuring.result import Offline, from_json, to_json
from dflash.models.draft import Draft
from dflash.training.cache import SequenceCache, open_cache
from dflash.training.evaluate import Evaluator, summarise, walk
from dflash.weights.load import UNTRAINED, read_borrowed, target_directory

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
        cache = open_cache(options.teacher_cache, borrowed.config)
        rows = cache.rows(held_out=True)
        if not len(rows):
            pytest.fail(f"{options.teacher_cache} has no held-out prompts to evaluate on", pytrace=False)
        chosen = np.sort(np.random.default_rng(0).permutation(rows)[:SEQUENCES])
        blocks = benchmark.pedantic(evaluator.score, (draft, cache, chosen), rounds=1, warmup_rounds=0)
    except UserError as error:
        pytest.exit(str(error), pytest.ExitCode.USAGE_ERROR)
    figures = summarise(blocks, draft.config.block_size)
    reached = figures["acceptance_length"]
    if isinstance(cache, SequenceCache):
        live = summarise(blocks.take(walk(blocks)), draft.config.block_size)
        reached = live["acceptance_length"]
        figures |= {f"live_{n}": live[n] for n in ("num_samples", "accept_len_mean", "acceptance_length")}
    origin = facts | {"case": "offline", "cache_sha256": cache.sha256, "rows": "held_out"}
    origin["block_size"] = draft.config.block_size
    benchmark.extra_info.update(to_json(from_json(origin | figures, Offline)))
    least = options.min_acceptance_length
    if least is not None and drafts(options)[0] != UNTRAINED and reached < least:
        pytest.fail(f"acceptance_length {reached:.2f} < {least:.2f} on held-out prompts", pytrace=False)
