"""What one step costs: T_1, T_verify(S) for S = 1..32, T_draft(S), beside the floor set by memory bandwidth.

The floor is the bytes of weights that a step must read over the bandwidth measured in the same run. On a TPU its
compiler's estimate of each step stands beside it, and a product of one column is timed plain and padded to eight.
"""

from typing import Any

import jax
import numpy as np
import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from dflash.compiled.programs import estimated_seconds
from dflash.decoding.sampling import Sampling
from dflash.measuring.result import Results, Step, to_json
from dflash.measuring.steps import (
    draft_step,
    in_turn,
    one_column_products,
    read_bandwidth,
    step_bytes,
    verify_step,
)
from dflash.models.draft import Draft
from dflash.models.llama import Llama

SIZES = (2, 4, 8, 16, 32)


@pytest.mark.benchmark(group="step")
def test_step(
    benchmark: BenchmarkFixture,
    target: Llama,
    draft: Draft,
    workload: Any,
    facts: dict[str, Any],
    sampling: Sampling,
    results: Results,
    device: jax.Device,
    pytestconfig: pytest.Config,
) -> None:
    options = pytestconfig.option
    batch = options.batch_size[0]
    context = workload.mean_len + max(options.max_new_tokens) // 2
    blocks = [s for s in sorted({8, *options.block_sizes}) if s <= draft.config.block_size]
    ids = draft.config.target_layer_ids
    others = {
        f"verify {s}": verify_step(target, tokens=s, batch=batch, context=context, layer_ids=ids, sampling=sampling)
        for s in sorted({*SIZES, *blocks})
    }
    others |= {
        f"draft {s}": draft_step(target, draft, block_size=s, batch=batch, context=context, sampling=sampling)
        for s in blocks
    }
    one = verify_step(target, tokens=1, batch=batch, context=context, sampling=sampling)
    taken: list[dict[str, float]] = []

    def time_others() -> None:
        """Outside the benchmark's clock, between two one-token steps: everything is timed in turn."""
        taken.append({name: float(s[0]) for name, s in in_turn(others, rounds=1, warmup=0).items()})

    rounds = 4 * options.rounds
    benchmark.pedantic(one, setup=time_others, rounds=rounds, warmup_rounds=2)
    bandwidth = read_bandwidth()
    products = in_turn(one_column_products(target), rounds=rounds)
    estimates = {1: estimated_seconds(one.program, device)} | {
        int(n.split()[1]): estimated_seconds(step.program, device) for n, step in others.items() if "verify" in n
    }

    def median_ms(name: str) -> float:
        seconds = sorted(t[name] for t in taken[-rounds:])
        return 1000 * seconds[len(seconds) // 2]

    if not benchmark.stats:
        return
    result = Step(
        **facts,
        case=f"step-c{context}",
        context=context,
        batch_size=batch,
        dtype=str(target.dtype),
        bandwidth_gb_s=bandwidth / 1e9,
        step_ms=1000 * benchmark.stats.stats.median,
        verify_ms={int(n.split()[1]): median_ms(n) for n in others if n.startswith("verify")},
        draft_ms={int(n.split()[1]): median_ms(n) for n in others if n.startswith("draft")},
        estimate_ms={s: 1000 * seconds for s, seconds in estimates.items() if seconds},
        product_ms={name: 1000 * float(np.median(seconds)) for name, seconds in products.items()},
        floor_ms={s: 1000 * step_bytes(target, s * batch) / bandwidth for s in (1, *SIZES, *blocks)},
    )
    benchmark.extra_info.update(to_json(result))
    results.measured.append(result)
