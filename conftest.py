"""The harness: markers by folder, which device a run may open, baselines and the summary at its end."""

import os
from collections.abc import Generator
from pathlib import Path
from typing import Any

import jax
import pytest

from dflash import baselines
from dflash.device import DeviceError, looks_like_tpu_host, open_device
from dflash.metrics import finite
from dflash.options import add_options
from dflash.provenance import compile_cache, provenance
from dflash.report.run import ReportError
from dflash.report.summary import Results
from dflash.weights import smollm2 as smollm2_snapshot

ROOT = Path(__file__).parent


RESULTS = pytest.StashKey[Results]()
_ONE_PROCESS = "a TPU belongs to one process, and -n asks for several workers: add -n 0"


def pytest_addoption(parser: pytest.Parser) -> None:
    add_options(parser, ROOT)


def _tpu_selected(config: pytest.Config) -> bool:
    expression = config.option.markexpr
    return "tpu" in expression and "not tpu" not in expression


def pytest_configure(config: pytest.Config) -> None:
    config.stash[RESULTS] = Results(compile_cache=compile_cache())
    _place_report(config)
    _refuse_workers(config)
    if config.option.resume and getattr(config.option, "benchmark_json", None) is None:
        raise pytest.UsageError("--resume continues what --benchmark-json FILE or --report DIR began: name the same")
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
    told = [*output_json["benchmarks"], *({"extra_info": info} for info in results.failed)]
    said = {"gate": results.gate.figures(), "audits": results.audits, "failed": results.failed}
    output_json["dflash"] = provenance(told, list(map(str, command)), results.compile_cache) | said
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


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> Generator[None, Any, Any]:
    """The verdicts are found before pytest-benchmark, in a wrapper of its own, writes the file that holds them."""
    _hold_to_baselines(session)
    return (yield)


def _hold_to_baselines(session: pytest.Session) -> None:
    """Holds what was measured to the baselines: a regression is exit code 1, though every test passed."""
    config, options = session.config, session.config.option
    if options.collectonly or hasattr(config, "workerinput"):
        return
    results = config.stash[RESULTS]
    results.gate = baselines.close_run(
        results.cases,
        Path(options.baselines),
        update=options.update_baselines,
        require=options.require_baseline,
        tolerance=options.tolerance,
    )
    if results.gate.failed and session.exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    results = config.stash[RESULTS]
    for title, lines in results.sections():
        terminalreporter.section(f"DFlash: {title}")
        for line in lines:
            terminalreporter.write_line(line)
    if results.saved:
        terminalreporter.write_line(f"every figure: {config.option.benchmark_json}")
        if config.option.report:
            terminalreporter.write_line(_write_report(config))


def _write_report(config: pytest.Config) -> str:
    """Writes the report; the line that says where it is, or why there is none."""
    from dflash.report.page import report_folder  # matplotlib takes a second that other runs need not wait

    try:
        return f"report: {report_folder(Path(config.option.report), Path(config.option.benchmark_json))}"
    except ReportError as error:
        return f"no report: {error}"


@pytest.fixture
def results(pytestconfig: pytest.Config) -> Results:
    """What this run measured so far; benchmarks add what they measure, for the summary."""
    return pytestconfig.stash[RESULTS]
