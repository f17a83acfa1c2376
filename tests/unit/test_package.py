"""What pip installs: the version, the command, and every file that the package reads."""

import re
import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path

import dflash

PACKAGE = Path(dflash.__file__).parent
PYPROJECT = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text(encoding="utf-8"))


def data_files():
    """Files of the package that are not modules, and are not made by running it."""
    made = {"__pycache__", ".DS_Store"}
    return {p for p in PACKAGE.rglob("*") if p.is_file() and p.suffix != ".py" and not made & set(p.parts)}


def test_the_version_is_a_release_number():
    assert re.fullmatch(r"\d+\.\d+\.\d+", dflash.__version__)
    assert PYPROJECT["tool"]["setuptools"]["dynamic"]["version"]["attr"] == "dflash.__version__"


def test_the_command_is_a_function_that_exists():
    (name, value), *others = PYPROJECT["project"]["scripts"].items()
    assert (name, others) == ("dflash", [])
    assert callable(EntryPoint(name, value, "console_scripts").load())


def test_every_data_file_is_packaged():
    patterns = PYPROJECT["tool"]["setuptools"]["package-data"]["dflash"]
    packaged = {p for pattern in patterns for p in PACKAGE.glob(pattern)}
    assert PACKAGE / "py.typed" in packaged
    assert data_files() - packaged == set()


def test_every_pattern_of_data_files_matches_something():
    patterns = PYPROJECT["tool"]["setuptools"]["package-data"]["dflash"]
    assert [p for p in patterns if not any(PACKAGE.glob(p))] == []


def test_the_license_is_the_one_that_is_stated():
    assert PYPROJECT["project"]["license"] == "Apache-2.0"
    text = (PACKAGE.parent / "LICENSE").read_text(encoding="utf-8")
    assert "Apache License" in text.splitlines()[0]
    assert "END OF TERMS AND CONDITIONS" in text
