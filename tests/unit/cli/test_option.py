"""Options that a command would ignore are refused, named as they were written, before anything is read or made."""

import dataclasses
import sys
from typing import Annotated

import pytest
import tyro

from dflash.cli import main as cli
from dflash.cli.option import given_options, refuse_unused
from dflash.config import ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inner:
    width: Annotated[int, tyro.conf.arg(name="line-width")] = 3
    loud: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outer:
    place: Annotated[str, tyro.conf.Positional]
    first_rows: tuple[int, ...] = ()
    inner: tyro.conf.OmitArgPrefixes[Inner] = dataclasses.field(default_factory=lambda: Inner(width=7))
    bare: tyro.conf.OmitArgPrefixes[Inner]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Alone:
    rows: int = 1
    inner: tyro.conf.OmitArgPrefixes[Inner] = dataclasses.field(default_factory=lambda: Inner(width=7))


def test_an_option_is_spelled_and_compared_as_the_command_has_it():
    assert given_options(Alone()) == {}
    # The command's own default is 7, and 3 was asked for.
    assert given_options(Alone(rows=1, inner=Inner())) == {"width": "--line-width"}
    several = Outer(place="x", first_rows=(2,), bare=Inner(loud=True))
    assert given_options(several) == {"place": "--place", "first_rows": "--first-rows", "loud": "--loud"}


def test_one_is_left_out_and_several_are():
    refuse_unused(Alone(), ["rows", "width", "loud"], "for nothing")
    with pytest.raises(ConfigError, match=r"^--loud is for shouting: leave it out$"):
        refuse_unused(Alone(inner=Inner(width=7, loud=True)), ["rows", "width", "loud"], "for shouting")
    with pytest.raises(ConfigError, match=r"^--rows, --line-width are for tables: leave them out$"):
        refuse_unused(Alone(rows=2, inner=Inner(width=1)), ["rows", "width"], "for tables")


@pytest.fixture
def said(monkeypatch, tmp_path, capsys):
    """The one line that a refused command says; it makes no file."""

    def said(*words):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["dflash", *words])
        assert cli.main() == 2
        out, err = capsys.readouterr()
        assert (out, err.count("\n")) == ("", 1)
        assert not any(tmp_path.iterdir())
        return err

    return said


GENERATE = "generate hi --target nowhere"
OF_WINDOWS = {
    "--ctx-len": "20",
    "--block-size": "4",
    "--num-blocks": "3",
    "--rollout-steps": "2",
    "--rollout-accept-len-mode": "uniform",
    "--rollout-accept-len-p": "0.5",
    "--position-offset-mode": "cycle_samples",
}
UNUSED = [
    (f"{GENERATE} --block-size 5", "--block-size is for a draft"),
    (f"{GENERATE} --mode greedy --block-size 5 --draft-vocab-size 9", "--block-size, --draft-vocab-size are for"),
    ("generate hi --mode greedy --block-size 3", "--block-size is for a draft"),
    (f"{GENERATE} --raw --system foo", "--system is for a chat"),
    (f"{GENERATE} --raw --chat-template-arg a=1", "--chat-template-arg is for a chat template"),
    (f"{GENERATE} --raw --template-date 2026-03-04", "--template-date is for a chat template"),
    ("serve-bench --server vllm --block-size 4", "--block-size is for a draft"),
    ("serve-bench --server vllm --draft-server-args=--x", "--draft-server-args is for a draft"),
    ("serve-bench --base-url http://127.0.0.1:1 --ready-timeout 3 --server-logs l", "--ready-timeout, --server-logs"),
    ("serve-bench --base-url http://127.0.0.1:1 --raw --chat-template-arg a=1", "--chat-template-arg is for a chat"),
    ("audit --target nowhere --raw --chat-template-arg a=1", "--chat-template-arg is for a chat template"),
    ("export d out --verifier a/b", "--verifier is for --format speculators, and this one is z-lab"),
    ("export d out --format sglang-jax --verifier a/b", "and this one is sglang-jax"),
    ("train c r --draft-layers 1 --conv-group-size 7", "--conv-group-size is for a DFlash 2 draft"),
    ("train c r --architecture dflash --selector-rank 7", "--selector-rank is for a DFlash 2 draft"),
    ("train c r --selector-top-k 7 --conv-kernel-size 4", "--conv-kernel-size, --selector-top-k are for a DFlash 2"),
    ("train c r --init-from d --draft-layers 3", "--draft-layers is for a new draft, and d is one already: leave it"),
    ("train c r --init-from d --init-layers 1 --mask-token-id 2", "--init-layers, --mask-token-id are for a new draft"),
    ("train c r --decay-gamma 3", "--decay-gamma is for --position-weights decay, and these are dpace"),
    ("train c r --position-weights decay --dpace-alpha 0.3", "--dpace-alpha is for --position-weights dpace"),
    ("build-cache c --raw", "--raw is for given prompts"),
    ("build-cache c --prompt-template {q}", "--prompt-template is for given prompts"),
    ("build-cache c --prompts builtin --raw --chat-template-arg a=1", "--chat-template-arg is for a chat template"),
    ("build-cache c --prompts p.jsonl --answers given --temperature 1", "--temperature is for answers that the target"),
    *((f"build-cache c {name} {value}", f"{name} is for --form windows") for name, value in OF_WINDOWS.items()),
    ("build-cache c --form windows --rollout-accept-len-mode uniform", "-mode is for --rollout-steps above 1"),
    (
        "build-cache c --form windows --rollout-steps 2 --rollout-accept-len-mode uniform --rollout-accept-len-p 0.5",
        "--rollout-accept-len-p is for --rollout-accept-len-mode geometric, and this is uniform",
    ),
    ("build-cache c --form windows --position-offset-mode cycle_samples", "is for several --position-offsets"),
]  # fmt: skip


@pytest.mark.parametrize(("words", "expected"), UNUSED, ids=[words for words, _ in UNUSED])
def test_what_would_be_ignored_is_refused(said, words, expected):
    assert expected in said(*words.split())


USED = (
    "generate hi --block-size 4 --system foo --chat-template-arg a=1",
    "generate hi --target nowhere --draft untrained --block-size 4 --temperature 0.5 --top-k 5 --min-p 0.1",
    "generate hi --mode greedy --raw --seed 3 --show-special",
    "serve-bench --server vllm --draft d --block-size 4 --draft-server-args=--x --server-python p",
    "serve-bench --base-url u --raw --temperature 1 --top-k 3 --min-speedup 1",
    "train c r --architecture dflash2 --conv-group-size 7 --selector-rank 3 --draft-layers 4",
    "train c r --init-from d --architecture dflash --block-size 4 --draft-vocab-size 9 --evaluate-every 3",
    "train c r --position-weights decay --decay-gamma 3",
    "train c r --dpace-alpha 0.3 --trainer easydel",
    "build-cache c --openings none --prompt-temperature 0.5 --max-user-turn 9 --top-k 5 --position-offsets 0 8",
    "build-cache c --prompts p.jsonl --raw --temperature 1 --top-k 5",
    "build-cache c --prompts p.jsonl --answers given --chat-template-arg a=1 --data-dir d",
    "build-cache c --prompt-temperature 0 --temperature 1 --min-p 0.3 --target-layer-ids 0 1",
    "build-cache c --form windows --ctx-len 9 --block-size 4 --num-blocks 3 --position-offsets 0 9 --rollout-steps 2 "
    "--position-offset-mode cycle_samples --rollout-accept-len-mode geometric --rollout-accept-len-p 0.5",
)


def read(words):
    """The module of a command, and its arguments."""
    command = cli.read_command(words)
    (arguments,) = [*command.args, *command.keywords.values()]
    return sys.modules[command.func.__module__], arguments


@pytest.mark.parametrize("words", USED)
def test_what_applies_is_not(words):
    module, arguments = read(words.split())
    module._check_unused(arguments)


@pytest.mark.parametrize("root", ["cache", "cache/runs", "cache/../cache/a/b", "link"])
def test_no_run_is_written_into_its_cache(said, tmp_path_factory, root):
    folder = tmp_path_factory.mktemp("made")
    (folder / "cache").mkdir()
    (folder / "link").symlink_to(folder / "cache")
    line = said("train", str(folder / "cache"), str(folder / root))
    assert "a run is kept outside of the teacher cache" in line
    assert "name another directory" in line
    assert not any((folder / "cache").iterdir())


def test_beside_its_cache_a_run_may_lie():
    for cache, root in (("cache", "cache-runs"), ("work/cache", "work/runs"), ("runs/cache", "runs")):
        module, arguments = read(["train", cache, root])
        module._check_places(arguments.cache_dir, arguments.run.root)


def test_choices_are_named_without_the_word_for_none_of_them(said):
    for words, choices in (
        ("generate hi --dtype float16", {"'float32'", "'bfloat16'"}),
        ("train c r --architecture dflash3", {"'dflash'", "'dflash2'"}),
    ):
        line = said(*words.split())
        listed = line.partition("Expected one of (")[2].partition(")")[0]
        assert set(listed.split(", ")) == choices
