"""The recipes of docs/tpu.md, command by command as they stand there: small models and numbers, eight CPU devices."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import dflash
from dflash.weights.config_json import read_target_shape
from dflash.weights.export import check_directory
from dflash.weights.snapshot import read_json
from dflash.weights.tiny import CHAT_TEMPLATE, write_tiny_target, write_tiny_tokenizer

pytestmark = pytest.mark.slow
ROOT = Path(dflash.__file__).parents[1]
PAGE = (ROOT / "docs" / "tpu.md").read_text()
RECIPES = {
    "gpt-oss-20b": ("## GPT-OSS-20B, from snapshot to gate", "gpt_oss", {"reasoning_effort": "low"}),
    "qwen3-8b": ("## A draft for Qwen3-8B, on one v6e chip", "qwen3", {"enable_thinking": "false"}),
}
# What a small model and two cores can do of the numbers.
SMALL = {
    "--num-conversations": ["24"],
    "--max-new-tokens": ["48"],
    "--batch-size": ["8"],
    "--steps": ["2"],
    "--draft-layers": ["2"],
    "--init-layers": ["1", "2"],
    "--exclude": ["builtin"],
}
MORE = {
    "build-cache": ["--max-user-turn", "24", "--max-prompt-len", "128", "--held-out", "0.4"],
    "train": ["--num-anchors", "4"],
}
STEPS = ["build-cache", "train", "evaluate", "export"]
# Needs libtpu, or looks at the machine.
ELSEWHERE = ("plan", "doctor")


def commands(heading):
    """Of the first block under a heading, the commands of `dflash` as words."""
    block = re.search(r"```sh\n(.*?)```", PAGE[PAGE.index(heading) :], re.DOTALL)[1]
    lines = [shlex.split(line) for line in block.splitlines()]
    return [words[1:] for words in lines if words[0].endswith("/dflash") and words[1] not in ELSEWHERE]


def smaller(words):
    """A command with numbers that a small model has the layers and the text for."""
    made = []
    for word in words:
        if word.startswith("--") or not made or made[-1][0] not in SMALL:
            made.append([word])
        else:
            made[-1].append(word)
    made = [[option[0], *SMALL.get(option[0], option[1:])] for option in made]
    return [word for option in made for word in option] + MORE.get(words[0], [])


def test_only_numbers_are_made_smaller():
    words = smaller(["train", "cache", "runs", "--init-layers", "1", "9", "17", "--steps", "40000", "--remat"])
    assert words == [
        "train",
        "cache",
        "runs",
        "--init-layers",
        "1",
        "2",
        "--steps",
        "2",
        "--remat",
        "--num-anchors",
        "4",
    ]


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_runs_as_it_is_written(name, tmp_path):
    heading, family, variables = RECIPES[name]
    stops = [1, *range(100, 107)]
    shape = {"num_attention_heads": 8, "num_key_value_heads": 8, "num_hidden_layers": 8, "eos_token_id": stops}
    if family == "gpt_oss":
        shape["layer_types"] = ["sliding_attention", "full_attention"] * 4
    target = write_tiny_target(tmp_path / name, family, vocab_size=260, mxfp4=family == "gpt_oss", **shape)
    known = "".join(f"{{{{ '' if {variable} else '' }}}}" for variable in variables)
    write_tiny_tokenizer(target, CHAT_TEMPLATE + known)
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
    }
    recipe = commands(heading)
    assert [words[0] for words in recipe if words[0] not in ("generate", "audit")] == STEPS
    for words in recipe:
        call = [sys.executable, "-m", "dflash", *smaller(words)]
        done = subprocess.run(call, cwd=tmp_path, env=environment, capture_output=True, encoding="utf-8")
        assert done.returncode == 0, f"{shlex.join(words)}: {done.stderr[-2000:]}"
    shape = read_target_shape(read_json(target, "config.json"), name)
    config = check_directory(tmp_path / "draft", shape)
    assert config.rope.kind == "default"
