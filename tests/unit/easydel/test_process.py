"""Importing EasyDeL leaves the process unchanged."""

import importlib.metadata
import json
import os
import subprocess
import sys

import numpy as np
import pytest

from dflash.cli.main import main
from dflash.easydel import door as easydel
from dflash.weights.runs.checkpoint import write_run

_LOOK = """
import json, logging, os, sys, warnings
import jax
jax.config.update("jax_compilation_cache_dir", {cache!r})

def look():
    return {{
        "environment": dict(os.environ),
        "limit": sys.getrecursionlimit(),
        "hook": repr(sys.excepthook),
        "log": [logging.root.level, repr(logging.root.handlers)],
        "warnings": repr(warnings.filters),
        "jax": {{name: repr(value) for name, value in jax.config.values.items() if name in known}},
    }}

{first}
known = list(jax.config.values)
before = look()
{action}
after = look()
jax.jit(lambda x: x + 1)(1.0)
print(json.dumps([before, after, sorted(os.listdir({cache!r}))]))
"""


def _look(action, cache, first=""):
    """The process before and after `action`, and what a program compiled afterwards left in jax's compile cache.

    What `first` changes counts as before.
    """
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    code = _LOOK.format(action=action, first=first, cache=str(cache))
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


@pytest.fixture
def cache(tmp_path):
    directory = tmp_path / "cache"
    directory.mkdir()
    return directory


def test_what_is_changed_meanwhile_is_put_back(cache):
    action = """
from dflash.easydel import isolated
from jax.experimental.compilation_cache import compilation_cache
with isolated():
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=3"
    del os.environ["JAX_PLATFORMS"]
    sys.setrecursionlimit(10000)
    sys.excepthook = print
    logging.basicConfig(level=10, force=True)
    warnings.simplefilter("error")
    compilation_cache.set_cache_dir("/elsewhere")
    jax.config.update("jax_compilation_cache_dir", "/elsewhere")
    jax.jit(lambda x: x + 2)(1.0)
"""
    before, after, compiled = _look(action, cache)
    assert after == before
    # The second program is kept where the user wants it, the first nowhere.
    assert len([name for name in compiled if name.endswith("-cache")]) == 1, compiled


def test_it_is_put_back_after_a_failure(monkeypatch):
    monkeypatch.delenv("EASYDEL_AUTO", raising=False)

    def fail():
        with easydel.isolated():
            raise KeyError(os.environ["EASYDEL_AUTO"])

    with pytest.raises(KeyError, match="0"):
        fail()
    assert "EASYDEL_AUTO" not in os.environ


def test_where_it_is_missing_or_another_the_error_says_what_to_do(monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(easydel.metadata, "version", missing)
    with pytest.raises(easydel.EasyDelError, match=r"not installed: pip install 'dflash-bench\[easydel\]'"):
        easydel.load()
    monkeypatch.setattr(easydel.metadata, "version", lambda name: "0.4.0")
    with pytest.raises(easydel.EasyDelError, match=r"must be 0\.3\.0.*got 0\.4\.0"):
        easydel.load()


@pytest.mark.parametrize(
    "command",
    ["audit-teacher", "build-cache cache --teacher easydel", "train cache runs --trainer easydel"],
)
def test_a_command_that_needs_it_says_so_first_and_in_one_sentence(command, monkeypatch, capsys, tmp_path):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    def read(*arguments):
        raise AssertionError(f"{arguments} was read for nothing")

    for module, name in (("target", "load_target"), ("train", "open_with_target")):
        monkeypatch.setattr(sys.modules[f"dflash.cli.{module}"], name, read)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(easydel.metadata, "version", missing)
    monkeypatch.setattr(sys, "argv", ["dflash", *command.split(), "--target", "target"])
    assert main() == 2
    assert capsys.readouterr().err.startswith("dflash: EasyDeL is not installed: pip install")
    assert not list(tmp_path.iterdir())


@pytest.fixture
def installed():
    try:
        importlib.metadata.version("easydel")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("EasyDeL is not installed")


@pytest.mark.oracle
@pytest.mark.easydel
def test_importing_easydel_leaves_the_process_as_it_was(cache, installed):
    before, after, compiled = _look("from dflash import easydel\neasydel.load()", cache)
    assert after == before
    assert len([name for name in compiled if name.endswith("-cache")]) == 1, compiled


_IMPORTS = """
from pathlib import Path
import numpy as np
from dflash.easydel import trainer as easydel_trainer
from dflash.training.cache import open_cache
from dflash.training.batches import TrainingBatches
from dflash.training.run import RunConfig
from dflash.training.trainer import TrainConfig
from dflash.weights.runs.checkpoint import read_run
"""
_TRAINS = """
where = Path({where!r})
table = np.load(where / "table.npy")
sequences = open_cache(where / "sequences")
batches = TrainingBatches(
    sequences, sequences.rows(False), batch_size=4, num_anchors=2, block_size=4, embedding=table, seed=0
)
config = TrainConfig(steps=2, batch_size=4, num_anchors=2, dp=2)
settings = RunConfig(root=where / "runs")
easydel_trainer.train(read_run(where / "run-0"), table, table[5], config, batches, settings, {{}})
"""


@pytest.mark.oracle
@pytest.mark.easydel
@pytest.mark.slow
def test_training_in_easydels_loop_leaves_the_process_as_it_was(
    cache, installed, tmp_path, write_sequences, draw_draft
):
    write_sequences(tmp_path / "sequences")
    draft = draw_draft(windows=(None,), causal=(False,), block_size=4)
    write_run(draft, tmp_path, 0, optimizer_state=None, provenance={}, keep=None)
    np.save(tmp_path / "table.npy", np.random.default_rng(8).standard_normal((199, 64)).astype(np.float32))
    before, after, compiled = _look(_TRAINS.format(where=str(tmp_path)), cache, _IMPORTS)
    assert (tmp_path / "runs" / "run-2").is_dir()
    assert after == before
    assert len([name for name in compiled if name.endswith("-cache")]) == 1, compiled
