"""The options of a benchmark run: each is read from the command line, else from the environment, else a default.

The root conftest.py adds them to pytest; `--help` lists them with their environment names.
"""

import argparse
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import pytest

from dflash import baselines
from dflash.device import KINDS
from dflash.serving.plan import SERVERS

T = TypeVar("T")


def _integer(text: str, least: int) -> int:
    try:
        value = int(text)
    except ValueError:
        value = least - 1
    if value < least:
        raise argparse.ArgumentTypeError(f"expected an integer of at least {least}, got {text!r}")
    return value


def _count(text: str) -> int:
    return _integer(text, 1)


def _length(text: str) -> int:
    return _integer(text, 0)


def _each(text: str, read: Callable[[str], T]) -> list[T]:
    """The values of a list, in order; one that is there twice counts once."""
    return list(dict.fromkeys(read(v) for v in text.split(",")))


def _counts(text: str) -> list[int]:
    return _each(text, _count)


def _lengths(text: str) -> list[int]:
    return _each(text, _length)


def _block_sizes(text: str) -> list[int]:
    return _each(text, lambda v: _integer(v, 2))


def _name(text: str) -> str:
    if not text:
        raise argparse.ArgumentTypeError("expected names with a comma between them, got an empty one")
    return text


def _names(text: str) -> list[str]:
    return _each(text, _name)


def _number(text: str, expected: str, fits: Callable[[float], bool]) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not fits(value):
        raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}")
    return value


def _floor(text: str) -> float | None:
    return _number(text, "a number above 0", lambda v: 0 < v < math.inf) if text else None


def _fraction(text: str) -> float:
    return _number(text, "a number from 0 to below 1", lambda v: 0 <= v < 1)


def _seconds(text: str) -> float:
    return _number(text, "seconds, 0 or more", lambda v: 0 <= v < math.inf)


def _option(group: pytest.OptionGroup, name: str, env: str, default: str | None, text: str, **more: Any) -> None:
    """An option whose default comes from the environment; the help says which name. None: not given."""
    value = os.environ.get(env) or default
    choices = more.get("choices")
    if choices and value not in choices:  # argparse checks what is typed, and takes a default as it is
        raise pytest.UsageError(f"{env} must be one of {', '.join(filter(None, choices))}, got {value!r}")
    group.addoption(name, default=value, help=f"{text} (env {env}; now {value or ''!r})", **more)


def add_options(parser: pytest.Parser, root: Path) -> None:
    """Adds every option of ours; `root` is the folder of the project, where baselines are looked for."""
    group = parser.getgroup("dflash", "DFlash decoding and its measurement")
    _option(group, "--run-on", "DFLASH_RUN_ON", "tpu", "device that tests/tpu and bench run on", choices=KINDS)
    _option(
        group,
        "--require-device",
        "DFLASH_REQUIRE_DEVICE",
        "",
        "fail, instead of skipping, without this device",
        choices=("", *KINDS),
    )
    _option(
        group,
        "--target",
        "TEACHER_SNAPSHOT_DIR",
        "smollm2-135m",
        "target: a snapshot directory (write --target=DIR), or smollm2-135m",
        metavar="DIR",
    )
    _option(
        group,
        "--draft",
        "DRAFT_RUN_DIR",
        None,  # dflash.sweep.drafts: it depends on the target, and a server gets a draft that is named only
        "drafts: a DFlashDraftModel or run directory (write --draft=DIR), smollm2-135m (the trained one that is here, "
        "and the default for the target of that name), or untrained (the default for every other)",
        type=_names,
        metavar="DIR,DIR",
    )
    _option(
        group,
        "--teacher-cache",
        "CACHE_DIR",
        "",
        "teacher cache whose held-out prompts a draft is evaluated on, offline",
        metavar="DIR",
    )
    _option(
        group, "--draft-layers", "DFLASH_DRAFT_LAYERS", "2", "layers of the untrained draft", type=_count, metavar="N"
    )
    _option(group, "--dtype", "DFLASH_DTYPE", "float32", "dtype of computation", choices=("float32", "bfloat16"))
    _option(
        group,
        "--prompts",
        "DFLASH_PROMPTS",
        "builtin",
        "prompt sets: builtin[:category], humaneval, FILE.jsonl, hf:NAME, or random",
        type=_names,
        metavar="SOURCE,SOURCE",
    )
    _option(group, "--num-prompts", "DFLASH_NUM_PROMPTS", "4", "prompts of a round", type=_count, metavar="N")
    _option(
        group,
        "--prompt-len",
        "DFLASH_PROMPT_LEN",
        "0",
        "exact prompt lengths in tokens; 0 leaves them",
        type=_lengths,
        metavar="N,N",
    )
    _option(group, "--batch-size", "DFLASH_BATCH_SIZE", "1", "prompts decoded together", type=_counts, metavar="N,N")
    _option(
        group, "--block-sizes", "BLOCK_SIZES", "8", "block sizes, the anchor included", type=_block_sizes, metavar="N,N"
    )
    _option(group, "--max-new-tokens", "MAX_NEW_TOKENS_LIST", "64", "token budgets", type=_counts, metavar="N,N")
    _option(
        group,
        "--rounds",
        "DFLASH_ROUNDS",
        "5",
        "timed rounds of each case at least, after one of warm-up; under 3 give no interval",
        type=_count,
        metavar="N",
    )
    _option(
        group,
        "--precision",
        "DFLASH_PRECISION",
        "0.05",
        "add rounds until the interval is narrower than this fraction of the speed-up",
        type=_fraction,
        metavar="X",
    )
    _option(
        group,
        "--time-limit",
        "DFLASH_TIME_LIMIT",
        "20",
        "seconds that added rounds of a case may take; 0 adds none",
        type=_seconds,
        metavar="S",
    )
    _option(
        group,
        "--also-run-baseline",
        "ALSO_RUN_BASELINE",
        "1",
        "0 leaves greedy out: no speed-up, no proof",
        choices=("0", "1", "false", "true"),
    )
    _option(
        group,
        "--report",
        "DFLASH_REPORT",
        "",
        "write report.html and report.md into this directory; the runs kept there are its history",
        metavar="DIR",
    )
    group.addoption(
        "--resume",
        action="store_true",
        help="take over the cases that an earlier run with the same --benchmark-json or --report measured already",
    )
    _add_server_options(group)
    _option(group, "--run-name", "RUN_NAME", "", "name kept in the results", metavar="NAME")
    _option(
        group,
        "--min-speedup",
        "DFLASH_MIN_SPEEDUP",
        "",
        "fail a draft's block cases under this",
        type=_floor,
        metavar="X",
    )
    _option(
        group,
        "--min-acceptance-length",
        "DFLASH_MIN_ACCEPTANCE_LENGTH",
        "",
        "fail a draft's cases under this",
        type=_floor,
        metavar="X",
    )
    _option(
        group,
        "--baselines",
        "DFLASH_BASELINES",
        str(root / "bench" / "baselines"),
        "directory of baselines, a file per device kind, that cases are held to",
        metavar="DIR",
    )
    group.addoption("--update-baselines", action="store_true", help="write this run's cases as baselines instead")
    group.addoption(
        "--require-baseline", action="store_true", help="fail unless every case has a baseline and passes it"
    )
    _option(
        group,
        "--tolerance",
        "DFLASH_TOLERANCE",
        str(baselines.TOLERANCE),
        "fraction that --update-baselines puts between a figure and its floor, at least",
        type=_fraction,
        metavar="X",
    )


def _add_server_options(group: pytest.OptionGroup) -> None:
    """Of bench/test_serving.py alone; the target, draft, prompts, batch size and rounds are everybody's."""
    _option(
        group,
        "--server",
        "DFLASH_SERVER",
        "",
        "measure this kind of server too; openai is one of unknown kind at --base-url",
        choices=("", *SERVERS),
    )
    _option(
        group,
        "--server-python",
        "DFLASH_SERVER_PYTHON",
        sys.executable,
        "Python interpreter that has the server",
        metavar="FILE",
    )
    words = {"metavar": "WORDS"}
    _option(group, "--server-args", "DFLASH_SERVER_ARGS", "", "words added to the server's command line", **words)
    _option(group, "--draft-server-args", "DFLASH_DRAFT_SERVER_ARGS", "", "more of them, with the draft", **words)
    _option(
        group,
        "--base-url",
        "DFLASH_BASE_URL",
        "",
        "a server that runs already, instead of one started here",
        metavar="URL",
    )
    _option(group, "--draft-base-url", "DFLASH_DRAFT_BASE_URL", "", "the same, with the draft", metavar="URL")
    _option(group, "--served-model", "DFLASH_SERVED_MODEL", "", "name in requests, where it is another", metavar="NAME")
    _option(
        group,
        "--ready-timeout",
        "DFLASH_READY_TIMEOUT",
        "900",
        "seconds until a server must be ready",
        type=_seconds,
        metavar="S",
    )
    _option(
        group, "--server-logs", "DFLASH_SERVER_LOGS", "server-logs", "directory of the servers' logs", metavar="DIR"
    )
