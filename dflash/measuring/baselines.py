"""Baselines: what each case reached on a device before, and the floors for later runs.

One file per device kind, `bench/baselines/<device kind>.json`, reviewed like code:

    {"schema_version": 1, "device_kind": "TPU v5e", "cases": {"block-b8-n256-draft": {
        "workload": {"workload_version": 1, "target_sha256": "...", "prompts_sha256": "...", ...},
        "speedup_x": {"reference": 3.1, "floor": 3.05}, "acceptance_length": {"reference": 5.9, "floor": 5.84},
        "accept_rate": {...}, "verify_ratio": {"reference": 1.4, "ceiling": 1.43}, "draft_ratio": {"reference": 0.4}}}}
"""

import dataclasses
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import filelock
from scipy.special import stdtrit

from dflash.config import fault_list
from dflash.host.disk import read_object, write_atomically
from dflash.measuring.gate import doubt
from dflash.measuring.result import CaseVerdict, Decode, GateResult, Served, Verdict
from dflash.metrics import HIGHER_IS_BETTER

SCHEMA_VERSION = 1
# What a figure may lose against its reference, as a fraction; more if its own interval is wider.
TOLERANCE = 0.01
# How long writing baselines waits for another run that does.
LOCK_SECONDS = 60
# A term that moved by less than this is called unchanged.
_UNCHANGED = 0.02
# No figure comes near it.
_MOST = 1e9
FIGURES = ("speedup_x", "acceptance_length", "accept_rate", "verify_ratio", "draft_ratio")
_TERMS = {"acceptance": "acceptance_length", "verify step": "verify_ratio", "draft step": "draft_ratio"}
# The interval of each figure. The prompts are the baseline's own, so only the clock's noise counts.
_INTERVALS = {"speedup_x": "speedup_x_timing_ci95", "verify_ratio": "verify_ratio_ci95"}
# Two cases are the same work only if these are equal. The draft is not among them: a worse one must be noticed.
_PROMPTS = ("target_sha256", "prompts_sha256", "num_prompts", "prompt_len")
# They decided the token ids and explain a difference, but make no other workload by themselves.
_PROMPT_FACTS = ("prompts", "chat_template_args", "template_date")
_WORKLOAD = ("workload_version", *_PROMPTS, "batch_size", "dtype", "mode", "block_size", "max_new_tokens", "sampling")


class BaselineError(ValueError):
    """A baseline file that can't be used: which one, every fault in it, and what to do."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Gate:
    """A run against its baselines: lines for the terminal, whether the run fails, and a verdict for each case.

    Without verdicts nothing was compared: no case was measured, or baselines were written.
    """

    lines: list[str] = dataclasses.field(default_factory=list)
    failed: bool = False
    verdicts: list[CaseVerdict] = dataclasses.field(default_factory=list)

    @property
    def result(self) -> GateResult | None:
        """What the file says of it; None where nothing was held to a baseline."""
        return GateResult(failed=self.failed, cases=self.verdicts) if self.verdicts else None


def workload(case: Decode) -> dict[str, Any]:
    """What identifies the work of a measured case; on CPUs their number and model too, since `cpu` is any of them.

    Of a case on several devices, their mesh as well.
    """
    names = (*_WORKLOAD, "cpu_count", "cpu_model") if case.platform == "cpu" else _WORKLOAD
    if any(size > 1 for size in (case.mesh or {}).values()):
        names = (*names, "mesh")
    return {name: getattr(case, name) for name in (*names, *_PROMPT_FACTS)}


def key_of(case: Decode) -> str:
    """Under which name a device's file has a case: its id, and its mesh if it ran on several devices."""
    mesh = [f"{axis}{size}" for axis, size in sorted((case.mesh or {}).items()) if size > 1]
    return f"{case.case}@{'-'.join(mesh)}" if mesh else case.case


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
        more = {"between_runs", "runs"} if name == "speedup_x" else set()
        if name not in FIGURES:
            faults.append(f"{name} is none of {', '.join(FIGURES)}")
        elif "reference" not in limits or set(limits) - known - more:
            faults.append(f"{name} takes {' and '.join(sorted(known, reverse=True))}, got {sorted(limits)}")
        else:
            # What is measured is divided by a reference.
            lowest = {"reference": 0.0 if name == "accept_rate" else 1e-9}
            faults += [
                f"{name} {k} must be a number from {lowest.get(k, 0.0):g} to {_MOST:g}, got {v!r}"
                for k, v in limits.items()
                if k in known and not (_is_number(v) and lowest.get(k, 0.0) <= v <= _MOST)
            ]
            deviation, runs = limits.get("between_runs"), limits.get("runs")
            if (deviation, runs) != (None, None) and not (
                _is_number(deviation) and 0 <= float(deviation or 0) <= 10 and type(runs) is int and 2 <= runs <= _MOST
            ):
                faults.append(f"{name} between_runs is 0 to 10 and of at least 2 runs, got {deviation!r} from {runs!r}")
    return faults


def read_baselines(directory: Path, device_kind: str) -> dict[str, Any] | None:
    """The cases of a device's file by id, or None where there is no file. Raises BaselineError with all its faults."""
    path = baseline_path(directory, device_kind)
    if not os.path.lexists(path):
        return None
    data = read_object(path, BaselineError, "restore it, or delete it to start over")
    if not isinstance(data.get("cases"), dict):
        raise BaselineError(f"{path} must hold `cases`; restore it, or delete it to start over")
    faults = []
    if data.get("schema_version") != SCHEMA_VERSION:
        faults.append(f"schema_version must be {SCHEMA_VERSION}, got {data.get('schema_version')!r}")
    if data.get("device_kind") != device_kind:
        faults.append(f"it is of device {data.get('device_kind')!r}, this run is on {device_kind!r}")
    faults += [f"{name}: {fault}" for name, case in data["cases"].items() for fault in _case_faults(case)]
    if faults:
        raise BaselineError(f"{path}: {fault_list(faults)}")
    return data["cases"]


def write_baselines(directory: Path, device_kind: str, cases: Mapping[str, Any]) -> Path:
    """Writes a device's file whole."""
    directory.mkdir(parents=True, exist_ok=True)
    path = baseline_path(directory, device_kind)
    data = {"schema_version": SCHEMA_VERSION, "device_kind": device_kind, "cases": dict(sorted(cases.items()))}
    write_atomically(path, json.dumps(data, indent=2, allow_nan=False) + "\n")
    return path


# ---- comparing a run with them


def _range(case: Decode, name: str) -> tuple[float, float]:
    """The interval of a figure; a point where it has none of its own, and is counted, not timed."""
    value = getattr(case, name)
    low, high = (getattr(case, _INTERVALS[name]) if name in _INTERVALS else None) or (value, value)
    return low, high


def _broken(case: Decode, name: str, held: Mapping[str, float]) -> str | None:
    """The figure against its floor or ceiling, `speedup_x 2.61 (2.55 to 2.68) < 2.80`, where it is broken."""
    low, high = _range(case, name)
    figure = f"{name} {getattr(case, name):.2f}" + (f" ({low:.2f} to {high:.2f})" if low < high else "")
    if high < held.get("floor", -math.inf):
        return f"{figure} < {held['floor']:.2f}"
    if low > held.get("ceiling", math.inf):
        return f"{figure} > {held['ceiling']:.2f}"
    return None


def _moved(case: Decode, baseline: Mapping[str, Any]) -> str:
    """Which terms moved since the reference: `acceptance unchanged, verify step +14%`."""
    changes, still = [], True
    for term, name in _TERMS.items():
        if name not in baseline or getattr(case, name) is None:
            continue
        change = getattr(case, name) / baseline[name]["reference"] - 1
        still &= abs(change) < _UNCHANGED
        changes.append(f"{term} unchanged" if abs(change) < _UNCHANGED else f"{term} {change:+.0%}")
    if changes and still:
        changes.append("so the loop around the steps moved")
    return ", ".join(changes)


def _differing(now: Mapping[str, Any], then: Mapping[str, Any]) -> list[str]:
    """The keys in which two workloads differ; none if only what describes their prompts differs."""
    names = [name for name in sorted({*now, *then}) if now.get(name) != then.get(name)]
    return names if set(names) - set(_PROMPT_FACTS) else []


def judge(case: Decode, baselines: Mapping[str, Any] | None) -> CaseVerdict:
    """One case against the baselines of its device (None: there are none), in one sentence."""
    device = case.device_kind

    def verdict(kind: Verdict, reason: str = "") -> CaseVerdict:
        return CaseVerdict(case=case.case, verdict=kind, sentence=reason)

    why = doubt(case)
    invalid = verdict("invalid", f"speedup_x is {why}")
    if why and not (case.lossless and case.speedup_x is not None):
        return invalid
    if baselines is None or key_of(case) not in baselines:
        where = "this case" if baselines is not None else "any case"
        reason = f"no baseline for {where} on {device}: --update-baselines writes one"
        return invalid if why else verdict("no-baseline", reason)
    baseline = baselines[key_of(case)]
    now, then = workload(case), baseline["workload"]
    if differing := _differing(now, then):
        changes = "; ".join(f"{k} was {then.get(k)}, is {now.get(k)}" for k in differing)
        reason = f"the baseline on {device} is of another workload: {changes}"
        return invalid if why else verdict("no-baseline", reason)
    # Noisy or few rounds hide a speed-up, but not what is counted or timed by itself.
    held = {name: baseline[name] for name in FIGURES if name in baseline and not (why and name == "speedup_x")}
    undefined = [name for name in held if not _is_number(getattr(case, name))]
    if undefined:
        return verdict("invalid", f"{', '.join(undefined)} must be measured, and is undefined here")
    broken = [text for name in held if (text := _broken(case, name, held[name]))]
    if not broken:
        return invalid if why else verdict("pass")
    moved = _moved(case, baseline)
    return verdict("fail", f"{', '.join(broken)} on {device}" + (f"; {moved}" if moved else ""))


# ---- writing new ones


def _limit(case: Decode, name: str, tolerance: float) -> dict[str, float]:
    """Reference and floor (or ceiling): the reference less the tolerance, or its interval's end if that is further."""
    reference = {"reference": round(getattr(case, name), 4)}
    if name == "draft_ratio":  # recorded to name the term that moved; a block's cost is in speedup_x
        return reference
    low, high = _range(case, name)
    if name == "speedup_x" and case.between_runs is not None:
        low = min(low, getattr(case, name) * math.exp(-_between_margin(case.between_runs, case.runs)))
        reference |= {"between_runs": round(case.between_runs, 5), "runs": case.runs}
    if HIGHER_IS_BETTER[name]:
        return reference | {"floor": round(min(low, (1 - tolerance) * getattr(case, name)), 4)}
    return reference | {"ceiling": round(max(high, (1 + tolerance) * getattr(case, name)), 4)}


def _between_margin(deviation: float, runs: int) -> float:
    """How far two runs of a case may differ, in the logarithm (95%), given the deviation of so many `runs`."""
    return float(stdtrit(runs - 1, 0.975)) * math.sqrt(2) * deviation


def with_held_spread(case: Decode, baselines: Mapping[str, Any] | None) -> Decode:
    """The case with the between-run spread stored in its baseline, unless it has its own."""
    held = (baselines or {}).get(key_of(case), {})
    known = held.get("speedup_x", {})
    if case.between_runs is not None or "between_runs" not in known or held.get("workload") != workload(case):
        return case
    return dataclasses.replace(case, between_runs=known["between_runs"], runs=int(known["runs"]))


def baseline_of(case: Decode, tolerance: float = TOLERANCE) -> dict[str, Any]:
    """What a measured case leaves for later runs. Figures that it lacks are left out."""
    limits = {name: _limit(case, name, tolerance) for name in FIGURES if _is_number(getattr(case, name))}
    return {"workload": workload(case), **limits}


def _change(case: str, old: Mapping[str, Any] | None, new: Mapping[str, Any]) -> str:
    """`case: speedup_x 3.10 -> 2.95 (floor 2.90), ...`"""

    def entry(name: str) -> str:
        limit = next((f" ({k} {v:.2f})" for k, v in new[name].items() if k in ("floor", "ceiling")), "")
        before = f"{old[name]['reference']:.2f} -> " if old and name in old else ""
        return f"{name} {before}{new[name]['reference']:.2f}{limit}"

    head = f"{case}: " if old else f"{case}: new, "
    if old and _differing(new["workload"], old["workload"]):
        head += "another workload, "
    return head + ", ".join(entry(name) for name in FIGURES if name in new)


def updated(
    cases: Sequence[Decode], baselines: Mapping[str, Any] | None, tolerance: float = TOLERANCE
) -> tuple[dict[str, Any], list[str]]:
    """The baselines with these cases replaced, and for each a line that says what changed.

    Cases whose speed-up is in doubt are not written; those that did not run stay.
    """
    new, lines = dict(baselines or {}), []
    for case in cases:
        if why := doubt(case):
            lines.append(f"{case.case}: not written, speedup_x is {why}")
            continue
        taken = baseline_of(with_held_spread(case, new), tolerance)
        key = key_of(case)
        lines.append(_change(key, new.get(key), taken))
        new[key] = taken
    return new, lines


# ---- a whole run


def _lines(verdicts: Sequence[CaseVerdict]) -> list[str]:
    """A line for each sentence, with the cases that it is about; passes are counted."""
    grouped: dict[tuple[str, str], list[str]] = {}
    for v in verdicts:
        grouped.setdefault((v.verdict, v.sentence), []).append(v.case)
    return [
        f"pass: {len(names)} of {len(verdicts)} cases" if kind == "pass" else f"{kind}: {', '.join(names)}: {sentence}"
        for (kind, sentence), names in grouped.items()
    ]


def _update(cases: Sequence[Decode], directory: Path, device: str, tolerance: float) -> list[str]:
    """Writes these cases as baselines, and a line of what changed for each. Raises BaselineError where it can't."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        # Another run may add cases of its own at this moment.
        with filelock.FileLock(directory / ".baselines.lock", timeout=LOCK_SECONDS):
            held = read_baselines(directory, device)
            new, lines = updated(cases, held, tolerance)
            if new != (held or {}):
                lines.append(f"written: {write_baselines(directory, device, new)}")
    except filelock.Timeout:
        raise BaselineError(f"another run has held {directory} for {LOCK_SECONDS} s; end it, then run again") from None
    except OSError as error:
        raise BaselineError(
            f"baselines are written into a directory; {directory}: {error.strerror}; name another with --baselines DIR"
        ) from None
    return lines


def close_run(
    cases: Sequence[Decode],
    directory: Path,
    *,
    update: bool = False,
    require: bool = False,
    tolerance: float = TOLERANCE,
) -> Gate:
    """Holds a run's cases to the baselines of its device, or writes them."""
    # The device of a server is unknown, so its figures are no baseline for another run.
    cases = [case for case in cases if not isinstance(case, Served)]
    if not cases:
        flag = "--update-baselines" if update else "--require-baseline"
        empty = f"{flag}: no case was measured on a device of this process, so there is nothing to hold to a baseline"
        return Gate(lines=[empty], failed=True) if update or require else Gate()
    device = str(cases[0].device_kind)
    try:
        if update:
            return Gate(lines=_update(cases, directory, device, tolerance))
        held = read_baselines(directory, device)
    except BaselineError as error:
        unread = [CaseVerdict(case=case.case, verdict="invalid", sentence=str(error)) for case in cases]
        return Gate(lines=[str(error)], failed=True, verdicts=unread)
    verdicts = [judge(case, held) for case in cases]
    kinds = {v.verdict for v in verdicts}
    failed = "fail" in kinds or (require and kinds != {"pass"})
    return Gate(lines=_lines(verdicts), failed=failed, verdicts=verdicts)
