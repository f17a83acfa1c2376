"""A sweep: cases measured a workload at a time, beside one baseline each; what is known already is not repeated."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

from dflash.decoding.decode import Rows
from dflash.decoding.sampling import GREEDILY, Sampling
from dflash.host.provenance import flags, sources_sha256, versions
from dflash.measuring.cases import Case, ChosenDraft, PromptSetting
from dflash.measuring.cost_model import StepTimes
from dflash.measuring.greedy import Greedy
from dflash.measuring.journal import Journal, Record, identity
from dflash.measuring.paired import PairedRun
from dflash.measuring.result import Decode, Failed
from dflash.measuring.turns import Failure, attempt, take_turns
from dflash.models.draft import Draft
from dflash.models.llama import Llama

# Raise it when a case of the same name measures something else than before: baselines of the old one count no more.
WORKLOAD_VERSION = 3


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class PromptGroups:
    """Groups of prompts, a batch each, and what identifies them."""

    groups: list[Rows]
    stop_token_ids: tuple[int, ...]
    facts: dict[str, Any]

    @property
    def mean_len(self) -> int:
        lengths = [len(p) for g in self.groups for p in g]
        return sum(lengths) // len(lengths)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Effort:
    """How long cases are measured: see `take_turns`. Without `baseline` nothing is compared."""

    rounds: int
    precision: float
    time_limit_s: float
    baseline: bool = True


class Outcome(NamedTuple):
    """What a case gave: its result and the seconds of its rounds; of one that failed, where in the code."""

    info: Decode | Failed
    seconds: list[float]
    trace: str = ""


@dataclasses.dataclass(kw_only=True)
class Sweep:
    """Measures `cases`; those that an earlier run measured are taken from the journal.

    Drafts, workloads, identifying facts and step times come by name, when a case needs them.
    """

    cases: Sequence[Case]
    target: Llama
    draft_of: Callable[[ChosenDraft], Draft]
    workload_of: Callable[[PromptSetting], PromptGroups]
    facts_of: Callable[[ChosenDraft, PromptSetting], dict[str, Any]]
    steps_of: Callable[[Case], StepTimes]
    journal: Journal
    effort: Effort
    sampling: Sampling = GREEDILY

    def __post_init__(self) -> None:
        self._known: dict[str, Outcome] = {}
        # What decides the result of every case.
        self._origin = [sources_sha256(), versions(), flags(), dataclasses.asdict(self.effort)]

    def outcome(self, case: Case) -> Outcome:
        """The outcome of a case, measured now with all others of its workload if not yet known."""
        if case.id not in self._known:
            group = [c for c in self.cases if c.workload == case.workload]
            for one in group:
                if record := self.journal.find(self._identify(one)[1]):
                    assert isinstance(record.info, Decode)  # a failed case is not found, so it is tried again
                    self._known[one.id] = Outcome(dataclasses.replace(record.info, resumed=True), record.seconds)
            self._measure([c for c in group if c.id not in self._known])
        return self._known[case.id]

    def _identify(self, case: Case) -> tuple[dict[str, Any], str]:
        """What identifies a case in the results, and the hash of all that decides its result: folders' names don't."""
        workload, facts = self.workload_of(case.setting), self.facts_of(case.draft, case.setting)
        names = {"target", "prompts", "run_name"} | ({"draft"} if facts["draft_sha256"] else set())
        hashed = {k: v for k, v in facts.items() if k not in names}
        dtype = str(self.target.dtype)
        decoded = [workload.groups, workload.stop_token_ids, case.max_new_tokens]
        if self.sampling.temperature:
            decoded.append(self.sampling.facts)
        info = facts | {
            "case": case.id,
            "proposer": case.proposer,
            "scripted": case.scripted,
            "workload_version": WORKLOAD_VERSION,
            # Cases of one run with the same baseline share its seconds.
            "baseline": identity([facts["target_sha256"], dtype, decoded])[:16],
        }
        return info, identity([case.id, WORKLOAD_VERSION, hashed, decoded, dtype, self._origin])

    def _measure(self, group: Sequence[Case]) -> None:
        runs = self._take_turns(group) if group else {}
        for case in group:
            facts, hashed = self._identify(case)
            # Out of the mapping: a reported run holds no memory while the next is.
            self._known[case.id] = outcome = self._result(case, runs.pop(case.id), facts)
            self.journal.add(Record(hashed, outcome.info, outcome.seconds))

    def _take_turns(self, group: Sequence[Case]) -> dict[str, PairedRun | Failure]:
        effort, workload = self.effort, self.workload_of(group[0].setting)
        budget, stops = group[0].max_new_tokens, workload.stop_token_ids
        greedy = Greedy(
            self.target, workload.groups, max_new_tokens=budget, stop_token_ids=stops, sampling=self.sampling
        )

        def make(case: Case) -> PairedRun:
            return PairedRun(
                greedy,
                self.draft_of(case.draft),
                mode=case.mode,
                block_size=case.block_size,
                scripted=case.scripted,
                brief=case.brief,
                baseline=effort.baseline,
            )

        # The largest block first: what it has to know of greedy decoding, the others need not ask for again.
        makers = {c.id: partial(make, c) for c in sorted(group, key=lambda c: (c.brief, -c.block_size))}
        return take_turns(greedy, makers, **dataclasses.asdict(effort))

    def _result(self, case: Case, run: PairedRun | Failure, facts: Mapping[str, Any]) -> Outcome:
        def figures() -> Outcome:
            assert isinstance(run, PairedRun)
            rounds = len(run.dflash_s)
            return Outcome(run.result(rounds, facts, self.steps_of(case)), [sum(s) for s in run.dflash_s])

        outcome = run if isinstance(run, Failure) else attempt(figures)
        if isinstance(outcome, Outcome):
            return outcome
        failed = Failed(
            **facts,
            mode=case.mode.name,
            block_size=case.block_size,
            max_new_tokens=case.max_new_tokens,
            batch_size=case.setting.batch_size,
            prompt_len=case.setting.prompt_len,
            dtype=str(self.target.dtype),
            status="failed",
            error=outcome.sentence,
        )
        return Outcome(failed, [], outcome.trace)
