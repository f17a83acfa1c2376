"""How much faster is decoding with the draft than greedy decoding, and are the tokens the same?

One test a case: mode x block size x token budget x proposer. Each round decodes all prompts greedily, then with the
draft, and rounds are added until the interval is narrow (--precision, --time-limit). pytest-benchmark's seconds are
those of DFlash, and `extra_info` carries the rest (dflash/metrics.py). A case whose tokens differ fails: a speed-up
without proven equality is worth nothing.
"""

from collections.abc import Callable
from typing import Any

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from dflash.cost_model import StepTimes
from dflash.gate import Floors, failures
from dflash.models.draft import Draft
from dflash.models.llama import Llama
from dflash.paired import PairedRun
from dflash.report.summary import Results

# Raise it when a case of the same name measures something else than before: baselines of the old one count no more.
WORKLOAD_VERSION = 1


def _floors(config: pytest.Config, case: Any) -> Floors:
    """Scripted cases are held to the cost model; a draft's own to what the user asks for."""
    if case.scripted is not None:
        return Floors(predicted_share=0.9 if case.mode == "block" else None)
    speedup, acceptance = config.option.min_speedup, config.option.min_acceptance_length
    return Floors(
        speedup_x=float(speedup) if speedup and case.mode == "block" else None,
        acceptance_length=float(acceptance) if acceptance else None,
    )


@pytest.mark.benchmark(group="decode")
def test_decode(
    benchmark: BenchmarkFixture,
    case: Any,
    target: Llama,
    draft: Draft,
    workload: Any,
    facts: dict[str, Any],
    steps_of: Callable[[int, int], StepTimes],
    results: Results,
    pytestconfig: pytest.Config,
) -> None:
    options = pytestconfig.option
    run = PairedRun(
        target,
        draft,
        workload.groups,
        mode={"block": "cached_block_verify", "seq": "cached_sequential_verify"}[case.mode],
        block_size=case.block_size,
        max_new_tokens=case.max_new_tokens,
        stop_token_ids=workload.stop_token_ids,
        scripted=case.scripted,
        baseline=options.also_run_baseline in ("1", "true"),
    )
    steps = steps_of(case.block_size, case.max_new_tokens)
    benchmark.pedantic(run.dflash_round, setup=run.baseline_round, rounds=options.rounds, warmup_rounds=1)
    rounds = options.rounds
    if benchmark.stats:
        limits = {"precision": options.precision, "time_limit_s": options.time_limit}
        rounds = run.add_rounds(rounds, keep=benchmark.stats.update, **limits)
    info = run.info(rounds, steps) | facts
    info |= {"case": case.id, "proposer": case.proposer, "scripted": case.scripted}
    info |= {"workload_version": WORKLOAD_VERSION}
    benchmark.extra_info.update(info)
    results.cases.append(info)
    if info["status"] == "no-baseline":
        return
    said = failures(info, _floors(pytestconfig, case))
    assert not said, "; ".join(said)
