"""A server in a process of its own: started, waited for, and ended with every process that it started.

It does not know which server it is. The log is kept; the excerpt after a failed start, and the log itself once the
server has ended, contain no secret.
"""

import contextlib
import dataclasses
import os
import shlex
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from dflash.host.disk import claim, write_atomically
from dflash.host.stopping import unwinding
from dflash.serving.connection import Connection, ServingError, redacted

LOG_LINES = 20
_TAIL_BYTES, _LINE = 1 << 16, 500
# Seconds after SIGTERM before the whole group is killed.
GRACE_S = 15.0
_POLL_S = 0.5


def free_port() -> int:
    """A port on which nothing listens now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Server:
    """Where a server listens. `process` and `log` are None for a server that was started elsewhere.

    `secrets` are hidden in what is shown of the log.
    """

    url: str
    process: subprocess.Popen[bytes] | None = None
    log: Path | None = None
    secrets: tuple[str, ...] = dataclasses.field(default=(), repr=False)

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
        start = max(0, self.log_size() - _TAIL_BYTES)
        # A line that is cut may begin inside a secret.
        end = self.read_log(start).partition("\n")[2] if start else self.read_log()
        # A progress bar returns to the start of its line: keep its last state.
        states = [line.rstrip("\r").rpartition("\r")[2] for line in redacted(end, self.secrets).rstrip().split("\n")]
        lines = [f"{state:.{_LINE}}" for state in states]
        return f"the last lines of {self.log}:\n  " + "\n  ".join(lines[-LOG_LINES:])

    def death(self) -> str | None:
        """How the server ended, with its last words; None while it runs, or if it was started elsewhere."""
        if self.process is None or self.process.poll() is None:
            return None
        code = self.process.returncode
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        return f"the server ended by itself with {how}; {self.tail()}"


@contextlib.contextmanager
def _own(log: Path, begin: str) -> Iterator[None]:
    """Begins a log that no other run writes to meanwhile: two servers' would be taken for one. Raises ServingError."""
    try:
        log.parent.mkdir(parents=True, exist_ok=True)
        lock = claim(log)
        if lock is not None:
            log.write_text(begin, encoding="utf-8")
    except OSError as error:
        raise ServingError(f"a server's log goes to {log} (--server-logs): {error.strerror}") from None
    if lock is None:
        raise ServingError(
            f"a log is of one server, and another run writes to {log}: wait until it ends, or name another directory "
            "(--server-logs)"
        )
    try:
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def started(
    command: Sequence[str],
    url: str,
    *,
    log: Path,
    timeout_s: float,
    secrets: tuple[str, ...] = (),
) -> Iterator[Server]:
    """A server that answers `url`/health, ended however the block is left, SIGTERM and SIGHUP included.

    Its log keeps none of the `secrets`. Raises ServingError when it can't be started, ends, or is not ready in time.
    """
    process = None
    with _own(log, f"$ {redacted(shlex.join(command), secrets)}\n"), unwinding():
        try:
            with log.open("ab") as out:
                process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=subprocess.STDOUT,
                    # Its own process group: Ctrl-C reaches only us, and we end the whole group.
                    start_new_session=True,
                )
            server = Server(url=url, process=process, log=log, secrets=secrets)
            _wait_until_ready(server, timeout_s)
            yield server
        except OSError as error:
            if process is not None:
                raise
            raise ServingError(f"a server is started by a command; {command[0]}: {error.strerror}") from None
        finally:
            if process is not None:
                try:
                    _end(process)
                finally:  # also where a second Ctrl-C cuts the wait short
                    write_atomically(log, redacted(log.read_text(encoding="utf-8", errors="replace"), secrets))


def _wait_until_ready(server: Server, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    connection = Connection(server.url, timeout_s=timeout_s)
    while True:
        if death := server.death():
            raise ServingError(f"a server must become ready; {death}")
        if connection.is_healthy():
            return
        if time.monotonic() >= deadline:
            raise ServingError(
                f"a server must be ready within {timeout_s:.0f} s, and {server.url}/health does not answer: allow "
                f"more (--ready-timeout), or see {server.tail()}"
            )
        time.sleep(_POLL_S)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ends the whole group: asks, waits, kills, including processes that outlived their leader."""
    try:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(GRACE_S)
    except (ProcessLookupError, subprocess.TimeoutExpired):
        pass
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
