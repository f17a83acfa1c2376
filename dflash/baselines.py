"""Baselines: what each case reached on a device before, and the floors that a run is held to. No jax.

One file per device kind, `bench/baselines/<device kind>.json`, reviewed like code:

    {"schema_version": 1, "device_kind": "TPU v5e", "cases": {"block-b8-n256-draft": {
        "workload": {"workload_version": 1, "target_sha256": "...", "prompts_sha256": "...", ...},
        "speedup_x": {"reference": 3.1, "floor": 3.05}, "acceptance_length": {"reference": 5.9, "floor": 5.84},
        "accept_rate": {...}, "verify_ratio": {"reference": 1.4, "ceiling": 1.43}, "draft_ratio": {"reference": 0.4}}}}
"""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dflash.gate import doubt
from dflash.metrics import HIGHER_IS_BETTER
from dflash.teacher_cache.arrays import write_atomically

SCHEMA_VERSION = 1
# What a figure may lose against its reference without a word, as a fraction; more where its own interval is wider.
TOLERANCE = 0.01
# A term that moved by less is called unchanged.
_UNCHANGED = 0.02
FIGURES = ("speedup_x", "acceptance_length", "accept_rate", "verify_ratio", "draft_ratio")
_TERMS = {"acceptance": "acceptance_length", "verify step": "verify_ratio", "draft step": "draft_ratio"}
# The interval that speaks for a figure. The prompts are the baseline's own, so theirs is the clock's noise alone.
_INTERVALS = {"speedup_x": "speedup_x_timing_ci95", "verify_ratio": "verify_ratio_ci95"}
# A case is the same work only where these are equal. The draft is not among them: a worse one must be noticed.
_PROMPTS = ("target_sha256", "prompts", "prompts_sha256", "num_prompts", "prompt_len")
_WORKLOAD = ("workload_version", *_PROMPTS, "batch_size", "dtype", "mode", "block_size", "max_new_tokens")

Case = Mapping[str, Any]


class BaselineError(ValueError):
    """A baseline file that can't be used: which one, every fault in it, and what to do."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """pass, fail, no-baseline or invalid, and the sentence that says why; the sentence of a pass is empty."""

    case: str
    verdict: str
    sentence: str


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Gate:
    """What baselines say of a run: the lines for a terminal, whether the run fails, and a verdict for each case.

    Without verdicts nothing was held to a baseline: no case was measured, or baselines were written.
    """

    lines: list[str] = dataclasses.field(default_factory=list)
    failed: bool = False
    verdicts: list[Verdict] = dataclasses.field(default_factory=list)

    def figures(self) -> dict[str, Any] | None:
        """For JSON; None where nothing was held to a baseline."""
        cases = [dataclasses.asdict(v) for v in self.verdicts]
        return {"failed": self.failed, "cases": cases} if cases else None


def workload(info: Case) -> dict[str, Any]:
    """What identifies the work of a measured case; on CPUs their number and model too, since `cpu` is any of them."""
    names = (*_WORKLOAD, "cpu_count", "cpu_model") if info.get("platform") == "cpu" else _WORKLOAD
    return {name: info.get(name) for name in names}


def baseline_path(directory: Path, device_kind: str) -> Path:
    """The file of a device kind."""
    return directory / f"{device_kind.replace(' ', '-').replace('/', '-')}.json"


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _case_faults(case: Any) -> list[str]:
    if not isinstance(case, dict) or not isinstance(case.get("workload"), dict):
        return ["needs a `workload`"]
    faults = []
    for name, held in case.items():
        if name == "workload":
            continue
        limits = held if isinstance(held, dict) else {"reference": held}
        known = {"reference", "floor" if HIGHER_IS_BETTER.get(name) else "ceiling"}
        if name not in FIGURES:
            faults.append(f"{name} is none of {', '.join(FIGURES)}")
        elif "reference" not in limits or set(limits) - known:
            faults.append(f"{name} takes {' and '.join(sorted(known, reverse=True))}, got {sorted(limits)}")
        else:
            faults += [f"{name} {k} must be a number, got {v!r}" for k, v in limits.items() if not _is_number(v)]
    return faults


def read_baselines(directory: Path, device_kind: str) -> dict[str, Any] | None:
    """The cases of a device's file by id, or None where there is no file. Raises BaselineError with all its faults."""
    path = baseline_path(directory, device_kind)
    if not path.exists():
        return None
    try:
        data = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise BaselineError(f"{path} must be JSON: {error}; restore it, or delete it to start anew") from None
    if not isinstance(data, dict) or not isinstance(data.get("cases"), dict):
        raise BaselineError(f"{path} must hold `cases`; restore it, or delete it to start anew")
    faults = []
    if data.get("schema_version") != SCHEMA_VERSION:
        faults.append(f"schema_version must be {SCHEMA_VERSION}, got {data.get('schema_version')!r}")
    if data.get("device_kind") != device_kind:
        faults.append(f"it is of device {data.get('device_kind')!r}, this run is on {device_kind!r}")
    faults += [f"{name}: {fault}" for name, case in data["cases"].items() for fault in _case_faults(case)]
    if faults:
        raise BaselineError(f"{path}: " + "; ".join(faults))
    return data["cases"]


def write_baselines(directory: Path, device_kind: str, cases: Mapping[str, Any]) -> Path:
    """Writes a device's file whole."""
    directory.mkdir(parents=True, exist_ok=True)
    path = baseline_path(directory, device_kind)
    data = {"schema_version": SCHEMA_VERSION, "device_kind": device_kind, "cases": dict(sorted(cases.items()))}
    write_atomically(path, json.dumps(data, indent=2, allow_nan=False) + "\n")
    return path


# ---- holding a run against them


def _range(info: Case, name: str) -> tuple[float, float]:
    """The interval of a figure; a point where it has none of its own, and is counted, not timed."""
    low, high = info.get(_INTERVALS.get(name, "")) or (info[name], info[name])
    return low, high


def _broken(info: Case, name: str, held: Mapping[str, float]) -> str | None:
    """The figure against its floor or ceiling, `speedup_x 2.61 (2.55 to 2.68) < 2.80`, where it is broken."""
    low, high = _range(info, name)
    told = f"{name} {info[name]:.2f}" + (f" ({low:.2f} to {high:.2f})" if low < high else "")
    if high < held.get("floor", -math.inf):
        return f"{told} < {held['floor']:.2f}"
    if low > held.get("ceiling", math.inf):
        return f"{told} > {held['ceiling']:.2f}"
    return None


def _moved(info: Case, baseline: Mapping[str, Any]) -> str:
    """Which terms moved since the reference: `acceptance unchanged, verify step +14%`."""
    said, still = [], True
    for term, name in _TERMS.items():
        if name not in baseline or info.get(name) is None:
            continue
        change = info[name] / baseline[name]["reference"] - 1
        still &= abs(change) < _UNCHANGED
        said.append(f"{term} unchanged" if abs(change) < _UNCHANGED else f"{term} {change:+.0%}")
    if said and still:
        said.append("so the loop around the steps moved")
    return ", ".join(said)


def judge(info: Case, baselines: Mapping[str, Any] | None) -> Verdict:
    """One case against the baselines of its device (None: there are none), in one sentence."""
    case, device = info["case"], info["device_kind"]

    def verdict(kind: str, said: str = "") -> Verdict:
        return Verdict(case=case, verdict=kind, sentence=said)

    why = doubt(dict(info))
    invalid = verdict("invalid", f"speedup_x is {why}")
    if why and not (info["lossless"] and info["speedup_x"] is not None):
        return invalid
    if baselines is None or case not in baselines:
        where = "this case" if baselines is not None else "any case"
        said = f"no baseline for {where} on {device}: --update-baselines writes one"
        return invalid if why else verdict("no-baseline", said)
    baseline = baselines[case]
    now, then = workload(info), baseline["workload"]
    differing = [f"{k} was {then.get(k)}, is {now.get(k)}" for k in sorted({*now, *then}) if now.get(k) != then.get(k)]
    if differing:
        said = f"the baseline on {device} is of another workload: {'; '.join(differing)}"
        return invalid if why else verdict("no-baseline", said)
    # Rounds that are noisy, or few, hide a speed-up; what is counted, or timed by itself, they don't.
    held = {name: baseline[name] for name in FIGURES if name in baseline and not (why and name == "speedup_x")}
    undefined = [name for name in held if not _is_number(info.get(name))]
    if undefined:
        return verdict("invalid", f"{', '.join(undefined)} must be measured, and is undefined here")
    broken = [text for name in held if (text := _broken(info, name, held[name]))]
    if not broken:
        return invalid if why else verdict("pass")
    moved = _moved(info, baseline)
    return verdict("fail", f"{', '.join(broken)} on {device}" + (f"; {moved}" if moved else ""))


# ---- taking new ones


def _limit(info: Case, name: str, tolerance: float) -> dict[str, float]:
    """Reference and floor (or ceiling): the reference less the tolerance, or its interval's end if that is further."""
    reference = {"reference": round(info[name], 4)}
    if name == "draft_ratio":  # told, to name the term that moved; a block's cost is in speedup_x
        return reference
    low, high = _range(info, name)
    if HIGHER_IS_BETTER[name]:
        return reference | {"floor": round(min(low, (1 - tolerance) * info[name]), 4)}
    return reference | {"ceiling": round(max(high, (1 + tolerance) * info[name]), 4)}


def baseline_of(info: Case, tolerance: float = TOLERANCE) -> dict[str, Any]:
    """What a measured case leaves for later runs. Figures that it has not are left out."""
    limits = {name: _limit(info, name, tolerance) for name in FIGURES if _is_number(info.get(name))}
    return {"workload": workload(info), **limits}


def _change(case: str, old: Mapping[str, Any] | None, new: Mapping[str, Any]) -> str:
    """`case: speedup_x 3.10 -> 2.95 (floor 2.90), ...`"""

    def told(name: str) -> str:
        limit = next((f" ({k} {v:.2f})" for k, v in new[name].items() if k != "reference"), "")
        before = f"{old[name]['reference']:.2f} -> " if old and name in old else ""
        return f"{name} {before}{new[name]['reference']:.2f}{limit}"

    head = f"{case}: " if old else f"{case}: new, "
    if old and old["workload"] != new["workload"]:
        head += "another workload, "
    return head + ", ".join(told(name) for name in FIGURES if name in new)


def updated(
    cases: Sequence[Case], baselines: Mapping[str, Any] | None, tolerance: float = TOLERANCE
) -> tuple[dict[str, Any], list[str]]:
    """Baselines with these cases in place of what was known of them, and a line of what changed for each.

    Cases whose speed-up is in doubt are not taken; those that did not run stay.
    """
    new, said = dict(baselines or {}), []
    for info in cases:
        if why := doubt(dict(info)):
            said.append(f"{info['case']}: not written, speedup_x is {why}")
            continue
        taken = baseline_of(info, tolerance)
        said.append(_change(info["case"], new.get(info["case"]), taken))
        new[info["case"]] = taken
    return new, said


# ---- a whole run


def _lines(verdicts: Sequence[Verdict]) -> list[str]:
    """A line for each sentence, with the cases that it is said of; passes are counted."""
    grouped: dict[tuple[str, str], list[str]] = {}
    for v in verdicts:
        grouped.setdefault((v.verdict, v.sentence), []).append(v.case)
    return [
        f"pass: {len(names)} of {len(verdicts)} cases" if kind == "pass" else f"{kind}: {', '.join(names)}: {sentence}"
        for (kind, sentence), names in grouped.items()
    ]


def close_run(
    cases: Sequence[Case], directory: Path, *, update: bool = False, require: bool = False, tolerance: float = TOLERANCE
) -> Gate:
    """Holds a run's cases to the baselines of its device, or writes them."""
    # What a server of unknown device reached says nothing of another.
    cases = [case for case in cases if case["mode"] != "served"]
    if not cases:
        flag = "--update-baselines" if update else "--require-baseline"
        empty = f"{flag}: no case was measured on a device of this process, so there is nothing to hold to a baseline"
        return Gate(lines=[empty], failed=True) if update or require else Gate()
    device = cases[0]["device_kind"]
    try:
        held = read_baselines(directory, device)
    except BaselineError as error:
        unread = [Verdict(case=case["case"], verdict="invalid", sentence=str(error)) for case in cases]
        return Gate(lines=[str(error)], failed=True, verdicts=unread)
    if update:
        new, said = updated(cases, held, tolerance)
        if new != (held or {}):
            said.append(f"written: {write_baselines(directory, device, new)}")
        return Gate(lines=said)
    verdicts = [judge(case, held) for case in cases]
    kinds = {v.verdict for v in verdicts}
    failed = "fail" in kinds or (require and kinds != {"pass"})
    return Gate(lines=_lines(verdicts), failed=failed, verdicts=verdicts)
