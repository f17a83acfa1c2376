"""What one step costs: T_1, T_verify(S) for S = 1..32, T_draft(S), beside the floor that the memory sets.

The floor is the bytes of weights that a step must read over the bandwidth measured in the same run.
"""

from typing import Any

import jax
import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from dflash.measure import draft_step, in_turn, read_bandwidth, step_bytes, verify_step
from dflash.metrics import finite
from dflash.models.draft import Draft
from dflash.models.llama import Llama
from dflash.report.summary import Results

SIZES = (2, 4, 8, 16, 32)


@pytest.mark.benchmark(group="step")
def test_step(
    benchmark: BenchmarkFixture,
    target: Llama,
    draft: Draft,
    workload: Any,
    facts: dict[str, Any],
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
        f"verify {s}": verify_step(target, tokens=s, batch=batch, context=context, layer_ids=ids)
        for s in sorted({*SIZES, *blocks})
    }
    others |= {f"draft {s}": draft_step(target, draft, block_size=s, batch=batch, context=context) for s in blocks}
    one = verify_step(target, tokens=1, batch=batch, context=context)
    taken: list[dict[str, float]] = []

    def time_others() -> None:
        """Outside the benchmark's clock, between two one-token steps: everything is timed in turn."""
        taken.append({name: float(s[0]) for name, s in in_turn(others, rounds=1, warmup=0).items()})

    rounds = 4 * options.rounds
    benchmark.pedantic(one, setup=time_others, rounds=rounds, warmup_rounds=2)
    bandwidth = read_bandwidth()

    def median_ms(name: str) -> float:
        seconds = sorted(t[name] for t in taken[-rounds:])
        return 1000 * seconds[len(seconds) // 2]

    info = {
        **facts,
        "case": f"step-c{context}",
        "context": context,
        "batch_size": batch,
        "dtype": str(target.dtype),
        "bandwidth_gb_s": bandwidth / 1e9,
        "step_ms": 1000 * benchmark.stats.stats.median if benchmark.stats else None,
        "verify_ms": {n.split()[1]: median_ms(n) for n in others if n.startswith("verify")},
        "draft_ms": {n.split()[1]: median_ms(n) for n in others if n.startswith("draft")},
        "floor_ms": {str(s): 1000 * step_bytes(target, s * batch) / bandwidth for s in (1, *SIZES, *blocks)},
    }
    benchmark.extra_info.update(finite(info))
    if info["step_ms"] is not None:
        results.steps.append(info)
