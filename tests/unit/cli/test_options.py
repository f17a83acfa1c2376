"""Every number among the options of every command: what is none of its kind is one sentence, and nothing starts."""

import dataclasses
import functools
import typing

import pytest

from dflash.cli import main as cli
from dflash.config import Checked, ConfigError, Range

VALUES = ("-1", "0", str(10**30), "nan", "", "x")


def numbers(kind, name=""):
    """The numbers of a type: whether they are whole, and their Range; nothing for any other type."""
    if kind in (int, float):
        return [(kind, None)]
    parts = typing.get_args(kind)
    inner = [found for part in parts for found in numbers(part)]
    ranges = [part for part in parts if isinstance(part, Range)]
    return [(inner[0][0], ranges[0])] if ranges else inner


def options(kind):
    """(option, whole or not, Range) for every number that a dataclass of options takes, nested ones too."""
    for field, hint in typing.get_type_hints(kind, include_extras=True).items():
        parts = [hint, *typing.get_args(hint)]
        nested = [part for part in parts if isinstance(part, type) and dataclasses.is_dataclass(part)]
        for part in nested:
            yield from options(part)
        if not nested:
            names = [part.name for part in parts if getattr(part, "name", None)]
            for number, reach in numbers(hint):
                yield (names or [field])[0].replace("_", "-"), number, reach


def arguments(command):
    (hint,) = [h for n, h in typing.get_type_hints(cli.COMMANDS[command]).items() if n != "return"]
    return hint


NUMBERS = [(command, *option) for command in cli.COMMANDS for option in options(arguments(command))]


@pytest.fixture
def started(monkeypatch, tmp_path, capsys):
    """Runs a command line whose command only says that it started: its arguments, or None and stderr."""

    def run(command, *words):
        starts = []

        def start(args):
            starts.append(args)

        stub = functools.wraps(cli.COMMANDS[command])(start)
        # A parser is made of every command, so only of two.
        other = "doctor" if command == "report" else "report"
        monkeypatch.setattr(cli, "COMMANDS", {command: stub, other: cli.COMMANDS[other]})
        monkeypatch.setattr("sys.argv", ["dflash", command, *words])
        monkeypatch.chdir(tmp_path)
        code = cli.main()
        assert code == (0 if starts else 2)
        assert not any(tmp_path.iterdir())
        return (starts or [None])[0], capsys.readouterr().err

    return run


NEEDED = {"generate": "ask", "build-cache": "c", "train": "c r", "evaluate": "c d", "plan": "--target qwen3-8b"}


def read(number, value):
    try:
        return number(value)
    except ValueError:
        return None


def test_there_are_options_to_look_at():
    assert {"generate", "train", "build-cache", "plan", "serve-bench", "audit"} <= {command for command, *_ in NUMBERS}
    assert len(NUMBERS) > 60
    assert [name for name in NUMBERS if name[3] is None] == []


@pytest.mark.parametrize(
    ("command", "option", "number", "reach"), NUMBERS, ids=[f"{words[0]}-{words[1]}" for words in NUMBERS]
)
def test_no_option_takes_what_is_no_number_of_its_kind(started, monkeypatch, command, option, number, reach):
    commands = cli.COMMANDS
    for value in VALUES:
        monkeypatch.setattr(cli, "COMMANDS", commands)
        args, err = started(command, *NEEDED.get(command, "").split(), f"--{option}={value}")
        meant = read(number, value)
        if meant is not None and not reach.rule(meant):
            assert args is not None, err
        else:
            assert args is None, value
            assert err.startswith("dflash: ")
            assert err.count("\n") == 1
            assert "Traceback" not in err
            assert option.replace("-", "_") in err.replace("-", "_")


@dataclasses.dataclass(frozen=True)
class Sizes(Checked):
    rows: typing.Annotated[int, Range(1)] | None = None
    share: typing.Annotated[float, Range(0, 1, above=True, below=True)] = 0.5
    places: tuple[typing.Annotated[int, Range(0, 3)], ...] = ()
    width: typing.Annotated[int, Range(1)] | typing.Literal["auto"] = "auto"


def test_all_faults_of_a_config_are_told_at_once():
    assert Sizes(rows=1, share=0.1, places=(0, 3), width=2).places == (0, 3)
    with pytest.raises(ConfigError) as error:
        Sizes(rows=0, share=float("nan"), places=(1, 4, -1), width="most")
    assert [fault.split(" must be ") for fault in str(error.value).split("; ")] == [
        ["rows", "at least 1, got 0"],
        ["share", "above 0, got nan"],
        ["places", "at most 3, got 4"],
        ["places", "at least 0, got -1"],
        ["width", "an integer, got 'most'"],
    ]


@pytest.mark.parametrize("share", [0, 1])
def test_the_ends_of_an_open_range_are_outside(share):
    with pytest.raises(ConfigError, match="share must be"):
        Sizes(share=share)
