"""Options of pytest: their defaults, what the environment and the command line make of them, what is refused."""

import dataclasses
import random
from pathlib import Path

import pytest

from dflash.cli.pytest_options import (
    add_options,
    all_options,
    apply_protocol,
    check_lengths,
    check_template,
    protocol_name,
    take_prompts,
    texts_of,
)
from dflash.decoding.sampling import SamplingOptions
from dflash.measuring.cases import cases, drafts


@pytest.fixture
def parse(monkeypatch):
    """Parses a command line with pytest's own parser. `env` is the environment, of our names."""
    names = ("TEACHER_SNAPSHOT_DIR", "DRAFT_RUN_DIR", "BLOCK_SIZES", "MAX_NEW_TOKENS_LIST", "DFLASH_RUN_ON")
    for name in (*names, "DFLASH_TIME_LIMIT", "DFLASH_NUM_PROMPTS", "DFLASH_PROTOCOL"):
        monkeypatch.delenv(name, raising=False)

    def parse(*arguments, **env):
        for name, value in env.items():
            monkeypatch.setenv(name, value)
        parser = pytest.Parser(_ispytest=True)
        add_options(parser, Path("root"))
        options = parser.parse(arguments)
        apply_protocol(options)
        return options

    return parse


@pytest.mark.parametrize(
    ("arguments", "env", "message"),
    [
        (["--block-sizes=1"], {}, r"--block-sizes: .*\b2, got '1'"),
        ([], {"BLOCK_SIZES": "8;16"}, r"--block-sizes: .*\b2, got '8;16'"),
        (["--min-speedup=fast"], {}, "--min-speedup: .*above 0, got 'fast'"),
        (["--batch-size=1,x"], {}, r"--batch-size: .*\b1, got 'x'"),
        (["--prompts=builtin,"], {}, "--prompts: .*name, got ''"),
        (["--rounds=0"], {}, r"--rounds: .*\b1, got '0'"),
        (["--precision=5%"], {}, "--precision: .*0 to below 1, got '5%'"),
        ([], {"DFLASH_TIME_LIMIT": "nan"}, "--time-limit: .*seconds.*got 'nan'"),
        ([], {"DFLASH_RUN_ON": "npu"}, "--run-on: .*cpu, gpu, tpu, got 'npu'"),
        (["--run-on=npu"], {}, "--run-on: .*cpu, gpu, tpu, got 'npu'"),
    ],
    ids=["block", "block-env", "floor", "batch", "prompts", "rounds", "precision", "time", "device-env", "device"],
)
def test_bad_options_are_usage_errors(parse, arguments, env, message):
    with pytest.raises(pytest.UsageError, match=message):
        parse(*arguments, **env)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--prompt-len=0,512", "--prompts=builtin,gsm8k"], "got --prompts gsm8k:"),
        (["--prompt-len=512", "--prompts=builtin:maths"], "got --prompts builtin:maths:"),
        (["--prompt-len=512", "--raw"], "got --raw:"),
    ],
)
def test_exact_lengths_are_of_builtin_text_or_random_tokens(parse, arguments, said):
    for good in (["--prompt-len=512", "--prompts=builtin,random"], ["--prompts=gsm8k", "--raw"]):
        check_lengths(parse(*good))
    with pytest.raises(pytest.UsageError, match=said):
        check_lengths(parse(*arguments))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--raw", "--chat-template-arg=a=1"], "got --chat-template-arg too"),
        (["--raw", "--template-date=2026-03-04", "--chat-template-arg=a=1"], "--chat-template-arg and --template-date"),
    ],
)
def test_what_is_for_a_chat_template_is_not_for_plain_text(parse, arguments, said):
    for good in ([], ["--raw"], arguments[1:]):
        check_template(parse(*good))
    with pytest.raises(pytest.UsageError, match=said):
        check_template(parse(*arguments))


def test_help_shows_no_secret_of_the_environment(monkeypatch):
    monkeypatch.setenv("DFLASH_BASE_URL", "http://me:abcdefgh@host:1")
    monkeypatch.setenv("DFLASH_SERVER_ARGS", "--tp 2 --api-key abcdefgh")
    parser = pytest.Parser(_ispytest=True)
    add_options(parser, Path("root"))
    told = {option.names()[0]: option.attrs()["help"] for option in parser.getgroup("dflash").options}
    assert "now 'http://***@host:1'" in told["--base-url"]
    assert "now '--tp 2 --api-key ***'" in told["--server-args"]
    assert "now 'tpu'" in told["--run-on"]


def test_the_protocol_of_z_lab_has_its_own_prompts_and_budget(parse, tmp_path):
    ours, theirs = parse(), parse("--protocol=zlab")
    assert (ours.num_prompts, ours.max_new_tokens, protocol_name(ours)) == (8, [64], "dflash")
    assert (theirs.num_prompts, theirs.max_new_tokens, protocol_name(theirs)) == (128, [2048], "zlab")
    for count in (100, 300):
        file = tmp_path / f"{count}.jsonl"
        file.write_text("".join(f'{{"prompt": "{i}?", "id": {i}}}\n' for i in range(count)))
    # All of a smaller set as it is; of a larger one the first of the shuffle.
    assert [p.id for p in take_prompts(theirs, str(tmp_path / "100.jsonl")).prompts] == [str(i) for i in range(100)]
    order = list(range(300))
    random.Random(42).shuffle(order)
    taken = take_prompts(theirs, str(tmp_path / "300.jsonl")).prompts
    assert [p.id for p in taken] == [str(i) for i in order[:128]]
    assert len(take_prompts(ours, "builtin").prompts) == 8
    few = take_prompts(parse("--protocol=zlab", "--num-prompts=3"), str(tmp_path / "300.jsonl")).prompts
    assert [p.id for p in few] == [str(i) for i in order[:3]]


@pytest.mark.parametrize(
    ("arguments", "env", "measured", "recorded"),
    [
        (["--max-new-tokens=64"], {}, (128, [64]), "zlab with max_new_tokens [64]"),
        (["--num-prompts=8"], {}, (8, [2048]), "zlab with num_prompts 8"),
        (["--num-prompts=128", "--max-new-tokens=2048"], {}, (128, [2048]), "zlab"),
        ([], {"MAX_NEW_TOKENS_LIST": "64,2048"}, (128, [64, 2048]), "zlab with max_new_tokens [64, 2048]"),
        (["--max-new-tokens=2048"], {"DFLASH_NUM_PROMPTS": "9"}, (9, [2048]), "zlab with num_prompts 9"),
    ],
    ids=["budget", "prompts", "the-same", "budget-env", "prompts-env"],
)
def test_what_is_asked_for_beside_the_protocol_is_measured_and_recorded(parse, arguments, env, measured, recorded):
    options = parse("--protocol=zlab", *arguments, **env)
    assert (options.num_prompts, options.max_new_tokens) == measured
    assert protocol_name(options) == recorded
    assert protocol_name(parse(*arguments, "--protocol=dflash", **env)) == "dflash"


def test_an_option_of_the_commands_too_has_their_default_and_their_words():
    options = {option.name: option for option in all_options(Path("root"))}
    told = texts_of(SamplingOptions)
    assert told["seed"] == "Seed of the draws."
    for field in dataclasses.fields(SamplingOptions):
        option = options[f"--{field.name.replace('_', '-')}"]
        assert (option.type(option.default), option.text) == (field.default, told[field.name])


NUMBERS = [option.name for option in all_options(Path("root")) if option.metavar in ("N", "N,N", "X", "S")]
TEXTS = [
    option.name for option in all_options(Path("root")) if option.metavar in ("DIR", "DIR,DIR", "FILE", "SOURCE,SOURCE")
]


@pytest.mark.parametrize("value", ["-1", "1e30", str(10**30), "nan", "inf", "", "x"])
@pytest.mark.parametrize("name", NUMBERS)
def test_no_option_takes_what_is_no_number_of_its_kind(parse, name, value):
    with pytest.raises(pytest.UsageError, match="expected") as error:
        parse(f"{name}={value}")
    assert "\n" not in str(error.value).partition("error: ")[2].strip()


@pytest.mark.parametrize("name", TEXTS)
def test_no_name_is_empty(parse, name):
    with pytest.raises(pytest.UsageError, match=f"{name}: expected a name"):
        parse(f"{name}=")


def test_what_is_not_given_is_none(parse):
    options = parse()
    assert options.report is options.min_speedup is options.server is options.require_device is options.draft is None


def test_the_command_line_comes_before_the_environment_and_that_before_the_default(parse):
    assert parse().block_sizes == [8]
    assert parse(BLOCK_SIZES="4,16,4").block_sizes == [4, 16]
    assert parse("--block-sizes=2", BLOCK_SIZES="4,16").block_sizes == [2]
    assert parse().baselines == str(Path("root", "bench", "baselines"))


@pytest.mark.parametrize(
    ("arguments", "env", "proposers"),
    [
        ([], {}, {"draft", "a3", "a7"}),
        (["--target=DIR"], {}, {"untrained", "a3", "a7"}),
        (["--draft=untrained"], {}, {"untrained", "a3", "a7"}),
        ([], {"DRAFT_RUN_DIR": "untrained,DIR"}, {"untrained", "draft", "a3", "a7"}),
    ],
    ids=["built-in", "another-target", "option", "environment"],
)
def test_the_built_in_target_is_measured_with_its_draft(parse, arguments, env, proposers):
    """Unless another is named; other targets come without one."""
    options = parse(*arguments, **env)
    assert {case.id.rpartition("-")[2] for case in cases(options)} == proposers
    assert ("smollm2-135m" in drafts(options)) == (not arguments and not env)
