"""`python -m dflash serve-bench`: a server without a draft and with one, over HTTP."""

import dataclasses
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import tyro

from dflash.cli.template import TemplateOptions
from dflash.config import Count, Positive
from dflash.measuring.gate import Floors
from dflash.measuring.result import Results
from dflash.report.sections import render, speedup_section
from dflash.serving.connection import ServingError
from dflash.serving.deployment import deployment
from dflash.serving.options import ServerOptions
from dflash.serving.results import results_of, write_results
from dflash.serving.run import served_run
from dflash.text.prompts import ids_sha256, load_prompts


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ServeBench(ServerOptions):
    """What `serve-bench` takes."""

    prompts: str = "builtin"
    """builtin[:category], a set by name (gsm8k, mt-bench ...), FILE.jsonl or hf:NAME."""
    data_dir: str = ""
    """Directory of named sets: gsm8k.jsonl, .json or .parquet, as they are published."""
    prompt_template: str = ""
    """What to ask about a row of hf:NAME: "{question} Explain."."""
    raw: bool = False
    """Prompts are plain text to be continued, without a chat template, as for a base model."""
    template: tyro.conf.OmitArgPrefixes[TemplateOptions] = dataclasses.field(default_factory=TemplateOptions)
    num_prompts: Count = 8
    """Prompts of a round."""
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
    _check(args)
    servers = deployment(args)
    tokenizer = args.template.open(args.target)
    prompt_set = load_prompts(args.prompts, data_dir=args.data_dir, prompt_template=args.prompt_template, raw=args.raw)
    prompts = prompt_set.take(args.num_prompts).encode(tokenizer)
    with served_run(
        servers,
        tokenizer,
        prompts,
        max_new_tokens=args.max_new_tokens,
        concurrency=args.concurrency,
        rounds=args.rounds,
    ) as run:
        run.measure(args.rounds)
    case = run.result({"prompts": args.prompts, "prompts_sha256": ids_sha256(prompts)} | tokenizer.facts)
    print("\n".join(render(speedup_section(Results(measured=[case])))))
    _write(args, results_of(case, run.seconds, ["dflash", *sys.argv[1:]]))
    if sentences := run.failures(case, Floors(speedup_x=args.min_speedup), args.rounds):
        print("; ".join(sentences), file=sys.stderr)
        sys.exit(1)


def _check(args: ServeBench) -> None:
    """Before anything is measured: a result that can't be written would be lost."""
    if args.json is not None and args.json.is_dir():
        raise ServingError(f"--json names a file to write; {args.json} is a directory")
    for directory in filter(None, (args.json and args.json.parent, args.report)):
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ServingError(f"results are written into a directory; {directory}: {error.strerror}") from None


def _write(args: ServeBench, results: dict[str, Any]) -> None:
    if args.json is not None:
        write_results(args.json, results)
        print(f"every figure: {args.json}")
    if args.report is not None:
        from dflash.report.page import report_folder  # matplotlib takes a second that other commands need not wait

        with tempfile.TemporaryDirectory() as folder:
            kept = Path(folder) / "latest.json"
            write_results(kept, results)
            print(f"report: {report_folder(args.report, kept)}")
