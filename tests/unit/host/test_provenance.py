"""Where a file comes from: what is recorded, and what never is."""

import json
import subprocess
from pathlib import Path

import jax
import pytest
import sample_runs
from sample_runs import GONE, damaged

from dflash.host import provenance as p

FACTS = {"platform": "cpu", "device_kind": "cpu", "device_count": 2, "target": "x", "target_sha256": "a" * 64}


def benchmark(**info):
    return {"extra_info": FACTS | info}


@pytest.mark.parametrize(
    ("command", "told"),
    [
        (["pytest", "--max-new-tokens=64", "--rounds", "3"], ["pytest", "--max-new-tokens=64", "--rounds", "3"]),
        (["x", "--max-new-tokens", "64"], ["x", "--max-new-tokens", "64"]),
        (["x", "--hf-token=abc"], ["x", "--hf-token=***"]),
        (["x", "--api-key", "abc", "y"], ["x", "--api-key", "***", "y"]),
        (["x", "--api-key", "--other"], ["x", "--api-key", "--other"]),
        (["HF_TOKEN=abc", "x"], ["HF_TOKEN=***", "x"]),
        (["--target=https://me:pass@host/x"], ["--target=https://***@host/x"]),
        (["--draft=hf_abcdefgh"], ["--draft=***"]),
        (["--server-args=--tp-size 4 --api-key abc"], ["--server-args=--tp-size 4 --api-key ***"]),
        (["--server-args", "--api-key abc --hf-token=x"], ["--server-args", "--api-key *** --hf-token=***"]),
        (
            ["--server-args=--header 'Authorization: Bearer abc.def'"],
            ["--server-args=--header 'Authorization: Bearer ***"],
        ),
        (["--header", "authorization: basic YTpi", "x"], ["--header", "authorization: basic ***", "x"]),
        (["--prompt", "a bearer bond, basic maths"], ["--prompt", "a bearer *** basic maths"]),
        (["--proxy-auth", "me:abc", "--author", "me"], ["--proxy-auth", "***", "--author", "me"]),
        (["http://host/v1?api_key=abc&n=1#x"], ["http://host/v1?api_key=***&n=1#x"]),
        (["http://host/v1?access-token=abc", "?tokens=3"], ["http://host/v1?access-token=***", "?tokens=3"]),
        (["--run-name=tokens of hf_x", "secret"], ["--run-name=tokens of hf_x", "secret"]),
    ],
)
def test_secrets_are_hidden_in_a_command(command, told):
    assert p.redact(command) == told


def test_words_that_no_result_could_record_are_refused():
    p.check_words(["--prompts", "café.jsonl"], ValueError)
    with pytest.raises(ValueError, match=r"'caf\\udce9.jsonl' has other bytes"):
        p.check_words(["--prompts", "caf\udce9.jsonl"], ValueError)


def test_what_a_secret_variable_holds_is_hidden_wherever_it_stands(monkeypatch):
    monkeypatch.setenv("MY_API_TOKEN", "plain-looking")
    monkeypatch.setenv("SHORT_TOKEN", "64")
    monkeypatch.setenv("MAX_NEW_TOKENS_LIST", "256,1024")
    assert p.redact(["--max-new-tokens", "256,1024"]) == ["--max-new-tokens", "256,1024"]
    assert p.redact(["--run-name=a plain-looking name", "--n=64"]) == ["--run-name=a *** name", "--n=64"]


def test_flags_are_an_allow_list_without_paths(monkeypatch):
    for name in (*p._SETTINGS, *p._FLAG_LISTS):
        monkeypatch.delenv(name, raising=False)
    assert p.flags() == {}
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("JAX_CREDENTIALS", "cpu-secret")
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_x=true --xla_dump_to=/home/somebody stray")
    assert p.flags() == {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_cpu_x=true --xla_dump_to=..."}


def test_a_fact_of_the_run_is_told_once_and_what_differs_is_a_list():
    told = p.provenance([benchmark(draft="a"), benchmark(draft="b"), {"extra_info": {}}], ["pytest"], "off")
    assert told["device"] == {"platform": "cpu", "device_kind": "cpu", "device_count": 2}
    assert told["read"] == {"target": "x", "target_sha256": "a" * 64, "draft": ["a", "b"]}
    assert told["versions"]["jax"] == jax.__version__
    assert (told["command"], told["compile_cache"], told["seeds"]) == (["pytest"], "off", None)


def test_seeds_of_every_case_are_told():
    infos = [benchmark(seeds={"prompts": 0, "draft": 1}), benchmark(seeds={"prompts": 0}), benchmark()]
    assert p.provenance(infos, ["pytest"], "off")["seeds"] == {"prompts": 0, "draft": 1}


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A repository of one commit, in the place of ours."""
    root = tmp_path / "repository"
    (root / "dflash").mkdir(parents=True)
    (root / "dflash" / "provenance.py").write_text("x = 1\n")
    git = ["git", "-C", str(root), "-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "first"]):
        subprocess.run([*git, *command], check=True)
    monkeypatch.setattr(p, "ROOT", root)
    monkeypatch.setattr(p, "__file__", str(root / "dflash" / "provenance.py"))
    return root


def test_a_checkout_says_its_commit_and_whether_sources_differ(checkout):
    clean = p.git()
    assert len(clean["commit"]) == 40
    assert clean["dirty"] is False
    (checkout / "dflash.json").write_text("{}")
    assert p.git() == clean  # a result beside the sources changes none of them
    (checkout / "dflash" / "new.py").write_text("")
    assert p.git() == clean | {"dirty": True}


def test_the_hash_of_the_sources_is_that_of_names_and_text(checkout):
    hashes = [p.sources_sha256()]
    for change in (
        lambda: (checkout / "dflash" / "provenance.py").write_text("x = 2\n"),
        lambda: (checkout / "dflash" / "provenance.py").rename(checkout / "dflash" / "other.py"),
        lambda: (checkout / "dflash" / "kernel.cc").write_text(""),
    ):
        change()
        hashes.append(p.sources_sha256())
    assert len(set(hashes)) == len(hashes) == 4
    (checkout / "README.md").write_text("")
    (checkout / "dflash" / "notes.md").write_text("")
    assert p.sources_sha256() == hashes[-1]


def test_somebody_elses_repository_is_not_ours(checkout, monkeypatch):
    installed = checkout / "site-packages" / "dflash" / "provenance.py"
    installed.parent.mkdir(parents=True)
    installed.write_text("")
    monkeypatch.setattr(p, "__file__", str(installed))
    assert p.git() is None


def test_without_git_there_is_no_commit(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert p.git() is None


@pytest.fixture
def cache_dir():
    before = jax.config.jax_compilation_cache_dir
    yield lambda value: jax.config.update("jax_compilation_cache_dir", value)
    jax.config.update("jax_compilation_cache_dir", before)


def test_the_compile_cache_is_off_cold_or_warm(cache_dir, tmp_path):
    cache_dir(None)
    assert p.compile_cache() == "off"
    cache_dir(str(tmp_path / "none yet"))
    assert p.compile_cache() == "cold"
    cache_dir(str(tmp_path))
    assert p.compile_cache() == "cold"
    (tmp_path / "program").write_text("")
    assert p.compile_cache() == "warm"
    cache_dir("gs://bucket/cache")
    assert p.compile_cache() == "unknown"


# ---- the schema of the file

SCHEMA = Path(p.__file__).parents[1] / "report" / "results.schema.json"


@pytest.fixture(scope="module")
def check():
    """Raises jsonschema's ValidationError for a file that is not as the schema says."""
    jsonschema = pytest.importorskip("jsonschema")
    schema = json.loads(SCHEMA.read_text())
    jsonschema.Draft202012Validator.check_schema(schema)

    def check(value):
        jsonschema.Draft202012Validator(schema).validate(value)

    check.Error = jsonschema.ValidationError
    return check


def test_a_whole_file_is_as_the_schema_says(check):
    check(sample_runs.file_of(sample_runs.sweep()))
    check(sample_runs.file_of(sample_runs.sweep(), gate=sample_runs.gate(), audits=[sample_runs.audit()]))
    check(sample_runs.file_of(sample_runs.sweep(), gate=None, audits=[]))


def test_cases_that_failed_are_as_the_schema_says(check):
    check(sample_runs.file_of(sample_runs.sweep(), failed=[sample_runs.failed()]))
    check(sample_runs.file_of([], failed=[sample_runs.failed()]))
    with pytest.raises(check.Error):
        check(sample_runs.file_of([], failed=[]))
    for change in ({"status": "ok"}, {"error": ""}):
        with pytest.raises(check.Error):
            check(sample_runs.file_of(sample_runs.sweep(), failed=[sample_runs.failed() | change]))


def test_what_provenance_writes_is_as_the_schema_says(check):
    file = sample_runs.file_of(sample_runs.sweep())
    file["dflash"] = json.loads(json.dumps(p.provenance(file["benchmarks"], ["pytest"], p.compile_cache())))
    check(file)


INFO = ("benchmarks", 0, "extra_info")


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("dflash",), GONE),
        (("dflash", "compile_cache"), GONE),
        (("dflash", "schema_version"), 2),
        (("dflash", "flags"), {"HF_TOKEN": "x"}),
        (("dflash", "read", "target_sha256"), "short"),
        (("dflash", "git", "commit"), "abc"),
        ((*INFO, "lossless"), GONE),
        ((*INFO, "accept_rate"), 70.0),
        ((*INFO, "acceptance_length"), 0.5),
        ((*INFO, "speedup_x_ci95"), [1.0]),
        ((*INFO, "accept_histogram", 0), -1),
        (("benchmarks",), []),
    ],
    ids=lambda v: ".".join(map(str, v)) if isinstance(v, tuple) else "",
)
def test_a_file_that_breaks_a_rule_is_refused(check, path, value):
    file = damaged(sample_runs.file_of(sample_runs.sweep()), path, value)
    with pytest.raises(check.Error):
        check(file)
