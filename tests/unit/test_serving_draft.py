"""No server gets a draft with a fault: each that a real one was seen to load without a word is refused here."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from dflash import init_draft, load_target, write_draft
from dflash.serving.draft import faults, load
from dflash.serving.server import ServingError
from dflash.tiny import write_tiny_target

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


def test_a_sound_draft_has_no_fault(sound, target):
    assert faults(sound, target) == []


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
    assert said in "; ".join(faults(spoilt(**changes), target))


def test_faults_of_config_and_tensors_come_together(spoilt, target):
    broken = spoilt(own={"target_layer_ids": [0, 9]}, tensors=without("hidden_norm.weight"))
    said = "; ".join(faults(broken, target))
    assert "layers" in said
    assert "hidden_norm.weight" in said


@pytest.mark.slow
def test_load_checks_in_a_process_of_its_own(sound, spoilt, target):
    draft = load(sound, target)
    assert draft.block_size == draft.config.block_size == 8
    assert load(sound, target, 4).block_size == 4
    with pytest.raises(ServingError, match=r"no server gets this draft, .*hidden_norm.weight"):
        load(spoilt(tensors=without("hidden_norm.weight")), target)
    with pytest.raises(ServingError, match="blocks of 2 up to what it was trained for, 8; got 16"):
        load(sound, target, 16)


def test_a_run_directory_is_to_be_exported(tmp_path, target):
    (tmp_path / "run_config.json").write_text("{}")
    with pytest.raises(ServingError, match="python -m dflash export"):
        load(tmp_path, target)
