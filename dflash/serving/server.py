"""A server in a process of its own: started, waited for, and ended with every process that it started.

Knows nothing of which server it is. The log is kept; what a failed start says of it, and the log itself once the server
has ended, hold no secret.
"""

import contextlib
import dataclasses
import http.client
import os
import shlex
import signal
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType

from dflash.provenance import redact
from dflash.teacher_cache.arrays import write_atomically

LOG_LINES = 20
# After a polite request to end; then the whole group is killed.
GRACE_S = 15.0
_POLL_S = 0.5


class ServingError(ValueError):
    """A server that can't be measured: the rule, what came, and what to do."""


def free_port() -> int:
    """A port on which nothing listens now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def redacted(text: str) -> str:
    """The text without secrets, word by word."""
    return "\n".join(" ".join(redact(line.split(" "))) for line in text.split("\n"))


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Server:
    """Where a server listens. `process` and `log` are None for one that somebody else runs."""

    url: str
    process: subprocess.Popen[bytes] | None = None
    log: Path | None = None

    def read_log(self, start: int = 0) -> str:
        """The log from a byte on; empty where there is none."""
        if self.log is None:
            return ""
        with self.log.open("rb") as file:
            file.seek(start)
            return file.read().decode("utf-8", errors="replace")

    def log_size(self) -> int:
        return 0 if self.log is None else self.log.stat().st_size

    def tail(self) -> str:
        """The last lines of the log, without secrets, after a line that says where it is."""
        # Of a progress bar, which returns to the start of its line, the last state.
        lines = [line.rstrip("\r").rpartition("\r")[2] for line in redacted(self.read_log()).rstrip().split("\n")]
        return f"the last lines of {self.log}:\n  " + "\n  ".join(lines[-LOG_LINES:])

    def death(self) -> str | None:
        """How the server ended, with its last words; None while it runs, or where it is somebody else's."""
        if self.process is None or self.process.poll() is None:
            return None
        code = self.process.returncode
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        return f"the server ended by itself with {how}; {self.tail()}"


@contextlib.contextmanager
def started(
    command: Sequence[str],
    url: str,
    *,
    health: str,
    log: Path,
    timeout_s: float,
) -> Iterator[Server]:
    """A server that answers `url` + `health`, until the block is left in whatever way; SIGTERM and SIGHUP included.

    Raises ServingError when it can't be started, ends, or is not ready in time.
    """
    try:
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text(f"$ {redacted(shlex.join(command))}\n", encoding="utf-8")
    except OSError as error:
        raise ServingError(f"a server's log goes to {log} (--log-dir): {error.strerror}") from None
    process = None
    with _leaving_on_signals():
        try:
            with log.open("ab") as out:
                process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=subprocess.STDOUT,
                    # A group of its own: Ctrl-C reaches us alone, and we end all of it.
                    start_new_session=True,
                )
            _wait_until_ready(Server(url=url, process=process, log=log), health, timeout_s)
            yield Server(url=url, process=process, log=log)
        except OSError as error:
            if process is not None:
                raise
            raise ServingError(f"a server is started by a command; {command[0]}: {error.strerror}") from None
        finally:
            if process is not None:
                try:
                    _end(process)
                finally:  # also where a second Ctrl-C cuts the wait short
                    write_atomically(log, redacted(log.read_text(encoding="utf-8", errors="replace")))


def _wait_until_ready(server: Server, health: str, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while True:
        if death := server.death():
            raise ServingError(f"a server must become ready; {death}")
        if _is_healthy(server.url + health):
            return
        if time.monotonic() >= deadline:
            raise ServingError(
                f"a server must be ready within {timeout_s:.0f} s, and {server.url + health} does not answer: allow "
                f"more (--ready-timeout), or see {server.tail()}"
            )
        time.sleep(_POLL_S)


def opener(url: str) -> urllib.request.OpenerDirector:
    """Opens URLs; a proxy of the environment is not asked for what listens on this host."""
    here = urllib.parse.urlsplit(url).hostname in ("127.0.0.1", "localhost", "::1")
    return urllib.request.build_opener(*([urllib.request.ProxyHandler({})] if here else []))


def _is_healthy(url: str) -> bool:
    try:
        with opener(url).open(url, timeout=5) as answer:
            return answer.status == 200
    except urllib.error.HTTPError as error:  # it listens, and is not ready
        error.close()
        return False
    except (OSError, ValueError, http.client.HTTPException):  # refused, reset, too slow, not HTTP
        return False


@contextlib.contextmanager
def _leaving_on_signals() -> Iterator[None]:
    """SIGTERM and SIGHUP unwind as Ctrl-C does, so that what was started is ended; only the main thread can say so."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(number: int, _: FrameType | None) -> None:
        raise KeyboardInterrupt(signal.Signals(number).name)

    # What is ignored stays so: under nohup a run goes on.
    heeded = [n for n in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) is not signal.SIG_IGN]
    before = {number: signal.signal(number, leave) for number in heeded}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ends the whole group: asks, waits, kills. What outlived its leader is killed too."""
    try:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(GRACE_S)
    except (ProcessLookupError, subprocess.TimeoutExpired):
        pass
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
