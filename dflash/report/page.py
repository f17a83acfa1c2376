"""The report of a run: report.html (one file, no script, nothing from a network) and report.md, the same in words."""

import re
from collections.abc import Sequence
from pathlib import Path

import jinja2

from dflash.host.disk import write_atomically
from dflash.measuring.gate import UNBELIEVED
from dflash.measuring.result import ResultError, ResultFile, read_file
from dflash.report.compare import differences
from dflash.report.figures import all_plots
from dflash.report.planned import planned_section
from dflash.report.sections import (
    Headline,
    Section,
    acceptance_section,
    audit_section,
    change_section,
    cost_section,
    failed_section,
    gate_section,
    headline,
    history_section,
    origin_section,
    peer_section,
    sets_section,
    speedup_section,
    training_section,
)

# How many runs of a folder are drawn and compared.
HISTORY = 30
_TONES = dict.fromkeys(("ok", "faster", "lossless", "lossless up to near ties"), "good")
_TONES |= dict.fromkeys(("slower", *UNBELIEVED, "failed", "fail", "defect"), "bad")


def _tone(cell: str) -> str:
    """good, bad or plain: how a verdict is coloured. Its words say it too."""
    return _TONES.get(_word(cell), "plain")


def _word(cell: str) -> str:
    """The verdict itself; what follows it says why, or what else is to be known."""
    return re.split(r"[,:] ", cell, maxsplit=1)[0]


def _cell(text: str) -> str:
    """Text for a Markdown table, escaped."""
    return text.replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")


def _templates() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("dflash.report"),
        autoescape=lambda name: bool(name and name.endswith(".html")),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"tone": _tone, "word": _word, "cell": _cell}
    return environment


def _comparable(run: ResultFile, other: ResultFile) -> list[str]:
    """Why a run does not belong to the history: by its cases of the same name."""
    named = {c.name: c for c in other.decodes}
    return sorted({d for c in run.decodes if c.name in named for d in differences(named[c.name], c)})


def sections(run: ResultFile, older: Sequence[ResultFile]) -> list[Section]:
    """All sections, in order. `older` runs come newest first; the first of them is compared with."""
    left_out, history = [], [run]
    for other in older:
        reasons = _comparable(run, other)
        if reasons:
            left_out.append(f"{other.short_when} is left out: other {', '.join(reasons)}.")
        else:
            history.insert(0, other)
    gate = gate_section(run.gate)
    judged = run.gate is not None and (run.gate.failed or {"pass", "fail"} & {c.verdict for c in run.gate.cases})
    measured = [speedup_section(run), sets_section(run), failed_section(run)]
    measured += [change_section(older[0], run)] if older else []
    measured += [acceptance_section(run), cost_section(run), training_section(run), peer_section(run)]
    measured += [audit_section(run.audits), history_section(left_out)]
    # What the baselines say is read first, and last where there are none.
    ordered = [gate, *measured] if judged else [*measured, gate]
    ordered.append(origin_section(run))
    plots = all_plots(run, history)
    for section in ordered:
        section.plots = plots.get(section.key, [])
    return [section for section in ordered if section]


def write_report(directory: Path, run: ResultFile, older: Sequence[ResultFile] = (), plan: Path | None = None) -> Path:
    """Writes report.html and report.md into `directory`; returns the page. Older runs in any order.

    A `plan`, the JSON file of `dflash plan`, is the last section. Raises ResultError when `directory` is none and can't
    be one, and for a file that is no plan.
    """
    planned = [] if plan is None else [planned_section(plan)]
    older = sorted(older, key=lambda r: r.when, reverse=True)
    content: dict[str, Headline | ResultFile | list[Section]] = {
        "headline": headline(run),
        "run": run,
        "sections": [*sections(run, older), *planned],
    }
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ResultError(f"a report is written into a directory; {directory}: {error.strerror}") from None
    for name in ("report.md", "report.html"):
        write_atomically(directory / name, _templates().get_template(name).render(content))
    return directory / "report.html"


def report_folder(directory: Path, json_file: Path) -> Path:
    """Keeps a run in `directory` (run-<time>.json) and writes its page beside it; earlier runs are its history.

    Raises ResultError for a file there that can't be read.
    """
    run = read_file(json_file)
    kept = directory / f"run-{run.when[:19].replace(':', '').replace('-', '')}.json"
    if json_file.resolve() != kept.resolve():
        write_atomically(kept, json_file.read_text(encoding="utf-8"))
    older = [read_file(path) for path in sorted(directory.glob("run-*.json"))[-HISTORY:] if path.name < kept.name]
    return write_report(directory, run, older)
