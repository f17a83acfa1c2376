"""`python -m dflash`, and the command that pip installs."""

import sys

from dflash.host import stopping


def main() -> int:
    """The exit code of a command; see `dflash.cli.main`."""
    stopping.leave_at_once()
    from dflash.cli import main as cli  # takes seconds, in which Ctrl-C is heeded too

    try:
        with stopping.unwinding():
            code = cli.main()
    except KeyboardInterrupt as stop:
        code = stopping.announce(stop)
    stopping.ignore()
    return code


if __name__ == "__main__":
    sys.exit(main())
