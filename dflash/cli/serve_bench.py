"""`python -m dflash serve-bench`: a server without a draft and with one, over HTTP."""

import dataclasses
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import tyro

from dflash.cli.option import refuse_unused
from dflash.cli.template import TemplateOptions, refuse_unused_template
from dflash.config import Count, Positive
from dflash.host.disk import check_writable, nearest
from dflash.measuring.gate import Floors, own_line
from dflash.measuring.result import Results, Served
from dflash.report.sections import render, speedup_section
from dflash.serving.connection import ServingError
from dflash.serving.deployment import deployment
from dflash.serving.options import ServerOptions
from dflash.serving.results import results_of, write_results
from dflash.serving.run import served_run
from dflash.text.prompts import PromptSource


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ServeBench(ServerOptions):
    """What `serve-bench` takes."""

    prompts: tyro.conf.OmitArgPrefixes[PromptSource] = dataclasses.field(default_factory=PromptSource)
    template: tyro.conf.OmitArgPrefixes[TemplateOptions] = dataclasses.field(default_factory=TemplateOptions)
    num_prompts: Count = 8
    """Prompts of a round, each with all of its turns."""
    max_new_tokens: Count = 128
    """Token budget."""
    concurrency: Count = 1
    """Requests at a time."""
    rounds: Count = 5
    """Timed rounds, after one of warm-up; under 3 give no interval."""
    json: Path | None = None
    """File to write, as --benchmark-json of pytest writes it."""
    report: Path | None = None
    """Directory that report.html and report.md go into; the runs kept there are its history."""
    min_speedup: Positive | None = None
    """Exit code 1 under this."""


def serve_bench(args: Annotated[ServeBench, tyro.conf.arg(name="")]) -> None:
    """Measure a server without a draft and with one; exit code 1 when texts differ or --min-speedup is missed."""
    _check_unused(args)
    _check(args)
    servers = deployment(args)
    tokenizer = args.template.open(args.target)
    prompts = args.prompts.load().take(args.num_prompts)
    with served_run(
        servers,
        tokenizer,
        prompts,
        max_new_tokens=args.max_new_tokens,
        concurrency=args.concurrency,
        rounds=args.rounds,
    ) as run:
        run.measure(args.rounds)

    def results(case: Served) -> dict[str, Any]:
        return results_of(case, run.seconds, ["dflash", *sys.argv[1:]])

    case = run.result({"prompts": args.prompts.source} | tokenizer.facts)
    shown = dataclasses.replace(case, own_unknown=None)  # that line comes last
    print("\n".join(render(speedup_section(Results(measured=[shown])))), flush=True)
    if args.offline:
        _write_json(args, results(case))  # decoding here takes minutes, and may be stopped
        case = run.held_to_ours(case)
    # Print failures before writing, in case writing fails.
    if sentences := run.failures(case, Floors(speedup_x=args.min_speedup), args.rounds):
        print("; ".join(sentences), file=sys.stderr)
    elif line := own_line(case):
        print(line)
    final = results(case)
    _write_json(args, final)
    if args.json is not None:
        print(f"every figure: {args.json}")
    _write_report(args, final)
    if sentences:
        sys.exit(1)


def _check_unused(args: ServeBench) -> None:
    """Raises ConfigError for options that this run would ignore."""
    refuse_unused_template(args, args.prompts.raw)
    if args.base_url:
        ours = ["server_python", "ready_timeout", "server_logs"]
        refuse_unused(args, ours, "for servers that are started here, and --base-url names one that runs already")
    if not args.draft:
        refuse_unused(args, ["block_size", "draft_server_args"], "for a draft, and none is named (--draft)")


def _check(args: ServeBench) -> None:
    """Before anything is measured: a result that can't be written would be lost."""
    if args.json is not None and args.json.is_dir():
        raise ServingError(f"--json names a file to write; {args.json} is a directory")
    for file in filter(None, (args.json, args.report and args.report / "report.html")):
        try:
            check_writable(nearest(file.parent) / file.name)
        except OSError as error:
            raise ServingError(f"results are written into a directory; {file.parent}: {error.strerror}") from None


def _write_json(args: ServeBench, results: dict[str, Any]) -> None:
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        write_results(args.json, results)


def _write_report(args: ServeBench, results: dict[str, Any]) -> None:
    if args.report is None:
        return
    from dflash.report.page import report_folder  # matplotlib takes a second that other commands need not wait

    args.report.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        kept = Path(folder) / "latest.json"
        write_results(kept, results)
        print(f"report: {report_folder(args.report, kept)}")
