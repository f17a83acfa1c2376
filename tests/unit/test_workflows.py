"""The workflows: what runs in them exists, a failed gate leaves its report behind, and no secret reaches a command.

No runner is here. Their steps are: commands are started by bash as a runner starts them, pytest only to collect.
"""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import sample_runs
import yaml

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
LOADED = {path.stem: yaml.safe_load(path.read_text()) for path in FILES}
JOBS = [(name, job) for name, workflow in LOADED.items() for job in workflow["jobs"].values()]
STEPS = [(name, step) for name, job in JOBS for step in job["steps"]]


def steps(workflow, word):
    """The steps of a workflow whose command or action holds a word."""
    return [s for name, s in STEPS if name == workflow and word in s.get("run", "") + s.get("uses", "")]


def test_each_question_has_its_workflow():
    assert set(LOADED) == {"tests", "full", "tpu"}
    triggers = {name: set(workflow[True]) for name, workflow in LOADED.items()}  # YAML reads `on` as true
    assert triggers["tests"] == {"push", "pull_request"}
    assert triggers["full"] == {"workflow_dispatch", "schedule"}
    assert triggers["tpu"] == {"workflow_dispatch", "schedule", "pull_request"}
    assert LOADED["tests"]["jobs"]["cpu"]["strategy"]["matrix"]["python"] == ["3.11", "3.12"]
    assert LOADED["tpu"]["jobs"]["gate"]["runs-on"] == ["self-hosted", "tpu"]
    assert [s["run"] for s in steps("full", ".ci/run")] == [".ci/run nightly"]
    assert os.access(ROOT / ".ci" / "run", os.X_OK)


def test_steps_beside_each_other_fail_the_run_when_one_of_them_does():
    """In its middle, and after the others have ended and said what they had to say."""
    text = (ROOT / ".ci" / "run").read_text()
    functions = text[text.index("step() {") : text.index("\nstep ")]
    steps = "slow_one() { sleep 0.2; echo whole; }\nbad_one() { echo begun; false; echo went on; }\n"
    script = f"set -euo pipefail\n{functions}\n{steps}"
    for names, status in (("slow_one", 0), ("bad_one slow_one", 1), ("slow_one bad_one", 1)):
        done = subprocess.run(["bash", "-c", f"{script}beside {names}\n"], capture_output=True, encoding="utf-8")
        said = done.stdout.splitlines()
        assert done.returncode == status, done.stdout + done.stderr
        assert "whole" in said
        assert "went on" not in said
        assert ("FAILED: bad one" in done.stdout) == bool(status)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_workflow_may_read_and_ends(path):
    """It may read the repository and nothing else, ends by itself, never runs beside itself, and knows its actions."""
    workflow = LOADED[path.stem]
    assert workflow["permissions"] == {"contents": "read"}
    for job in workflow["jobs"].values():
        assert 0 < job["timeout-minutes"] <= 180
        assert "permissions" not in job
        assert "concurrency" in workflow or "concurrency" in job
    for line in re.findall(r"uses:.*", path.read_text()):
        assert re.fullmatch(r"uses: [\w./-]+@[0-9a-f]{40} # v[\d.]+", line), line
    for checkout in steps(path.stem, "actions/checkout"):
        assert checkout["with"]["persist-credentials"] is False


def test_no_secret_is_on_a_command_line_and_no_text_of_others_becomes_a_command():
    for name, step in STEPS:
        assert "${{" not in step.get("run", ""), (name, step)
        assert "secrets." not in json.dumps(step | {"env": None}), (name, step)
    for _, job in JOBS:
        assert "secrets." not in json.dumps(job.get("env", {}))
    having = [step["run"] for _, step in STEPS if "secrets." in json.dumps(step.get("env", {}))]
    assert len(having) == 1
    assert "pytest -m tpu" in having[0]


def test_a_fork_does_not_run_on_our_machine():
    condition = LOADED["tpu"]["jobs"]["gate"]["if"]
    assert "github.event.pull_request.head.repo.full_name == github.repository" in condition
    assert "github.event.label.name == 'tpu'" in condition


@pytest.mark.parametrize("name", ["full", "tpu"])
def test_whatever_failed_the_summary_and_the_files_are_left(name):
    (summary,) = steps(name, "GITHUB_STEP_SUMMARY")
    (upload,) = steps(name, "actions/upload-artifact")
    assert summary["if"] == upload["if"] == "always()"
    kept = upload["with"]["path"].split()
    (run,) = steps(name, ".ci/run" if name == "full" else "pytest")
    written = {"dflash.json", "out"} if name == "full" else {"tpu.json", "out", "bench/baselines"}
    assert set(kept) == written
    # What measures ends before the job does, so that these steps still run.
    (job,) = (job for job in LOADED[name]["jobs"].values() if run in job["steps"])
    assert run["timeout-minutes"] < job["timeout-minutes"]


def test_the_history_is_kept_under_the_name_that_it_is_looked_for():
    restore, save = steps("tpu", "actions/cache")
    assert restore["with"]["path"] == save["with"]["path"]
    assert restore["with"]["key"] == save["with"]["key"]
    assert save["with"]["key"].startswith(restore["with"]["restore-keys"])
    assert save["if"].startswith("always()")


# ---- what the steps say to bash


@pytest.fixture
def bash(tmp_path):
    """Runs a step in a checkout of nothing, whose python, with .venv/bin or without, is ours."""
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} "$@"\n')
    python.chmod(0o755)

    def run(command, cwd=tmp_path, **env):
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("DFLASH_", "PYTEST_"))}
        environment |= {"PATH": f"{python.parent}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
        environment |= {"GITHUB_STEP_SUMMARY": str(tmp_path / "summary.md"), **env}
        done = subprocess.run(
            ["bash", "-e", "-c", command], cwd=cwd, env=environment, capture_output=True, encoding="utf-8", timeout=600
        )
        return done.returncode, done.stdout + done.stderr

    return run


def gates(step):
    """What $GATE may be, from the expression that gives it."""
    return re.findall(r"'(--[\w-]+)'", step["env"]["GATE"])


def collected(bash, tmp_path, command, **env):
    """The ids that a command of pytest selects in this checkout."""
    here = command.replace(".venv/bin/", "").replace("tpu.json", str(tmp_path / "tpu.json"))
    code, said = bash(f"{here} --co -q -p no:cacheprovider", cwd=ROOT, **env)
    assert code == 0, said[-2000:]
    return [line for line in said.splitlines() if "::" in line]


@pytest.mark.slow
def test_the_gate_measures_and_audits_and_needs_a_baseline(bash, tmp_path):
    (step,) = steps("tpu", "pytest")
    assert gates(step) == ["--update-baselines", "--require-baseline"]
    assert re.search(r"\$\{\{ inputs\.update-baselines && .* \|\| '--require-baseline' \}\}", step["env"]["GATE"])
    for words in ('"$GATE"', "--require-device tpu", "--benchmark-json tpu.json", "--report out"):
        assert words in step["run"]
    names = collected(bash, tmp_path, step["run"], GATE="--require-baseline")
    assert {name.split("::")[0] for name in names} >= {
        "tests/tpu/test_audit.py",
        "tests/tpu/test_parity.py",
        "bench/test_decode.py",
        "bench/test_step.py",
    }
    assert not any(name.startswith("tests/unit") for name in names)
    assert any("block-b16-n1024" in name for name in names)


@pytest.mark.slow
def test_the_tests_of_each_push_are_those_of_a_cpu(bash, tmp_path):
    (step,) = steps("tests", "pytest")
    assert step["run"].endswith(" -n 2")
    names = collected(bash, tmp_path, step["run"].removesuffix(" -n 2"))
    assert "tests/unit/decoding/test_accept.py" in {name.split("::")[0] for name in names}
    assert all(name.startswith("tests/unit/") for name in names)


@pytest.mark.parametrize("name", ["full", "tpu"])
def test_the_summary_is_the_report_or_says_that_there_is_none(bash, tmp_path, name):
    (step,) = steps(name, "GITHUB_STEP_SUMMARY")
    file = {"full": "dflash.json", "tpu": "tpu.json"}[name]
    code, said = bash(step["run"])
    assert code == 0, said
    assert (tmp_path / "summary.md").read_text() == "Nothing was measured; the log says why.\n"
    (tmp_path / "summary.md").unlink()
    run = sample_runs.file_of([sample_runs.decode()], gate=sample_runs.gate())
    (tmp_path / file).write_text(json.dumps(run))
    if name == "tpu":  # there pytest's --report writes it
        assert bash(f".venv/bin/python -m dflash report {file} --out out")[0] == 0
    code, said = bash(step["run"])
    assert code == 0, said
    summary = (tmp_path / "summary.md").read_text()
    assert summary == (tmp_path / "out" / "report.md").read_text()
    assert "This fails the run." in summary


def test_the_figures_for_the_chart_are_where_its_action_looks(bash, tmp_path):
    (step,) = steps("tpu", "export-results")
    (action,) = steps("tpu", "github-action-benchmark@")
    (tmp_path / "out").mkdir()
    (tmp_path / "tpu.json").write_text(json.dumps(sample_runs.file_of([sample_runs.decode()])))
    code, said = bash(step["run"])
    assert code == 0, said
    figures = json.loads((tmp_path / action["with"]["output-file-path"]).read_text())
    assert {"name", "unit", "value"} <= figures[0].keys()
    assert action["with"]["tool"] == "customBiggerIsBetter"
    assert action["with"]["external-data-json-path"] in steps("tpu", "actions/cache/save")[0]["with"]["path"].split()
