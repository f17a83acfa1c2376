"""The trained drafts that come with the project, opened as a stranger would: whole, small, and true to their records.

Nothing here is skipped where one is missing: a checkout without it is broken.
"""

import json
import re
import tomllib

import pytest

from dflash import decode, init_draft, load_draft, load_target, load_tokenizer
from dflash.config import check_draft
from dflash.text.prompts import load_prompts
from dflash.weights.config_json import read_draft_config
from dflash.weights.huggingface import check_draft_tensors
from dflash.weights.load import SHIPPED_DRAFTS, draft_directory, draft_hash
from dflash.weights.snapshot import read_json, snapshot_hash, target_config

PACKAGE = SHIPPED_DRAFTS["smollm2-135m"].parents[1]
LARGEST = 40_000_000
HASH = re.compile(r"\b[0-9a-f]{64}\b")
# At the start, or behind what may stand before a path; a URL's slashes follow a colon, a fraction's a digit.
ABSOLUTE = re.compile(r"""(?:^|[\s"'`=(\[])(?:/\w|~/|[A-Za-z]:\\)""", re.MULTILINE)


@pytest.fixture(params=SHIPPED_DRAFTS)
def name(request):
    return request.param


def record(name):
    return json.loads((SHIPPED_DRAFTS[name] / "training.json").read_text(encoding="utf-8"))


def files(name):
    return {p for p in SHIPPED_DRAFTS[name].rglob("*") if p.is_file()}


def config(name):
    return read_draft_config(read_json(SHIPPED_DRAFTS[name], "config.json"), str(SHIPPED_DRAFTS[name]))


def test_it_is_found_by_its_name_and_whole(name):
    assert draft_directory(name) == SHIPPED_DRAFTS[name]
    assert {"README.md", "config.json", "training.json"} <= {p.name for p in SHIPPED_DRAFTS[name].iterdir()}
    check_draft_tensors(SHIPPED_DRAFTS[name], config(name))


def test_one_of_them_is_for_servers():
    """They know no DFlash 2."""
    plain = config("smollm2-135m-plain")
    assert (plain.conv, plain.selector) == (None, None)


def test_it_is_small(name):
    assert 0 < sum(p.stat().st_size for p in files(name)) <= LARGEST


def test_a_wheel_holds_all_of_it(name):
    project = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text(encoding="utf-8"))
    patterns = project["tool"]["setuptools"]["package-data"]["dflash"]
    assert set() < files(name) <= {p for pattern in patterns for p in PACKAGE.glob(pattern)}


def test_its_record_is_of_these_weights(name):
    assert record(name)["draft_sha256"] == draft_hash(name)


def test_its_record_says_how_it_was_trained(name):
    told = record(name)
    read = told["provenance"]
    assert HASH.fullmatch(read["cache_sha256"])
    assert HASH.fullmatch(read["snapshot_sha256"])
    for side in ("train", "held_out"):
        assert HASH.fullmatch(read["split"][side]["sha256"])
        assert read["split"][side]["num_prompts"] > 0
    assert {"steps", "batch_size", "learning_rate", "seed"} <= told["train"].keys()
    assert told["step"] > 0


def test_its_readme_names_only_hashes_of_its_record(name):
    known = set(HASH.findall(json.dumps(record(name))))
    assert set(HASH.findall((SHIPPED_DRAFTS[name] / "README.md").read_text(encoding="utf-8"))) <= known


@pytest.mark.parametrize("file", ["README.md", "config.json", "training.json"])
def test_it_names_no_path_of_a_machine(name, file):
    text = (SHIPPED_DRAFTS[name] / file).read_text(encoding="utf-8")
    assert not ABSOLUTE.findall(text)


@pytest.mark.parametrize(
    ("text", "absolute"),
    [
        ('"/home/somebody/cache"', True),
        ("train --cache=/data", True),
        ("in `/data/x`", True),
        ("C:\\runs", True),
        ("~/runs", True),
        ("https://arxiv.org/abs/2502.14856", False),
        ("dflash/data/x 1/2, and/or", False),
    ],
)
def test_a_path_of_a_machine_would_be_noticed(text, absolute):
    assert bool(ABSOLUTE.search(text)) == absolute


@pytest.mark.model
def test_it_fits_the_target_that_it_was_trained_for(smollm2, name):
    check_draft(config(name), target_config(smollm2))
    assert record(name)["provenance"]["snapshot_sha256"] == snapshot_hash(smollm2)


@pytest.mark.slow
@pytest.mark.model
def test_it_decodes_losslessly_and_is_accepted(smollm2, name):
    target, tokenizer = load_target(smollm2), load_tokenizer(smollm2)
    prompts = load_prompts("builtin").take(4).encode(tokenizer)
    asked = {"max_new_tokens": 64, "stop_token_ids": tokenizer.stop_token_ids}
    expected = decode(target, None, prompts, mode="greedy", **asked)
    found = {}
    for which, draft in (("trained", load_draft(name, target)), ("untrained", init_draft(target))):
        result = decode(target, draft, prompts, mode="cached_block_verify", **asked)
        assert result.tokens == expected.tokens
        found[which] = result.metrics["acceptance_length"]
    assert found["trained"] > 1.5 > found["untrained"]
