"""Training runs: what they leave on the disk, and that a killed one resumes as if nothing had happened."""

import json
import os
import random
import re
import shutil
import subprocess
import sys
import time
import types
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

import dflash
from dflash import ConfigError
from dflash.training import run as run_module
from dflash.training.batches import TrainingBatches
from dflash.training.run import Run, RunConfig, TrainingError, write_curves
from dflash.training.trainer import TrainConfig, Trainer
from dflash.weights.runs.checkpoint import read_run, write_run
from dflash.weights.runs.directories import completed_runs, latest_run

V, H, S = 199, 64, 4
SMALL = {"windows": (None,), "causal": (False,), "block_size": S}
STEPS = 12
TRAIN = {"steps": STEPS, "batch_size": 4, "num_anchors": 2, "learning_rate": 1e-3}
TIMES = {"draft_tokens_per_s", "matmul_fraction", "wait_fraction"}
FIGURES = {"loss", "cross_entropy", "token_acc", "accept_len_mean"}


@pytest.fixture(autouse=True)
def fast_machine(monkeypatch):
    """Measuring the machine takes seconds."""
    monkeypatch.setattr(run_module, "matmul_rate", lambda dtype: 1e12)


@pytest.fixture(scope="module")
def cache(write_sequences, tmp_path_factory):
    return write_sequences(tmp_path_factory.mktemp("run") / "cache", held_out=8)


@pytest.fixture(scope="module")
def table():
    """Embedding and head of the target."""
    return np.random.default_rng(8).standard_normal((V, H)).astype(np.float32)


@pytest.fixture(scope="module")
def programs():
    """The compiled step of each config: compiling takes longer than training here."""
    return {}


@pytest.fixture
def start(draw_draft, cache, table, programs):
    """Opens a run in a directory, with changes to its settings."""

    def start(root, *, cache=cache, held_out=(), draft=None, provenance=None, train=None, **settings):
        config = TrainConfig(**(TRAIN | (train or {})))
        trainer = Trainer(draft or draw_draft(**SMALL), table, table[5], config)
        key = (config, trainer.draft_config)
        trainer._step, trainer._score = programs.setdefault(key, (trainer._step, trainer._score))
        intervals = {"save_every": 4, "log_every": 2, "evaluate_every": 6} | settings
        return Run(
            trainer,
            batches_of(cache, table),
            [batches_of(cache, table, held_out=True)(i) for i in held_out],
            RunConfig(root=root, **intervals),
            {"cache_sha256": "ab"} if provenance is None else provenance,
        )

    return start


def batches_of(cache, table, held_out=False):
    return TrainingBatches(
        cache, cache.rows(held_out), batch_size=4, num_anchors=2, block_size=S, embedding=table, seed=0
    )


def lines_of(root):
    return [json.loads(line) for line in (root / "metrics.jsonl").read_text().splitlines()]


def timeless(root):
    return [{k: v for k, v in line.items() if k not in TIMES} for line in lines_of(root)]


def arrays_of(run):
    """Every file of a checkpoint's weights and optimizer state, byte for byte."""
    folders = [run / "model", run / "tx"]
    return {p.relative_to(run).as_posix(): p.read_bytes() for f in folders for p in f.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def finished(draw_draft, cache, table, tmp_path_factory):
    """An unbroken run, not to be changed."""
    root = tmp_path_factory.mktemp("finished") / "root"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_module, "matmul_rate", lambda dtype: 1e12)
        trainer = Trainer(draw_draft(**SMALL), table, table[5], TrainConfig(**TRAIN))
        config = RunConfig(root=root, save_every=3, log_every=2, evaluate_every=6)
        scored = [batches_of(cache, table, held_out=True)(i) for i in range(2)]
        Run(trainer, batches_of(cache, table), scored, config, {"cache_sha256": "ab"}).train()
    return root


# ---- what a run leaves


def test_metrics_have_a_line_at_every_report_score_and_checkpoint(finished):
    lines = lines_of(finished)
    assert [line["step"] for line in lines] == [2, 3, 4, 6, 8, 9, 10, 12]
    always = {"step", "learning_rate", "gradient_norm"} | FIGURES | TIMES
    for line in lines:
        scored = {f"held_out_{name}" for name in FIGURES} if line["step"] in (6, 12) else set()
        assert line.keys() == always | scored
        assert all(np.isfinite(v) for v in line.values())
        assert 0 <= line["wait_fraction"] <= 1
        assert line["draft_tokens_per_s"] > 0


def test_a_line_counts_the_steps_since_the_last_one(start, tmp_path, finished):
    start(tmp_path, log_every=1, save_every=99, evaluate_every=99).train()
    single, together = timeless(tmp_path), {line["step"]: line for line in timeless(finished)}
    assert [line["step"] for line in single] == list(range(1, STEPS + 1))
    for key in ("learning_rate", "gradient_norm"):
        assert {s: together[s][key] for s in together} == {s: single[s - 1][key] for s in together}
    assert together[3]["loss"] == single[2]["loss"]
    assert min(single[4]["loss"], single[5]["loss"]) < together[6]["loss"] < max(single[4]["loss"], single[5]["loss"])


def test_the_last_checkpoints_stay(start, tmp_path, finished):
    assert list(completed_runs(finished)) == [9, 12]
    last = start(tmp_path, save_every=5, keep=3).train()
    assert last == tmp_path / "run-12"
    assert list(completed_runs(tmp_path)) == [5, 10, 12]
    config = json.loads((last / "config.json").read_text())
    assert config["dflash"]["provenance"] == {"cache_sha256": "ab"}


def test_curves_are_a_png(finished, tmp_path):
    image = (finished / "curves.png").read_bytes()
    assert image.startswith(b"\x89PNG\r\n\x1a\n")
    assert len(image) > 5000
    # What is no number has no point.
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "cross_entropy": {}}\n{"step": 2, "cross_entropy": null}\n')
    write_curves(tmp_path / "metrics.jsonl", tmp_path / "empty.png")
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["empty.png", "metrics.jsonl"]


def test_held_out_scores_train_nothing(start, tmp_path, finished):
    last = start(tmp_path, save_every=3).train()
    assert not any(key.startswith("held_out") for line in lines_of(tmp_path) for key in line)
    assert arrays_of(last) == arrays_of(finished / "run-12")


def test_tensorboard_gets_the_same_figures_where_there_is_one(start, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    start(tmp_path / "without").train()
    told = []

    class Writer:
        def __init__(self, directory):
            assert directory == str(tmp_path / "with" / "tensorboard")

        def add_scalar(self, name, value, step):
            told.append((step, name, value))

        def flush(self):
            pass

    monkeypatch.setitem(sys.modules, "tensorboard", types.ModuleType("tensorboard"))
    monkeypatch.setitem(sys.modules, "tensorboard.summary", types.SimpleNamespace(Writer=Writer))
    start(tmp_path / "with").train()
    assert told == [(line["step"], k, v) for line in lines_of(tmp_path / "with") for k, v in line.items()]
    assert timeless(tmp_path / "with") == timeless(tmp_path / "without")


# ---- and on from there

TRAINS = """
import json, sys
from pathlib import Path
import numpy as np
from dflash.training.cache import open_cache
from dflash.training import run as module
from dflash.training.batches import TrainingBatches
from dflash.training.trainer import TrainConfig, Trainer
from dflash.weights.runs.checkpoint import read_run

module.matmul_rate = lambda dtype: 1e12
where, root = Path(sys.argv[1]), Path(sys.argv[2])
draft, table, cache = read_run(where / "run-0"), np.load(where / "table.npy"), open_cache(where / "cache")

def batches(held_out):
    return TrainingBatches(
        cache, cache.rows(held_out), batch_size=4, num_anchors=2, block_size=4, embedding=table, seed=0
    )

trainer = Trainer(draft, table, table[5], TrainConfig(**json.loads(sys.argv[3])))
config = module.RunConfig(root=root, save_every=3, log_every=2, evaluate_every=6)
run = module.Run(trainer, batches(False), [batches(True)(i) for i in range(2)], config, {"cache_sha256": "ab"})
print("training", flush=True)
print(run.train(), flush=True)
"""


@pytest.fixture
def begin(draw_draft, cache, table, tmp_path):
    """Starts the run of `finished` in a process of its own."""
    write_run(draw_draft(**SMALL), tmp_path, 0, optimizer_state=None, provenance={}, keep=None)
    np.save(tmp_path / "table.npy", table)
    (tmp_path / "cache").symlink_to(cache.directory)
    processes = []

    def begin(root):
        process = subprocess.Popen(
            [sys.executable, "-c", TRAINS, str(tmp_path), str(root), json.dumps(TRAIN)],
            env=os.environ | {"JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "2"},
            cwd=Path(dflash.__file__).parents[1],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        processes.append(process)
        return process

    yield begin
    for process in processes:
        with process:
            process.kill()


@pytest.mark.slow
def test_a_killed_run_ends_as_an_unbroken_one(begin, start, finished, tmp_path):
    """Killed in other processes, after any number of lines and checkpoints; ended in this one."""
    rng = random.Random(0)
    roots = [tmp_path / name for name in ("a", "b")]
    steps = set()
    for lines in ({roots[0]: 1, roots[1]: 4}, {roots[0]: 5}):
        for root, process, least in [(r, begin(r), n) for r, n in lines.items()]:
            assert process.stdout.readline() == "training\n"
            deadline = time.monotonic() + 600
            while not (root / "metrics.jsonl").read_text().count("\n") >= least and time.monotonic() < deadline:
                time.sleep(0.002)
            time.sleep(rng.uniform(0, 0.1))
            process.kill()
            process.wait()
            steps.add(max(completed_runs(root), default=0))
    for root in roots:
        run = start(root, save_every=3, held_out=range(2))
        assert run.step == max(completed_runs(root), default=0)
        assert run.train() == root / "run-12"
        assert timeless(root) == timeless(finished)
        assert arrays_of(root / "run-12") == arrays_of(finished / "run-12")
        assert list(completed_runs(root)) == [9, 12]
    assert steps & {3, 6, 9}, steps


@pytest.mark.parametrize("step", [3, 6, 9])
def test_it_goes_on_from_every_checkpoint(start, finished, tmp_path, monkeypatch, step):
    class StoppedError(Exception):
        pass

    def stop(self, line):
        log(self, line)
        if line["step"] > step:
            raise StoppedError

    log = Run._log
    with monkeypatch.context() as patch:
        patch.setattr(Run, "_log", stop)
        with pytest.raises(StoppedError):
            start(tmp_path, save_every=3, held_out=range(2)).train()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 99, "lo')  # torn
    run = start(tmp_path, save_every=3, held_out=range(2))
    assert run.step == step
    run.train()
    assert timeless(tmp_path) == timeless(finished)
    assert arrays_of(tmp_path / "run-12") == arrays_of(finished / "run-12")


def test_a_finished_run_trains_no_further(start, tmp_path, monkeypatch):
    last = start(tmp_path).train()
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file() and p.name != "curves.png"}
    (tmp_path / "curves.png").unlink()  # killed just before it was drawn

    def never(*args):
        raise AssertionError("nothing is left to train")

    monkeypatch.setattr(Trainer, "step", never)
    monkeypatch.setattr(run_module, "matmul_rate", never)
    assert start(tmp_path).train() == last
    assert (tmp_path / "curves.png").is_file()
    assert {p: p.read_bytes() for p in before} == before


def test_lines_of_a_run_without_a_checkpoint_do_not_stay(start, tmp_path):
    tmp_path.mkdir(exist_ok=True)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 3.0}\n')
    start(tmp_path)
    assert lines_of(tmp_path) == []


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"train": {"learning_rate": 0.5, "seed": 3}}, "train.learning_rate 0.001 there, 0.5 here, train.seed 0 there"),
        ({"provenance": {"cache_sha256": "cd"}}, "provenance.cache_sha256 'ab' there, 'cd' here"),
        ({"draft": {"block_size": 5}}, "draft.block_size 4 there, 5 here"),
        ({"draft": {"windows": (None, None), "causal": (False, False)}}, "draft.num_hidden_layers 1 there, 2 here"),
    ],
)
def test_a_run_with_other_settings_is_refused(start, draw_draft, finished, changes, said):
    before = {p: p.read_bytes() for p in finished.rglob("*") if p.is_file()}
    if "draft" in changes:
        changes = {"draft": draw_draft(**(SMALL | changes["draft"]))}
    with pytest.raises(ConfigError, match="holds a run with other settings") as error:
        start(finished, **changes)
    assert said in str(error.value)
    assert {p: p.read_bytes() for p in finished.rglob("*") if p.is_file()} == before


def test_a_checkpoint_of_another_run_with_the_same_settings_is_refused(start, finished, tmp_path):
    """Copied over a run's own, it would be taken for it by its settings."""
    root = tmp_path / "root"
    run = start(root, save_every=3)
    run.train()
    mine = latest_run(root)
    theirs = finished / mine.name
    assert json.loads((mine / "metadata.json").read_text())["identity"]
    shutil.rmtree(mine)
    shutil.copytree(theirs, mine)
    with pytest.raises(ConfigError, match=f"{mine} is no checkpoint of "):
        start(root, save_every=3)


def test_a_run_from_before_there_were_identities_is_resumed(start, finished, tmp_path):
    root = shutil.copytree(finished, tmp_path / "root")
    for path in (root / "run_config.json", *root.glob("run-*/metadata.json")):
        raw = json.loads(path.read_text())
        del raw["identity"]
        path.write_text(json.dumps(raw))
    assert start(root, save_every=3).step == STEPS


CLAIM = "import sys; from pathlib import Path; from dflash.training.run import claim_run; claim_run(Path(sys.argv[1]))"


def test_a_directory_that_is_a_draft_takes_no_run(start, tmp_path):
    """`export` and `generate` would go on to read that draft, not the run."""
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ConfigError, match="holds the weights of a draft"):
        start(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_a_directory_belongs_to_one_process_at_a_time(start, tmp_path):
    root = tmp_path / "root"
    command = [sys.executable, "-c", CLAIM, str(root)]
    run = start(root)
    before = {p: p.read_bytes() for p in root.rglob("*") if p.is_file()}
    refused = subprocess.run(command, capture_output=True, text=True)
    assert "one process at a time" in refused.stderr.splitlines()[-1]
    assert {p: p.read_bytes() for p in root.rglob("*") if p.is_file()} == before
    run.train()
    assert subprocess.run(command, capture_output=True).returncode == 0


@pytest.mark.parametrize(
    ("name", "text", "named"),
    [
        ("run_config.json", "{", "is no valid JSON"),
        ("run_config.json", "[]", "must hold a JSON object"),
        ("metrics.jsonl", '{"step": 1}\n{"loss": 1}\n', "line 2, must say its step"),
        ("metrics.jsonl", '{"step": 1}\n{,}\n', "line 2, is no valid JSON"),
        ("metrics.jsonl", '{"step": 1}\n{"step": 2, "lo\n{"step": 3}\n', "line 2, is no valid JSON"),
    ],
)
def test_a_damaged_file_of_a_run_is_one_sentence(start, finished, tmp_path, name, text, named):
    root = shutil.copytree(finished, tmp_path / "root")
    (root / name).write_text(text)
    with pytest.raises((ConfigError, TrainingError), match=named):
        start(root, save_every=3)


# ---- what can't go on, or can't begin


@pytest.fixture
def spoiled(write_sequences, tmp_path):
    """The same cache but for a NaN in sequence 7."""
    cache = write_sequences(tmp_path / "cache", held_out=8)
    features = np.load(cache.directory / "features_u16.npy", mmap_mode="r+")
    features[cache.bounds[7], 5] = 0x7FC0
    features.flush()
    return cache


def test_a_nan_stops_the_run_and_spoils_nothing(start, spoiled, tmp_path):
    root = tmp_path / "root"
    run = start(root, cache=spoiled, save_every=1)
    bad = next(step for step in range(STEPS) if 7 in run.batches.rows(step))
    assert bad > 0
    with pytest.raises(TrainingError) as error:
        run.train()
    rows = re.escape(str(run.batches.rows(bad).tolist()))
    assert re.search(f"step {bad + 1} .*loss nan .*norm nan .*{rows}.* {root / f'run-{bad}'}", str(error.value))
    assert [line["step"] for line in lines_of(root)] == list(range(1, bad + 1))
    assert latest_run(root) == root / f"run-{bad}"
    for weights in (run.trainer.state, nnx.state(read_run(latest_run(root)))):
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(weights))


def test_a_nan_is_noticed_without_a_line_or_a_checkpoint(start, spoiled, tmp_path):
    run = start(tmp_path / "root", cache=spoiled, save_every=100, log_every=100, evaluate_every=100)
    bad = next(step for step in range(STEPS) if 7 in run.batches.rows(step))
    with pytest.raises(TrainingError, match=r"last good checkpoint is none: .*learning rate"):
        run.train()
    assert run.step <= bad + 2
    assert lines_of(tmp_path / "root") == []


def test_a_nan_in_held_out_rows_is_told(start, cache, table, tmp_path):
    run = start(tmp_path, held_out=range(2))
    run.held_out[1].features[0, 0, 0] = 0x7FC0
    with pytest.raises(TrainingError, match=r"held-out batch 1 .*loss nan .*step 6; .*run-4"):
        run.train()


def test_a_draft_that_no_checkpoint_holds_is_refused_at_once(start, draw_draft, tmp_path):
    mixed = draw_draft(**(SMALL | {"windows": (None, 16), "causal": (True, False)}))
    with pytest.raises(ConfigError, match="is_causal is one key"):
        start(tmp_path / "root", draft=mixed)
    with pytest.raises(ValueError, match="provenance must be JSON"):
        start(tmp_path / "root", provenance={"cache": tmp_path})
    assert not (tmp_path / "root").exists()


def test_all_faults_of_a_run_config_at_once(tmp_path):
    names = ("save_every", "keep", "log_every", "evaluate_every")
    with pytest.raises(ConfigError) as error:
        RunConfig(root=tmp_path, **dict.fromkeys(names, 0))
    assert all(f"{name} must be at least 1, got 0" in str(error.value) for name in names)
