"""How much faster is decoding with the draft than greedy decoding, and are the tokens the same?

One test a case (dflash/sweep.py). Cases of one workload (same prompts, batch size, prompt length and token budget) are
measured together, by the first of their tests: each round decodes all prompts greedily, once, and then as every case
does; rounds are added until the interval is narrow (--precision, --time-limit). pytest-benchmark's seconds are those of
DFlash, and `extra_info` carries the rest (dflash/metrics.py). A case whose tokens differ fails: a speed-up without
proven equality is worth nothing. One that can't be measured fails too, and is told apart.
"""

import contextlib
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from dflash.gate import Floors, failures
from dflash.greedy import Greedy
from dflash.journal import Journal, JournalError, identity, journal_path
from dflash.models.llama import Llama
from dflash.paired import PairedRun
from dflash.provenance import flags, sources_sha256, versions
from dflash.report.summary import Results
from dflash.sweep import MODES, Case, cases
from dflash.turns import WARMUP, Failure, attempt, take_turns

# Raise it when a case of the same name measures something else than before: baselines of the old one count no more.
WORKLOAD_VERSION = 1


class Outcome(NamedTuple):
    """What a case gave: its `extra_info` and the seconds of its rounds; of one that failed, where in the code."""

    info: dict[str, Any]
    seconds: list[float]
    trace: str = ""


def _floors(config: pytest.Config, case: Case) -> Floors:
    """Scripted cases are held to the cost model; a draft's own to what the user asks for."""
    if case.scripted is not None:
        return Floors(predicted_share=0.9 if case.mode == "block" else None)
    speedup, acceptance = config.option.min_speedup, config.option.min_acceptance_length
    return Floors(
        speedup_x=float(speedup) if speedup and case.mode == "block" else None,
        acceptance_length=float(acceptance) if acceptance else None,
    )


@pytest.fixture(scope="module")
def journal(pytestconfig: pytest.Config) -> Journal:
    json_file = pytestconfig.getoption("benchmark_json", None)
    try:
        return Journal(json_file and journal_path(Path(json_file)), resume=pytestconfig.option.resume)
    except JournalError as error:
        pytest.exit(str(error), pytest.ExitCode.USAGE_ERROR)


@pytest.fixture(scope="module")
def identify(
    workload_of: Callable[..., Any], facts_of: Callable[..., dict[str, Any]], pytestconfig: pytest.Config
) -> Callable[[Case], tuple[dict[str, Any], str]]:
    """What identifies a case in the results, and the hash of all that decides its result: names of folders don't."""
    options = pytestconfig.option
    settings = ("dtype", "rounds", "precision", "time_limit", "also_run_baseline")
    origin = [sources_sha256(), versions(), flags(), {name: getattr(options, name) for name in settings}]

    def facts(case: Case) -> tuple[dict[str, Any], str]:
        workload, told = workload_of(case.setting), facts_of(case.draft, case.setting)
        hashed = told if told["draft_sha256"] is None else {k: v for k, v in told.items() if k != "draft"}
        hashed = {k: v for k, v in hashed.items() if k not in ("target", "prompts", "run_name")}
        decoded = [workload.groups, workload.stop_token_ids, case.max_new_tokens]
        info = told | {
            "case": case.id,
            "proposer": case.proposer,
            "scripted": case.scripted,
            "workload_version": WORKLOAD_VERSION,
            # Cases of one run with the same baseline share its seconds.
            "baseline": identity([told["target_sha256"], options.dtype, decoded])[:16],
        }
        return info, identity([case.id, WORKLOAD_VERSION, hashed, decoded, origin])

    return facts


@pytest.fixture(scope="module")
def outcome_of(
    request: pytest.FixtureRequest,
    target: Llama,
    draft_of: Callable[..., Any],
    workload_of: Callable[..., Any],
    steps_of: Callable[..., Any],
    identify: Callable[[Case], tuple[dict[str, Any], str]],
    journal: Journal,
    pytestconfig: pytest.Config,
) -> Callable[[Case], Outcome]:
    """What became of a case: in an earlier run, or measured now with all selected cases of its workload."""
    options = pytestconfig.option
    baseline = options.also_run_baseline in ("1", "true")
    selected = {item.callspec.params["case"] for item in request.session.items if "case" in item.fixturenames}
    known: dict[str, Outcome] = {}

    def take_turns_of(group: Sequence[Case]) -> dict[str, PairedRun | Failure]:
        workload, budget = workload_of(group[0].setting), group[0].max_new_tokens
        greedy = Greedy(target, workload.groups, max_new_tokens=budget, stop_token_ids=workload.stop_token_ids)

        def make(case: Case) -> PairedRun:
            more = {"mode": MODES[case.mode], "block_size": case.block_size, "scripted": case.scripted}
            return PairedRun(greedy, draft_of(case.draft), baseline=baseline, **more)

        # The largest block first: what it has to know of greedy decoding, the others need not ask for again.
        ordered = sorted(group, key=lambda c: -c.block_size)
        limits = {"rounds": options.rounds, "precision": options.precision, "time_limit_s": options.time_limit}
        return take_turns(greedy, {c.id: partial(make, c) for c in ordered}, baseline=baseline, **limits)

    def told(case: Case, run: PairedRun | Failure) -> Outcome:
        def figures() -> Outcome:
            rounds = len(run.dflash_s) - WARMUP
            return Outcome(run.info(rounds, steps_of(case)) | facts, [sum(s) for s in run.dflash_s[-rounds:]])

        facts, _ = identify(case)
        done = run if isinstance(run, Failure) else attempt(figures)
        if isinstance(done, Outcome):
            return done
        asked = {"mode": MODES[case.mode], "block_size": case.block_size, "max_new_tokens": case.max_new_tokens}
        asked |= {"batch_size": case.setting.batch_size, "prompt_len": case.setting.prompt_len, "dtype": options.dtype}
        return Outcome(facts | asked | {"status": "failed", "error": done.sentence}, [], done.trace)

    def measure(group: Sequence[Case]) -> None:
        runs = take_turns_of(group)
        for case in group:
            known[case.id] = done = told(case, runs.pop(case.id))
            journal.add(identify(case)[1], done.info, done.seconds)

    def outcome(case: Case) -> Outcome:
        if case.id not in known:
            group = [c for c in cases(options) if c.id in selected and c.workload == case.workload]
            found = {c.id: journal.find(identify(c)[1]) for c in group}
            known.update({name: Outcome(r["info"] | {"resumed": True}, r["seconds"]) for name, r in found.items() if r})
            if left := [c for c in group if c.id not in known]:
                measure(left)
        return known[case.id]

    return outcome


def _hand_over(benchmark: BenchmarkFixture, seconds: list[float]) -> None:
    """Gives pytest-benchmark what was timed already. Without seconds it lists nothing, and still writes its file."""

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
    outcome_of: Callable[[Case], Outcome],
    results: Results,
    request: pytest.FixtureRequest,
    pytestconfig: pytest.Config,
) -> None:
    done = outcome_of(case)
    info = done.info
    _hand_over(benchmark, done.seconds)
    if info["status"] == "failed":
        results.failed.append(info | {"name": request.node.nodeid})
        print(done.trace, file=sys.stderr)
        pytest.fail(info["error"], pytrace=False)
    benchmark.extra_info.update(info)
    results.cases.append(info)
    if info["status"] == "no-baseline":
        return
    said = failures(info, _floors(pytestconfig, case))
    assert not said, "; ".join(said)
