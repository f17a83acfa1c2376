"""What the benchmarks of a run measured, and what the terminal says of it at the end. No jax."""

import dataclasses
from collections.abc import Iterator
from typing import Any

from dflash.baselines import Gate
from dflash.cost_model import advice_line
from dflash.gate import remark
from dflash.report.text import audit_lines, category_table, speedup_table, step_table, training_lines

Info = dict[str, Any]


@dataclasses.dataclass
class Results:
    """Lists of `extra_info` of benchmarks and of figures of audits; `gate` is what the baselines say of the cases.

    `failed` are cases that could not be measured: what identifies them, and `error`.
    """

    cases: list[Info] = dataclasses.field(default_factory=list)
    failed: list[Info] = dataclasses.field(default_factory=list)
    steps: list[Info] = dataclasses.field(default_factory=list)
    trainings: list[Info] = dataclasses.field(default_factory=list)
    acceptances: list[Info] = dataclasses.field(default_factory=list)
    audits: list[Info] = dataclasses.field(default_factory=list)
    gate: Gate = dataclasses.field(default_factory=Gate)
    compile_cache: str = "unknown"
    saved: bool = False

    def sections(self) -> Iterator[tuple[str, list[str]]]:
        """Title and lines of every section that has something to say."""
        tables = {
            "what a step costs": [line for info in self.steps for line in step_table(info)],
            "what training a draft costs": [line for info in self.trainings for line in training_lines(info)],
            "what the target accepts of the draft": [line for i in self.acceptances for line in category_table(i)],
            "the audit of decoding": [f"{info['case']}: {audit_lines(info)[0]}" for info in self.audits],
            "speed-up over greedy decoding": list(self._speedups()) if self.cases else [],
            "could not be measured": [f"{info['case']}: {info['error']}" for info in self.failed],
            "baselines": self.gate.lines,
        }
        return ((title, lines) for title, lines in tables.items() if lines)

    def _speedups(self) -> Iterator[str]:
        yield from speedup_table(self.cases)
        for info in self.cases:
            if (said := remark(info)) is not None:
                yield f"{info['case']}: {said}"
            if info.get("scripted") is None and (told := advice_line(info)) is not None:
                yield told
