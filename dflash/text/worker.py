"""The process that holds transformers: one for all tokenizers, started with the first; it ends with ours.

Chat templates are programs by whoever made a snapshot, so they run with bounds on time, output and memory: one that
oversteps ends the process, and the next request starts another. Apart from that, a process of its own keeps the
library's imports out of ours, and runs them while a target is read.
"""

import atexit
import contextlib
import json
import os
import selectors
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

_SCRIPT = Path(__file__).with_name("worker_script.py")
# For one text; a real template takes milliseconds. An interpreter that starts and a large vocabulary take longer.
RENDER_S, START_S = 10.0, 120.0


class WorkerFaultError(ValueError):
    """What could not be done: `fault` is a word of `worker_script`'s."""

    def __init__(self, fault: str, reason: str):
        super().__init__(reason)
        self.fault = fault


class _Worker:
    """The process, and the one request that it works on."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = 0
        self._ready = False

    def begin(self) -> None:
        """Starts the process unless it runs, and does not wait for it."""
        with self._lock:
            if self._process is not None and self._owner == os.getpid() and self._process.poll() is None:
                return
            self.end()
            self._process = subprocess.Popen(
                [sys.executable, "-P", str(_SCRIPT)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # only we handle Ctrl-C
            )
            self._owner, self._ready = os.getpid(), False

    def ask(self, request: dict[str, Any]) -> Any:
        """The answer to a request. Raises WorkerFaultError, also when none comes in time."""
        line = json.dumps(request).encode() + b"\n"
        seconds = START_S if request["do"] == "open" else RENDER_S
        with self._lock:
            self.begin()
            process = self._process
            assert process is not None
            assert process.stdin is not None
            try:
                if not self._ready:
                    self._line(process, START_S)
                    self._ready = True
                process.stdin.write(line)
                process.stdin.flush()
                answer: dict[str, Any] = json.loads(self._line(process, seconds))
            except (TimeoutError, OSError, EOFError) as error:
                ready = self._ready
                self.end()
                if not ready:
                    raise WorkerFaultError("files", f"{sys.executable} does not run {_SCRIPT.name}") from None
                late = isinstance(error, TimeoutError)
                reason = f"it takes longer than {seconds:g} s" if late else "it ended the process that ran it"
                raise WorkerFaultError("bounds", reason) from None
            except BaseException:  # after Ctrl-C the next answer would belong to this request
                self.end()
                raise
        if "fault" in answer:
            raise WorkerFaultError(answer["fault"], answer["reason"])
        return answer["got"]

    @staticmethod
    def _line(process: subprocess.Popen[bytes], seconds: float) -> bytes:
        """The next line that it writes. Raises TimeoutError, or EOFError if it has ended."""
        assert process.stdout is not None
        deadline, parts = time.monotonic() + seconds, list[bytes]()
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            while not (parts and parts[-1].endswith(b"\n")):
                if not selector.select(max(deadline - time.monotonic(), 0)):
                    raise TimeoutError
                parts.append(os.read(process.stdout.fileno(), 1 << 20))
                if not parts[-1]:
                    raise EOFError
        return b"".join(parts)

    def end(self) -> None:
        process, self._process = self._process, None
        if process is None or self._owner != os.getpid():  # a fork must not end its parent's worker
            return
        process.kill()
        with contextlib.suppress(OSError), process:
            pass


WORKER = _Worker()
atexit.register(WORKER.end)
