"""The trained draft that comes with the project, opened as a stranger would: whole, small, and true to its record.

Nothing here is skipped where it is missing: a checkout without it is broken.
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
from dflash.weights.load import SHIPPED_DRAFT, draft_directory, draft_hash
from dflash.weights.snapshot import read_json, snapshot_hash, target_config

PACKAGE = SHIPPED_DRAFT.parents[1]
LARGEST = 40_000_000
HASH = re.compile(r"\b[0-9a-f]{64}\b")
# At the start, or behind what may stand before a path; a URL's slashes follow a colon, a fraction's a digit.
ABSOLUTE = re.compile(r"""(?:^|[\s"'`=(\[])(?:/\w|~/|[A-Za-z]:\\)""", re.MULTILINE)


def record():
    return json.loads((SHIPPED_DRAFT / "training.json").read_text(encoding="utf-8"))


def files():
    return {p for p in SHIPPED_DRAFT.rglob("*") if p.is_file()}


def config():
    return read_draft_config(read_json(SHIPPED_DRAFT, "config.json"), str(SHIPPED_DRAFT))


def test_it_is_found_by_its_name_and_whole():
    assert draft_directory("smollm2-135m") == SHIPPED_DRAFT
    assert {"README.md", "config.json", "training.json"} <= {p.name for p in SHIPPED_DRAFT.iterdir()}
    check_draft_tensors(SHIPPED_DRAFT, config())


def test_it_is_small():
    assert 0 < sum(p.stat().st_size for p in files()) <= LARGEST


def test_a_wheel_holds_all_of_it():
    project = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text(encoding="utf-8"))
    patterns = project["tool"]["setuptools"]["package-data"]["dflash"]
    assert set() < files() <= {p for pattern in patterns for p in PACKAGE.glob(pattern)}


def test_its_record_is_of_these_weights():
    assert record()["draft_sha256"] == draft_hash("smollm2-135m")


def test_its_record_says_how_it_was_trained():
    told = record()
    read = told["provenance"]
    assert HASH.fullmatch(read["cache_sha256"])
    assert HASH.fullmatch(read["snapshot_sha256"])
    for side in ("train", "held_out"):
        assert HASH.fullmatch(read["split"][side]["sha256"])
        assert read["split"][side]["num_prompts"] > 0
    assert {"steps", "batch_size", "learning_rate", "seed"} <= told["train"].keys()
    assert told["step"] > 0


def test_its_readme_names_only_hashes_of_its_record():
    known = set(HASH.findall(json.dumps(record())))
    assert set(HASH.findall((SHIPPED_DRAFT / "README.md").read_text(encoding="utf-8"))) <= known


@pytest.mark.parametrize("name", ["README.md", "config.json", "training.json"])
def test_it_names_no_path_of_a_machine(name):
    text = (SHIPPED_DRAFT / name).read_text(encoding="utf-8")
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
def test_it_fits_the_target_that_it_was_trained_for(smollm2):
    check_draft(config(), target_config(smollm2))
    assert record()["provenance"]["snapshot_sha256"] == snapshot_hash(smollm2)


@pytest.mark.slow
@pytest.mark.model
def test_it_decodes_losslessly_and_is_accepted(smollm2):
    target, tokenizer = load_target(smollm2), load_tokenizer(smollm2)
    prompts = load_prompts("builtin").take(4).encode(tokenizer)
    asked = {"max_new_tokens": 64, "stop_token_ids": tokenizer.stop_token_ids}
    expected = decode(target, None, prompts, mode="greedy", **asked)
    found = {}
    for name, draft in (("trained", load_draft("smollm2-135m", target)), ("untrained", init_draft(target))):
        result = decode(target, draft, prompts, mode="cached_block_verify", **asked)
        assert result.tokens == expected.tokens
        found[name] = result.metrics["acceptance_length"]
    assert found["trained"] > 1.5 > found["untrained"]
