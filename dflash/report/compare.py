"""Two runs side by side: what changed, case by case, and whether the change is more than noise."""

import dataclasses
import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import Any

from dflash.report.run import Info, Run, counts

LEVEL = 0.05
# With fewer rounds an interval is no interval.
LEAST_ROUNDS = 3
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
    old: Info | None
    new: Info | None
    ratio: float | None = None
    interval: tuple[float, float] | None = None
    p: float | None = None
    verdict: str


def differences(old: Info, new: Info) -> list[str]:
    """Names of the facts by which two cases are not the same measurement. What only one of them tells is not judged."""
    both = (k for k in _SAME if old.get(k) is not None and new.get(k) is not None)
    return [k for k in both if old[k] != new[k]]


def _log_error(case: Info) -> float | None:
    """Standard error of the logarithm of a speed-up, from its 95% interval."""
    interval = case.get("speedup_x_ci95")
    if not interval or case.get("rounds", 0) < LEAST_ROUNDS or not interval[0] < interval[1]:
        return None
    return math.log(interval[1] / interval[0]) / (2 * NormalDist().inv_cdf(0.975))


def _compared(case: str, old: Info, new: Info) -> Change:
    differ = differences(old, new)
    if differ:
        return Change(case=case, old=old, new=new, verdict="not comparable: other " + ", ".join(differ))
    for name, info in (("older", old), ("newer", new)):
        if not counts(info):
            return Change(case=case, old=old, new=new, verdict=f"not comparable: the {name} is {info.get('status')}")
    ratio = new["speedup_x"] / old["speedup_x"]
    errors = _log_error(old), _log_error(new)
    if errors[0] is None or errors[1] is None:
        verdict = f"too few rounds: at least {LEAST_ROUNDS} of each"
        return Change(case=case, old=old, new=new, ratio=ratio, verdict=verdict)
    error = math.hypot(errors[0], errors[1])
    half = error * NormalDist().inv_cdf(0.975)
    p = 2 * (1 - NormalDist().cdf(abs(math.log(ratio)) / error))
    interval = ratio * math.exp(-half), ratio * math.exp(half)
    return Change(case=case, old=old, new=new, ratio=ratio, interval=interval, p=p, verdict="no significant change")


def compare(old: Run, new: Run) -> list[Change]:
    """Every case of either run, joined by its pytest id. A speed-up is a ratio within its run: drift cancels.

    Significant means p < 5% after Holm's correction for as many cases as are compared.
    """
    olds, news = ({c["name"]: c for c in run.decodes} for run in (old, new))
    failed = {c["name"] for c in new.failed}
    changes = []
    for name in [*news, *(n for n in olds if n not in news)]:
        a, b = olds.get(name), news.get(name)
        if a and b:
            changes.append(_compared(b["case"], a, b))
        else:
            verdict = "only in the newer run" if b else "failed" if name in failed else "only in the older run"
            changes.append(Change(case=(a or b or {})["case"], old=a, new=b, verdict=verdict))
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


def other_facts(old: Run, new: Run) -> list[tuple[str, str, str]]:
    """What else differs between the runs, and may be why: versions, draft, commit, flags. (name, before, now)."""
    a, b = _facts(old), _facts(new)
    return [(n, a.get(n, "not told"), b.get(n, "not told")) for n in {**b, **a} if a.get(n) != b.get(n)]


def _facts(run: Run) -> dict[str, str]:
    told = run.provenance
    found: dict[str, Any] = {"commit": commit(run)}
    found |= {f"version of {n}": v for n, v in (told.get("versions") or {}).items()}
    found |= {n: v for n, v in (told.get("device") or {}).items() if n not in _SAME}
    found |= {n: v for n, v in (told.get("read") or {}).items() if n not in _SAME}
    found |= told.get("flags") or {}
    return {n: str(v) for n, v in found.items() if v is not None}


def commit(run: Run) -> str | None:
    """The commit as people write it, with a word if files differed from it."""
    told = run.provenance.get("git") or {}
    sha, dirty = told.get("commit") or run.commit.get("id"), told.get("dirty", run.commit.get("dirty"))
    return f"{str(sha)[:12]}{' and uncommitted changes' if dirty else ''}" if sha else None
