"""Command lines of servers: what each installed version wants, and what is refused before it is started."""

import json
import os
import shlex
import subprocess
import sys

import pytest

from dflash import init_draft, load_target, write_draft
from dflash.serving.adapters import ADAPTERS, Installed, Launch
from dflash.serving.connection import ServingError
from dflash.serving.draft import ServedDraft
from dflash.serving.options import SERVERS
from dflash.weights.config_json import read_draft_config
from dflash.weights.tiny import write_tiny_target

# What stands in each version that its adapter looks for.
UPSTREAM = {"srt/server_args.py": 'choices=["EAGLE", "DFLASH"]\n"DFLASH requires --speculative-eagle-topk=1 (linear"'}
FORK = {"srt/server_args.py": 'choices=["EAGLE", "DFLASH"]\n'}
OLD = {"srt/server_args.py": 'choices=["EAGLE"]\n'}
CHECK = (
    "import argparse, sys\n"
    "from sgl_jax.srt.server_args import ServerArgs\n"
    "parser = argparse.ArgumentParser()\n"
    "ServerArgs.add_cli_args(parser)\n"
    "args = ServerArgs.from_cli_args(parser.parse_args(sys.argv[1:]))\n"
    "args.check_server_args()\n"
    "print(args.speculative_algorithm, args.speculative_num_draft_tokens)\n"
)


@pytest.fixture
def installed(tmp_path):
    """A package on disk with these files."""

    def installed(files, version="1.0"):
        for name, text in files.items():
            path = tmp_path / "package" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return Installed(version=version, directory=tmp_path / "package")

    return installed


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    return write_tiny_target(tmp_path_factory.mktemp("adapters") / "target", num_hidden_layers=5)


@pytest.fixture(scope="module")
def draft(target):
    directory = target.with_name("draft")
    write_draft(init_draft(load_target(target), block_size=8, target_layer_ids=(0, 3)), directory)
    return as_served(directory)


def as_served(directory, **changes):
    raw = json.loads((directory / "config.json").read_text()) | changes
    return ServedDraft(directory=directory, config=read_draft_config(raw), raw=raw, block_size=8)


def words(name, installed, target, draft):
    return ADAPTERS[name].arguments(Launch(installed=installed, target=target, config={}, draft=draft), 1234)


def faults_of(name, installed, draft, config):
    return ADAPTERS[name].faults(Launch(installed=installed, target=draft.directory, config=config, draft=draft))


def test_upstream_sglang_jax_is_told_what_it_refuses_to_start_without(installed, target, draft):
    line = " ".join(words("sglang-jax", installed(UPSTREAM), target, draft))
    assert line == (
        f"-m sgl_jax.launch_server --model-path {target} --decode-log-interval 1 --speculative-algorithm DFLASH "
        f"--speculative-draft-model-path {draft.directory} --speculative-num-draft-tokens 8 --grammar-backend none "
        "--speculative-num-steps 1 --speculative-eagle-topk 1 --host 127.0.0.1 --port 1234"
    )


def test_the_fork_of_sglang_jax_is_told_its_guardrails(installed, target, draft):
    line = " ".join(words("sglang-jax", installed(FORK), target, draft))
    assert "--page-size 1 --disable-overlap-schedule" in line
    assert "--speculative-num-draft-tokens 8" in line
    assert "--speculative-num-steps" not in line
    # Neither server may answer a repeated prompt from a cache that the other can't have.
    assert "--disable-radix-cache" in line
    assert "--disable-radix-cache" in words("sglang-jax", installed(FORK), target, None)


@pytest.mark.parametrize("name", sorted(name for name, adapter in ADAPTERS.items() if adapter.package))
def test_without_a_draft_a_server_is_told_nothing_of_drafting(name, installed, target):
    line = " ".join(words(name, installed(UPSTREAM), target, None))
    assert str(target) in line
    assert "speculative" not in line
    assert "radix" not in line
    assert line.endswith("--host 127.0.0.1 --port 1234")


def test_sglang_and_vllm(installed, target, draft):
    line = " ".join(words("sglang", installed({}), target, draft))
    assert line == (
        f"-m sglang.launch_server --model-path {target} --speculative-algorithm DFLASH --speculative-draft-model-path "
        f"{draft.directory} --speculative-num-draft-tokens 8 --host 127.0.0.1 --port 1234"
    )
    vllm = words("vllm", installed({}), target, draft)
    settings = json.loads(vllm[vllm.index("--speculative-config") + 1])
    assert settings == {"method": "dflash", "model": str(draft.directory), "num_speculative_tokens": 7}


@pytest.mark.parametrize(
    ("name", "files", "has"),
    [
        ("sglang-jax", UPSTREAM, True),
        ("sglang-jax", FORK, True),
        ("sglang-jax", OLD, False),
        ("sglang-jax", {}, False),
        ("sglang", {"srt/speculative/spec_info.py": "    DFLASH = auto()"}, True),
        ("sglang", {"srt/speculative/spec_info.py": "    EAGLE = auto()"}, False),
        ("vllm", {"v1/spec_decode/dflash.py": ""}, True),
        ("vllm", {"v1/spec_decode/eagle.py": ""}, False),
    ],
)
def test_what_is_installed_says_whether_it_has_dflash(name, files, has, installed):
    assert ADAPTERS[name].has_dflash(installed(files)) == has


@pytest.mark.parametrize(
    ("target_changes", "draft_changes", "fault"),
    [
        ({}, {}, None),
        ({"architectures": ["GptOssForCausalLM"]}, {}, "and this is ['GptOss"),
        ({"tie_word_embeddings": True}, {}, "is tied to its embeddings"),
        ({"architectures": 7}, {}, "and this is 7"),
        ({}, {"num_target_layers": 4}, "last layer (3)"),
        (
            {},
            {"layer_types": ["sliding_attention"] * 2, "sliding_window": 16, "use_sliding_window": True},
            "sliding windows",
        ),
        (
            {},
            {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}},
            "rope_scaling; the draft's rope is yarn",
        ),
    ],
)
def test_upstream_sglang_jax_is_given_nothing_that_it_would_load_wrongly(
    installed, draft, target_changes, draft_changes, fault
):
    raw = {"architectures": ["Qwen3ForCausalLM"], "num_hidden_layers": 5} | target_changes
    faults = faults_of("sglang-jax", installed(UPSTREAM), as_served(draft.directory, **draft_changes), raw)
    assert len(faults) == (fault is not None)
    assert fault is None or fault in faults[0]


def test_vllm_is_given_no_draft_whose_mask_token_it_would_invent(installed, draft):
    assert faults_of("vllm", installed({}), draft, {}) == []
    own = {"target_layer_ids": draft.raw["dflash_config"]["target_layer_ids"]}
    moved = ServedDraft(
        directory=draft.directory,
        config=draft.config,
        raw=draft.raw | {"dflash_config": own, "mask_token_id": 1},
        block_size=8,
    )
    assert "mask_token_id from dflash_config alone" in faults_of("vllm", installed({}), moved, {})[0]


def test_a_server_is_found_without_being_imported(tmp_path, monkeypatch):
    package = tmp_path / "sgl_jax"
    package.mkdir()
    (package / "__init__.py").write_text("raise SystemExit('imported')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    found = ADAPTERS["sglang-jax"].look(sys.executable)
    assert found == Installed(version="", directory=package)


def test_no_version_of_transformers_drafts(installed):
    assert not ADAPTERS["transformers"].can_draft
    assert not ADAPTERS["transformers"].has_dflash(installed(UPSTREAM))


def test_every_server_that_an_option_names_has_an_adapter():
    assert set(SERVERS) == set(ADAPTERS)


@pytest.mark.parametrize(
    ("python", "said"),
    [
        ("/nowhere/python", "--server-python .*: No such file"),
        ("/bin/false", "--server-python .*/bin/false: CalledProcess"),
        (sys.executable, "has no vllm to start"),
    ],
)
def test_an_interpreter_without_the_server_is_refused(python, said):
    with pytest.raises(ServingError, match=said):
        ADAPTERS["vllm"].look(python)


def test_sglang_jax_takes_its_command_lines(target, draft):
    """With sglang-jax's own parser, which needs Python 3.12: DFLASH_SGLANG_JAX_PYTHON names its interpreter."""
    python = os.environ.get("DFLASH_SGLANG_JAX_PYTHON")
    if not python:
        pytest.skip("DFLASH_SGLANG_JAX_PYTHON names no interpreter that has sglang-jax with DFLASH")
    adapter = ADAPTERS["sglang-jax"]
    found = adapter.look(python)
    for given, expected in ((None, "None"), (draft, "DFLASH 8")):
        command = words("sglang-jax", found, target, given)[2:]
        done = subprocess.run([python, "-c", CHECK, *command], capture_output=True, text=True)
        assert done.stdout.startswith(expected), shlex.join(command) + done.stderr[-2000:]


@pytest.mark.parametrize("printed", ["5", "[1]", "null", "hello", r"\xff", "[" * 5000])
def test_a_program_that_is_no_python_is_named(tmp_path, printed):
    program = tmp_path / "program"
    program.write_text(f"#!/bin/sh\nprintf '{printed}'\n")
    program.chmod(0o755)
    with pytest.raises(ServingError, match=r"--server-python names the Python interpreter .*/program: "):
        ADAPTERS["vllm"].look(str(program))
