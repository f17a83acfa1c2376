"""`python -m dflash report` and `export-results`: a run for people, and for other tools."""

import dataclasses
import sys
from pathlib import Path
from typing import Annotated

import tyro

from dflash.host.disk import write_atomically
from dflash.measuring.result import ResultError, read_file
from dflash.report.other_tools import Format, left_out
from dflash.report.other_tools import export as exported


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """What `report` takes."""

    run: Annotated[Path, tyro.conf.Positional]
    """File of pytest's --benchmark-json."""
    older: Annotated[tuple[Path, ...], tyro.conf.Positional] = ()
    """Older files, in any order: the run is compared with the newest; all of them are the history."""
    out: Path = Path("report")
    """Directory for report.html and report.md."""
    plan: Path | None = None
    """File of `dflash plan --json`: the estimate is a section of the page."""


def report(args: Annotated[Report, tyro.conf.arg(name="")]) -> None:
    """Write the page of a run: speed-ups, acceptance, costs, what changed, where it comes from."""
    from dflash.report.page import write_report  # matplotlib takes a second that other commands need not spend

    print(write_report(args.out, read_file(args.run), [read_file(path) for path in args.older], args.plan))


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ExportResults:
    """What `export-results` takes."""

    run: Annotated[Path, tyro.conf.Positional]
    """File of pytest's --benchmark-json."""
    format: Format
    """github-action-benchmark, bencher, the names of vllm bench serve or of sglang.bench_serving, or CSV."""
    out: Path | None = None
    """File to write; by default the export is printed."""


def export_results(args: Annotated[ExportResults, tyro.conf.arg(name="")]) -> None:
    """Write a run's cases in the format of another tool."""
    run = read_file(args.run)
    text = exported(run, args.format)
    if names := left_out(run, args.format):
        print(f"not exported, since their figures do not count: {', '.join(names)}", file=sys.stderr)
    if args.out is None:
        print(text, end="")
        return
    try:
        write_atomically(args.out, text)
    except OSError as error:
        raise ResultError(f"an export is written to a file; {args.out}: {error.strerror}") from None
