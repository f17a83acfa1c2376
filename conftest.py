"""The harness: options, markers by folder, which device a run may open, and the summary at its end."""

import argparse
import dataclasses
import math
import os
from collections.abc import Generator
from pathlib import Path
from typing import Any

import jax
import pytest

from dflash import baselines, report
from dflash.cost_model import advice_line
from dflash.device import KINDS, DeviceError, looks_like_tpu_host, open_device
from dflash.gate import remark
from dflash.metrics import finite
from dflash.provenance import compile_cache, provenance
from dflash.report.run import ReportError
from dflash.weights import smollm2 as smollm2_snapshot
from dflash.weights.load import UNTRAINED

ROOT = Path(__file__).parent


@dataclasses.dataclass
class Results:
    """What bench tests measured, for the summary."""

    cases: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    steps: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    trainings: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    acceptances: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    compile_cache: str = "unknown"
    saved: bool = False
    gate: list[str] = dataclasses.field(default_factory=list)


RESULTS = pytest.StashKey[Results]()
_ONE_PROCESS = "a TPU belongs to one process, and -n asks for several workers: add -n 0"


def _integer(text: str, least: int) -> int:
    try:
        value = int(text)
    except ValueError:
        value = least - 1
    if value < least:
        raise argparse.ArgumentTypeError(f"expected an integer of at least {least}, got {text!r}")
    return value


def _count(text: str) -> int:
    return _integer(text, 1)


def _length(text: str) -> int:
    return _integer(text, 0)


def _counts(text: str) -> list[int]:
    return [_integer(v, 1) for v in text.split(",")]


def _block_sizes(text: str) -> list[int]:
    return [_integer(v, 2) for v in text.split(",")]


def _floor(text: str) -> float | None:
    if not text:
        return None
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text!r}")
    return value


def _fraction(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"expected a number from 0 to below 1, got {text!r}")
    return value


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"expected seconds, 0 or more, got {text!r}")
    return value


def _option(group: pytest.OptionGroup, name: str, env: str, default: str, text: str, **more: Any) -> None:
    """An option whose default comes from the environment; the help says which name."""
    value = os.environ.get(env) or default
    choices = more.get("choices")
    if choices and value not in choices:  # argparse checks what is typed, and takes a default as it is
        raise pytest.UsageError(f"{env} must be one of {', '.join(filter(None, choices))}, got {value!r}")
    group.addoption(name, default=value, help=f"{text} (env {env}; now {value!r})", **more)


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("dflash", "DFlash decoding and its measurement")
    _option(group, "--run-on", "DFLASH_RUN_ON", "tpu", "device that tests/tpu and bench run on", choices=KINDS)
    _option(
        group,
        "--require-device",
        "DFLASH_REQUIRE_DEVICE",
        "",
        "fail, instead of skipping, without this device",
        choices=("", *KINDS),
    )
    _option(
        group,
        "--target",
        "TEACHER_SNAPSHOT_DIR",
        "smollm2-135m",
        "target: a snapshot directory (write --target=DIR), or smollm2-135m",
        metavar="DIR",
    )
    _option(
        group,
        "--draft",
        "DRAFT_RUN_DIR",
        UNTRAINED,
        "draft: a DFlashDraftModel or run directory (write --draft=DIR), or untrained",
        metavar="DIR",
    )
    _option(
        group,
        "--teacher-cache",
        "CACHE_DIR",
        "",
        "teacher cache whose held-out prompts a draft is evaluated on, offline",
        metavar="DIR",
    )
    _option(
        group, "--draft-layers", "DFLASH_DRAFT_LAYERS", "2", "layers of the untrained draft", type=_count, metavar="N"
    )
    _option(group, "--dtype", "DFLASH_DTYPE", "float32", "dtype of computation", choices=("float32", "bfloat16"))
    _option(
        group,
        "--prompts",
        "DFLASH_PROMPTS",
        "builtin",
        "prompts: builtin[:category], humaneval, FILE.jsonl, hf:NAME, or random",
        metavar="SOURCE",
    )
    _option(group, "--num-prompts", "DFLASH_NUM_PROMPTS", "4", "prompts of a round", type=_count, metavar="N")
    _option(
        group,
        "--prompt-len",
        "DFLASH_PROMPT_LEN",
        "0",
        "exact prompt length in tokens; 0 leaves them",
        type=_length,
        metavar="N",
    )
    _option(group, "--batch-size", "DFLASH_BATCH_SIZE", "1", "prompts decoded together", type=_count, metavar="N")
    _option(
        group, "--block-sizes", "BLOCK_SIZES", "8", "block sizes, the anchor included", type=_block_sizes, metavar="N,N"
    )
    _option(group, "--max-new-tokens", "MAX_NEW_TOKENS_LIST", "64", "token budgets", type=_counts, metavar="N,N")
    _option(
        group,
        "--rounds",
        "DFLASH_ROUNDS",
        "5",
        "timed rounds of each case at least, after one of warm-up; under 3 give no interval",
        type=_count,
        metavar="N",
    )
    _option(
        group,
        "--precision",
        "DFLASH_PRECISION",
        "0.05",
        "add rounds until the interval is narrower than this fraction of the speed-up",
        type=_fraction,
        metavar="X",
    )
    _option(
        group,
        "--time-limit",
        "DFLASH_TIME_LIMIT",
        "20",
        "seconds that added rounds of a case may take; 0 adds none",
        type=_seconds,
        metavar="S",
    )
    _option(
        group,
        "--also-run-baseline",
        "ALSO_RUN_BASELINE",
        "1",
        "0 leaves greedy out: no speed-up, no proof",
        choices=("0", "1", "false", "true"),
    )
    _option(
        group,
        "--report",
        "DFLASH_REPORT",
        "",
        "write report.html and report.md into this directory; the runs kept there are its history",
        metavar="DIR",
    )
    _option(group, "--run-name", "RUN_NAME", "", "name kept in the results", metavar="NAME")
    _option(
        group,
        "--min-speedup",
        "DFLASH_MIN_SPEEDUP",
        "",
        "fail a draft's block cases under this",
        type=_floor,
        metavar="X",
    )
    _option(
        group,
        "--min-acceptance-length",
        "DFLASH_MIN_ACCEPTANCE_LENGTH",
        "",
        "fail a draft's cases under this",
        type=_floor,
        metavar="X",
    )
    _option(
        group,
        "--baselines",
        "DFLASH_BASELINES",
        str(ROOT / "bench" / "baselines"),
        "directory of baselines, a file per device kind, that cases are held to",
        metavar="DIR",
    )
    group.addoption("--update-baselines", action="store_true", help="write this run's cases as baselines instead")
    group.addoption(
        "--require-baseline", action="store_true", help="fail unless every case has a baseline and passes it"
    )
    _option(
        group,
        "--tolerance",
        "DFLASH_TOLERANCE",
        str(baselines.TOLERANCE),
        "fraction that --update-baselines puts between a figure and its floor, at least",
        type=_fraction,
        metavar="X",
    )


def _tpu_selected(config: pytest.Config) -> bool:
    expression = config.option.markexpr
    return "tpu" in expression and "not tpu" not in expression


def pytest_configure(config: pytest.Config) -> None:
    config.stash[RESULTS] = Results(compile_cache=compile_cache())
    _place_report(config)
    _refuse_workers(config)
    # Named before anything opens a backend.
    if config.option.run_on == "cpu":
        jax.config.update("jax_platforms", "cpu")
    elif config.option.run_on == "gpu":
        jax.config.update("jax_platforms", "cuda,cpu")
    elif not looks_like_tpu_host():
        jax.config.update("jax_platforms", os.environ.get("JAX_PLATFORMS") or "cpu")


def _place_report(config: pytest.Config) -> None:
    """A report is made of the benchmark file, so there must be one: beside the report, unless the user says where."""
    if not config.option.report or config.option.collectonly or hasattr(config, "workerinput"):
        return
    directory = Path(config.option.report)
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise pytest.UsageError(f"--report names a directory to write into; {directory}: {error.strerror}") from None
    if getattr(config.option, "benchmark_json", None) is None:
        config.option.benchmark_json = directory / "latest.json"


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_json(config: pytest.Config, output_json: dict[str, Any]) -> None:
    """What the file says of where it comes from; and null for NaN, which is no JSON."""
    results, command = config.stash[RESULTS], ["pytest", *config.invocation_params.args]
    output_json["dflash"] = provenance(output_json["benchmarks"], list(map(str, command)), results.compile_cache)
    output_json.update(finite(output_json))
    results.saved = True


def _refuse_workers(config: pytest.Config) -> None:
    """pytest-benchmark writes no file under xdist and says nothing; and a TPU belongs to one process."""
    workers = getattr(config.option, "numprocesses", None)
    json_file = getattr(config.option, "benchmark_json", None)
    if not workers or hasattr(config, "workerinput"):
        return
    if json_file is not None:
        raise pytest.UsageError(
            f"--benchmark-json and --report write nothing when tests run in {workers} workers: add -n 0"
        )
    if _tpu_selected(config) and config.option.run_on == "tpu":
        raise pytest.UsageError(_ONE_PROCESS)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        path = item.path.relative_to(ROOT).parts if item.path.is_relative_to(ROOT) else ()
        if path[:2] == ("tests", "unit"):
            if not item.get_closest_marker("slow"):
                item.add_marker("cpu")
        elif path[:2] == ("tests", "tpu"):
            item.add_marker("tpu")
        elif path[:1] == ("bench",):
            item.add_marker("bench")
            item.add_marker(config.option.run_on)


def pytest_collection_finish(session: pytest.Session) -> None:
    config = session.config
    if not any(item.get_closest_marker(m) for item in session.items for m in ("tpu", "bench")):
        jax.config.update("jax_platforms", "cpu")  # nothing here needs an accelerator: leave it to others
    kind = config.option.require_device
    if kind and not config.option.collectonly and not hasattr(config, "workerinput"):
        try:
            open_device(kind)
        except DeviceError as error:
            raise pytest.UsageError(f"--require-device {kind}: {error}") from None


@pytest.fixture(scope="session")
def device(pytestconfig: pytest.Config) -> jax.Device:
    """The device that --run-on names. Without one the test is skipped, which --require-device turns into an error."""
    kind = pytestconfig.option.run_on
    if kind == "tpu" and hasattr(pytestconfig, "workerinput") and looks_like_tpu_host():
        pytest.fail(_ONE_PROCESS, pytrace=False)
    try:
        return open_device(kind)
    except DeviceError as error:
        if pytestconfig.option.require_device:
            pytest.fail(f"--require-device {pytestconfig.option.require_device}: {error}", pytrace=False)
        pytest.skip(str(error))


def _extras_required() -> bool:
    """.ci/run says so once it has installed them. `CI` alone does not: a user's runner owes us no torch."""
    return bool(os.environ.get("DFLASH_REQUIRE_EXTRAS"))


def _smollm2_directory() -> Path:
    """The SmolLM2-135M snapshot. Only a run that must make every comparison fetches it: other tests use no network."""
    directory = smollm2_snapshot.find_snapshot()
    if directory is None and _extras_required():
        directory = smollm2_snapshot.snapshot_dir()
    if directory is None:
        folder = smollm2_snapshot.default_cache_dir()
        pytest.skip(f"no SmolLM2-135M in {folder} yet: `python -m dflash generate hello` fetches it")
    return directory


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The snapshot directory of SmolLM2-135M, for tests marked `model`."""
    return _smollm2_directory()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Before any fixture: a test marked `model` has its model, or does not run."""
    if item.get_closest_marker("model"):
        _smollm2_directory()


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """With DFLASH_REQUIRE_EXTRAS no file is skipped whole: what its tests are marked can't be seen any more."""
    report = yield
    if report.skipped and _extras_required():
        report.outcome = "failed"
        report.longrepr = f"{collector.nodeid} was skipped, and DFLASH_REQUIRE_EXTRAS is set: {report.longrepr}"
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """With DFLASH_REQUIRE_EXTRAS a comparison that could not be made fails: green must mean that it was made."""
    outcome = yield
    marked = any(item.get_closest_marker(name) for name in ("oracle", "model", "browser"))
    if outcome.skipped and marked and _extras_required() and not hasattr(outcome, "wasxfail"):
        outcome.outcome = "failed"
        outcome.longrepr = f"{item.nodeid} was skipped, and DFLASH_REQUIRE_EXTRAS is set: {outcome.longrepr}"
    return outcome


def pytest_report_header(config: pytest.Config) -> str:
    return (
        f"dflash: jax {jax.__version__}, device {config.option.run_on} (not opened yet), target {config.option.target}"
    )


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Holds what was measured to the baselines: a regression is exit code 1, though every test passed."""
    config, options = session.config, session.config.option
    if options.collectonly or hasattr(config, "workerinput"):
        return
    results = config.stash[RESULTS]
    results.gate, failed = baselines.close_run(
        results.cases,
        Path(options.baselines),
        update=options.update_baselines,
        require=options.require_baseline,
        tolerance=options.tolerance,
    )
    if failed and session.exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    results = config.stash[RESULTS]
    if results.steps:
        terminalreporter.section("DFlash: what a step costs")
        for info in results.steps:
            for line in report.step_table(info):
                terminalreporter.write_line(line)
    if results.trainings:
        terminalreporter.section("DFlash: what training a draft costs")
        for info in results.trainings:
            for line in report.training_lines(info):
                terminalreporter.write_line(line)
    if results.acceptances:
        terminalreporter.section("DFlash: what the target accepts of the draft")
        for info in results.acceptances:
            for line in report.category_table(info):
                terminalreporter.write_line(line)
    if results.cases:
        terminalreporter.section("DFlash: speed-up over greedy decoding")
        for line in report.speedup_table(results.cases):
            terminalreporter.write_line(line)
        for info in results.cases:
            if (said := remark(info)) is not None:
                terminalreporter.write_line(f"{info['case']}: {said}")
            if info.get("scripted") is None and (told := advice_line(info)) is not None:
                terminalreporter.write_line(told)
        json_file = getattr(config.option, "benchmark_json", None)
        if json_file is not None:
            terminalreporter.write_line(f"every figure: {json_file}")
    if results.gate:
        terminalreporter.section("DFlash: baselines")
        for line in results.gate:
            terminalreporter.write_line(line)
    if results.saved and config.option.report:
        terminalreporter.write_line(_write_report(config))


def _write_report(config: pytest.Config) -> str:
    """Writes the report; the line that says where it is, or why there is none."""
    from dflash.report.page import report_folder  # matplotlib takes a second that other runs need not wait

    try:
        return f"report: {report_folder(Path(config.option.report), Path(config.option.benchmark_json))}"
    except ReportError as error:
        return f"no report: {error}"


@pytest.fixture
def record_case(pytestconfig: pytest.Config) -> Any:
    """Keeps a case for the summary."""
    return pytestconfig.stash[RESULTS].cases.append


@pytest.fixture
def record_step(pytestconfig: pytest.Config) -> Any:
    """Keeps the terms of a step for the summary."""
    return pytestconfig.stash[RESULTS].steps.append


@pytest.fixture
def record_training(pytestconfig: pytest.Config) -> Any:
    """Keeps what training costs for the summary."""
    return pytestconfig.stash[RESULTS].trainings.append


@pytest.fixture
def record_acceptance(pytestconfig: pytest.Config) -> Any:
    """Keeps the acceptance of each category of prompts for the summary."""
    return pytestconfig.stash[RESULTS].acceptances.append
