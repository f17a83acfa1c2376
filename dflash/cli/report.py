"""`python -m dflash report` and `export-results`: a run for people, and for other tools."""

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro

from dflash.exports import Format
from dflash.exports import export as exported
from dflash.report.run import ReportError, read_run
from dflash.teacher_cache.arrays import write_atomically


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """What `report` takes."""

    run: Annotated[Path, tyro.conf.Positional]
    """File of pytest's --benchmark-json."""
    older: Annotated[tuple[Path, ...], tyro.conf.Positional] = ()
    """Older ones, in any order: the newest of them is compared with, all are the history."""
    out: Path = Path("report")
    """Directory that report.html and report.md go into."""


def report(args: Annotated[Report, tyro.conf.arg(name="")]) -> None:
    """Write the page of a run: speed-ups, acceptance, costs, what changed, where it comes from."""
    from dflash.report.page import write_report  # matplotlib takes a second that other commands need not wait

    print(write_report(args.out, read_run(args.run), [read_run(path) for path in args.older]))


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ExportResults:
    """What `export-results` takes."""

    run: Annotated[Path, tyro.conf.Positional]
    """File of pytest's --benchmark-json."""
    format: Format
    """github-action-benchmark, bencher, the names of vllm bench serve or of sglang.bench_serving, or CSV."""
    out: Path | None = None
    """File to write; without one it is printed."""


def export_results(args: Annotated[ExportResults, tyro.conf.arg(name="")]) -> None:
    """Write a run's cases in the format of another tool."""
    text = exported(read_run(args.run), args.format)
    if args.out is None:
        print(text, end="")
        return
    try:
        write_atomically(args.out, text)
    except OSError as error:
        raise ReportError(f"an export is written to a file; {args.out}: {error.strerror}") from None
