"""Runs the corpus: `python corpus.py FOLDER` prints a line of JSON for each case.

Everything is imported once; each case then is a fork with a limit to its time and memory, its own copy of a specimen,
and nothing that another case has opened. The cases are the same in every run: each is drawn with its name for a seed.
"""

import contextlib
import dataclasses
import json
import os
import random
import re
import resource
import shutil
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path

import jax
from hostile_server import hostile
from malformed import damage
from malformed.specimens import SPECIMENS, Specimen, make

from dflash.cli import main as cli
from dflash.config import UserError
from dflash.measuring.baselines import BaselineError
from dflash.measuring.journal import JournalError

SECONDS, BYTES, SENTENCE = 60.0, 6 << 30, 4000
# Values that are drawn for a file, and the damages of all kinds that a file gets in CI.
VALUES, SAMPLE = 12, 6
REFUSALS = (UserError, BaselineError, JournalError)


@dataclasses.dataclass(frozen=True)
class Case:
    """A damage to one file of a specimen; `must` be refused, or may be harmless. Without one: the whole specimen."""

    specimen: Specimen
    file: str = ""
    kind: str = ""
    must: bool = False

    @property
    def name(self) -> str:
        return ": ".join(filter(None, (self.specimen.name, self.file, self.kind)))


def _kinds(specimen: Specimen, file: str) -> Iterator[tuple[str, bool]]:
    """The damages that a file gets, and whether each must be refused where the file is needed."""
    if file == "answers":
        yield from ((f"answer {name}", name != "comments") for name in damage.ANSWERS)
        yield from ((f"value {i}", False) for i in range(2 * VALUES))
        return
    yield from ((f"is {name}", True) for name in damage.NO_FILES)
    if file.endswith((".json", ".zarray")):
        # The tokenizers library has its own reader of JSON.
        lenient = {"NaN", "5000 digits", "half a character", "twice"} if file == "tokenizer.json" else set()
        yield from ((name, name not in lenient) for name in damage.BROKEN_JSON)
        yield from ((f"value {i}", False) for i in range(VALUES))
        if file == "tokenizer_config.json":
            yield from ((f"template {name}", name not in ("blank", "unknown")) for name in damage.TEMPLATES)
    elif file.endswith(".jsonl"):
        # Openings are strings: what is put into an object changes none of them.
        objects = {"NaN", "5000 digits", "half a character", "twice", "text"}
        lenient = objects if file == "openings.jsonl" else damage.BROKEN_JSON if file == "metrics.jsonl" else set()
        yield from ((f"line {name}", name not in lenient) for name in damage.BROKEN_JSON)
        yield from ((f"line value {i}", False) for i in range(VALUES))
    elif file.endswith(".safetensors"):
        yield from ((name, True) for name in damage.BROKEN_WEIGHTS)
    else:
        yield from ((name, name != "zeros" or "/0" in file) for name in damage.BROKEN)
        yield from ((name, False) for name in damage.LESS_BROKEN)


def cases(whole: bool = False) -> list[Case]:
    """The corpus, whole specimens first; of each file's damages all, or a sample."""
    damaged = []
    for specimen in SPECIMENS:
        for file in specimen.files:
            kinds = list(_kinds(specimen, file))
            draw = random.Random(f"{specimen.name}: {file}")
            kinds = kinds if whole or file == "answers" else draw.sample(kinds, min(SAMPLE, len(kinds)))
            damaged += [Case(specimen, file, kind, must and file in specimen.needed) for kind, must in kinds]
    return [*(Case(specimen) for specimen in SPECIMENS), *damaged]


def _spoil(path: Path, kind: str, draw: random.Random) -> None:
    if kind.startswith("is "):
        damage.NO_FILES[kind.removeprefix("is ")](path)
        return
    if kind.startswith("template "):
        settings = json.loads(path.read_bytes()) | {"chat_template": damage.TEMPLATES[kind.removeprefix("template ")]}
        path.write_text(json.dumps(settings))
        return
    if kind.startswith("answer "):
        path.write_bytes(damage.ANSWERS[kind.removeprefix("answer ")])
        return
    every = damage.BROKEN_WEIGHTS | damage.LESS_BROKEN if path.suffix == ".safetensors" else {}
    every = every or damage.BROKEN_JSON | damage.LESS_BROKEN
    word = kind.removeprefix("line ")
    change = damage.change_value if word.startswith("value ") else every[word]
    if path.name == "answers":
        events = [e.removeprefix(b"data: ") for e in path.read_bytes().split(b"\n\n")[:4]]
        place = draw.randrange(4)
        events[place] = change(events[place], draw)
        path.write_bytes(damage.HEAD + b"".join(b"data: %b\n\n" % e for e in events) + b"data: [DONE]\n\n")
        return
    change = damage.on_a_line(change) if kind.startswith("line ") else change
    path.write_bytes(change(path.read_bytes(), draw))


def _read(case: Case, specimens: Path, folder: Path) -> int:
    """In the fork: reads the copy as a user would; the exit code."""
    reads, copy = case.specimen.reads, folder / "copy"
    if callable(reads):
        try:
            reads(copy)
        except REFUSALS as error:
            print(f"dflash: {error}", file=sys.stderr)
            return 2
        return 0
    places = {s.name: specimens / s.name for s in SPECIMENS} | {"s": copy, "o": folder / "out"}
    with contextlib.ExitStack() as stack:
        if (copy / "answers").is_file():
            said = (copy / "answers").read_bytes()
            said = said if case.kind else damage.HEAD + said
            places["url"] = stack.enter_context(hostile(said)).url
        sys.argv = ["dflash", *(word.format_map(places) for word in reads)]
        try:
            return cli.main()
        except SystemExit as leaving:
            return int(leaving.code or 0)


def _child(case: Case, specimens: Path, folder: Path) -> None:
    """What the fork does; it never returns."""
    code = 70
    try:
        os.setpgid(0, 0)
        for number, name in ((1, "said"), (2, "told")):
            os.dup2(os.open(folder / name, os.O_CREAT | os.O_WRONLY), number)
        held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (held + BYTES, held + BYTES))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        os.chdir(folder)
        code = _read(case, specimens, folder)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


_BAR = re.compile(r"^.*(\d+%\||\d+it/s|\[\d\d:\d\d).*$")


def verdict(case: Case, code: int | None, told: str, left: list[str]) -> str:
    """refused or harmless; anything else says what is wrong."""
    lines = [line for line in told.replace("\r", "\n").splitlines() if line.strip() and not _BAR.match(line)]
    if code is None:
        return f"took longer than {SECONDS:g} s"
    if code < 0:
        return f"ended by {signal.Signals(-code).name}"
    if "Traceback" in told:
        return "a traceback"
    if code == 0:
        return "harmless" if not case.must else "accepted"
    served = case.specimen.name == "server" and code == 1
    if code != 2 and not served:
        return f"exit code {code}"
    if len(lines) != 1 or not (lines[0].startswith("dflash: ") or served):
        return f"refused in {len(lines)} lines"
    if len(lines[0]) > SENTENCE:
        return f"refused in {len(lines[0])} characters"
    if left:
        return f"refused, and left {left}"
    return "refused"


def outcome(case: Case, specimens: Path, folder: Path) -> dict[str, object]:
    """Runs a case, and removes what it needed."""
    folder.mkdir()
    try:
        shutil.copytree(specimens / case.specimen.name, folder / "copy")
        for near in ("oss",) if callable(case.specimen.reads) else ():
            (folder / near).symlink_to(specimens / near)
        if case.kind:
            _spoil(folder / "copy" / case.file, case.kind, random.Random(case.name))
        before = {path.name for path in folder.iterdir()} | {"said", "told"}
        began, child = time.monotonic(), os.fork()
        if child == 0:
            _child(case, specimens, folder)
        code: int | None = None
        while time.monotonic() < began + SECONDS:
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                code = os.waitstatus_to_exitcode(status)
                break
            time.sleep(0.005)
        else:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
        told = (folder / "told").read_text(errors="replace")
        left = [] if case.specimen.resumes else sorted({path.name for path in folder.iterdir()} - before)
        found = verdict(case, code, told, left)
        seconds = round(time.monotonic() - began, 2)
        return {"name": case.name, "verdict": found, "seconds": seconds, "told": told[-2000:]}
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def main(folder: Path, words: list[str]) -> None:
    """Makes the specimens in a fork and runs, two at a time, every case that has all the words in its name.

    With --whole among the words no damage is left out.
    """
    warnings.filterwarnings("ignore", message=r"os\.fork")
    jax.config.update("jax_platforms", "cpu")
    specimens = folder / "specimens"
    if not specimens.is_dir():
        making = os.fork()
        if making == 0:
            try:
                make(specimens)
                os._exit(0)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
        if os.waitpid(making, 0)[1]:
            sys.exit("the specimens could not be made")
    whole = "--whole" in words
    chosen = [c for c in cases(whole) if all(word in c.name for word in words if word != "--whole")]
    # Two of us share the cases; what whole specimens compile, the others need not.
    workers = []
    for own in (0, 1):
        worker = os.fork()
        if worker == 0:
            for number, case in enumerate(chosen):
                if number % 2 == own:
                    line = json.dumps(outcome(case, specimens, folder / f"case-{number}"))
                    os.write(1, line.encode() + b"\n")
            os._exit(0)
        workers.append(worker)
    sys.exit(max(os.waitstatus_to_exitcode(os.waitpid(worker, 0)[1]) for worker in workers))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
