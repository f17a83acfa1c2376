"""How much faster is decoding with the draft than greedy decoding, and are the tokens the same?

One test a case (dflash/sweep.py). Cases of one workload (same prompts, batch size, prompt length and token budget) are
measured together, by the first of their tests: each round decodes all prompts greedily, once, and as every case does;
rounds are added until the interval is narrow (--precision, --time-limit). pytest-benchmark's seconds are those of
DFlash, and `extra_info` carries the rest (dflash/metrics.py). A case whose tokens differ fails: a speed-up without
proven equality is worth nothing. One that can't be measured fails too, and is told apart.
"""

import contextlib
import dataclasses
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from dflash.cost_model import StepTimes
from dflash.gate import Floors, failures
from dflash.greedy import Greedy
from dflash.journal import Journal, JournalError, identity, journal_path
from dflash.models.draft import Draft
from dflash.models.llama import Llama
from dflash.paired import PairedRun
from dflash.provenance import flags, sources_sha256, versions
from dflash.report.summary import Results
from dflash.sweep import MODES, Case, Setting, cases
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


@dataclasses.dataclass(kw_only=True)
class Sweep:
    """Measures cases, a workload at a time; what an earlier run measured is taken from the journal.

    `selected` are the ids of the cases that this run is to measure, `origin` what decides the result of all of them.
    """

    target: Llama
    draft_of: Callable[[str], Draft]
    workload_of: Callable[[Setting], Any]
    facts_of: Callable[[str, Setting], dict[str, Any]]
    steps_of: Callable[[Case], StepTimes]
    journal: Journal
    options: Any
    selected: set[str]
    origin: list[Any]
    known: dict[str, Outcome] = dataclasses.field(default_factory=dict)

    def outcome(self, case: Case) -> Outcome:
        """What became of a case, or becomes of it now."""
        if case.id not in self.known:
            group = [c for c in cases(self.options) if c.id in self.selected and c.workload == case.workload]
            for one in group:
                if record := self.journal.find(self._identify(one)[1]):
                    self.known[one.id] = Outcome(record["info"] | {"resumed": True}, record["seconds"])
            self._measure([c for c in group if c.id not in self.known])
        return self.known[case.id]

    def _identify(self, case: Case) -> tuple[dict[str, Any], str]:
        """What identifies a case in the results, and the hash of all that decides its result: folders' names don't."""
        workload, facts = self.workload_of(case.setting), self.facts_of(case.draft, case.setting)
        names = {"target", "prompts", "run_name"} | ({"draft"} if facts["draft_sha256"] else set())
        hashed = {k: v for k, v in facts.items() if k not in names}
        decoded = [workload.groups, workload.stop_token_ids, case.max_new_tokens]
        info = facts | {
            "case": case.id,
            "proposer": case.proposer,
            "scripted": case.scripted,
            "workload_version": WORKLOAD_VERSION,
            # Cases of one run with the same baseline share its seconds.
            "baseline": identity([facts["target_sha256"], self.options.dtype, decoded])[:16],
        }
        return info, identity([case.id, WORKLOAD_VERSION, hashed, decoded, self.origin])

    def _measure(self, group: Sequence[Case]) -> None:
        runs = self._take_turns(group) if group else {}
        for case in group:
            facts, identified = self._identify(case)
            self.known[case.id] = done = self._told(case, runs.pop(case.id), facts)
            self.journal.add(identified, done.info, done.seconds)

    def _take_turns(self, group: Sequence[Case]) -> dict[str, PairedRun | Failure]:
        options, workload = self.options, self.workload_of(group[0].setting)
        baseline = options.also_run_baseline in ("1", "true")
        budget, stops = group[0].max_new_tokens, workload.stop_token_ids
        greedy = Greedy(self.target, workload.groups, max_new_tokens=budget, stop_token_ids=stops)

        def make(case: Case) -> PairedRun:
            more = {"mode": MODES[case.mode], "block_size": case.block_size, "scripted": case.scripted}
            return PairedRun(greedy, self.draft_of(case.draft), baseline=baseline, **more)

        # The largest block first: what it has to know of greedy decoding, the others need not ask for again.
        makers = {c.id: partial(make, c) for c in sorted(group, key=lambda c: -c.block_size)}
        limits = {"rounds": options.rounds, "precision": options.precision, "time_limit_s": options.time_limit}
        return take_turns(greedy, makers, baseline=baseline, **limits)

    def _told(self, case: Case, run: PairedRun | Failure, facts: dict[str, Any]) -> Outcome:
        def figures() -> Outcome:
            rounds = len(run.dflash_s) - WARMUP
            return Outcome(run.info(rounds, self.steps_of(case)) | facts, [sum(s) for s in run.dflash_s[-rounds:]])

        done = run if isinstance(run, Failure) else attempt(figures)
        if isinstance(done, Outcome):
            return done
        setting = case.setting
        asked = {"mode": MODES[case.mode], "block_size": case.block_size, "max_new_tokens": case.max_new_tokens}
        asked |= {"batch_size": setting.batch_size, "prompt_len": setting.prompt_len, "dtype": self.options.dtype}
        return Outcome(facts | asked | {"status": "failed", "error": done.sentence}, [], done.trace)


@pytest.fixture(scope="module")
def sweep(
    request: pytest.FixtureRequest,
    target: Llama,
    draft_of: Callable[[str], Draft],
    workload_of: Callable[[Setting], Any],
    facts_of: Callable[[str, Setting], dict[str, Any]],
    steps_of: Callable[[Case], StepTimes],
    pytestconfig: pytest.Config,
) -> Sweep:
    options, json_file = pytestconfig.option, pytestconfig.getoption("benchmark_json", None)
    try:
        journal = Journal(json_file and journal_path(Path(json_file)), resume=options.resume)
    except JournalError as error:
        pytest.exit(str(error), pytest.ExitCode.USAGE_ERROR)
    settings = ("dtype", "rounds", "precision", "time_limit", "also_run_baseline")
    return Sweep(
        target=target,
        draft_of=draft_of,
        workload_of=workload_of,
        facts_of=facts_of,
        steps_of=steps_of,
        journal=journal,
        options=options,
        selected={item.callspec.params["case"] for item in request.session.items if "case" in item.fixturenames},
        origin=[sources_sha256(), versions(), flags(), {name: getattr(options, name) for name in settings}],
    )


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
    sweep: Sweep,
    results: Results,
    request: pytest.FixtureRequest,
    pytestconfig: pytest.Config,
) -> None:
    done = sweep.outcome(case)
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
