"""Training checkpoints: every bit back, EasyDeL's layout, no run half written, no damaged one read."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import filelock
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
import tensorstore
from flax import nnx

import dflash
from dflash import ConfigError, WeightsError, decode, load_draft, load_target, write_draft
from dflash.weights import huggingface
from dflash.weights.load import read_any_draft
from dflash.weights.runs import checkpoint as easydel
from dflash.weights.runs import directories as runs
from dflash.weights.runs.checkpoint import read_optimizer_state, read_run, write_run
from dflash.weights.runs.directories import latest_run, resolve_run
from dflash.weights.tiny import write_tiny_target

SMALL = {"hidden_size": 32, "intermediate_size": 48, "head_dim": 8, "windows": (None,), "causal": (False,)}


def save(draft, root, step=1, state=None, keep=None, **provenance):
    return write_run(draft, root, step, optimizer_state=state, provenance=provenance, keep=keep)


@pytest.fixture(scope="module")
def draft(draw_draft):
    return draw_draft()


@pytest.fixture(scope="module")
def small(draw_draft):
    return draw_draft(**SMALL)


@pytest.fixture(scope="module")
def saved(small, tmp_path_factory):
    """A run with optimizer state, to be copied."""
    return save(small, tmp_path_factory.mktemp("saved"), 7, state={"count": jnp.int32(3), "mu": jnp.ones((3, 2))})


@pytest.fixture
def run(saved, tmp_path):
    return Path(shutil.copytree(saved, tmp_path / "run-7"))


def bits(value):
    value = np.asarray(value)
    return value.shape, value.dtype.name, value.tobytes()


def same_bits(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    return [bits(x) for x in jax.tree.leaves(a)] == [bits(x) for x in jax.tree.leaves(b)]


def refusal(kind, act, *args):
    with pytest.raises(kind) as error:
        act(*args)
    return str(error.value)


def edit(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def names(root):
    return sorted(path.name for path in root.iterdir() if path.name != ".runs.lock")


# ---- what is written comes back


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("bias", [False, True])
def test_a_draft_comes_back_bit_by_bit(draw_draft, tmp_path, dtype, bias):
    draft = draw_draft(dtype=jnp.dtype(dtype), attention_bias=bias)
    run = save(draft, tmp_path)
    assert run == tmp_path / "run-1"
    read = read_run(run, dtype)
    assert read.config == draft.config
    assert read.dtype == draft.dtype
    assert same_bits(nnx.state(read), nnx.state(draft))
    other = "bfloat16" if dtype == "float32" else "float32"
    cast = jax.tree.map(lambda x: x.astype(other), nnx.state(draft))
    assert same_bits(nnx.state(read_run(run, other)), cast)


def test_optimizer_state_comes_back_bit_by_bit(small, tmp_path):
    schedule = optax.cosine_decay_schedule(1e-3, 100)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, mu_dtype=jnp.bfloat16))
    params = nnx.state(small)
    state = optimizer.init(params)
    _, state = optimizer.update(jax.tree.map(jnp.sin, params), state, params)
    run = save(small, tmp_path, state=state)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)
    for like in (optimizer.init(params), shapes):
        read = read_optimizer_state(run, like)
        assert same_bits(read, state)
        assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(read))


def test_every_kind_of_leaf_comes_back(small, tmp_path):
    nan = np.array([0x7FC12345, 0xFF800000, 0x80000000, 1], np.uint32).view(np.float32)
    state = {
        "float32": nan,
        "bfloat16": np.array([0x7FC1, 0x8000], np.uint16).view(ml_dtypes.bfloat16),
        "zeros": jnp.zeros((5, 3)),
        "int32": jnp.int32(-7),
        "uint32": jnp.array([2**32 - 1], jnp.uint32),
        "bool": np.array([[True], [False]]),
        "scalar": np.float64(0.1),
        "empty": np.zeros((0, 4), np.float32),
        "python": [3, 2.5, True, None, ()],
        "..": np.arange(2),
        "": {"a/b": np.arange(3), ".": np.arange(4), "%": np.arange(5), "\N{GREEK SMALL LETTER MU} é": np.arange(6)},
    }
    run = save(small, tmp_path, state=state)
    read = read_optimizer_state(run, state)
    assert same_bits(read, state)
    kinds = [type(leaf) for leaf in jax.tree.leaves(state)]
    assert [type(leaf) for leaf in jax.tree.leaves(read)] == kinds
    stored = {p.parent.relative_to(run / "tx").as_posix() for p in (run / "tx").rglob(".zarray")}
    assert {"%2E%2E", "%/a%2Fb", "%/%2E", "%/%25", "%/%CE%BC%20%C3%A9", "python/0"} <= stored
    alone = save(small, tmp_path, 2, state=jnp.arange(3))
    assert same_bits(read_optimizer_state(alone, jnp.zeros(3, jnp.int32)), jnp.arange(3))
    assert read_optimizer_state(save(small, tmp_path, 3, state=optax.EmptyState()), optax.EmptyState()) == ()


# ---- the layout


def test_the_layout_is_easydels(draft, tmp_path):
    run = save(draft, tmp_path / "new" / "root", 120, state={"a": jnp.ones(2)}, cache_sha256="ab", target_sha256="cd")
    files = {path.name for path in run.iterdir()}
    assert files == {"config.json", "metadata.json", "tensorstore_index.json", "model", "tx"}
    marker = json.loads((run / "metadata.json").read_text())
    assert marker | {"timestamp": ""} == {"step": 120, "is_temporary": False, "timestamp": ""}
    index = json.loads((run / "tensorstore_index.json").read_text())
    assert index["format"] == "tensorstore"
    assert [entry["path"] for entry in index["prefixes"]["tx"]] == ["tx/a"]
    shapes = {entry["path"]: entry["shape"] for entry in index["prefixes"]["model"]}
    wanted = {"fc/kernel": [128, 64], "hidden_norm/scale": [64], "final_norm/scale": [64]}
    for i in range(2):
        sizes = {"in_norm/scale": [64], "post_norm/scale": [64]}
        sizes |= {"attn/q_proj/kernel": [64, 64], "attn/k_proj/kernel": [64, 32], "attn/v_proj/kernel": [64, 32]}
        sizes |= {"attn/o_proj/kernel": [64, 64], "attn/q_norm/scale": [16], "attn/k_norm/scale": [16]}
        sizes |= {"mlp/gate_proj/kernel": [64, 96], "mlp/up_proj/kernel": [64, 96], "mlp/down_proj/kernel": [96, 64]}
        wanted |= {f"layers/{i}/{name}": size for name, size in sizes.items()}
    assert shapes == {f"model/{name}/value": size for name, size in wanted.items()}
    assert {entry["dtype"] for entry in index["prefixes"]["model"]} == {"float32"}
    array = json.loads((run / "model/layers/1/mlp/down_proj/kernel/value/.zarray").read_text())
    assert (array["zarr_format"], array["dtype"], array["shape"]) == (2, "<f4", [96, 64])
    assert array["compressor"]["id"] == "zstd"


def test_kernels_are_transposed_and_split(draft, tmp_path):
    run = save(draft, tmp_path)

    def stored(name):
        spec = {"driver": "zarr", "kvstore": {"driver": "file", "path": str(run / "model" / name / "value")}}
        return tensorstore.open(spec).result().read().result()

    layer = draft.layers[1]
    k, v = np.split(np.asarray(layer.attention.kv.weight.get_value()), 2)
    assert np.array_equal(stored("layers/1/attn/k_proj/kernel"), k.T)
    assert np.array_equal(stored("layers/1/attn/v_proj/kernel"), v.T)
    gate, up = np.split(np.asarray(layer.mlp.gate_up.weight.get_value()), 2)
    assert np.array_equal(stored("layers/1/mlp/gate_proj/kernel"), gate.T)
    assert np.array_equal(stored("layers/1/mlp/up_proj/kernel"), up.T)
    assert np.array_equal(stored("final_norm/scale"), draft.norm.weight.get_value())


def test_config_json_says_what_a_reader_needs(draft, tmp_path):
    text = (save(draft, tmp_path, cache_sha256="ab", target_sha256="cd") / "config.json").read_text()
    content = json.loads(text)
    assert text == json.dumps(content, indent=2, sort_keys=True) + "\n"
    told = content.pop("dflash")
    assert content == {
        "add_one_for_pre_layer_capture": True,
        "block_size": 8,
        "head_dim": 16,
        "hidden_act": "silu",
        "hidden_size": 64,
        "mlp_ratio": 1.5,
        "num_attention_heads": 4,
        "num_context_features": 2,
        "num_key_value_heads": 2,
        "num_layers": 2,
        "qk_norm": True,
        "remat": False,
        "rms_norm_eps": 1e-5,
        "target_layer_ids": [0, 1],
    }
    assert told["provenance"] == {"cache_sha256": "ab", "target_sha256": "cd"}
    assert told["conventions"]["qk_norm"] == "with weights, before rope"
    assert told["draft"]["architectures"] == ["DFlashDraftModel"]
    assert told["draft"]["dflash_config"]["mask_token_id"] == 5


def test_a_draft_decodes_the_same_from_either_directory(draft, tmp_path):
    target = load_target(write_tiny_target(tmp_path / "target", num_hidden_layers=2))
    write_draft(draft, tmp_path / "exported")
    save(draft, tmp_path / "root", 9)
    run = save(draft, tmp_path / "root", 10)
    prompts = [[3, 50, 7, 120], [9, 8, 60]]
    results = [
        decode(target, load_draft(where, target), prompts, max_new_tokens=24)
        for where in (tmp_path / "exported", run, str(tmp_path / "root"))
    ]
    assert results[0].tokens == results[1].tokens == results[2].tokens
    assert results[0].accept_lens == results[1].accept_lens == results[2].accept_lens
    assert "dflash.load_draft" in refusal(ConfigError, huggingface.DIALECT.config, run, None)
    # A directory's files tell what it is, not its name.
    assert read_any_draft((tmp_path / "exported").rename(tmp_path / "run-3")).config == draft.config


# ---- runs of a root


def test_the_last_ones_are_kept(small, tmp_path):
    for step in (5, 10, 20):
        save(small, tmp_path, step)
    save(small, tmp_path, 30, keep=3)
    assert names(tmp_path) == ["run-10", "run-20", "run-30"]
    (tmp_path / "run-20" / "metadata.json").unlink()
    save(small, tmp_path, 100, keep=2)  # run-20 is no run to count
    assert names(tmp_path) == ["run-100", "run-20", "run-30"]
    save(small, tmp_path, 40, keep=1)  # what is newer is not touched, and not what was just written
    assert names(tmp_path) == ["run-100", "run-20", "run-40"]


def test_the_latest_complete_run(small, tmp_path):
    assert latest_run(tmp_path / "nowhere") is None
    assert latest_run(tmp_path) is None
    assert "holds no draft" in refusal(WeightsError, read_any_draft, tmp_path / "nowhere")
    (tmp_path / "run_config.json").write_text("{}")
    assert "holds no complete run-<step> directory" in refusal(WeightsError, read_any_draft, tmp_path)
    for step in (9, 10):
        save(small, tmp_path, step)
    for name in ("run-11", "run-012", "run-x", ".run-99.abc", "run-13.old"):
        shutil.copytree(tmp_path / "run-9", tmp_path / name)
    (tmp_path / "run-11" / "metadata.json").unlink()
    assert latest_run(tmp_path) == resolve_run(tmp_path) == tmp_path / "run-10"
    assert resolve_run(tmp_path / "run-9") == tmp_path / "run-9"
    assert resolve_run(tmp_path / "run-13.old") == tmp_path / "run-13.old"  # named directly
    assert read_any_draft(tmp_path).config == small.config
    said = refusal(WeightsError, read_run, tmp_path)
    assert "is no run directory" in said
    assert "resolve_run" in said


def test_an_incomplete_run_is_refused_when_named(run):
    (run / "metadata.json").unlink()
    for act in (resolve_run, read_run, read_any_draft):
        assert "is incomplete, it has no metadata.json" in refusal(WeightsError, act, run)
    assert "(incomplete ones: ['run-7'])" in refusal(WeightsError, resolve_run, run.parent)


def test_a_root_may_be_named_like_a_run(small, tmp_path):
    run = save(small, tmp_path / "run-3", 8)
    assert resolve_run(tmp_path / "run-3") == run


def test_a_pickle_is_refused_by_name(run):
    shutil.rmtree(run / "model")
    (run / "tensorstore_index.json").unlink()
    (run / "model").mkdir()
    (run / "model" / "graphstate.pkl").write_bytes(b"\x80\x04.")
    for act in (read_run, resolve_run, read_any_draft):
        assert "graphstate.pkl; a pickle" in refusal(WeightsError, act, run)
    assert "a pickle" in refusal(WeightsError, resolve_run, run.parent)  # not the fork's in silence


def test_what_cannot_be_written(small, draw_draft, tmp_path):
    run = save(small, tmp_path, 1)
    before = (run / "metadata.json").read_bytes()
    assert "a run is written once" in refusal(WeightsError, save, small, tmp_path, 1)
    assert (run / "metadata.json").read_bytes() == before
    for step, keep in ((-1, None), (2.0, None), (True, None), (2, 0), (2, True)):
        assert "step must be an integer >= 0" in refusal(ValueError, save, small, tmp_path, step, None, keep)
    state = {"a": jax.random.key(0), "b": np.array(["x"]), "c": np.zeros(2, np.complex64), "d": 1.0}
    said = refusal(WeightsError, save, small, tmp_path, 2, state)
    assert "tx/a is key<fry>; tx/b is <U1; tx/c is complex64. " in said
    with pytest.raises(ValueError, match="provenance must be JSON"):
        save(small, tmp_path, 2, path=Path("x"))
    mixed = draw_draft(**SMALL)
    mixed.norm.weight = nnx.Param(mixed.norm.weight.get_value().astype(jnp.bfloat16))
    assert "got ['bfloat16', 'float32']" in refusal(WeightsError, save, mixed, tmp_path, 2)
    assert names(tmp_path) == ["run-1"]


def test_a_draft_that_config_json_cannot_hold_is_refused(draw_draft, tmp_path):
    mixed = draw_draft(**SMALL | {"windows": (None, None), "causal": (True, False)})
    assert "is_causal is one key" in refusal(ConfigError, save, mixed, tmp_path)
    assert names(tmp_path) == []


def test_a_write_that_fails_leaves_nothing(small, tmp_path, monkeypatch):
    save(small, tmp_path, 1)
    real, calls = easydel.write_array, []

    def failing(*args):
        calls.append(args)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(easydel, "write_array", failing)
    with pytest.raises(KeyboardInterrupt):
        save(small, tmp_path, 2, keep=1)
    assert names(tmp_path) == ["run-1"]
    assert save(small, tmp_path, 2, keep=1)
    assert names(tmp_path) == ["run-2"]


def test_what_the_dead_left_is_removed_and_replaced(small, run):
    root = run.parent
    (run / "metadata.json").unlink()
    shutil.copytree(run, root / ".run-9.0123456789ab")
    (root / ".run-notes").mkdir()
    (root / "run_config.json").write_text("{}")
    assert latest_run(root) is None
    assert latest_run(save(small, root, 7).parent) == run
    assert names(root) == [".run-notes", "run-7", "run_config.json"]


def test_one_writer_at_a_time(small, tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "_LOCK_TIMEOUT_S", 0.1)
    with filelock.FileLock(tmp_path / ".runs.lock"):
        assert "one process at a time" in refusal(WeightsError, save, small, tmp_path)
    save(small, tmp_path)


# ---- a writer is killed

WRITES_FOR_EVER = """
import sys
from pathlib import Path
import numpy as np
from dflash.weights.runs.checkpoint import read_run, write_run

draft = read_run(Path(sys.argv[1]))
for step in range(1, 10_000):
    state = {"step": np.int32(step), "mu": np.full((64, 64), step, np.float32)}
    write_run(draft, Path(sys.argv[2]), step, optimizer_state=state, provenance={"step": step}, keep=2)
    print(step, flush=True)
"""


@pytest.fixture
def start_writer(saved):
    writers = []

    def start(root):
        writers.append(open_writer(saved, root))
        return writers[-1]

    yield start
    for writer in writers:
        with writer:
            writer.kill()


def open_writer(source, root):
    return subprocess.Popen(
        [sys.executable, "-c", WRITES_FOR_EVER, str(source), str(root)],
        env=os.environ | {"JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "2"},
        cwd=Path(dflash.__file__).parents[1],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )


@pytest.mark.slow
def test_a_killed_writer_leaves_the_old_runs_or_the_new(small, start_writer, tmp_path):
    seed = random.randrange(2**32)
    rng = random.Random(seed)
    roots = [tmp_path / str(i) for i in range(8)]
    for pair in zip(roots[::2], roots[1::2], strict=True):  # one on each core
        for root, writer in [(root, start_writer(root)) for root in pair]:
            assert [writer.stdout.readline() for _ in range(2)] == ["1\n", "2\n"]
            time.sleep(rng.uniform(0, 0.3))
            with writer:
                writer.send_signal(signal.SIGKILL)
                done = max(map(int, ["2", *writer.stdout.read().split()]))
            found = sorted(runs.completed_runs(root))
            before, after = [done - 1, done], [done, done + 1]
            assert found in (before, [done - 1, *after], after), f"seed {seed}"
            for step in found:
                run = root / f"run-{step}"
                assert same_bits(nnx.state(read_run(run)), nnx.state(small)), f"seed {seed}"
                like = {"step": np.zeros((), np.int32), "mu": np.zeros((64, 64), np.float32)}
                read = read_optimizer_state(run, like)
                assert int(read["step"]) == step, f"seed {seed}"
                assert (read["mu"] == step).all(), f"seed {seed}"
            save(small, root, found[-1] + 1, keep=2)
            assert names(root) == sorted(f"run-{step}" for step in (found[-1], found[-1] + 1)), f"seed {seed}"


# ---- damaged runs

KERNEL = "model/layers/0/attn/q_proj/kernel/value"


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 16
    path.write_bytes(content)


def rewrite(array, change):
    edit(array / ".zarray", lambda content: content.update(change))


DAMAGES = {
    "missing chunk": (lambda array: (array / "0.0").unlink(), "not all are there"),
    "empty chunk": (lambda array: (array / "0.0").write_bytes(b""), "Truncated"),
    "cut chunk": (lambda array: os.truncate(array / "0.0", 900), "Truncated"),
    "changed chunk": (lambda array: flip(array / "0.0"), "/q_proj/"),
    "other chunk": (
        lambda array: shutil.copy(array.parents[2] / "o_proj/kernel/value/0.0", array / "0.0"),
        "its bytes are not those that were written",
    ),
    "no .zarray": (lambda array: (array / ".zarray").unlink(), "No such file"),
    "cut .zarray": (lambda array: os.truncate(array / ".zarray", 20), "no valid JSON"),
    "other dtype": (lambda array: rewrite(array, {"dtype": "<i4"}), "its .zarray says int32 [32, 32]"),
    "other shape": (lambda array: rewrite(array, {"shape": [16, 64]}), "its .zarray says float32 [16, 64]"),
    "huge chunks": (lambda array: rewrite(array, {"chunks": [10**9, 10**4]}), "more than the array"),
    "no array": (shutil.rmtree, "No such file"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_array_is_refused(run, damage):
    change, said = DAMAGES[damage]
    change(run / KERNEL)
    message = refusal(WeightsError, read_run, run)
    assert message.startswith(f"arrays of {run} are damaged (1 fault): {KERNEL} ")
    assert said in message
    assert "tensorstore_spec" not in message


def test_all_damaged_arrays_are_named(run):
    for name in ("fc/kernel", "layers/0/mlp/up_proj/kernel"):
        (run / "model" / name / "value" / "0.0").unlink()
    message = refusal(WeightsError, read_run, run)
    assert message.startswith("arrays of")
    assert "damaged (2 faults): " in message
    assert "model/fc/kernel/value" in message
    assert "up_proj" in message
    like = {"count": jnp.int32(0), "mu": jnp.ones((3, 2))}
    assert read_optimizer_state(run, like)["count"] == 3
    (run / "tx" / "count" / "0").unlink()
    assert "damaged (1 fault): " in refusal(WeightsError, read_optimizer_state, run, like)


def test_without_checksums_a_missing_chunk_is_zeros(run):
    """As EasyDeL writes: a chunk of the fill value may be left out."""

    def forget(index):
        for entry in index["prefixes"]["model"]:
            del entry["sha256"]

    edit(run / "tensorstore_index.json", forget)
    (run / KERNEL / "0.0").unlink()
    draft = read_run(run)
    assert not np.asarray(draft.layers[0].attention.q.weight.get_value()).any()
    assert np.asarray(draft.layers[0].attention.out.weight.get_value()).any()


def test_paths_stay_inside(run, tmp_path):
    def lead_out(index):
        entries = index["prefixes"]["model"]
        for entry, path in zip(entries, ["model/../../x", "/etc/x", "tx/count", "model//x", "model/./x"], strict=False):
            entry["path"] = path
        entries.append(dict(entries[-1]))
        entries[-2]["shape"] = [-1]
        entries[5]["sha256"] = 3

    edit(run / "tensorstore_index.json", lead_out)
    message = refusal(WeightsError, read_run, run)
    for path in ("model/../../x", "/etc/x", "tx/count", "model//x", "model/./x"):
        assert f"inside model/, got '{path}'" in message
    assert "sizes, got [-1]" in message
    assert "text, got 'float32' and 3" in message


def test_a_link_that_leads_out_is_refused(run, tmp_path):
    (run / KERNEL).rename(tmp_path / "elsewhere")
    (run / KERNEL).symlink_to(tmp_path / "elsewhere")
    assert f"{KERNEL} (it leads out of" in refusal(WeightsError, read_run, run)


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("tensorstore_index.json", None, "is no run directory|needs tensorstore_index.json"),
        ("tensorstore_index.json", '{"format": "orbax"}', "format tensorstore .*got 'orbax'"),
        ("tensorstore_index.json", "[]", "JSON object, got list"),
        ("tensorstore_index.json", '{"format": "tensorstore", "prefixes": {"model": 3}}', "got 3"),
        ("config.json", None, "a run directory needs config.json"),
        ("config.json", '{"hidden_size": ', "is no valid JSON"),
    ],
)
def test_files_that_are_missing_or_no_json(run, name, text, said):
    (run / name).unlink()
    if text is not None:
        (run / name).write_text(text)
    with pytest.raises(WeightsError, match=said):
        read_run(run)


# ---- what does not fit is told in one message


def test_arrays_that_do_not_fit_the_config(run):
    def change(index):
        entries = index["prefixes"]["model"]
        entries[0]["shape"] = [9, 9]
        entries[1]["dtype"] = "int32"
        entries[2]["path"] = "model/other/value"

    edit(run / "tensorstore_index.json", change)
    message = refusal(WeightsError, read_run, run)
    assert "(4 faults): " in message
    for said in (
        "missing model/layers/0/",
        "fc/kernel/value is [9, 9], must be [64, 32]",
        "is int32, must be one of",
        "unexpected model/other",
    ):
        assert said in message


def test_a_config_that_contradicts_itself(run):
    def change(config):
        config.update(hidden_size=64, qk_norm=False)
        config["dflash"]["conventions"]["mask"] = "a vector"
        config["dflash"]["conventions"]["new"] = 1

    edit(run / "config.json", change)
    message = refusal(ConfigError, read_run, run)
    for said in (
        "hidden_size is 64, but 32 by dflash.draft",
        "qk_norm is False, but True",
        "convention mask must be",
        "convention new must be None, got 1",
    ):
        assert said in message
    edit(run / "config.json", lambda config: config["dflash"]["draft"].pop("vocab_size"))
    message = refusal(ConfigError, read_run, run)
    assert "vocab_size is missing" in message
    assert "convention new" in message


def test_an_optimizer_state_that_does_not_fit(run, saved):
    like = {"count": jnp.float32(0), "mu": jnp.ones((2, 3)), "nu": jnp.ones(1)}
    message = refusal(WeightsError, read_optimizer_state, saved, like)
    for said in (
        "(3 faults)",
        "missing tx/nu [1]",
        "tx/count is int32, must be one of ['float32']",
        "tx/mu is [3, 2], must be [2, 3]",
    ):
        assert said in message
    assert "unexpected tx/mu [3, 2]" in refusal(WeightsError, read_optimizer_state, saved, {"count": jnp.int32(0)})


def test_a_run_without_optimizer_state(small, tmp_path):
    run = save(small, tmp_path)
    assert not (run / "tx").exists()
    assert "was written without an optimizer state" in refusal(WeightsError, read_optimizer_state, run, {})


def test_a_run_of_another_trainer_is_not_read_as_ours(run):
    edit(run / "config.json", lambda config: config.pop("dflash"))
    assert "has no `dflash` entry" in refusal(ConfigError, read_run, run)


def test_a_dtype_we_do_not_compute_in(run):
    assert "got 'float16'" in refusal(ValueError, read_run, run, "float16")
