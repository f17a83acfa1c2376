"""How much faster is decoding with the draft than greedy decoding, and are the tokens the same?

One test per case (dflash/measuring/cases.py). Cases of one workload (same prompts, batch size, prompt length and token
budget) are measured together, by the first of their tests: each round decodes all prompts greedily, once, and as every
case does; rounds are added until the interval is narrow (--precision, --time-limit). pytest-benchmark's seconds are
those of DFlash, and `extra_info` carries the rest (dflash/metrics.py). A case whose tokens differ fails: a speed-up
without proven equality is worth nothing. One that can't be measured fails too, with a status of its own.
"""

import contextlib
import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from dflash.decoding.sampling import Sampling
from dflash.measuring.cases import Case, ChosenDraft, PromptSetting, cases
from dflash.measuring.cost_model import StepTimes
from dflash.measuring.gate import Floors, failures
from dflash.measuring.journal import Journal, JournalError, journal_path
from dflash.measuring.result import Failed, Results, to_json
from dflash.measuring.sweep import Effort, PromptGroups, Sweep
from dflash.models.draft import Draft
from dflash.models.llama import Llama


def _floors(options: Any, case: Case) -> Floors:
    """What the user asks of a case: of a draft's own, or of a scripted one beside the cost model."""
    whole = case.mode.whole
    if case.scripted is not None:
        return Floors(predicted_share=options.min_predicted_share if whole else None)
    return Floors(
        speedup_x=options.min_speedup if whole else None,
        acceptance_length=options.min_acceptance_length,
    )


@pytest.fixture(scope="module")
def sweep(
    request: pytest.FixtureRequest,
    target: Llama,
    draft_of: Callable[[ChosenDraft], Draft],
    workload_of: Callable[[PromptSetting], PromptGroups],
    facts_of: Callable[[ChosenDraft, PromptSetting], dict[str, Any]],
    steps_of: Callable[[Case], StepTimes],
    sampling: Sampling,
    pytestconfig: pytest.Config,
) -> Sweep:
    options, json_file = pytestconfig.option, pytestconfig.getoption("benchmark_json", None)
    try:
        journal = Journal(json_file and journal_path(Path(json_file)), resume=options.resume)
    except JournalError as error:
        pytest.exit(str(error), pytest.ExitCode.USAGE_ERROR)
    selected = {item.callspec.params["case"] for item in request.session.items if "case" in item.fixturenames}
    return Sweep(
        cases=[case for case in cases(options) if case.id in selected],
        target=target,
        draft_of=draft_of,
        workload_of=workload_of,
        facts_of=facts_of,
        steps_of=steps_of,
        journal=journal,
        effort=Effort(
            rounds=options.rounds,
            precision=options.precision,
            time_limit_s=options.time_limit,
            baseline=options.also_run_baseline in ("1", "true"),
        ),
        sampling=sampling,
    )


def _hand_over(benchmark: BenchmarkFixture, seconds: list[float]) -> None:
    """Hands pytest-benchmark the timings. Without seconds it lists nothing, but still writes its file."""

    def nothing() -> None:
        if not seconds:
            raise LookupError

    with contextlib.suppress(LookupError):
        benchmark.pedantic(nothing, rounds=max(1, len(seconds)))
    if benchmark.stats:
        benchmark.stats.stats.data[:] = seconds


@pytest.mark.benchmark(group="decode")
def test_decode(
    benchmark: BenchmarkFixture,
    case: Case,
    sweep: Sweep,
    results: Results,
    request: pytest.FixtureRequest,
    pytestconfig: pytest.Config,
) -> None:
    outcome = sweep.outcome(case)
    info = outcome.info
    _hand_over(benchmark, outcome.seconds)
    if isinstance(info, Failed):
        results.failed.append(dataclasses.replace(info, name=request.node.nodeid))
        print(outcome.trace, file=sys.stderr)
        pytest.fail(info.error, pytrace=False)
    benchmark.extra_info.update(to_json(info))
    results.measured.append(info)
    if info.status == "no-baseline":
        return
    if broken := failures(info, _floors(pytestconfig.option, case)):
        pytest.fail("; ".join(broken), pytrace=False)
