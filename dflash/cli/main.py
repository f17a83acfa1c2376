"""`python -m dflash ...`: a thin layer of arguments over the functions that Python users call."""

import contextlib
import errno
import functools
import io
import os
import re
import sys
from collections.abc import Callable
from typing import Any

import tyro

from dflash.cli.audit import audit
from dflash.cli.audit_teacher import audit_teacher_command
from dflash.cli.build_cache import build_cache
from dflash.cli.doctor import doctor
from dflash.cli.evaluate import evaluate
from dflash.cli.export import export
from dflash.cli.generate import generate
from dflash.cli.plan import plan
from dflash.cli.report import export_results, report
from dflash.cli.serve_bench import serve_bench
from dflash.cli.train import train
from dflash.config import UserError
from dflash.host.disk import one_line
from dflash.host.provenance import check_words
from dflash.measuring.turns import is_out_of_memory, sentence_of


class UsageError(UserError, ValueError):
    """A command line that can't be read: what is wrong with it."""


# What may go wrong with any file that is written or read, and what helps.
_MORE_ROOM = "make room, then run the same command again"
_OTHER_PLACE = "name a place that may be written to"
_REMEDIES = {
    errno.ENOSPC: _MORE_ROOM,
    errno.EDQUOT: _MORE_ROOM,
    errno.EFBIG: "files may not grow this large here; name another place",
    errno.EROFS: _OTHER_PLACE,
    errno.EACCES: _OTHER_PLACE,
    errno.EPERM: _OTHER_PLACE,
    errno.EEXIST: _OTHER_PLACE,
    errno.EISDIR: _OTHER_PLACE,
    errno.ENOTDIR: _OTHER_PLACE,
    errno.ENOENT: "name one that is there",
    errno.ENAMETOOLONG: "name it shorter",
    errno.ELOOP: "it is a link to itself; name another place",
    errno.EIO: "look at that disk",
    errno.EMFILE: "allow more open files (ulimit -n)",
}
_LONGEST = 3000


COMMANDS: dict[str, Callable[..., None]] = {
    "generate": generate,
    "build-cache": build_cache,
    "train": train,
    "evaluate": evaluate,
    "report": report,
    "export-results": export_results,
    "export": export,
    "audit": audit,
    "audit-teacher": audit_teacher_command,
    "doctor": doctor,
    "plan": plan,
    "serve-bench": serve_bench,
}


def _later(command: Callable[..., None]) -> Callable[..., Callable[[], None]]:
    """The command with its arguments read, to be started afterwards."""

    @functools.wraps(command)
    def read(*args: Any, **kwargs: Any) -> Callable[[], None]:
        return functools.partial(command, *args, **kwargs)

    return read


def read_command(words: list[str]) -> Callable[[], None]:
    """The command that these words ask for. Raises UsageError, or the error of a config that refuses its values."""
    app = tyro.extras.SubcommandApp()
    for name, command in COMMANDS.items():
        app.command(name=name)(_later(command))
    box = io.StringIO()
    try:
        with contextlib.redirect_stderr(box):
            return app.cli(prog="dflash", description="DFlash: lossless speculative decoding, measured.", args=words)
    except SystemExit as leaving:
        if not leaving.code:
            raise
        # tyro draws the error of a nested config into its box, which names no option.
        error: BaseException | None = leaving
        while error is not None:
            if isinstance(error, UserError):
                raise error from None
            error = error.__context__
        raise UsageError(_sentence(box.getvalue())) from None


def _sentence(box: str) -> str:
    """What tyro's box says, without its frame and the help under it."""
    parts: list[list[str]] = [[]]
    for row in (line.strip("│ ") for line in box.splitlines()[1:-1]):
        if row.startswith(("──", "---")):  # the second on an ASCII terminal
            parts.append([])
        else:
            parts[-1].append(row.strip())
    # For a union tyro adds the error of every member.
    texts = [" ".join(part).partition("Got errors:")[0].strip() for part in parts]
    said = "; ".join(text for text in texts if text and not text.startswith(("Argument help", "For full help")))
    return re.sub(r"'None', |, 'None'", "", said)  # its word for an option that is left out


def main() -> int:
    """Exit code 0; 1 for an audit's defect or a host that needs fixing; 2, with one sentence, for a user's mistake."""
    for stream in (sys.stdout, sys.stderr):
        # A character that the terminal can't show must not end a command.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        check_words(sys.argv[1:], UsageError)
        read_command(sys.argv[1:])()
    except UserError as error:
        return _refuse(str(error))
    except BrokenPipeError:
        # The reader of our output has closed it; Python would complain about that at its exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        return _refuse(
            f"{sentence_of(error)}: ask for less (a smaller batch, fewer tokens), or take more devices or a larger host"
        )
    except OSError as error:
        if error.errno not in _REMEDIES:
            raise
        place = "" if error.filename is None else f"{error.filename}: "
        return _refuse(f"{place}{error.strerror}: {_REMEDIES[error.errno]}")
    return 0


def _refuse(reason: str) -> int:
    """One line of readable length: a quoted value may have any."""
    line = one_line(reason)
    if len(line) > _LONGEST:
        line = f"{line[: _LONGEST // 2]} ... {line[-_LONGEST // 2 :]}"
    print(f"dflash: {line}", file=sys.stderr)
    return 2
