"""`python -m dflash serve-bench`: a server without a draft and with one, over HTTP."""

import dataclasses
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Literal

import tyro

from dflash.gate import Floors, failures, remark
from dflash.prompts import load_prompts
from dflash.report.text import speedup_table
from dflash.serving.plan import Request, make_plan
from dflash.serving.results import case_facts, results_of, write_results
from dflash.serving.run import served_run
from dflash.serving.server import ServingError
from dflash.tokenizer import load_tokenizer


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ServeBench:
    """What `serve-bench` takes."""

    server: Literal["sglang-jax", "sglang", "vllm", "transformers", "openai"] = "openai"
    """Kind of server; `openai` is one of unknown kind, at --base-url."""
    target: str = "smollm2-135m"
    """Snapshot directory of the target, which is served; its tokenizer is used here."""
    draft: str = ""
    """DFlashDraftModel directory; without one the target alone is measured, smollm2-135m too: no server can read the
    draft that comes with it."""
    block_size: int | None = None
    """Block size, the anchor included; by default the draft's own."""
    server_python: str = sys.executable
    """Python interpreter that has the server; by default this one."""
    server_args: str = ""
    """Words added to the command line of both servers, as in a shell."""
    draft_server_args: str = ""
    """Words added to that of the server with the draft."""
    base_url: str = ""
    """A server without a draft that runs already, instead of one started here."""
    draft_base_url: str = ""
    """The same of a server with the draft."""
    served_model: str = ""
    """Name of the model in requests; by default what is served."""
    key_variable: str = ""
    """Variable of the environment that holds the key of --base-url and --draft-base-url."""
    prompts: str = "builtin"
    """builtin[:category], humaneval, FILE.jsonl or hf:NAME."""
    num_prompts: int = 8
    """Prompts of a round."""
    max_new_tokens: int = 128
    """Token budget."""
    concurrency: int = 1
    """Requests at a time."""
    rounds: int = 5
    """Timed rounds, after one of warm-up; under 3 give no interval."""
    ready_timeout: float = 900.0
    """Seconds until a server must be ready."""
    request_timeout: float = 900.0
    """Seconds that a server may be silent."""
    log_dir: Path = Path("server-logs")
    """Directory of the logs, target.log and draft.log."""
    json: Path | None = None
    """File to write, as --benchmark-json of pytest writes it."""
    report: Path | None = None
    """Directory that report.html and report.md go into; the runs kept there are its history."""
    min_speedup: float | None = None
    """Exit code 1 under this."""


def serve_bench(args: Annotated[ServeBench, tyro.conf.arg(name="")]) -> None:
    """Measure a server without a draft and with one; exit code 1 when texts differ or --min-speedup is missed."""
    names = ("num_prompts", "max_new_tokens", "concurrency", "rounds")
    low = [f"--{name.replace('_', '-')} {getattr(args, name)}" for name in names if getattr(args, name) < 1]
    if low:
        raise ServingError(f"a run needs at least 1 of each, got {', '.join(low)}")
    _make_directories(args)
    plan = make_plan(_request(args))
    tokenizer = load_tokenizer(args.target)
    prompt_set = load_prompts(args.prompts).take(args.num_prompts)
    with served_run(
        plan,
        tokenizer,
        prompt_set.encode(tokenizer),
        max_new_tokens=args.max_new_tokens,
        concurrency=args.concurrency,
        rounds=args.rounds,
    ) as run:
        for _ in range(args.rounds):
            run.baseline_round()
            run.round()
    info = run.info()
    info |= case_facts(plan, info) | {"prompts": args.prompts, "prompts_sha256": prompt_set.sha256}
    for line in speedup_table([info]):
        print(line)
    if (doubted := remark(info)) is not None:
        print(f"{info['case']}: {doubted}")
    if info["acceptance_unknown"] and plan.no_draft is None:
        print(f"acceptance is unknown: {info['acceptance_unknown']}")
    _write(args, results_of(info, run.seconds, ["dflash", *sys.argv[1:]]))
    said = failures(info, Floors(speedup_x=args.min_speedup)) if plan.no_draft is None or args.min_speedup else []
    if said:
        print("; ".join(said), file=sys.stderr)
        sys.exit(1)


def _make_directories(args: ServeBench) -> None:
    """Before anything is measured: a result that can't be written would be lost."""
    if args.json is not None and args.json.is_dir():
        raise ServingError(f"--json names a file to write; {args.json} is a directory")
    for directory in filter(None, (args.json and args.json.parent, args.report)):
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ServingError(f"results are written into a directory; {directory}: {error.strerror}") from None


def _request(args: ServeBench) -> Request:
    return Request(
        server=args.server,
        target=args.target,
        draft=args.draft,
        block_size=args.block_size,
        python=args.server_python,
        arguments=args.server_args,
        draft_arguments=args.draft_server_args,
        base_url=args.base_url,
        draft_base_url=args.draft_base_url,
        served_model=args.served_model,
        key_variable=args.key_variable,
        ready_timeout_s=args.ready_timeout,
        request_timeout_s=args.request_timeout,
        log_dir=args.log_dir,
    )


def _write(args: ServeBench, results: dict) -> None:
    if args.json is not None:
        write_results(args.json, results)
        print(f"every figure: {args.json}")
    if args.report is not None:
        from dflash.report.page import report_folder  # matplotlib takes a second that other commands need not wait

        with tempfile.TemporaryDirectory() as folder:
            kept = Path(folder) / "latest.json"
            write_results(kept, results)
            print(f"report: {report_folder(args.report, kept)}")
