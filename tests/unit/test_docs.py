"""The documentation: its links lead somewhere, its commands exist, and its picture of the layers is the contract's."""

import importlib
import re
import shlex
import sys
import tomllib
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from dflash.cli import main as cli

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
SVG = "{http://www.w3.org/2000/svg}"


def named(page):
    return str(page.relative_to(ROOT))


def headings(page):
    """The anchors that GitHub gives to a page's headings."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in re.findall(r"^#+ (.+)$", text, re.MULTILINE)}


def commands(text):
    """The commands in a page's fenced sh blocks, as words: those of this project's command line, and of pytest."""
    for block in re.findall(r"^```sh\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        for line in re.split(r"\n|&&", block.replace("\\\n", " ")):
            words = shlex.split(line, comments=True)
            for program in ("dflash", "pytest"):
                place = next((i for i, word in enumerate(words) if Path(word).name == program), None)
                if place is not None:
                    yield program, words[place + 1 :]


def options(words):
    return [word.partition("=")[0] for word in words if word.startswith("--")]


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_links_lead_to_files_and_headings(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if "://" in link:
            continue
        path, _, heading = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        assert not heading or heading in headings(target), link


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_what_a_page_names_exists(page):
    text = page.read_text(encoding="utf-8")
    paths = re.findall(r"`((?:dflash|tests|docs)/[\w./-]+|bench/[\w/]+\.py|\.github/[\w./-]+)`", text)
    assert [p for p in paths if not (ROOT / p).exists()] == []
    for name in re.findall(r"`(dflash(?:\.[a-zA-Z_]\w*)+)[`(]", text):
        importable(name)


def importable(name):
    """The module or attribute of this dotted name; an error where there is none."""
    module, *rest = name.split(".")
    thing = importlib.import_module(module)
    for part in rest:
        module = f"{module}.{part}"
        thing = getattr(thing, part) if hasattr(thing, part) else importlib.import_module(module)
    return thing


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_commands_are_read_as_a_page_writes_them(page, pytestconfig):
    for program, words in commands(page.read_text(encoding="utf-8")):
        if program == "dflash":
            command = cli.read_command(words)
            # What a page shows ignores none of its own options.
            if check := getattr(sys.modules[command.func.__module__], "_check_unused", None):
                check(*command.args, *command.keywords.values())
        for option in options(words) if program == "pytest" else []:
            pytestconfig.getoption(option)


def test_the_readme_is_short_and_holds_the_commands_that_ci_runs():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert text.count("\n") <= 120
    for mark in ("main-job", "tests"):
        assert re.search(rf"^<!-- {mark} -->\n```sh\n.+\n```$", text, re.MULTILINE)


def test_the_picture_of_the_layers_is_the_contract_of_imports():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    (contract,) = project["tool"]["importlinter"]["contracts"]
    layers = [{room.strip() for room in re.split(r"[|:]", layer)} for layer in contract["layers"]]
    floors = {}
    for text in ElementTree.parse(ROOT / "docs" / "pictures" / "house.svg").iter(f"{SVG}text"):
        if text.get("class") == "h":
            floors.setdefault(float(text.get("y")), set()).add(text.text)
    assert [floors[y] for y in sorted(floors)] == [{"bench", "tests"}, *layers]


@pytest.mark.parametrize("picture", sorted((ROOT / "docs" / "pictures").glob("*.svg")), ids=named)
def test_a_picture_stands_alone_and_knows_dark_and_light(picture):
    root = ElementTree.parse(picture).getroot()
    assert root.find(f"{SVG}title").text
    text = picture.read_text(encoding="utf-8")
    assert "prefers-color-scheme: dark" in text
    assert re.findall(r"https?://[^\"]+", text) == ["http://www.w3.org/2000/svg"]
    page = {p.name for p in PAGES if f"pictures/{picture.name}" in p.read_text(encoding="utf-8")}
    assert page
