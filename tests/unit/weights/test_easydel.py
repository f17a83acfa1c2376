"""Targets in EasyDeL's layout, read and made without it."""

import json

import numpy as np
import pytest
from flax import nnx

from dflash import load_target
from dflash.weights.easydel import from_state, to_state
from dflash.weights.huggingface import read_tensors
from dflash.weights.load import read_borrowed, read_layers
from dflash.weights.runs.arrays import write_array, write_index
from dflash.weights.snapshot import WeightsError, snapshot_hash
from dflash.weights.tiny import write_tiny_target

FAMILIES = {"llama": {"tie_word_embeddings": True}, "qwen2": {}, "qwen3": {}, "gpt_oss": {}}
TOKENS = np.random.default_rng(0).integers(0, 199, (2, 24))


def their_arrays(snapshot):
    """A snapshot's tensors as EasyDeL keeps them, written from its own naming: kernels turned round, norms' too."""
    arrays = {}
    for name, value in read_tensors(snapshot).items():
        path = name.replace(".", "/")
        if path.endswith("gate_up_proj") or path.endswith("gate_up_proj_bias"):
            part = "bias" if path.endswith("_bias") else "kernel"
            stem = path.removesuffix("_bias").removesuffix("gate_up_proj")
            arrays[f"{stem}gate_proj/{part}"] = value[..., ::2]
            arrays[f"{stem}up_proj/{part}"] = value[..., 1::2]
        elif "/experts/" in path:
            arrays[f"{path.removesuffix('_bias')}/{'bias' if path.endswith('_bias') else 'kernel'}"] = value
        elif "embed_tokens" in path:
            arrays[path.replace("weight", "embedding")] = value
        elif path.endswith("/weight"):
            arrays[path.replace("/weight", "/kernel")] = value.T
        else:
            arrays[path] = value
    return arrays


def write_theirs(snapshot, directory):
    """What `save_pretrained` writes of a snapshot, as far as it is read."""
    directory.mkdir()
    (directory / "config.json").write_text((snapshot / "config.json").read_text())
    entries = [write_array(directory, f"model/{path}", value) for path, value in their_arrays(snapshot).items()]
    write_index(directory, {"model": entries})
    index = json.loads((directory / "tensorstore_index.json").read_text())
    for entry in index["prefixes"]["model"]:
        del entry["sha256"]  # a key of ours
    (directory / "tensorstore_index.json").write_text(json.dumps(index))
    return directory


@pytest.fixture(params=FAMILIES)
def snapshot(request, tmp_path):
    return write_tiny_target(tmp_path / "snapshot", request.param, **FAMILIES[request.param])


def weights(target):
    return {path: v.get_value() for path, v in nnx.to_flat_state(nnx.state(target))}


def equal(one, other):
    a, b = weights(one), weights(other)
    return a.keys() == b.keys() and all(np.array_equal(a[path], b[path]) for path in a)


def test_a_directory_of_theirs_is_the_target_of_the_snapshot(snapshot, tmp_path):
    theirs = write_theirs(snapshot, tmp_path / "theirs")
    target = load_target(theirs)
    assert equal(target, load_target(snapshot))
    assert equal(load_target(theirs, "bfloat16"), load_target(snapshot, "bfloat16"))


def test_what_training_borrows_comes_from_it_too(tmp_path):
    snapshot = write_tiny_target(tmp_path / "snapshot")
    theirs = write_theirs(snapshot, tmp_path / "theirs")
    ours, borrowed = read_borrowed(snapshot), read_borrowed(theirs)
    for name in ("embedding", "head", "norm"):
        np.testing.assert_array_equal(getattr(borrowed, name), getattr(ours, name))
    for mine, other in zip(read_layers(snapshot, [0, 2]), read_layers(theirs, [0, 2]), strict=True):
        assert mine.keys() == other.keys()
        assert all(np.array_equal(mine[name], other[name]) for name in mine)


def test_its_hash_changes_with_any_weight(tmp_path):
    one = write_theirs(write_tiny_target(tmp_path / "a"), tmp_path / "one")
    assert snapshot_hash(one) == snapshot_hash(one)
    other = write_theirs(write_tiny_target(tmp_path / "b", seed=1), tmp_path / "other")
    assert snapshot_hash(one) != snapshot_hash(other)


def test_a_target_becomes_their_state_and_comes_back(snapshot):
    target = load_target(snapshot)
    state = dict(to_state(target))
    expected = their_arrays(snapshot)
    assert state.keys() == expected.keys()
    assert all(np.array_equal(state[path], expected[path]) for path in state)
    back = from_state(target.config, state)
    assert equal(back, target)
    np.testing.assert_array_equal(back.forward(TOKENS)[0], target.forward(TOKENS)[0])


def test_no_weight_is_held_twice(tmp_path):
    """What both lay out alike is one memory; the rest is given up as it is read."""
    target = load_target(write_tiny_target(tmp_path, "gpt_oss"))
    state = dict(to_state(target))
    address = {path: array.unsafe_buffer_pointer() for path, array in state.items()}
    back = from_state(target.config, state)
    assert state == {}
    for ours, theirs in (
        (back.embedding.weight, "model/embed_tokens/embedding"),
        (back.norm.weight, "model/norm/kernel"),
        (back.layers[1].mlp.down_bias, "model/layers/1/mlp/experts/down_proj/bias"),
    ):
        assert ours.get_value().unsafe_buffer_pointer() == address[theirs]
    assert target.embedding.weight.get_value().unsafe_buffer_pointer() == address["model/embed_tokens/embedding"]


def test_lost_chunks_are_no_zeros(tmp_path):
    theirs = write_theirs(write_tiny_target(tmp_path / "snapshot", "gpt_oss"), tmp_path / "theirs")
    layer = theirs / "model/model/layers/1"
    # What a writer may leave out, being zero.
    for path in ("self_attn/q_proj/bias", "self_attn/sinks", "mlp/experts/down_proj/bias"):
        for chunk in (layer / path).glob("[0-9]*"):
            chunk.unlink()
    attention = load_target(theirs).layers[1].attention
    assert not np.asarray(attention.sinks.get_value()).any()
    for path in ("input_layernorm/kernel/0", "self_attn/o_proj/kernel/0.0", "mlp/experts/up_proj/kernel/.zarray"):
        (layer / path).unlink()
    with pytest.raises(WeightsError, match=r"copied incompletely, .*zeros \(3 faults\): .*: copy it again") as error:
        load_target(theirs)
    for said in ("1/input_layernorm/kernel (1 of 1 chunks)", "1/self_attn/o_proj/kernel (", "up_proj/kernel (without"):
        assert said in str(error.value)


def test_a_tied_head_that_they_saved_is_passed_over(tmp_path):
    snapshot = write_tiny_target(tmp_path / "snapshot", tie_word_embeddings=True)
    target = load_target(snapshot)
    state = dict(to_state(target)) | {"lm_head/kernel": np.zeros((64, 199), np.float32)}
    assert equal(from_state(target.config, state), target)


def test_every_fault_is_told(tmp_path):
    snapshot = write_tiny_target(tmp_path / "snapshot", num_hidden_layers=1)
    target = load_target(snapshot)
    state = dict(to_state(target))
    state["extra"] = state.pop("model/norm/kernel")
    state["lm_head/kernel"] = state["lm_head/kernel"][:, :3]
    with pytest.raises(WeightsError, match=r"3 faults.*missing model/norm/kernel.*64, 3.*unexpected extra"):
        from_state(target.config, state)

    theirs = write_theirs(snapshot, tmp_path / "theirs")
    index = json.loads((theirs / "tensorstore_index.json").read_text())
    entries = index["prefixes"]["model"]
    entries[:] = [entry for entry in entries if not entry["path"].endswith("norm/kernel")]
    (theirs / "tensorstore_index.json").write_text(json.dumps(index))
    with pytest.raises(WeightsError, match=r"3 faults.*missing model/model/norm/kernel \[64\]"):
        load_target(theirs)
