"""The report of a run: report.html (one file, no script, nothing from a network) and report.md, the same in words."""

from collections.abc import Sequence
from pathlib import Path

import jinja2

from dflash.report.checks import audit_section, gate_section
from dflash.report.compare import differences
from dflash.report.figures import all_plots
from dflash.report.run import ReportError, Run, read_run
from dflash.report.sections import (
    Headline,
    Section,
    acceptance_section,
    change_section,
    cost_section,
    headline,
    history_section,
    origin_section,
    speedup_section,
)
from dflash.teacher_cache.arrays import write_atomically

# Runs of a folder that are drawn and compared.
HISTORY = 30
_TONES = dict.fromkeys(("ok", "faster", "lossless", "lossless up to near ties"), "good")
_TONES |= dict.fromkeys(("slower", "invalid", "failed", "fail", "defect"), "bad")


def _tone(cell: str) -> str:
    """good, bad or plain: how a verdict is coloured. Its words say it too."""
    return _TONES.get(cell.split(", ")[0], "plain")


def _cell(text: str) -> str:
    """Text in a Markdown table, and not markup."""
    return text.replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")


def _templates() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("dflash.report"),
        autoescape=lambda name: bool(name and name.endswith(".html")),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"tone": _tone, "cell": _cell}
    return environment


def _comparable(run: Run, other: Run) -> list[str]:
    """Why a run does not belong to the history: by its cases of the same name."""
    named = {c["name"]: c for c in other.decodes}
    return sorted({d for c in run.decodes if c["name"] in named for d in differences(named[c["name"]], c)})


def sections(run: Run, older: Sequence[Run]) -> list[Section]:
    """All that is said, in order. `older` runs come newest first; the first of them is compared with."""
    told, history = [], [run]
    for other in older:
        reasons = _comparable(run, other)
        if reasons:
            told.append(f"{other.short_when} is left out: other {', '.join(reasons)}.")
        else:
            history.insert(0, other)
    found = [gate_section(run.gate), speedup_section(run)]
    found += [change_section(older[0], run)] if older else []
    found += [acceptance_section(run), cost_section(run), audit_section(run.audits)]
    found += [history_section(told), origin_section(run)]
    plots = all_plots(run, history)
    for section in found:
        section.plots = plots.get(section.key, [])
    return [s for s in found if s.tables or s.plots or s.sentences]


def write_report(directory: Path, run: Run, older: Sequence[Run] = ()) -> Path:
    """Writes report.html and report.md into `directory`; returns the page. Older runs in any order.

    Raises ReportError when that is no directory and can't be one.
    """
    older = sorted(older, key=lambda r: r.when, reverse=True)
    said: dict[str, Headline | Run | list[Section]] = {
        "headline": headline(run),
        "run": run,
        "sections": sections(run, older),
    }
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ReportError(f"a report is written into a directory; {directory}: {error.strerror}") from None
    for name in ("report.md", "report.html"):
        write_atomically(directory / name, _templates().get_template(name).render(said))
    return directory / "report.html"


def report_folder(directory: Path, json_file: Path) -> Path:
    """Keeps a run in `directory` (run-<time>.json), and writes the page of it beside; the earlier ones are its history.

    Raises ReportError for a file there that can't be read.
    """
    run = read_run(json_file)
    kept = directory / f"run-{run.when[:19].replace(':', '').replace('-', '')}.json"
    if json_file.resolve() != kept.resolve():
        write_atomically(kept, json_file.read_text(encoding="utf-8"))
    older = [read_run(path) for path in sorted(directory.glob("run-*.json"))[-HISTORY:] if path.name < kept.name]
    return write_report(directory, run, older)
