"""Two runs side by side: what changed, case by case, and whether the change is more than noise."""

import dataclasses
import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import Any

from dflash.measuring.interval import LEAST_ROUNDS
from dflash.measuring.result import Decode, ResultFile, to_json

LEVEL = 0.05
# A case measures the same thing only where all of these agree.
_SAME = (
    "device_kind",
    "device_count",
    "target_sha256",
    "prompts_sha256",
    "dtype",
    "mode",
    "proposer",
    "block_size",
    "batch_size",
    "num_prompts",
    "prompt_len",
    "max_new_tokens",
)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Change:
    """One case in two runs. `ratio` is new speed-up / old with its 95% interval; None where they can't be compared."""

    case: str
    old: Decode | None
    new: Decode | None
    ratio: float | None = None
    interval: tuple[float, float] | None = None
    p: float | None = None
    verdict: str


def differences(old: Decode, new: Decode) -> list[str]:
    """Names of the facts by which two cases are not the same measurement. What only one states is not judged."""
    # `cpu` is any of them: their number and model tell them apart.
    names = (*_SAME, "cpu_count", "cpu_model") if new.platform == "cpu" else _SAME
    pairs = {name: (getattr(old, name), getattr(new, name)) for name in names}
    return [name for name, (a, b) in pairs.items() if a is not None and b is not None and a != b]


def _log_error(case: Decode) -> float | None:
    """Standard error of the logarithm of a speed-up, from its 95% interval."""
    interval = case.speedup_x_ci95
    if not interval or case.rounds < LEAST_ROUNDS or not interval[0] < interval[1]:
        return None
    return math.log(interval[1] / interval[0]) / (2 * NormalDist().inv_cdf(0.975))


def between_runs(old: Decode, new: Decode) -> float:
    """What is known of the change between runs, as a standard deviation of the logarithm; 0 where nothing is."""
    known = [(c.between_runs, c.runs - 1) for c in (old, new) if c.between_runs is not None and c.runs > 1]
    if not known:
        return 0.0
    return math.sqrt(sum(n * deviation**2 for deviation, n in known) / sum(n for _, n in known))


def _compared(case: str, old: Decode, new: Decode) -> Change:
    differ = differences(old, new)
    if differ:
        return Change(case=case, old=old, new=new, verdict="not comparable: other " + ", ".join(differ))
    for name, side in (("older", old), ("newer", new)):
        if not side.counts:
            return Change(case=case, old=old, new=new, verdict=f"not comparable: the {name} is {side.status}")
    ratio = (new.speedup_x or math.nan) / (old.speedup_x or math.nan)
    errors = _log_error(old), _log_error(new)
    if errors[0] is None or errors[1] is None:
        verdict = f"too few rounds: at least {LEAST_ROUNDS} of each"
        return Change(case=case, old=old, new=new, ratio=ratio, verdict=verdict)
    # An interval within a run does not hold what changes between runs; both runs have their share of that.
    error = math.hypot(errors[0], errors[1], math.sqrt(2) * between_runs(old, new))
    half = error * NormalDist().inv_cdf(0.975)
    p = 2 * (1 - NormalDist().cdf(abs(math.log(ratio)) / error))
    interval = ratio * math.exp(-half), ratio * math.exp(half)
    return Change(case=case, old=old, new=new, ratio=ratio, interval=interval, p=p, verdict="no significant change")


def compare(old: ResultFile, new: ResultFile) -> list[Change]:
    """Every case of either run, joined by its pytest id. A speed-up is a ratio within its run: drift cancels.

    Significant means p < 5% after Holm's correction for as many cases as are compared.
    """
    olds, news = ({c.name: c for c in run.decodes} for run in (old, new))
    failed = {c.name for c in new.failed}
    changes = []
    for name in [*news, *(n for n in olds if n not in news)]:
        a, b = olds.get(name), news.get(name)
        if a and b:
            changes.append(_compared(b.case, a, b))
        elif one := a or b:
            verdict = "only in the newer run" if b else "failed" if name in failed else "only in the older run"
            changes.append(Change(case=one.case, old=a, new=b, verdict=verdict))
    return _judged(changes)


def _judged(changes: Sequence[Change]) -> list[Change]:
    judged = list(changes)
    tested = sorted((c.p, i) for i, c in enumerate(changes) if c.p is not None)
    for done, (p, i) in enumerate(tested):
        if p >= LEVEL / (len(tested) - done):
            break
        word = "faster" if (changes[i].ratio or 0) > 1 else "slower"
        judged[i] = dataclasses.replace(changes[i], verdict=word)
    return judged


def other_facts(old: ResultFile, new: ResultFile) -> list[tuple[str, str, str]]:
    """What else differs between the runs, and may be why: versions, draft, commit, flags. (name, before, now)."""
    a, b = _facts(old), _facts(new)
    return [(n, a.get(n, "not stated"), b.get(n, "not stated")) for n in {**b, **a} if a.get(n) != b.get(n)]


def _facts(run: ResultFile) -> dict[str, str]:
    origin = run.provenance
    facts: dict[str, Any] = {"commit": commit(run)}
    facts |= {f"version of {name}": version for name, version in origin.versions.items()}
    facts |= {name: value for name, value in (origin.device | to_json(origin.read)).items() if name not in _SAME}
    facts |= origin.flags
    return {name: str(value) for name, value in facts.items() if value is not None}


def commit(run: ResultFile) -> str | None:
    """The commit in short form, with a note if files differed from it."""
    git = run.provenance.git
    return f"{git.commit[:12]}{' and uncommitted changes' if git.dirty else ''}" if git and git.commit else None
