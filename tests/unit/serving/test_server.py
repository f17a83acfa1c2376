"""A server's process: it is waited for, always ended with its children, and what it says when it fails is shown."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dflash.serving import server as module
from dflash.serving.connection import ServingError
from dflash.serving.server import free_port, started

STUB = Path(__file__).parents[1] / "stub_server.py"


def alive(pid):
    """Whether a process runs; one that ended and was not waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def ends(pid, seconds=120.0):
    deadline = time.monotonic() + seconds
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not alive(pid)


@pytest.fixture
def start(tmp_path):
    """A stub in a process of its own, with a child; leaves the child's id in child.txt."""

    def start(command=None, timeout_s=120, **settings):
        port = free_port()
        given = json.dumps({"child": str(tmp_path / "child.txt")} | settings)
        command = command or [sys.executable, str(STUB), given, "--host", "127.0.0.1", "--port", str(port)]
        url = f"http://127.0.0.1:{port}"
        return started(command, url, log=tmp_path / "logs" / "target.log", timeout_s=timeout_s)

    return start


def python(code):
    return [sys.executable, "-c", code]


def test_a_server_and_its_children_end_with_the_block(start, tmp_path):
    with start() as server:
        child = int((tmp_path / "child.txt").read_text())
        assert alive(server.process.pid)
        assert alive(child)
        assert server.death() is None
    assert not alive(server.process.pid)
    assert ends(child)
    log = (tmp_path / "logs" / "target.log").read_text()
    assert log.startswith("$ ")
    assert "the stub starts" in log


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_a_server_ends_when_the_block_fails(start, tmp_path, error):
    with pytest.raises(error), start() as server:
        raise error
    assert not alive(server.process.pid)
    assert ends(int((tmp_path / "child.txt").read_text()))


def test_a_server_that_ignores_the_request_to_end_is_killed(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "GRACE_S", 0.3)
    deaf = (
        "import signal, http.server, sys\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "class H(http.server.BaseHTTPRequestHandler):\n"
        "    def do_GET(self): self.send_response(200); self.end_headers()\n"
        "http.server.HTTPServer(('127.0.0.1', int(sys.argv[1])), H).serve_forever()"
    )
    port = free_port()
    log, url = tmp_path / "log", f"http://127.0.0.1:{port}"
    with started([*python(deaf), str(port)], url, log=log, timeout_s=120) as server:
        pass
    assert server.process.returncode == -signal.SIGKILL


def test_a_failed_start_shows_the_last_lines_without_secrets(start, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_TOKEN", "hf_averysecretword")
    code = "import os, sys\nfor i in range(50): print(i)\nprint('no chip', os.environ['HF_TOKEN'])\nsys.exit(3)"
    with pytest.raises(ServingError, match="ended by itself with exit code 3") as caught, start(python(code)):
        pass
    said = str(caught.value)
    assert "no chip ***" in said
    assert "\n  49\n" in said
    assert "\n  9\n" not in said
    log = (tmp_path / "logs" / "target.log").read_text()
    assert "hf_averysecretword" not in log
    assert "\n9\n" in log


def test_a_server_that_is_never_ready_is_ended(start, tmp_path):
    never = start(healthy=False, timeout_s=5)
    with pytest.raises(ServingError, match=r"(?s)ready within 5 s.*--ready-timeout.*the stub starts"), never:
        pass
    assert ends(int((tmp_path / "child.txt").read_text()))


def test_a_command_that_does_not_exist_is_named(start):
    with pytest.raises(ServingError, match="/nowhere/python: No such file"), start(["/nowhere/python"]):
        pass


def test_a_log_that_can_not_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(ServingError, match=r"/file/log \(--server-logs\)"),
        started(python("pass"), "http://127.0.0.1:1", log=tmp_path / "file" / "log", timeout_s=1),
    ):
        pass


def test_a_log_is_of_one_server_at_a_time(start, tmp_path):
    with start():
        with pytest.raises(ServingError, match=r"another run writes to .*target\.log.*--server-logs"), start():
            pass
        assert "the stub starts" in (tmp_path / "logs" / "target.log").read_text()
    with start():
        pass


def test_a_log_keeps_no_secret_when_the_wait_for_its_server_is_cut_short(start, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_averysecretword")

    def cut_short(process):
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        (tmp_path / "logs" / "target.log").write_text("hf_averysecretword")
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "_end", cut_short)
    with pytest.raises(KeyboardInterrupt), start():
        pass
    assert (tmp_path / "logs" / "target.log").read_text() == "***"


def test_a_signal_that_is_ignored_stays_so(start):
    """As under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with start():
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
            assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_server_that_dies_later_says_how(start):
    with start() as server:
        os.kill(server.process.pid, signal.SIGKILL)
        server.process.wait(10)
        assert "signal SIGKILL" in server.death()
        assert "the stub starts" in server.death()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_to_us_ends_the_server(tmp_path, number):
    child, port = tmp_path / "child.txt", free_port()
    words = [sys.executable, str(STUB), json.dumps({"child": str(child)}), "--host", "127.0.0.1", "--port", str(port)]
    code = (
        "import pathlib, signal, sys, time\n"
        "from dflash.serving.server import started\n"
        # A shell's jobs in the background are born deaf to it.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "signal.signal(signal.SIGHUP, signal.SIG_DFL)\n"
        f"with started({words!r}, 'http://127.0.0.1:{port}', "
        f"log=pathlib.Path({str(tmp_path / 'log')!r}), timeout_s=120) as server:\n"
        "    print(server.process.pid, flush=True)\n"
        "    time.sleep(600)\n"
    )
    ours = subprocess.Popen(
        python(code), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=STUB.parents[2]
    )
    pid = int(ours.stdout.readline())
    assert alive(pid)
    ours.send_signal(number)
    assert ours.wait(30) != 0
    ours.stdout.close()
    assert not alive(pid)
    assert ends(int(child.read_text()))
