"""No server gets a draft with a fault: each fault that a real server silently accepted is refused here."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from dflash import init_draft, load_target, write_draft
from dflash.config import ConfigError, ConvConfig, SelectorConfig
from dflash.models.draft import pack_tokens
from dflash.serving.connection import ServingError
from dflash.serving.draft import served_draft
from dflash.weights.load import new_draft
from dflash.weights.runs.checkpoint import write_run
from dflash.weights.snapshot import WeightsError
from dflash.weights.tiny import write_tiny_target

CONFIG, WEIGHTS = "config.json", "model.safetensors"


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    return write_tiny_target(tmp_path_factory.mktemp("served") / "target", num_hidden_layers=5)


@pytest.fixture(scope="module")
def sound(target):
    directory = target.with_name("draft")
    write_draft(init_draft(load_target(target), block_size=8), directory)
    return directory


@pytest.fixture
def spoilt(sound, tmp_path):
    """A copy of the sound draft with another config (keys of dflash_config too) or other tensors."""

    def spoilt(config=None, own=None, tensors=lambda t: t):
        directory = tmp_path / "draft"
        shutil.copytree(sound, directory)
        raw = json.loads((directory / CONFIG).read_text()) | (config or {})
        raw["dflash_config"] = raw["dflash_config"] | (own or {})
        (directory / CONFIG).write_text(json.dumps(raw))
        save_file(tensors(load_file(directory / WEIGHTS)), directory / WEIGHTS, metadata={"format": "pt"})
        return directory

    return spoilt


def without(name):
    return lambda tensors: {k: v for k, v in tensors.items() if k != name}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"tensors": without("hidden_norm.weight")}, "hidden_norm.weight"),
        ({"tensors": lambda t: t | {"mask_embedding": np.zeros(4, np.float32)}}, "mask_embedding"),
        ({"tensors": lambda t: t | {"fc.weight": t["fc.weight"][:, :-1].copy()}}, "fc.weight"),
        ({"tensors": lambda t: {f"model.{k}": v for k, v in t.items()}}, "model."),
        ({"own": {"target_layer_ids": [0, 9]}}, "layers"),
        ({"own": {"mask_token_id": 10**6}}, "mask"),
        ({"config": {"block_size": 1}, "own": {"block_size": 1}}, "block_size"),
    ],
    ids=["missing", "extra", "fc", "prefix", "layer", "mask", "block"],
)
def test_a_fault_is_named(spoilt, target, changes, said):
    with pytest.raises(ServingError, match=r"no server gets this draft, ") as error:
        served_draft(spoilt(**changes), target)
    assert said in str(error.value)


def test_faults_of_config_and_tensors_come_together(spoilt, target):
    broken = spoilt(own={"target_layer_ids": [0, 9]}, tensors=without("hidden_norm.weight"))
    with pytest.raises(ServingError, match="layers") as error:
        served_draft(broken, target)
    assert "hidden_norm.weight" in str(error.value)


def test_a_block_is_no_larger_than_trained_for(sound, target):
    draft = served_draft(sound, target)
    assert draft.block_size == draft.config.block_size == 8
    assert served_draft(sound, target, 4).block_size == 4
    with pytest.raises(ServingError, match=r"blocks of 2 .*\b8; got 16"):
        served_draft(sound, target, 16)


def test_no_server_knows_a_second_architecture(target, tmp_path):
    config = load_target(target).config
    parts = {"conv": ConvConfig(kernel_size=3, group_size=16), "selector": SelectorConfig(rank=8, top_k=5)}
    second = new_draft(config, num_layers=2, block_size=8, **parts)
    write_draft(second, tmp_path / "second")
    with pytest.raises(ServingError, match="no server knows DFlash 2 drafts"):
        served_draft(tmp_path / "second", target)


def test_a_draft_of_a_reduced_vocabulary_is_served(target, tmp_path):
    """What is proposed is whoever decodes' choice, and servers choose from all tokens."""
    config = load_target(target).config
    few = new_draft(config, num_layers=2, block_size=8, vocabulary=pack_tokens(np.arange(50), config.vocab_size))
    write_draft(few, tmp_path / "few")
    assert served_draft(tmp_path / "few", target).config == few.config


def test_no_device_is_opened(sound, target):
    """A TPU belongs to one process, and that is the server's."""
    script = (
        "import sys; from pathlib import Path; from dflash.serving.draft import served_draft; "
        "served_draft(*map(Path, sys.argv[1:])); from jax._src import xla_bridge; assert not xla_bridge._backends"
    )
    subprocess.run([sys.executable, "-c", script, sound, target], check=True)


def test_a_config_for_speculators_is_refused_by_name(spoilt, target):
    with pytest.raises(ServingError, match=r"speculators: .*--format"):
        served_draft(spoilt({"speculators_config": {}}), target)


def test_a_target_of_a_family_that_we_can_not_run_may_be_served(sound, target, tmp_path):
    """Of its config only layers, width and vocabulary are read, wherever a model of pictures and text has them."""
    ours = json.loads((target / CONFIG).read_text())
    sizes = {name: ours[name] for name in ("num_hidden_layers", "hidden_size", "vocab_size")}
    foreign = {"model_type": "qwen3_moe", "quantization_config": {"quant_method": "fp8"}, "rope_scaling": {"odd": 1}}
    for raw in (sizes | foreign, {"model_type": "qwen3_vl", "text_config": sizes}):
        (tmp_path / CONFIG).write_text(json.dumps(raw))
        assert served_draft(sound, tmp_path).block_size == 8
    (tmp_path / CONFIG).write_text(json.dumps(sizes | {"hidden_size": 32, "num_hidden_layers": 2}))
    with pytest.raises(ServingError, match=r"hidden size .* 32; .*reads layers"):
        served_draft(sound, tmp_path)
    (tmp_path / CONFIG).write_text(json.dumps(sizes | {"vocab_size": "many"}))
    with pytest.raises(ConfigError, match="vocab_size must be a number"):
        served_draft(sound, tmp_path)


def test_a_run_directory_is_to_be_exported(tmp_path, target):
    write_run(init_draft(load_target(target)), tmp_path, 3, optimizer_state=None, provenance={}, keep=None)
    for path in (tmp_path, tmp_path / "run-3"):
        with pytest.raises(ServingError, match=rf"holds training runs: .*python -m dflash export {path} NEW_DIR"):
            served_draft(path, target)


def test_no_draft_is_told_as_every_command_tells_it(tmp_path, target):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    for name in ("empty", "file", "nowhere", "no/such/dir"):
        with pytest.raises(WeightsError, match=rf"^{tmp_path / name} holds no draft: name .*smollm2-135m-plain$"):
            served_draft(str(tmp_path / name), target)
    with pytest.raises(WeightsError, match="an untrained draft is not taken here: name "):
        served_draft("untrained", target)
