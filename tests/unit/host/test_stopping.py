"""Signals to commands that run: one line, the exit code of the signal, and nothing that they started stays."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dflash import __main__, init_draft, load_target, write_draft
from dflash.host import stopping
from dflash.measuring.turns import attempt
from dflash.weights.tiny import write_tiny_target, write_tiny_tokenizer

ROOT = Path(__file__).parents[3]
# From the start of a process to here, and more than a busy machine needs.
PATIENCE_S = 300
CODES = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129}


def test_the_code_of_an_exit_is_that_of_its_signal(capsys, monkeypatch):
    monkeypatch.setattr(stopping, "ignore", lambda: None)
    for number, code in CODES.items():
        assert stopping.announce(stopping.Stopped(number)) == code
    assert stopping.announce(KeyboardInterrupt()) == 130
    assert capsys.readouterr().err == "dflash: interrupted\n" * 4


def test_a_block_that_unwinds_leaves_the_handlers_as_they_were():
    before = [signal.getsignal(number) for number in CODES]

    def stopped():
        with stopping.unwinding():
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(PATIENCE_S)

    with pytest.raises(stopping.Stopped) as stop:
        stopped()
    assert stop.value.number == signal.SIGTERM
    assert [signal.getsignal(number) for number in CODES] == before


def hands_on_another():
    """A signal within C: numpy's own look at a type makes a SystemError of what our handler raises."""
    try:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(PATIENCE_S)
    except stopping.Stopped as stop:
        raise SystemError("returned a result with an exception set") from stop


def swallows():
    with contextlib.suppress(stopping.Stopped):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(PATIENCE_S)
    return 0


@pytest.fixture
def heeding():
    before = {number: signal.getsignal(number) for number in CODES}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("command", [hands_on_another, swallows])
def test_a_command_is_stopped_whatever_became_of_the_signal(command, heeding, capsys, monkeypatch):
    monkeypatch.setattr("dflash.cli.main.main", command)
    assert __main__.main() == 143
    assert capsys.readouterr().err == "dflash: interrupted\n"
    assert stopping.deferred() is None


def test_a_case_does_not_fail_by_what_became_of_a_signal(heeding):
    with pytest.raises(stopping.Stopped), stopping.unwinding():
        attempt(hands_on_another)


def test_a_later_error_is_no_signal_s():
    with pytest.raises(stopping.Stopped), stopping.unwinding():
        hands_on_another()
    with pytest.raises(SystemError), stopping.unwinding():
        raise SystemError


# ---- whole commands


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    stops = {"vocab_size": 260, "eos_token_id": [1, *range(100, 107)]}
    return write_tiny_tokenizer(write_tiny_target(tmp_path_factory.mktemp("stopping") / "target", **stops))


@pytest.fixture
def start(tmp_path):
    """Starts a command in an empty folder."""

    started = []
    # What tells of a worker switches benchmarks off, also in a run of its own.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    # A shell's jobs in the background are born deaf; what a process has a handler for, its children hear.
    before = {number: signal.signal(number, lambda *_: None) for number in CODES}

    def start(*words):
        process = subprocess.Popen(
            [sys.executable, *map(str, words)],
            cwd=tmp_path,
            env=environment | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield start
    for number, handler in before.items():
        signal.signal(number, handler)
    for process in started:
        process.kill()
        process.communicate()


def wait_until(true, process):
    deadline = time.monotonic() + PATIENCE_S
    while not true():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def imports(process, name):
    """Whether a file of this name is mapped into a process: it imports, or has imported, what needs it."""
    return name in Path(f"/proc/{process.pid}/maps").read_text()


def ended(process, number):
    """What a process told after a signal, all but progress bars."""
    _, told = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == CODES[number], told
    assert "Traceback" not in told
    assert "Exception ignored" not in told
    return [line for line in told.replace("\r", "\n").splitlines() if line.strip() and "%|" not in line]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("library", ["_multiarray_umath", "libjax_common"])
def test_a_signal_while_it_imports(start, number, library):
    process = start("-m", "dflash", "doctor")
    wait_until(lambda: imports(process, library), process)
    process.send_signal(number)
    assert ended(process, number) == ["dflash: interrupted"]


@pytest.mark.slow
@pytest.mark.parametrize(("number", "times"), [(signal.SIGINT, 1), (signal.SIGINT, 3), (signal.SIGTERM, 2)])
def test_a_signal_while_it_builds_a_cache_keeps_what_is_there(start, target, tmp_path, number, times):
    words = ("-m", "dflash", "build-cache", "cache", "--target", target, "--num-conversations", 4000)
    words += ("--max-new-tokens", 24, "--max-user-turn", 40, "--batch-size", 4, "--target-layer-ids", 0, 2)
    process = start(*words)
    text = tmp_path / "cache.building" / "cache" / "conversations.jsonl"
    wait_until(lambda: text.is_file() and text.stat().st_size > 2000, process)
    for _ in range(times):
        process.send_signal(number)
    assert ended(process, number) == ["dflash: interrupted"]
    lines = text.read_bytes().splitlines()
    assert [json.loads(line)["batch"] for line in lines[:-1]] == list(range(len(lines) - 1))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_benchmark_that_is_stopped_writes_what_it_measured(start, target, tmp_path, number):
    """Of six workloads two are measured, and then it is stopped."""
    words = ("-m", "pytest", ROOT / "bench" / "test_decode.py", "-c", ROOT / "pytest.ini", "--rootdir", ROOT)
    draft = tmp_path / "draft"
    write_draft(init_draft(load_target(target), target_layer_ids=(0, 2), block_size=4), draft)
    words += (
        "--run-on",
        "cpu",
        f"--target={target}",
        f"--draft={draft}",
        "-k",
        "block and draft",
        "-p",
        "no:cacheprovider",
    )
    words += (
        "--max-new-tokens",
        "8,9,10,11,12,13",
        "--num-prompts",
        1,
        "--rounds",
        1,
        "--block-sizes",
        4,
        "--time-limit",
        0,
    )
    process = start(*words, "--benchmark-json", tmp_path / "x.json")
    journal = tmp_path / "x.cases.jsonl"
    # The second is measured once the first has been handed over.
    wait_until(lambda: journal.is_file() and journal.read_bytes().count(b"\n") == 2, process)
    process.send_signal(number)
    out, told = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == CODES[number], out + told
    assert "Traceback" not in out + told
    assert out.count("Stopped") == 1
    kept = json.loads((tmp_path / "x.json").read_text())["benchmarks"]
    assert kept[0]["extra_info"]["max_new_tokens"] == 8
    assert len(kept) < 6


# Sends the signal where jax looks at a type, within numpy: a SystemError with the signal's exception as its cause.
WITHIN_C = """
import os, sys
from jax._src.numpy import scalar_types
from dflash import __main__

look = scalar_types._ScalarMeta.__eq__


def stopped(self, other):
    if sys.argv[1:] and "building" in "".join(os.listdir(".")):
        os.kill(os.getpid(), NUMBER)
    return look(self, other)


scalar_types._ScalarMeta.__eq__ = stopped
sys.exit(__main__.main())
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", CODES)
def test_a_signal_within_c_is_no_traceback(start, target, tmp_path, number):
    words = ("-c", WITHIN_C.replace("NUMBER", str(int(number))), "build-cache", "cache", "--target", target)
    words += ("--num-conversations", 8, "--max-new-tokens", 8, "--batch-size", 4, "--target-layer-ids", 0, 2)
    assert ended(start(*words), number) == ["dflash: interrupted"]


# Sends the signal when pytest-benchmark knows of a benchmark of which there is no round yet.
BEFORE_A_ROUND = """
import os
from pytest_benchmark.fixture import BenchmarkFixture

make = BenchmarkFixture._make_stats


def stopped(self, *args, **kwargs):
    made = make(self, *args, **kwargs)
    os.kill(os.getpid(), NUMBER)
    return made


BenchmarkFixture._make_stats = stopped
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", CODES)
def test_a_signal_before_the_first_round_is_no_traceback(start, target, tmp_path, number):
    (tmp_path / "before_a_round.py").write_text(BEFORE_A_ROUND.replace("NUMBER", str(int(number))))
    draft = tmp_path / "draft"
    write_draft(init_draft(load_target(target), target_layer_ids=(0, 2), block_size=4), draft)
    words = ("-m", "pytest", ROOT / "bench" / "test_step.py", "-c", ROOT / "pytest.ini", "--rootdir", ROOT)
    words += ("-p", "before_a_round", "-p", "no:cacheprovider", "--run-on", "cpu", f"--target={target}")
    words += (f"--draft={draft}", "--block-sizes", 4)
    process = start(*words, "--rounds", 1, "--benchmark-json", tmp_path / "x.json")
    out, told = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == CODES[number], out + told
    assert "Traceback" not in out + told
    assert out.count("Stopped") == 1
    assert not (tmp_path / "x.json").exists()


# Sends the signal within a hook of pytest's, between the plugins that wrap it.
IN_A_HOOK = """
import os, pytest


@pytest.hookimpl(tryfirst=True)
def HOOK():
    os.kill(os.getpid(), NUMBER)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("hook", "number"),
    [
        ("pytest_runtest_makereport", signal.SIGINT),
        ("pytest_sessionfinish", signal.SIGTERM),
        ("pytest_terminal_summary", signal.SIGINT),
        ("pytest_unconfigure", signal.SIGHUP),
    ],
)
def test_a_signal_within_a_hook_of_pytest_is_no_traceback(start, tmp_path, hook, number):
    (tmp_path / "in_a_hook.py").write_text(IN_A_HOOK.replace("HOOK", hook).replace("NUMBER", str(int(number))))
    words = ("-m", "pytest", ROOT / "tests" / "unit" / "test_metrics.py", "-c", ROOT / "pytest.ini", "--rootdir", ROOT)
    process = start(*words, "-p", "in_a_hook", "-p", "no:cacheprovider", "-k", "pooled")
    out, told = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == CODES[number], out + told
    assert "Traceback" not in out + told
    assert out.count("Stopped") + told.count("dflash: interrupted") == 1
