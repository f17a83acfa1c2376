"""The options of a benchmark run: each comes from the command line, else the environment, else a default.

The root conftest.py adds them to pytest; `--help` lists them with their environment names.
"""

import argparse
import ast
import dataclasses
import inspect
import itertools
import os
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest

from dflash.cli.target import TargetOptions
from dflash.cli.template import TemplateOptions
from dflash.config import Computed, Count, Fraction, Positive, Range, Size
from dflash.decoding.sampling import SamplingOptions
from dflash.host.device import KINDS
from dflash.host.provenance import redact
from dflash.measuring import baselines
from dflash.measuring.protocol import OURS, PROTOCOLS, ZLAB
from dflash.serving.options import SERVERS, ServerOptions
from dflash.text.prompts import PromptSet, PromptSource, load_prompts
from dflash.text.tokenizer import Tokenizer

Type = Callable[[str], Any]


def _refuse(expected: str, text: str) -> argparse.ArgumentTypeError:
    return argparse.ArgumentTypeError(f"expected {expected}, got {text!r:.60}")


def within(kind: Any, expected: str = "") -> Type:
    """A number of a type of `dflash.config`, such as Share; `expected` replaces its rule in the error message."""
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

    @property
    def unless_given(self) -> str | None:
        """Its value where the command line gives none: the environment's, else the default."""
        return os.environ.get(self.env) or self.default


def reader(hint: Any) -> Type:
    """What reads a field of this type: a number in its range, one of some words, or a name."""
    if typing.get_origin(hint) is Literal:
        return one_of(*typing.get_args(hint))
    return within(hint) if typing.get_origin(hint) is Annotated else name


def texts_of(kind: type) -> dict[str, str]:
    """The text under each field of a dataclass of options, its bases' too, which is the help of a command."""
    texts: dict[str, str] = {}
    for part in filter(dataclasses.is_dataclass, reversed(kind.__mro__)):
        (made,) = ast.parse(inspect.getsource(part)).body
        assert isinstance(made, ast.ClassDef)
        texts |= {
            ast.unparse(field.target): " ".join(ast.literal_eval(text.value).split())
            for field, text in itertools.pairwise(made.body)
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr)
        }
    return texts


def shared(kind: Any, field: str, metavar: str, **changed: Any) -> Option:
    """The option that commands take as a field of this dataclass; `changed` is what differs in a benchmark run."""
    default = kind.__dataclass_fields__[field].default
    hint = typing.get_type_hints(kind, include_extras=True)[field]
    option = Option(
        name=f"--{field.replace('_', '-')}",
        env=f"DFLASH_{field.upper()}",
        default=None if default is None else str(default),
        type=words if default == "" else reader(hint),
        metavar=metavar,
        text=texts_of(kind)[field],
    )
    return dataclasses.replace(option, **changed)


def all_options(root: Path) -> list[Option]:
    """Every option with a value; `root` is the folder of the project, where baselines are looked for."""
    devices = "|".join(KINDS)
    return [
        Option("--run-on", "DFLASH_RUN_ON", "tpu", one_of(*KINDS), devices, "Device that tests/tpu and bench run on."),
        Option(
            "--require-device", "DFLASH_REQUIRE_DEVICE", None, one_of(*KINDS), devices,
            "Fail, instead of skipping, without this device.",
        ),
        shared(
            TargetOptions, "target", "DIR", env="TEACHER_SNAPSHOT_DIR",
            text=f"{texts_of(TargetOptions)['target']} Write --target=DIR.",
        ),
        Option(
            "--draft", "DRAFT_RUN_DIR", None, listed(name), "DIR,DIR",
            "Drafts: a DFlashDraftModel or run directory (write --draft=DIR), smollm2-135m (a trained one in the "
            "package, and the default for the target of that name; -plain is the other), or untrained (the default for "
            "every other).",
        ),
        Option(
            "--teacher-cache", "CACHE_DIR", None, name, "DIR",
            "Teacher cache whose held-out prompts a draft is evaluated on, offline.",
        ),
        Option("--draft-layers", "DFLASH_DRAFT_LAYERS", "2", integer(1), "N", "Layers of the untrained draft."),
        Option(
            "--draft-vocab-size", "DFLASH_DRAFT_VOCAB_SIZE", None, listed(draft_vocab), "N,all",
            "Tokens that a draft proposes, or all; by default those that it was trained with.",
        ),
        shared(TargetOptions, "dtype", "|".join(typing.get_args(Computed)), type=reader(Computed)),
        shared(TargetOptions, "tp", "N", type=integer(1)),
        shared(TargetOptions, "dp", "N", type=integer(1)),
        shared(
            PromptSource, "source", "SOURCE,SOURCE", name="--prompts", env="DFLASH_PROMPTS", type=listed(name),
            text=f"Prompt sets, or random tokens (random): {texts_of(PromptSource)['source']}",
        ),
        shared(PromptSource, "data_dir", "DIR", default=None, type=name),
        shared(PromptSource, "prompt_template", "TEXT"),
        shared(TemplateOptions, "chat_template_arg", "WORDS", default="", type=words),
        shared(TemplateOptions, "template_date", "YYYY-MM-DD"),
        Option(
            "--protocol", "DFLASH_PROTOCOL", OURS.name, one_of(*PROTOCOLS), "|".join(PROTOCOLS),
            f"zlab measures as z-lab's tables do: {ZLAB.num_prompts} prompts, up to {ZLAB.max_new_tokens} new tokens, "
            "mean by prompt; others, if given, are measured, and named in the results.",
        ),
        Option(
            "--num-prompts", "DFLASH_NUM_PROMPTS", None, integer(1), "N",
            f"Prompts of a round; by default {OURS.num_prompts}.",
        ),
        Option(
            "--category-prompts", "DFLASH_CATEGORY_PROMPTS", "2", integer(1), "N",
            "Prompts of each category whose acceptance is measured, if it has that many.",
        ),
        Option(
            "--prompt-len", "DFLASH_PROMPT_LEN", "0", listed(integer(0)), "N,N",
            "Exact lengths in tokens, of prompts made of builtin text or random tokens; 0 leaves prompts as they are.",
        ),
        Option("--batch-size", "DFLASH_BATCH_SIZE", "1", listed(integer(1)), "N,N", "Prompts decoded together."),
        Option("--block-sizes", "BLOCK_SIZES", "8", listed(integer(2)), "N,N", "Block sizes, the anchor included."),
        Option(
            "--max-new-tokens", "MAX_NEW_TOKENS_LIST", None, listed(integer(1)), "N,N",
            f"Token budgets; by default {OURS.max_new_tokens}.",
        ),
        shared(SamplingOptions, "temperature", "T"),
        shared(SamplingOptions, "top_k", "N"),
        shared(SamplingOptions, "top_p", "P"),
        shared(SamplingOptions, "min_p", "P"),
        shared(SamplingOptions, "seed", "N"),
        Option(
            "--rounds", "DFLASH_ROUNDS", "5", integer(1), "N",
            "Minimum timed rounds of each case; fewer than 3 give no interval.",
        ),
        Option(
            "--precision", "DFLASH_PRECISION", "0.05", FRACTION, "X",
            "Add rounds until the interval is narrower than this fraction of the speed-up.",
        ),
        Option(
            "--time-limit", "DFLASH_TIME_LIMIT", "10", SECONDS, "S",
            "Seconds that added rounds of a case may take; 0 adds none.",
        ),
        Option(
            "--repeat", "DFLASH_REPEAT", "1", integer(1), "N",
            "Measure decoding cases in N processes, one after the other: what changes between runs is kept with them.",
        ),
        Option(
            "--also-run-baseline", "ALSO_RUN_BASELINE", "1", one_of("0", "1", "false", "true"), "0|1",
            "0 leaves greedy out: no speed-up, no proof.",
        ),
        Option(
            "--report", "DFLASH_REPORT", None, name, "DIR",
            "Write report.html and report.md into this directory; the runs kept there are its history.",
        ),
        shared(
            ServerOptions, "server", "|".join(SERVERS), default=None,
            text=f"Measure a server too. {texts_of(ServerOptions)['server']}",
        ),
        shared(ServerOptions, "server_python", "FILE"),
        shared(ServerOptions, "server_args", "WORDS"),
        shared(ServerOptions, "draft_server_args", "WORDS"),
        shared(ServerOptions, "base_url", "URL"),
        shared(ServerOptions, "draft_base_url", "URL"),
        shared(ServerOptions, "served_model", "NAME"),
        shared(ServerOptions, "ready_timeout", "S", type=SECONDS),
        shared(ServerOptions, "server_logs", "DIR"),
        Option("--run-name", "RUN_NAME", None, name, "NAME", "Name kept in the results."),
        Option("--min-speedup", "DFLASH_MIN_SPEEDUP", None, FLOOR, "X", "Fail a draft's block cases under this."),
        Option(
            "--min-acceptance-length", "DFLASH_MIN_ACCEPTANCE_LENGTH", None, FLOOR, "X",
            "Fail a draft's cases under this.",
        ),
        Option(
            "--min-predicted-share", "DFLASH_MIN_PREDICTED_SHARE", None, FRACTION, "X",
            "Fail scripted block cases under this fraction of the speed-up that their steps predict.",
        ),
        Option(
            "--baselines", "DFLASH_BASELINES", str(root / "bench" / "baselines"), name, "DIR",
            "Directory of baselines, a file per device kind, that cases are held to.",
        ),
        Option(
            "--tolerance", "DFLASH_TOLERANCE", str(baselines.TOLERANCE), FRACTION, "X",
            "Minimum fraction that --update-baselines puts between a figure and its floor.",
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
    """Fills in from the protocol what was not asked for."""
    protocol = PROTOCOLS[options.protocol]
    options.num_prompts = options.num_prompts or protocol.num_prompts
    options.max_new_tokens = options.max_new_tokens or [protocol.max_new_tokens]


def check_lengths(options: Any) -> None:
    """Raises UsageError for --prompt-len with prompts that can't be cut: they would not have the length they claim."""
    if not any(options.prompt_len):
        return
    others = [source for source in options.prompts if source not in ("builtin", "random")]
    if others or options.raw:
        raise pytest.UsageError(
            "--prompt-len makes prompts of exactly so many tokens of builtin text in the chat template, or of random "
            f"tokens; got {'--raw' if options.raw else '--prompts ' + ','.join(others)}: leave one of them out"
        )


def check_template(options: Any) -> None:
    """Raises UsageError for options of a chat template that --raw leaves out."""
    fields = dataclasses.fields(TemplateOptions)
    given = [f"--{f.name.replace('_', '-')}" for f in fields if getattr(options, f.name) not in (f.default, "")]
    if options.raw and given:
        raise pytest.UsageError(
            f"--raw puts no chat template around the words; got {' and '.join(given)} too: leave one of them out"
        )


def protocol_name(options: Any) -> str:
    """The protocol, with every deviation from z-lab's own, so that no other figure passes for one of theirs."""
    if options.protocol == OURS.name:
        return OURS.name
    theirs = {"num_prompts": ZLAB.num_prompts, "max_new_tokens": [ZLAB.max_new_tokens]}
    others = [f"{name} {getattr(options, name)}" for name, value in theirs.items() if getattr(options, name) != value]
    return f"{ZLAB.name} with {', '.join(others)}" if others else ZLAB.name


def take_prompts(options: Any, source: str) -> PromptSet:
    """The prompts of a source that are measured. Raises PromptError."""
    return PROTOCOLS[options.protocol].take(open_prompts(options, source), options.num_prompts)


FLAGS = {
    "--raw": texts_of(PromptSource)["raw"],
    "--aot-grid": "tests/aot: compile every program for every topology, not only those that say most.",
    "--offline": texts_of(ServerOptions)["offline"],
    "--resume": "Take over the cases that an earlier run with the same --benchmark-json or --report measured already.",
    "--update-baselines": "Write this run's cases as baselines instead.",
    "--require-baseline": "Fail unless every case has a baseline and passes it.",
}


def add_options(parser: pytest.Parser, root: Path) -> None:
    """Adds every option of ours to pytest; `root` as for `all_options`."""
    group = parser.getgroup("dflash", "DFlash decoding and its measurement")
    for option in all_options(root):
        value = option.unless_given
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
