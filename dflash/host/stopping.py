"""Ctrl-C, SIGTERM and SIGHUP: one line, 128 + the signal's number as exit code, and nothing left running.

Imports nothing that takes time: a command heeds signals before it imports anything else.
"""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, NoReturn

Handler = Callable[[int, FrameType | None], Any] | int | None

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_LINE = "dflash: interrupted"
# Signals whose Stopped has not reached the end of its block.
_received: list[int] = []


class Stopped(KeyboardInterrupt):
    """A signal that ends us."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.number = number


def exit_code(stop: KeyboardInterrupt) -> int:
    """130 for Ctrl-C, 143 for SIGTERM."""
    return 128 + getattr(stop, "number", signal.SIGINT)


def announce(stop: KeyboardInterrupt) -> int:
    """Says that we were stopped, and ignores further signals. Returns the exit code."""
    ignore()
    print(_LINE, file=sys.stderr)
    return exit_code(stop)


def leave_at_once() -> None:
    """While there is nothing to undo: a signal ends the process where it is, even in the middle of an import."""
    _heed(_leave)


@contextlib.contextmanager
def unwinding() -> Iterator[None]:
    """Within the block a signal raises Stopped, and what is open is closed.

    Any error that leaves the block after a signal leaves it as Stopped: C code that our handler interrupts makes
    another exception of it, such as a SystemError.
    """
    before, earlier = _heed(_raise), len(_received)
    try:
        yield
    except BaseException as error:
        ours = _received[earlier:]
        del _received[earlier:]
        if ours and not isinstance(error, Stopped):
            raise Stopped(ours[-1]) from None
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def insist() -> None:
    """Raises Stopped again if it was swallowed: C code that our handler interrupts hands on another error, or none."""
    if _received:
        raise Stopped(_received[-1])


def ignore() -> None:
    """Ignores signals for the few moments that are left."""
    _heed(signal.SIG_IGN)


def defer() -> None:
    """From here on a signal only says its line: what is being written is written whole, and `deferred` has the code."""
    _heed(_note)


def deferred() -> int | None:
    """The exit code of a signal that has not ended anything yet."""
    return 128 + _received[0] if _received else None


def _leave(number: int, _: FrameType | None) -> NoReturn:
    os.write(2, f"{_LINE}\n".encode())
    os._exit(128 + number)


def _raise(number: int, _: FrameType | None) -> NoReturn:
    _received.append(number)
    raise Stopped(number)


def _note(number: int, _: FrameType | None) -> None:
    if not _received:
        os.write(2, f"{_LINE}\n".encode())
    _received.append(number)


def _heed(handler: Handler) -> dict[int, Handler]:
    """Installs a handler where that is possible, in the main thread. Returns the previous ones."""
    if threading.current_thread() is not threading.main_thread():
        return {}
    # Ignored signals stay ignored: under nohup a run continues.
    heeded = [n for n in _SIGNALS if signal.getsignal(n) is not signal.SIG_IGN]
    return {number: signal.signal(number, handler) for number in heeded}
