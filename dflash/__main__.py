"""`python -m dflash`, and the command that pip installs."""

import os
import sys

from dflash.host import stopping


def _open_streams() -> None:
    """Opens the null device where a standard stream is closed: the next file would take its number, and its output."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
    sys.stdout = sys.stdout or os.fdopen(1, "w", closefd=False)
    sys.stderr = sys.stderr or os.fdopen(2, "w", closefd=False)


def main() -> int:
    """The exit code of a command; see `dflash.cli.main`."""
    _open_streams()
    stopping.leave_at_once()
    from dflash.cli import main as cli  # takes seconds, in which Ctrl-C is heeded too

    try:
        with stopping.unwinding():
            code = cli.main()
            stopping.insist()
    except KeyboardInterrupt as stop:
        code = stopping.announce(stop)
    stopping.ignore()
    return code


if __name__ == "__main__":
    sys.exit(main())
