"""The options of a benchmark run: each comes from the command line, else the environment, else a default.

The root conftest.py adds them to pytest; `--help` lists them with their environment names.
"""

import argparse
import dataclasses
import os
import sys
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import pytest

from dflash.cli.template import TemplateOptions
from dflash.config import Count, Fraction, Index, Mass, Positive, Range, Seed, Share, Size, Temperature
from dflash.host.device import KINDS
from dflash.host.provenance import redact
from dflash.measuring import baselines
from dflash.measuring.protocol import OURS, PROTOCOLS, ZLAB
from dflash.serving.options import SERVERS
from dflash.text.prompts import PromptSet, load_prompts
from dflash.text.tokenizer import FIXED_DAY, Tokenizer

Type = Callable[[str], Any]


def _refuse(expected: str, text: str) -> argparse.ArgumentTypeError:
    return argparse.ArgumentTypeError(f"expected {expected}, got {text!r:.60}")


def within(kind: Any, expected: str = "") -> Type:
    """A number of a type of `dflash.config`, such as Share; `expected` says what it is in other words than its rule."""
    read_number, allowed = typing.get_args(kind)
    words = "an integer" if read_number is int else "a number"

    def read(text: str) -> int | float:
        try:
            value: int | float = read_number(text)
        except ValueError:
            raise _refuse(expected or words, text) from None
        if rule := allowed.rule(value):
            raise _refuse(expected or f"{words} {rule}", text)
        return value

    return read


def integer(lowest: int) -> Type:
    """An integer of at least this."""
    return within(Annotated[int, Range(lowest)], f"an integer of at least {lowest}")


def name(text: str) -> str:
    """Text that is not empty."""
    if not text.strip():
        raise _refuse("a name", text)
    return text


def words(text: str) -> str:
    """Any text."""
    return text


def listed(read: Type) -> Type:
    """Comma-separated values, in order; duplicates count once."""
    return lambda text: list(dict.fromkeys(read(value) for value in text.split(",")))


def one_of(*choices: str) -> Type:
    """One of these."""

    def read(text: str) -> str:
        if text not in choices:
            raise _refuse(f"one of {', '.join(choices)}", text)
        return text

    return read


def draft_vocab(text: str) -> int | str:
    """How many tokens a draft proposes: an integer of at least 1, or all."""
    if text == "all":
        return text
    return within(Count, "an integer of at least 1, or all")(text)


FLOOR = within(Positive, "a number above 0")
FRACTION = within(Fraction, "a number from 0 to below 1")
SECONDS = within(Size, "seconds, 0 or more")


@dataclasses.dataclass(frozen=True, slots=True)
class Option:
    """One option: its name, the environment variable that sets it too, its default (None: not given), and its type."""

    name: str
    env: str
    default: str | None
    type: Type
    metavar: str
    text: str


def all_options(root: Path) -> list[Option]:
    """Every option with a value; `root` is the folder of the project, where baselines are looked for."""
    devices, servers = "|".join(KINDS), "|".join(SERVERS)
    return [
        Option("--run-on", "DFLASH_RUN_ON", "tpu", one_of(*KINDS), devices, "device that tests/tpu and bench run on"),
        Option(
            "--require-device", "DFLASH_REQUIRE_DEVICE", None, one_of(*KINDS), devices,
            "fail, instead of skipping, without this device",
        ),
        Option(
            "--target", "TEACHER_SNAPSHOT_DIR", "smollm2-135m", name, "DIR",
            "target: a snapshot directory (write --target=DIR), a model of the hub, or smollm2-135m",
        ),
        Option(
            "--draft", "DRAFT_RUN_DIR", None, listed(name), "DIR,DIR",
            "drafts: a DFlashDraftModel or run directory (write --draft=DIR), smollm2-135m (a trained one in the "
            "package, and the default for the target of that name; -plain is the other), or untrained (the default for "
            "every other)",
        ),
        Option(
            "--teacher-cache", "CACHE_DIR", None, name, "DIR",
            "teacher cache whose held-out prompts a draft is evaluated on, offline",
        ),
        Option("--draft-layers", "DFLASH_DRAFT_LAYERS", "2", integer(1), "N", "layers of the untrained draft"),
        Option(
            "--draft-vocab-size", "DFLASH_DRAFT_VOCAB_SIZE", None, listed(draft_vocab), "N,all",
            "tokens that a draft proposes, or all; by default those that it was trained with",
        ),
        Option(
            "--dtype", "DFLASH_DTYPE", None, one_of("float32", "bfloat16"), "float32|bfloat16",
            "dtype of computation; by default bfloat16 on an accelerator and float32 on a CPU",
        ),
        Option("--tp", "DFLASH_TP", "1", integer(1), "N", "devices that the networks are split over"),
        Option(
            "--dp", "DFLASH_DP", "1", integer(1), "N", "devices, times --tp, that the rows of a batch are split over"
        ),
        Option(
            "--prompts", "DFLASH_PROMPTS", "builtin", listed(name), "SOURCE,SOURCE",
            "prompt sets: builtin[:category], one by name (gsm8k, mt-bench ...), FILE.jsonl, hf:NAME, or random",
        ),
        Option(
            "--data-dir", "DFLASH_DATA_DIR", None, name, "DIR",
            "directory of named sets: gsm8k.jsonl, .json or .parquet, as they are published",
        ),
        Option(
            "--prompt-template", "DFLASH_PROMPT_TEMPLATE", "", words, "TEXT",
            "what to ask about a row of hf:NAME: '{question} Explain.'",
        ),
        Option(
            "--chat-template-arg", "DFLASH_CHAT_TEMPLATE_ARG", "", words, "WORDS",
            "variables of the chat template: 'enable_thinking=false reasoning_effort=low'",
        ),
        Option(
            "--template-date", "DFLASH_TEMPLATE_DATE", FIXED_DAY, name, "YYYY-MM-DD",
            "day that a chat template takes for today",
        ),
        Option(
            "--protocol", "DFLASH_PROTOCOL", OURS.name, one_of(*PROTOCOLS), "|".join(PROTOCOLS),
            "zlab measures as z-lab's tables do: 128 prompts, up to 2048 new tokens, mean by prompt; others, if given, "
            "are measured, and named in the results",
        ),
        Option("--num-prompts", "DFLASH_NUM_PROMPTS", None, integer(1), "N", "prompts of a round; by default 8"),
        Option(
            "--category-prompts", "DFLASH_CATEGORY_PROMPTS", "2", integer(1), "N",
            "prompts of each category whose acceptance is measured, if it has that many",
        ),
        Option(
            "--prompt-len", "DFLASH_PROMPT_LEN", "0", listed(integer(0)), "N,N",
            "exact lengths in tokens, of prompts made of builtin text or random tokens; 0 leaves prompts as they are",
        ),
        Option("--batch-size", "DFLASH_BATCH_SIZE", "1", listed(integer(1)), "N,N", "prompts decoded together"),
        Option("--block-sizes", "BLOCK_SIZES", "8", listed(integer(2)), "N,N", "block sizes, the anchor included"),
        Option(
            "--max-new-tokens", "MAX_NEW_TOKENS_LIST", None, listed(integer(1)), "N,N", "token budgets; by default 64"
        ),
        Option(
            "--temperature", "DFLASH_TEMPERATURE", "0", within(Temperature), "T",
            "above 0, tokens are drawn, the same by both decoders; 0 is greedy",
        ),
        Option("--top-k", "DFLASH_TOP_K", "0", within(Index), "N", "draw from the likeliest N tokens; 0 from all"),
        Option(
            "--top-p", "DFLASH_TOP_P", "1", within(Mass), "P",
            "draw from the likeliest tokens that reach this probability together",
        ),
        Option(
            "--min-p", "DFLASH_MIN_P", "0", within(Share), "P",
            "draw from tokens at least this fraction as likely as the likeliest",
        ),
        Option("--seed", "DFLASH_SEED", "0", within(Seed), "N", "seed of the draws"),
        Option(
            "--rounds", "DFLASH_ROUNDS", "5", integer(1), "N",
            "minimum timed rounds of each case; fewer than 3 give no interval",
        ),
        Option(
            "--precision", "DFLASH_PRECISION", "0.05", FRACTION, "X",
            "add rounds until the interval is narrower than this fraction of the speed-up",
        ),
        Option(
            "--time-limit", "DFLASH_TIME_LIMIT", "10", SECONDS, "S",
            "seconds that added rounds of a case may take; 0 adds none",
        ),
        Option(
            "--repeat", "DFLASH_REPEAT", "1", integer(1), "N",
            "measure decoding cases in N processes, one after the other: what changes between runs is kept with them",
        ),
        Option(
            "--also-run-baseline", "ALSO_RUN_BASELINE", "1", one_of("0", "1", "false", "true"), "0|1",
            "0 leaves greedy out: no speed-up, no proof",
        ),
        Option(
            "--report", "DFLASH_REPORT", None, name, "DIR",
            "write report.html and report.md into this directory; the runs kept there are its history",
        ),
        Option("--server", "DFLASH_SERVER", None, one_of(*SERVERS), servers,
            "measure this kind of server too; openai is one of unknown kind at --base-url"),
        Option(
            "--server-python", "DFLASH_SERVER_PYTHON", sys.executable, name, "FILE",
            "Python interpreter that has the server",
        ),
        Option("--server-args", "DFLASH_SERVER_ARGS", "", words, "WORDS", "words added to the server's command line"),
        Option("--draft-server-args", "DFLASH_DRAFT_SERVER_ARGS", "", words, "WORDS", "more of them, with the draft"),
        Option("--base-url", "DFLASH_BASE_URL", "", words, "URL", "a server that runs already"),
        Option("--draft-base-url", "DFLASH_DRAFT_BASE_URL", "", words, "URL", "the same, with the draft"),
        Option("--served-model", "DFLASH_SERVED_MODEL", "", words, "NAME", "model name in requests, if it differs"),
        Option("--ready-timeout", "DFLASH_READY_TIMEOUT", "900", SECONDS, "S", "seconds until a server must be ready"),
        Option("--server-logs", "DFLASH_SERVER_LOGS", "server-logs", name, "DIR", "directory of the servers' logs"),
        Option("--run-name", "RUN_NAME", None, name, "NAME", "name kept in the results"),
        Option("--min-speedup", "DFLASH_MIN_SPEEDUP", None, FLOOR, "X", "fail a draft's block cases under this"),
        Option(
            "--min-acceptance-length", "DFLASH_MIN_ACCEPTANCE_LENGTH", None, FLOOR, "X",
            "fail a draft's cases under this",
        ),
        Option(
            "--min-predicted-share", "DFLASH_MIN_PREDICTED_SHARE", None, FRACTION, "X",
            "fail scripted block cases under this fraction of the speed-up that their steps predict",
        ),
        Option(
            "--baselines", "DFLASH_BASELINES", str(root / "bench" / "baselines"), name, "DIR",
            "directory of baselines, a file per device kind, that cases are held to",
        ),
        Option(
            "--tolerance", "DFLASH_TOLERANCE", str(baselines.TOLERANCE), FRACTION, "X",
            "minimum fraction that --update-baselines puts between a figure and its floor",
        ),
    ]  # fmt: skip


def open_tokenizer(options: Any) -> Tokenizer:
    """The tokenizer of a run's target. Raises TokenizerError."""
    words = tuple(options.chat_template_arg.split())
    return TemplateOptions(chat_template_arg=words, template_date=options.template_date).open(options.target)


def open_prompts(options: Any, source: str) -> PromptSet:
    """The prompts of a source. Raises PromptError."""
    return load_prompts(source, data_dir=options.data_dir, prompt_template=options.prompt_template, raw=options.raw)


def apply_protocol(options: Any) -> None:
    """What is not asked for is as the protocol has it."""
    protocol = PROTOCOLS[options.protocol]
    options.num_prompts = options.num_prompts or protocol.num_prompts
    options.max_new_tokens = options.max_new_tokens or [protocol.max_new_tokens]


def check_lengths(options: Any) -> None:
    """Raises UsageError for exact lengths of prompts that are not cut to any: figures would bear another's name."""
    if not any(options.prompt_len):
        return
    others = [source for source in options.prompts if source not in ("builtin", "random")]
    if others or options.raw:
        raise pytest.UsageError(
            "--prompt-len makes prompts of exactly so many tokens of builtin text in the chat template, or of random "
            f"tokens; got {'--raw' if options.raw else '--prompts ' + ','.join(others)}: leave one of them out"
        )


def protocol_name(options: Any) -> str:
    """The protocol, with what was asked for instead of z-lab's own: no such figure passes for one of z-lab's."""
    if options.protocol == OURS.name:
        return OURS.name
    theirs = {"num_prompts": ZLAB.num_prompts, "max_new_tokens": [ZLAB.max_new_tokens]}
    others = [f"{name} {getattr(options, name)}" for name, value in theirs.items() if getattr(options, name) != value]
    return f"{ZLAB.name} with {', '.join(others)}" if others else ZLAB.name


def take_prompts(options: Any, source: str) -> PromptSet:
    """The prompts of a source that are measured. Raises PromptError."""
    return PROTOCOLS[options.protocol].take(open_prompts(options, source), options.num_prompts)


FLAGS = {
    "--raw": "prompts are plain text to be continued, without a chat template, as for a base model",
    "--aot-grid": "tests/aot: compile every program for every topology, not only those that say most",
    "--offline": "decode a server's prompts here too, and fail where it accepts more or less than that",
    "--resume": "take over the cases that an earlier run with the same --benchmark-json or --report measured already",
    "--update-baselines": "write this run's cases as baselines instead",
    "--require-baseline": "fail unless every case has a baseline and passes it",
}


def add_options(parser: pytest.Parser, root: Path) -> None:
    """Adds every option of ours to pytest; `root` as for `all_options`."""
    group = parser.getgroup("dflash", "DFlash decoding and its measurement")
    for option in all_options(root):
        value = os.environ.get(option.env) or option.default
        shown = " ".join(redact((value or "").split(" ")))
        group.addoption(
            option.name,
            default=value,
            type=option.type,
            metavar=option.metavar,
            help=f"{option.text} (env {option.env}; now {shown!r})".replace("%", "%%"),
        )
    for flag, text in FLAGS.items():
        group.addoption(flag, action="store_true", help=text)
