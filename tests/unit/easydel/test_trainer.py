"""EasyDeL's trainer with our step: the same weights as ours, resumed from its checkpoints, never restarted."""

import json
import shutil
import sys

import jax
import numpy as np
import pytest
from flax import nnx

from dflash import ConfigError
from dflash.cli.main import main
from dflash.config import ConvConfig, SelectorConfig
from dflash.easydel import door as easydel
from dflash.easydel import trainer as easydel_trainer
from dflash.training import run as run_module
from dflash.training.batches import TrainingBatches
from dflash.training.run import Run, RunConfig, TrainingError
from dflash.training.trainer import TrainConfig, Trainer
from dflash.weights.load import read_any_draft
from dflash.weights.runs.checkpoint import read_run, write_run
from dflash.weights.runs.directories import completed_runs
from dflash.weights.snapshot import WeightsError
from dflash.weights.tiny import write_tiny_target, write_tiny_tokenizer

pytestmark = [pytest.mark.oracle, pytest.mark.easydel, pytest.mark.slow]

V, H, S = 199, 64, 4
SMALL = {"windows": (None,), "causal": (False,), "block_size": S}
TRAIN = {"steps": 6, "batch_size": 8, "num_anchors": 2, "learning_rate": 1e-3, "weight_decay": 0.1}


@pytest.fixture(scope="module", autouse=True)
def package():
    try:
        return easydel.load("easydel.trainers")
    except easydel.EasyDelError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def cache(write_sequences, tmp_path_factory):
    return write_sequences(tmp_path_factory.mktemp("easydel") / "cache", held_out=8)


@pytest.fixture(scope="module")
def table():
    """Embedding and head of the target."""
    return np.random.default_rng(8).standard_normal((V, H)).astype(np.float32)


@pytest.fixture(scope="module")
def batches(cache, table):
    return TrainingBatches(cache, cache.rows(False), batch_size=8, num_anchors=2, block_size=S, embedding=table, seed=0)


@pytest.fixture(scope="module")
def train(draw_draft, table, batches):
    """Trains a draft into a directory, in EasyDeL's loop."""

    def train(root, *, batches=batches, draft=None, **changes):
        return easydel_trainer.train(
            draft or draw_draft(**SMALL),
            table,
            table[5],
            TrainConfig(**TRAIN | changes),
            batches,
            RunConfig(root=root, save_every=3, log_every=2),
            {"cache_sha256": "ab"},
        )

    return train


@pytest.fixture(scope="module")
def finished(train, tmp_path_factory):
    """An unbroken run, not to be changed."""
    root = tmp_path_factory.mktemp("finished") / "runs"
    assert train(root) == root / "run-6"
    return root


class StoppedError(Exception):
    pass


@pytest.fixture
def stopped(train, cache, table, tmp_path):
    """A run that was stopped after its first checkpoint."""

    class Batches(TrainingBatches):
        def __call__(self, step):
            if step == 4:
                raise StoppedError
            return super().__call__(step)

    settings = {"batch_size": 8, "num_anchors": 2, "block_size": S, "embedding": table, "seed": 0}
    with pytest.raises(StoppedError):
        train(tmp_path / "runs", batches=Batches(cache, cache.rows(False), **settings))
    assert list(completed_runs(tmp_path / "runs")) == [3]
    return tmp_path / "runs"


def arrays_of(run):
    """Every file of a checkpoint's weights and optimizer state, byte for byte."""
    folders = [run / "model", run / "tx"]
    return {p.relative_to(run).as_posix(): p.read_bytes() for f in folders for p in f.rglob("*") if p.is_file()}


def apart(one, other):
    """The largest difference of any two weights, as a share of the second's largest entry."""
    pairs = zip(jax.tree.leaves(nnx.state(one)), jax.tree.leaves(nnx.state(other)), strict=True)
    return max(float(np.abs(x - y).max() / np.abs(y).max()) for x, y in pairs)


# ---- the same steps


@pytest.mark.parametrize("changes", [{}, {"accumulation": 2, "remat": True, "dtype": "bfloat16", "clip": 0.0}])
def test_its_weights_are_those_of_our_trainer(train, draw_draft, table, batches, tmp_path, changes):
    ours = Trainer(draw_draft(**SMALL), table, table[5], TrainConfig(**TRAIN | changes))
    for step in range(6):
        ours.step(batches(step))
    theirs = read_run(train(tmp_path / "runs", **changes))
    assert apart(ours.draft(), draw_draft(**SMALL)) > 1e-3
    assert apart(theirs, ours.draft()) < 1e-4


def test_figures_are_those_of_our_run(finished, draw_draft, table, batches, tmp_path, monkeypatch):
    monkeypatch.setattr(run_module, "matmul_rate", lambda dtype: 1e12)
    trainer = Trainer(draw_draft(**SMALL), table, table[5], TrainConfig(**TRAIN))
    Run(trainer, batches, [], RunConfig(root=tmp_path, save_every=3, log_every=2, evaluate_every=99), {}).train()
    ours, theirs = (
        [json.loads(line) for line in (root / "metrics.jsonl").read_text().splitlines()]
        for root in (tmp_path, finished)
    )
    assert [line["step"] for line in theirs] == [line["step"] for line in ours] == [2, 3, 4, 6]
    for expected, line in zip(ours, theirs, strict=True):
        assert line == pytest.approx({key: expected[key] for key in line}, rel=1e-4)
    assert (finished / "curves.png").is_file()


def test_a_step_reads_the_rows_that_ours_would(train, package, batches, tmp_path, monkeypatch):
    seen = []
    kind = easydel_trainer._trainer_class(package)
    place = kind._preprocess_batch_input

    def look(self, state, batch, is_train):
        seen.append((int(state.step), batch))
        return place(self, state, batch, is_train)

    monkeypatch.setattr(kind, "_preprocess_batch_input", look)
    train(tmp_path / "runs")
    assert [step for step, _ in seen] == list(range(6))
    for step, batch in seen:
        np.testing.assert_array_equal(batch.starts, batches.cache.pos_start[batches.rows(step)])
        np.testing.assert_array_equal(batch.features, batches(step).features)
    read = np.concatenate([batches.rows(step) for step in range(2)])
    assert sorted(read) == sorted(batches.cache.rows(False)) != list(read)


def test_a_dflash2_draft_is_trained_too(train, draw_draft, table, batches, tmp_path):
    parts = {"conv": ConvConfig(kernel_size=3, group_size=16), "selector": SelectorConfig(rank=8, top_k=4)}
    ours = Trainer(draw_draft(**SMALL, **parts), table, table[5], TrainConfig(**TRAIN))
    for step in range(6):
        ours.step(batches(step))
    assert apart(read_run(train(tmp_path / "runs", draft=draw_draft(**SMALL, **parts))), ours.draft()) < 1e-4


# ---- what it saves, and on from there


def test_what_it_saves_is_a_run_of_ours(finished, draw_draft):
    assert list(completed_runs(finished)) == [3, 6]
    draft = read_any_draft(finished)
    assert draft.config == draw_draft(**SMALL).config
    content = json.loads((finished / "run-6" / "config.json").read_text())
    assert content["model_type"] == "dflash_draft"
    assert content["dflash"]["provenance"] == {"cache_sha256": "ab"}
    index = json.loads((finished / "run-6" / "tensorstore_index.json").read_text())["prefixes"]
    assert all(len(entry["sha256"]) == 64 for entries in index.values() for entry in entries)


def test_a_stopped_run_ends_as_an_unbroken_one(stopped, finished, train):
    assert train(stopped) == stopped / "run-6"
    assert arrays_of(stopped / "run-6") == arrays_of(finished / "run-6")
    assert (stopped / "metrics.jsonl").read_text() == (finished / "metrics.jsonl").read_text()


def test_a_finished_run_trains_no_further(finished, train, tmp_path):
    root = shutil.copytree(finished, tmp_path / "runs")
    assert train(root) == root / "run-6"
    assert arrays_of(root / "run-6") == arrays_of(finished / "run-6")


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


DAMAGES = {
    "a weight": (lambda run: (run / "model/fc/kernel/value/0.0").unlink(), WeightsError, "model/fc/kernel"),
    "a moment": (lambda run: cut(next((run / "tx").rglob("mu/fc/**/0.0"))), WeightsError, "/mu/fc"),
    "no weights": (lambda run: shutil.rmtree(run / "model"), WeightsError, "it has no model/"),
    "no marker": (lambda run: (run / "metadata.json").unlink(), WeightsError, "it has no metadata.json"),
    "no index": (lambda run: (run / "tensorstore_index.json").unlink(), WeightsError, "tensorstore_index.json"),
    "no moments": (lambda run: shutil.rmtree(run / "tx"), WeightsError, "arrays of"),
    "only EasyDeL reads it": (
        lambda run: next(run.glob("tx_structure.json")).write_text("{}"),
        TrainingError,
        "would start again from step 0: move that checkpoint away",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_checkpoint_that_cannot_be_read_is_no_fresh_start(stopped, train, damage):
    spoil, error, said = DAMAGES[damage]
    spoil(stopped / "run-3")
    before = {p: p.read_bytes() for p in stopped.rglob("*") if p.is_file()}
    with pytest.raises(error, match=said) as raised:
        train(stopped)
    assert "run-3" in str(raised.value)
    assert {p: p.read_bytes() for p in stopped.rglob("*") if p.is_file()} == before


def test_a_resume_that_easydel_would_skip_is_an_error(stopped, train, package, monkeypatch):
    """Its loader fails without a fault of the files: stock, it warns and begins at step 0."""

    def fail(*args, **settings):
        raise OSError("no such luck")

    monkeypatch.setattr(package.EasyDeLState, "load_state", fail)
    with pytest.raises(TrainingError, match=r"can't resume from .*run-3"):
        train(stopped)


def test_another_run_is_refused(finished, train, draw_draft, table, batches, tmp_path):
    root = shutil.copytree(finished, tmp_path / "runs")
    with pytest.raises(ConfigError, match=r"train.learning_rate 0.001 there, 0.002 here"):
        train(root, learning_rate=2e-3)
    trainer = Trainer(draw_draft(**SMALL), table, table[5], TrainConfig(**TRAIN))
    with pytest.raises(ConfigError, match="trainer 'easydel' there, None here"):
        Run(trainer, batches, [], RunConfig(root=root), {"cache_sha256": "ab"})
    write_run(draw_draft(**SMALL), tmp_path / "foreign", 3, optimizer_state=None, provenance={}, keep=None)
    with pytest.raises(ConfigError, match="holds a run with other settings"):
        train(tmp_path / "foreign")


# ---- what stops it


def stop(monkeypatch, error):
    """Raises where a step's figures are looked at; returns the error."""

    def fail(step, *arguments):
        if step == 4:
            raise error

    monkeypatch.setattr(easydel_trainer, "check_step", fail)
    return error


def test_an_interrupt_is_one_and_no_end(train, monkeypatch, tmp_path):
    """Stock, it returns as if that step had been the last."""
    stop(monkeypatch, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "runs")
    assert list(completed_runs(tmp_path / "runs")) == [3, 4]
    monkeypatch.undo()
    assert train(tmp_path / "runs").name == "run-6"


def test_a_mistake_of_ours_is_not_told_as_an_interrupt(train, monkeypatch, tmp_path):
    """Stock, a TypeError between two steps ends the run as Ctrl-C does."""
    error = stop(monkeypatch, TypeError("a mistake"))
    with pytest.raises(TypeError) as raised:
        train(tmp_path / "runs")
    assert raised.value is error


def test_an_interrupt_within_a_step_leaves_the_last_checkpoint(train, package, monkeypatch, tmp_path):
    kind = easydel_trainer._trainer_class(package)
    place = kind._preprocess_batch_input

    def interrupt(self, state, batch, is_train):
        if int(state.step) == 4:
            raise KeyboardInterrupt
        return place(self, state, batch, is_train)

    monkeypatch.setattr(kind, "_preprocess_batch_input", interrupt)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "runs")
    assert list(completed_runs(tmp_path / "runs")) == [3]


def test_what_ends_it_in_their_code_is_no_end(train, package, monkeypatch, tmp_path):
    def interrupt(self, state, metrics, step):
        if step == 4:
            raise KeyboardInterrupt
        return state, metrics

    monkeypatch.setattr(easydel_trainer._trainer_class(package), "on_step_end", interrupt)
    with pytest.raises(TrainingError, match=r"interrupted after step 4 of 6; .*run-4"):
        train(tmp_path / "runs")


def test_what_is_not_finite_stops_it(train, cache, table, tmp_path):
    spoilt = table.copy()
    spoilt[:] = np.inf
    settings = {"batch_size": 8, "num_anchors": 2, "block_size": S, "embedding": spoilt, "seed": 0}
    with pytest.raises(TrainingError, match=r"step 1 .*loss .* rows \[.*last good checkpoint is none"):
        train(tmp_path / "runs", batches=TrainingBatches(cache, cache.rows(False), **settings))
    assert not completed_runs(tmp_path / "runs")


def test_the_mesh_has_every_device(train, tmp_path):
    with pytest.raises(ConfigError, match=f"must be {jax.device_count()}, got 2 x 4"):
        train(tmp_path / "runs", dp=2, tp=4)
    assert not (tmp_path / "runs").exists()


# ---- many devices, and the command line

SHARDED = """
import sys
from pathlib import Path
import jax, numpy as np
from flax import nnx
from dflash.easydel import trainer as easydel_trainer
from dflash.training.cache import open_cache
from dflash.training.batches import TrainingBatches
from dflash.training.run import RunConfig
from dflash.training.trainer import TrainConfig, Trainer
from dflash.weights.runs.checkpoint import read_run
from dflash.weights.runs.directories import completed_runs

where = Path(sys.argv[1])
draft, table, cache = read_run(where / "run-0"), np.load(where / "table.npy"), open_cache(where / "cache")
config = TrainConfig(dp=2, tp=4, **{train})
settings = dict(batch_size=8, num_anchors=2, block_size=4, embedding=table, seed=0)
batches = TrainingBatches(cache, cache.rows(False), **settings)

class StoppedError(Exception):
    pass

class Batches(TrainingBatches):
    def __call__(self, step):
        if step == 4:
            raise StoppedError
        return super().__call__(step)

def train(root, batches):
    settings = RunConfig(root=where / root, save_every=3, log_every=2)
    return easydel_trainer.train(draft, table, table[5], config, batches, settings, dict())

if {first}:
    try:
        train("runs", Batches(cache, cache.rows(False), **settings))
    except StoppedError:
        assert list(completed_runs(where / "runs")) == [3]
else:
    assert list(completed_runs(where / "runs")) == [3]
    ours = Trainer(draft, table, table[5], config)
    for step in range(6):
        ours.step(batches(step))
    resumed, unbroken = (read_run(train(root, batches)) for root in ("runs", "unbroken"))
    for a, b, c in zip(*(jax.tree.leaves(nnx.state(d)) for d in (resumed, unbroken, ours.draft())), strict=True):
        np.testing.assert_array_equal(a, b)
        assert np.abs(a - c).max() <= 1e-4 * np.abs(c).max(), np.abs(a - c).max() / np.abs(c).max()
print("same")
"""


def test_on_a_mesh_of_dp_and_tp(draw_draft, cache, table, on_eight_devices, tmp_path):
    """Stopped in one process, on in another; against an unbroken run, and our trainer on the same mesh."""
    write_run(draw_draft(**SMALL), tmp_path, 0, optimizer_state=None, provenance={}, keep=None)
    np.save(tmp_path / "table.npy", table)
    (tmp_path / "cache").symlink_to(cache.directory)
    for first in (True, False):
        on_eight_devices(SHARDED.format(train=TRAIN, first=first))


def test_from_the_command_line(tmp_path, monkeypatch, capsys):
    folder = write_tiny_tokenizer(write_tiny_target(tmp_path / "target", vocab_size=260, num_hidden_layers=2))
    monkeypatch.chdir(tmp_path)
    build = "--num-conversations 4 --max-new-tokens 16 --max-user-turn 16 --openings none --held-out 0.3"
    train = "--trainer easydel --steps 4 --batch-size 2 --num-anchors 2 --save-every 2 --draft-layers 1 --block-size 4"
    for command in (
        ["build-cache", "cache", *build.split(), "--target-layer-ids", "0", "1"],
        ["train", "cache", "runs", *train.split()],
        ["train", "cache", "runs", *train.split()],
        ["evaluate", "cache", "runs", "--rows", "train"],
    ):
        monkeypatch.setattr(sys, "argv", ["dflash", *command, "--target", str(folder)])
        assert main() == 0, capsys.readouterr().err
    assert "draft: " in capsys.readouterr().out
    assert list(completed_runs(tmp_path / "runs")) == [2, 4]
