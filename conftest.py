"""The harness: markers by folder, which device a run may open, baselines, and the summary at the end."""

import contextlib
import os
from collections.abc import Generator
from pathlib import Path
from typing import Any

from dflash.host import stopping

stopping.leave_at_once()  # the imports take seconds

# isort: split
import jax
import pytest

from dflash.cli.pytest_options import add_options, all_options, apply_protocol, check_lengths, check_template
from dflash.host.device import DeviceError, check_width, default_dtype, looks_like_tpu_host, open_device
from dflash.host.disk import check_writable, claim, is_device
from dflash.host.provenance import check_words, compile_cache, provenance
from dflash.measuring import baselines
from dflash.measuring.gate import closing_line
from dflash.measuring.repeat import again, with_spread
from dflash.measuring.result import Decode, ResultError, Results, to_json
from dflash.metrics import finite
from dflash.report.sections import MEASURED, render
from dflash.weights import smollm2 as smollm2_snapshot

ROOT = Path(__file__).parent


RESULTS = pytest.StashKey[Results]()
# Speed-ups by case of the other runs of --repeat.
REPEATS = pytest.StashKey[list[dict[str, float]]]()
GATE = pytest.StashKey[baselines.Gate]()
COMPILE_CACHE = pytest.StashKey[str]()
SAVED = pytest.StashKey[bool]()
# Why tests that need a device are skipped.
NO_DEVICE = pytest.StashKey[str]()
_ONE_PROCESS = "a TPU belongs to one process, and -n asks for several workers: add -n 0"
_ONE_AT_A_TIME = "benchmarks that run beside each other measure each other, and -n asks for several workers: add -n 0"


def pytest_addoption(parser: pytest.Parser) -> None:
    add_options(parser, ROOT)


def _tpu_selected(config: pytest.Config) -> bool:
    expression = config.option.markexpr
    return "tpu" in expression and "not tpu" not in expression


def _measures(config: pytest.Config) -> bool:
    """Whether this process answers for what is measured: tests are run, not only listed, and it is no worker of -n."""
    return not config.option.collectonly and not hasattr(config, "workerinput")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(_Stops())
    config.stash[RESULTS] = Results()
    config.stash[COMPILE_CACHE] = compile_cache()
    try:
        check_width()
    except DeviceError as error:
        raise pytest.UsageError(str(error)) from None
    named = (os.environ.get(option.env, "") for option in all_options(ROOT))
    check_words([*map(str, config.invocation_params.args), *named], pytest.UsageError)
    if config.option.help:
        return  # pytest reads no further: defaults are still text, and nothing will run
    apply_protocol(config.option)
    check_lengths(config.option)
    check_template(config.option)
    _place_report(config)
    _check_results_file(config)
    _check_baselines(config)
    _refuse_workers(config)
    if config.option.resume and getattr(config.option, "benchmark_json", None) is None:
        raise pytest.UsageError("--resume continues what --benchmark-json FILE or --report DIR began: name the same")
    config.option.dtype = config.option.dtype or default_dtype(config.option.run_on)
    # Named before anything opens a backend.
    if config.option.run_on == "cpu":
        jax.config.update("jax_platforms", "cpu")
    elif config.option.run_on == "gpu":
        jax.config.update("jax_platforms", "cuda,cpu")
    elif not looks_like_tpu_host():
        jax.config.update("jax_platforms", os.environ.get("JAX_PLATFORMS") or "cpu")


def _place_report(config: pytest.Config) -> None:
    """A report is made from the benchmark file, so there must be one: beside the report, unless the user says where."""
    if not config.option.report or not _measures(config):
        return
    directory = Path(config.option.report)
    _check_directory("--report", directory)
    if getattr(config.option, "benchmark_json", None) is None:
        config.option.benchmark_json = directory / "latest.json"


def _check_directory(option: str, directory: Path) -> None:
    """Makes a directory into which an option writes. Raises UsageError where nothing can be written."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        check_writable(directory / "probe")
    except OSError as error:
        raise pytest.UsageError(f"{option} names a directory to write into; {directory}: {error.strerror}") from None


def _check_baselines(config: pytest.Config) -> None:
    """Before anything is measured, as for results."""
    if config.option.update_baselines and _measures(config):
        _check_directory("--baselines", Path(config.option.baselines))


def _check_results_file(config: pytest.Config) -> None:
    """Before anything is measured: results that can't be written would be lost."""
    json_file = getattr(config.option, "benchmark_json", None)
    if json_file is None or not _measures(config):
        return
    folder = json_file.parent
    if json_file.is_dir():
        fault = f"{json_file} is a directory"
    elif is_device(json_file):
        fault = f"{json_file} is a device, and a run keeps a journal beside its results"
    elif not folder.is_dir():
        fault = f"{folder} is {'no directory' if folder.exists() else 'not there'}"
    elif not os.access(json_file if json_file.exists() else folder, os.W_OK):
        fault = f"{json_file} may not be written"
    else:
        _claim_results_file(config, json_file)
        return
    raise pytest.UsageError(f"--benchmark-json names a file to write, in a directory that is there; {fault}")


def _claim_results_file(config: pytest.Config, json_file: Path) -> None:
    """Keeps other runs from the file, its journal and its report while it runs: the last would overwrite the others.

    Raises UsageError where another run has it.
    """
    try:
        lock = claim(json_file)
    except OSError as error:
        raise pytest.UsageError(f"--benchmark-json names a file; {json_file.parent}: {error.strerror}") from None
    if lock is None:
        raise pytest.UsageError(
            f"results of one run go into one file, and another run writes {json_file}: wait until it ends, or name "
            "another one"
        )
    config.add_cleanup(lock.release)


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_json(config: pytest.Config, output_json: dict[str, Any]) -> None:
    """Adds where the file comes from, and writes null for NaN, which is not JSON."""
    results, command = config.stash[RESULTS], ["pytest", *config.invocation_params.args]
    benchmarks = [*output_json["benchmarks"], *({"extra_info": to_json(case)} for case in results.failed)]
    origin = provenance(benchmarks, list(map(str, command)), config.stash[COMPILE_CACHE])
    output_json["dflash"] = origin | results.checks()
    known = [case for case in results.decodes if case.between_runs is not None]
    spreads = {case.case: {"between_runs": case.between_runs, "runs": case.runs} for case in known}
    for benchmark in output_json["benchmarks"]:
        benchmark["extra_info"].update(spreads.get(benchmark["extra_info"].get("case"), {}))
    output_json.update(finite(output_json))
    config.stash[SAVED] = True


def _refuse_workers(config: pytest.Config) -> None:
    """pytest-benchmark silently writes no file under xdist; and a TPU belongs to one process."""
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
    # Without a path both folders of pytest.ini are named, whatever -m leaves of them: the tests themselves refuse then.
    named = config.args if config.args_source is pytest.Config.ArgsSource.ARGS else []
    if any((ROOT / "bench") in (path := Path(word.split("::")[0]).resolve(), *path.parents) for word in named):
        raise pytest.UsageError(_ONE_AT_A_TIME)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Workers get whole files: what the tests of a file load and compile is made once."""
    from xdist.scheduler import LoadFileScheduling

    return LoadFileScheduling(config, log) if config.option.dist == "load" else None


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        path = item.path.relative_to(ROOT).parts if item.path.is_relative_to(ROOT) else ()
        if path[:2] == ("tests", "unit"):
            if not item.get_closest_marker("slow"):
                item.add_marker("cpu")
        elif path[:2] == ("tests", "tpu"):
            item.add_marker("tpu")
        elif path[:2] == ("tests", "aot"):
            item.add_marker("aot")
        elif path[:1] == ("bench",):
            item.add_marker("bench")
            item.add_marker(config.option.run_on)


def pytest_collection_finish(session: pytest.Session) -> None:
    config = session.config
    _repeat(session)
    if not any(item.get_closest_marker(m) for item in session.items for m in ("tpu", "bench")):
        jax.config.update("jax_platforms", "cpu")  # nothing here needs an accelerator: leave it to others
    kind = config.option.require_device
    if kind and _measures(config):
        try:
            open_device(kind)
        except DeviceError as error:
            raise pytest.UsageError(f"--require-device {kind}: {error}") from None


def _repeat(session: pytest.Session) -> None:
    """Measures the decoding cases in processes of their own, as long as this one holds no device."""
    config, option = session.config, session.config.option
    tests = [
        f"{config.rootpath}/{item.nodeid}" for item in session.items if "case" in getattr(item, "fixturenames", ())
    ]
    if option.repeat < 2 or not tests or not _measures(config):
        return
    try:
        config.stash[REPEATS] = again(
            list(map(str, config.invocation_params.args)), config.args, tests, option.repeat - 1
        )
    except ResultError as error:
        raise pytest.UsageError(f"--repeat {option.repeat}: {error}") from None


def _with_spreads(config: pytest.Config) -> None:
    """The cases know what changes between runs: from other runs of this one, else from their baselines."""
    results = config.stash[RESULTS]
    held = None
    if results.decodes:
        with contextlib.suppress(baselines.BaselineError):  # reported when the cases are compared
            held = baselines.read_baselines(Path(config.option.baselines), str(results.decodes[0].device_kind))
    runs = config.stash.get(REPEATS, [])
    results.measured = [
        baselines.with_held_spread(with_spread(case, runs), held) if isinstance(case, Decode) else case
        for case in results.measured
    ]


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
        pytestconfig.stash[NO_DEVICE] = str(error)
        pytest.skip(str(error))


def _extras_required() -> bool:
    """.ci/run sets it once it has installed them. `CI` alone does not count: a user's runner need not have torch."""
    return bool(os.environ.get("DFLASH_REQUIRE_EXTRAS"))


def _smollm2_directory() -> Path:
    """The SmolLM2-135M snapshot. Only a run that must make every comparison fetches it; other tests use no network."""
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
    if item.get_closest_marker("bench") and hasattr(item.config, "workerinput"):
        pytest.fail(_ONE_AT_A_TIME, pytrace=False)
    if item.get_closest_marker("model"):
        _smollm2_directory()


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """With DFLASH_REQUIRE_EXTRAS no file is skipped as a whole, because the markers of its tests would be lost."""
    report = yield
    if report.skipped and _extras_required():
        report.outcome = "failed"
        report.longrepr = f"{collector.nodeid} was skipped, and DFLASH_REQUIRE_EXTRAS is set: {report.longrepr}"
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Failed tests are named in the results. With DFLASH_REQUIRE_EXTRAS a comparison that could not be made fails."""
    outcome = yield
    if outcome.failed and item.nodeid not in item.config.stash[RESULTS].failed_tests:
        item.config.stash[RESULTS].failed_tests.append(item.nodeid)
    if outcome.skipped and call.excinfo and str(call.excinfo.value) == item.config.stash.get(NO_DEVICE, None):
        # From one place, so that the summary says it once, with their number. pytest's summary allows a place without a
        # line; its annotation does not.
        outcome.longrepr = (str(Path(__file__)), None, f"Skipped: {call.excinfo.value}")  # type: ignore[assignment]
    marked = any(item.get_closest_marker(name) for name in ("oracle", "model", "browser", "aot"))
    if outcome.skipped and marked and _extras_required() and not hasattr(outcome, "wasxfail"):
        outcome.outcome = "failed"
        outcome.longrepr = f"{item.nodeid} was skipped, and DFLASH_REQUIRE_EXTRAS is set: {outcome.longrepr}"
    return outcome


class _Stops:
    """What a signal does to a session: pytest says so in a line, and what was measured is written."""

    def __init__(self) -> None:
        self.code: int | None = None
        self._heeding = contextlib.ExitStack()

    def pytest_sessionstart(self, session: pytest.Session) -> None:
        self._session = session
        self._heeding.enter_context(stopping.unwinding())

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_makereport(self) -> None:
        stopping.insist()  # before a test is said to have failed by what became of a signal

    def pytest_runtest_logfinish(self) -> None:
        stopping.insist()

    def pytest_keyboard_interrupt(self, excinfo: pytest.ExceptionInfo[BaseException]) -> None:
        # pytest's own reasons to end come here too.
        if isinstance(excinfo.value, stopping.Stopped):
            stopping.ignore()
            self.code = stopping.exit_code(excinfo.value)

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> Generator[None, Any, Any]:
        if self.code is None:
            stopping.defer()
        else:
            _drop_unmeasured(session.config)
        done = yield
        session.exitstatus = session.exitstatus if self.code is None else self.code
        return done

    @pytest.hookimpl(trylast=True)
    def pytest_unconfigure(self) -> None:
        if self.code is None and (code := stopping.deferred()) is not None:
            self._session.exitstatus = code
        self._heeding.close()


def _drop_unmeasured(config: pytest.Config) -> None:
    """A benchmark that was stopped within its first round: pytest-benchmark would take statistics of nothing."""
    session: Any = getattr(config, "_benchmarksession", None)  # not there with -p no:benchmark
    if session is not None:
        session.benchmarks = [benchmark for benchmark in session.benchmarks if benchmark.stats.data]


def pytest_report_header(config: pytest.Config) -> str:
    return (
        f"dflash: jax {jax.__version__}, device {config.option.run_on} (not opened yet), target {config.option.target}"
    )


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> Generator[None, Any, Any]:
    """Judges the cases before pytest-benchmark, in its own wrapper, writes the file with the verdicts."""
    _hold_to_baselines(session)
    return (yield)


def _hold_to_baselines(session: pytest.Session) -> None:
    """Compares the measured cases with the baselines: a regression exits 1 even if every test passed."""
    config, options = session.config, session.config.option
    if not _measures(config):
        return
    _with_spreads(config)
    results = config.stash[RESULTS]
    failed = session.testsfailed if options.update_baselines else 0
    if failed:
        gate = baselines.Gate(lines=[f"--update-baselines: nothing is written, since {failed} tests failed"])
    else:
        gate = baselines.close_run(
            results.decodes,
            Path(options.baselines),
            update=options.update_baselines,
            require=options.require_baseline,
            tolerance=options.tolerance,
        )
    config.stash[GATE], results.gate = gate, gate.result
    if gate.failed and session.exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> Generator[None, None, None]:
    """Our tables, and then pytest's own summary, in which what a benchmark says of its failure stands whole."""
    results, verbosity = config.stash[RESULTS], config.option.verbose
    texts = {section.title: render(section) for section in (make(results) for make in MEASURED)}
    texts["Baselines"] = config.stash.get(GATE, baselines.Gate()).lines
    for title, lines in texts.items():
        if lines:
            terminalreporter.section(f"DFlash: {title[0].lower()}{title[1:]}")
        for line in lines:
            terminalreporter.write_line(line)
    if results.decodes or results.failed:
        config.option.verbose = max(2, verbosity)  # below that pytest cuts it at the terminal's width
    try:
        return (yield)
    finally:
        config.option.verbose = verbosity


@pytest.hookimpl(trylast=True)
def pytest_unconfigure(config: pytest.Config) -> None:
    """The last line of all: what the run comes to."""
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    if reporter is None or hasattr(config, "workerinput") or RESULTS not in config.stash:
        return
    results = config.stash[RESULTS]
    parts = list(filter(None, [closing_line(results.decodes), *_places(config)]))
    failed = sum(len(reporter.stats.get(kind, [])) for kind in ("failed", "error"))
    if parts:
        reporter.write_line("DFlash: " + "; ".join([*parts, *([f"{failed} tests FAILED"] if failed else [])]))


def _places(config: pytest.Config) -> list[str]:
    """Where the figures of a run are: its file, or the one that --benchmark-autosave numbered, and its report."""
    option = config.option
    if not config.stash.get(SAVED, False):
        return []
    file = option.benchmark_json
    if file is None:
        file = max(config._benchmarksession.storage.query(), default=None)  # type: ignore[attr-defined]
    return [f"figures: {file}", *([_write_report(config)] if option.report else [])]


def _write_report(config: pytest.Config) -> str:
    """Writes the report; returns the line that says where it is, or why there is none."""
    from dflash.report.page import report_folder  # matplotlib takes a second that other runs need not spend

    try:
        return f"report: {report_folder(Path(config.option.report), Path(config.option.benchmark_json))}"
    except ResultError as error:
        return f"no report: {error}"


@pytest.fixture
def results(pytestconfig: pytest.Config) -> Results:
    """What this run has measured so far; benchmarks add their results for the summary."""
    return pytestconfig.stash[RESULTS]
