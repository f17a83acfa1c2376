"""A real server on this host: `transformers serve` with SmolLM2, by the command line and by the URL.

DFLASH_SERVER_PYTHON names an interpreter that has it, by default this one (the extra `serving`).
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import dflash
from dflash import decode, load_target, load_tokenizer
from dflash.serving.deployment import deployment
from dflash.serving.options import ServerOptions
from dflash.serving.run import served_run
from dflash.text.prompts import load_prompts

pytestmark = [pytest.mark.slow, pytest.mark.oracle, pytest.mark.model]
PYTHON = os.environ.get("DFLASH_SERVER_PYTHON") or sys.executable
ARGUMENTS = "--dtype float32 --device cpu"
BUDGET = 12


@pytest.fixture(scope="module", autouse=True)
def offline(smollm2):
    """The server is installed, and asks no network for anything."""
    needs = "import fastapi, openai, torch, transformers, uvicorn"
    if subprocess.run([PYTHON, "-c", needs], capture_output=True).returncode:
        pytest.skip(f'{PYTHON} has no `transformers serve`: pip install -e ".[serving]"')
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield


@pytest.fixture(scope="module")
def tokenizer(smollm2):
    return load_tokenizer(smollm2)


@pytest.fixture(scope="module")
def prompts():
    return load_prompts("builtin").take(2)


@pytest.fixture(scope="module")
def url(smollm2, tmp_path_factory):
    """A server that runs for all tests here."""
    options = {"server_args": ARGUMENTS, "server_logs": tmp_path_factory.mktemp("logs"), "ready_timeout": 300.0}
    servers = deployment(ServerOptions(server="transformers", target=str(smollm2), server_python=PYTHON, **options))
    assert "has no DFLASH" not in servers.no_draft  # no draft was given at all
    with servers.open(drafting=False) as server:
        yield server.url


def measure(tokenizer, prompts, rounds=1, **options):
    servers = deployment(ServerOptions(**options))
    with served_run(servers, tokenizer, prompts, max_new_tokens=BUDGET, concurrency=2, rounds=rounds) as run:
        run.measure(rounds)
    return run, run.result({"prompts": "builtin"})


def test_it_answers_as_greedy_decoding_does(url, smollm2, tokenizer, prompts):
    run, case = measure(tokenizer, prompts, target=str(smollm2), base_url=url, served_model=str(smollm2))
    stops = tokenizer.stop_token_ids
    greedy = {"mode": "greedy", "max_new_tokens": BUDGET, "stop_token_ids": stops}
    expected = decode(load_target(smollm2), None, prompts.encode(tokenizer), **greedy)
    answers = run.target.rounds[0].completions
    assert [list(a.tokens) for a in answers] == [[t for t in row if t not in stops] for row in expected.tokens]
    assert [a.counted for a in answers] == [len(row) for row in expected.tokens]
    assert not any(a.exact for a in answers)
    assert case.status == "no-draft"


def test_two_that_run_already_are_compared(url, smollm2, tokenizer, prompts):
    same = {"target": str(smollm2), "served_model": str(smollm2), "base_url": url, "draft_base_url": url}
    _, case = measure(tokenizer, prompts, **same)
    assert case.lossless is True
    assert case.interleaved
    assert case.over_budget == 0
    assert case.speedup_x > 0
    assert case.status == "quick"
    assert case.acceptance_length is None
    assert "block size is unknown" in case.acceptance_unknown


def test_the_command_starts_it_and_ends_it(smollm2, tmp_path):
    words = ["--server", "transformers", "--server-python", PYTHON, f"--server-args={ARGUMENTS}"]
    words += ["--target", str(smollm2), "--num-prompts", "2", "--max-new-tokens", "8", "--rounds", "1"]
    words += ["--json", "served.json", "--server-logs", "logs", "--ready-timeout", "300"]
    environment = os.environ | {"PYTHONPATH": str(Path(dflash.__file__).parents[1]), "HF_TOKEN": "hf_averysecretword"}
    done = subprocess.run(
        [sys.executable, "-m", "dflash", "serve-bench", *words],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    assert "no-draft: " in done.stdout
    (benchmark,) = json.loads((tmp_path / "served.json").read_text())["benchmarks"]
    info = benchmark["extra_info"]
    assert info["server"].startswith("transformers ")
    assert info["baseline_tok_s_total"] > 0
    assert info["speedup_x"] is None
    log = (tmp_path / "logs" / "target.log").read_text()
    assert "Finished server process" in log
    assert "POST /v1/completions" in log
    assert "hf_averysecretword" not in log
