"""Drafts of the EasyDeL fork: each form's own network, written here in numpy, gives what our draft gives."""

import json
import math
import re
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.serialization import msgpack_serialize
from safetensors.numpy import load_file, save_file

from dflash import ConfigError, WeightsError, decode, load_draft, load_target
from dflash.training.batches import sequence_batch
from dflash.training.objective import block_hidden
from dflash.weights.huggingface import write_draft
from dflash.weights.load import draft_hash, read_any_draft
from dflash.weights.runs.arrays import write_array, write_index
from dflash.weights.runs.checkpoint import read_run, write_run
from dflash.weights.tiny import write_tiny_target

H, INNER, HEADS, KV, D, LAYERS, BLOCK, EPS = 64, 128, 6, 2, 16, 2, 5, 1e-5
CONTEXT, START = 7, 900
# What the arrays of a run are called, and their shapes: EasyDeL's, kernels [in, out].
SHAPES = {
    "mask_embedding": (H,),
    "fc/kernel": (2 * H, H),
    "fc/bias": (H,),
    "hidden_norm/scale": (H,),
    "final_norm/scale": (H,),
}
for i in range(LAYERS):
    SHAPES |= {f"layers/{i}/in_norm/scale": (H,), f"layers/{i}/post_norm/scale": (H,)}
    sizes = {"attn/q_proj": (H, HEADS * D), "attn/k_proj": (H, KV * D), "attn/v_proj": (H, KV * D)}
    sizes |= {
        "attn/o_proj": (HEADS * D, H),
        "mlp/gate_proj": (H, INNER),
        "mlp/up_proj": (H, INNER),
        "mlp/down_proj": (INNER, H),
    }
    for name, shape in sizes.items():
        SHAPES |= {f"layers/{i}/{name}/kernel": shape, f"layers/{i}/{name}/bias": shape[1:]}
YARN = {"base": 150000.0, "factor": 32.0, "original": 4096, "fast": 32.0, "slow": 1.0}


def draw(seed=0):
    rng = np.random.default_rng(seed)
    arrays = {}
    for name, shape in SHAPES.items():
        if name.endswith("scale"):
            arrays[name] = rng.uniform(0.5, 1.5, shape).astype(np.float32)
        else:
            arrays[name] = rng.normal(0, 1.3 * shape[0] ** -0.5 if len(shape) > 1 else 0.3, shape).astype(np.float32)
    # Heads so small that the epsilon of their norm weighs.
    arrays["layers/0/attn/k_proj/kernel"][:, :D] *= 1e-3
    arrays["layers/0/attn/k_proj/bias"][:D] *= 1e-3
    return arrays


# ---- the fork's network, in numpy


def rms(x, weight=1.0):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + EPS) * weight


def yarn(x, positions):
    """Rotates x [T, heads, D]; the range of frequencies is rounded, and cos and sin carry YaRN's factor."""
    powers = YARN["base"] ** (np.arange(0, D, 2) / D)

    def place(rotations):
        return D * math.log(YARN["original"] / (rotations * 2 * math.pi)) / (2 * math.log(YARN["base"]))

    low, high = max(math.floor(place(YARN["fast"])), 0), min(math.ceil(place(YARN["slow"])), D - 1)
    interpolated = np.clip((np.arange(D // 2) - low) / (high - low), 0, 1)
    frequencies = interpolated / (YARN["factor"] * powers) + (1 - interpolated) / powers
    angles = positions[:, None] * frequencies
    factor = 0.1 * math.log(YARN["factor"]) + 1
    cos, sin = (f(angles)[:, None] * factor for f in (np.cos, np.sin))
    first, second = np.split(x, 2, axis=-1)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def fork_hidden(arrays, features, anchor, *, qk_norm=True):
    """features [C, 2H] at positions START.., the anchor's embedding [H] -> hidden after the norm [BLOCK, H]."""
    a = {name: value.astype(np.float64) for name, value in arrays.items()}

    def linear(name, x):
        return x @ a[f"{name}/kernel"] + a.get(f"{name}/bias", 0.0)

    context = rms(linear("fc", features), a["hidden_norm/scale"])
    x = np.concatenate([anchor[None], np.repeat(a["mask_embedding"][None], BLOCK - 1, axis=0)])
    positions = START + np.arange(len(features) + BLOCK)
    for i in range(LAYERS):
        layer = f"layers/{i}"
        normed = rms(x, a[f"{layer}/in_norm/scale"])
        both = np.concatenate([context, normed])
        q = yarn(linear(f"{layer}/attn/q_proj", normed).reshape(-1, HEADS, D), positions[len(features) :])
        k = yarn(linear(f"{layer}/attn/k_proj", both).reshape(-1, KV, D), positions)
        v = linear(f"{layer}/attn/v_proj", both).reshape(-1, KV, D)
        if qk_norm:
            q, k = rms(q), rms(k)
        mixed = []
        for head in range(HEADS):
            scores = q[:, head] @ k[:, head % KV].T * D**-0.5
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            mixed.append(weights / weights.sum(-1, keepdims=True) @ v[:, head % KV])
        x = x + linear(f"{layer}/attn/o_proj", np.concatenate(mixed, axis=-1))
        normed = rms(x, a[f"{layer}/post_norm/scale"])
        gate = linear(f"{layer}/mlp/gate_proj", normed)
        x = x + linear(f"{layer}/mlp/down_proj", gate / (1 + np.exp(-gate)) * linear(f"{layer}/mlp/up_proj", normed))
    return rms(x, a["final_norm/scale"])


def assert_same_network(draft, arrays, **form):
    rng = np.random.default_rng(3)
    features = rng.normal(size=(CONTEXT, 2 * H)).astype(np.float32)
    anchor = rng.normal(size=H).astype(np.float32)
    columns = list(jnp.asarray(features.T).reshape(2, H, CONTEXT))
    # What the mask token's embedding is must not matter.
    block = np.concatenate([anchor[:, None], np.full((H, BLOCK - 1), 7.0, np.float32)], axis=1)
    ours = draft.uncached(
        columns, jnp.array([[CONTEXT]]), draft.masked(jnp.asarray(block), BLOCK), start=jnp.array([START])
    )
    theirs = fork_hidden(arrays, features, anchor, **form)
    head = rng.normal(size=(H, 50)) * H**-0.5
    np.testing.assert_allclose(np.asarray(ours).T @ head, theirs @ head, atol=1e-5)
    assert np.abs(theirs @ head).max() > 0.5


# ---- where they leave it

CONFIG = {
    "hidden_size": H,
    "num_layers": LAYERS,
    "mlp_ratio": 2.0,
    "hidden_act": "silu",
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV,
    "head_dim": D,
    "rms_norm_eps": EPS,
    "block_size": BLOCK,
    "num_context_features": 2,
    "qk_norm": True,
    "remat": True,
}
WITH_IDS = {"target_layer_ids": [1, 2], "add_one_for_pre_layer_capture": True}


def write_json(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2, sort_keys=True))
    return path


def write_fork_run(root, arrays, config, step=1500, settings=None):
    """A run directory as EasyDeL's trainer leaves it; its index knows no hashes."""
    run = root / f"run-{step}"
    run.mkdir(parents=True)
    entries = [write_array(run, f"model/{name}/value", value) for name, value in arrays.items()]
    write_index(run, {"model": entries})
    index = json.loads((run / "tensorstore_index.json").read_text())
    for entry in index["prefixes"]["model"]:
        del entry["sha256"]
    write_json(run / "tensorstore_index.json", index)
    write_json(run / "config.json", config)
    write_json(run / "metadata.json", {"step": step, "timestamp": "", "is_temporary": False})
    write_json(root / "run_config.json", {"model_name": "draft", "draft_layers": LAYERS, **(settings or {})})
    return run


def write_fork_export(directory, arrays, dtype=np.float32, notes=None, fused=True, **changes):
    """What the exporter of such runs writes: a shard of globals and one a layer, q/k norms of ones."""
    names = {"in_norm/scale": "input_layernorm.weight", "post_norm/scale": "post_attention_layernorm.weight"}
    shards = [{} for _ in range(LAYERS + 1)]
    for name, value in arrays.items():
        value = np.ascontiguousarray(value.T if value.ndim == 2 else value).astype(dtype)
        if not name.startswith("layers/"):
            theirs = {"final_norm/scale": "norm.weight"}.get(name, name.replace("/", "."))
            theirs = theirs.replace("kernel", "weight").replace("scale", "weight")
            shards[0][f"model.{theirs}"] = value
            continue
        _, i, rest = name.split("/", 2)
        rest = names.get(rest, rest.replace("attn/", "self_attn.").replace("/", ".").replace("kernel", "weight"))
        shards[1 + int(i)][f"model.layers.{i}.{rest}"] = value
    for i, shard in enumerate(shards[1:]):
        prefix = f"model.layers.{i}"
        shard |= {f"{prefix}.self_attn.{n}_norm.weight": np.ones(D, dtype) for n in "qk"}
        for kind in ("weight", "bias") if fused else ():
            halves = [shard.pop(f"{prefix}.mlp.{part}_proj.{kind}") for part in ("gate", "up")]
            shard[f"{prefix}.mlp.gate_up_proj.{kind}"] = np.concatenate(halves)
    directory.mkdir(parents=True)
    weight_map = {}
    for i, shard in enumerate(shards):
        file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, directory / file, metadata={"converted_from": "run-1500"})
        weight_map |= dict.fromkeys(shard, file)
    index = {"metadata": {"total_size": "12345"}, "weight_map": weight_map}
    write_json(directory / "model.safetensors.index.json", index)
    scaling = {"rope_type": "yarn", "factor": 32.0, "original_max_position_embeddings": 4096}
    scaling |= {"beta_fast": 32.0, "beta_slow": 1.0, "truncate": False}
    config = {
        "architectures": ["DFlashDraftModel"],
        "model_type": "llama",
        "vocab_size": 199,
        "hidden_size": H,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV,
        "head_dim": D,
        "max_position_embeddings": 131072,
        "rope_theta": 150000.0,
        "rope_scaling": scaling,
        "rms_norm_eps": EPS,
        "attention_bias": True,
        "block_size": BLOCK,
        "hidden_act": "silu",
        "dflash_config": {
            "block_size": BLOCK,
            "target_layer_ids": [0, 1],
            "mask_token": "<|MASK|>",
            "mask_token_id": None,
            "use_qk_norm": True,
            "use_mask_embedding": True,
            "mlp_bias": True,
            "fc_bias": True,
        },
        "source_checkpoint": "/gone/run-1500",
        **changes,
    }
    write_json(directory / "config.json", config | ({"export_notes": notes} if notes else {}))
    return directory


NOTES = {
    "target_layer_ids_raw": [1, 2],
    "target_layer_ids_mode": "auto",
    "target_layer_ids_mode_resolved": "prelayer",
}


def write_linen(root, arrays, meta, step=20):
    """What the Linen trainer leaves: no q/k norm, no bias in fc, names of its own."""
    params = {}
    for name, value in arrays.items():
        if name == "fc/bias":
            continue
        name = name.replace("in_norm", "input_norm").replace("post_norm", "post_attn_norm").replace("scale", "weight")
        name = name.replace("attn/", "self_attn/").replace("post_self_attn", "post_attn").replace("final_norm", "norm")
        if name.startswith("layers/"):
            name = name.replace("layers/", "layers_", 1)
        *keys, last = name.split("/")
        tree = params
        for key in keys:
            tree = tree.setdefault(key, {})
        tree[last] = value
    folder = root / f"step_{step:06d}"
    folder.mkdir(parents=True)
    (folder / "draft_params.msgpack").write_bytes(msgpack_serialize({"params": params}))
    np.save(folder / "losses.npy", np.zeros(step, np.float32))
    write_json(
        root / "meta.json", {"draft_layers": LAYERS, "mlp_ratio": 2.0, "hidden_act": "silu", "steps": 20, **meta}
    )
    return folder


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    directory = tmp_path_factory.mktemp("fork") / "target"
    heads = {"num_attention_heads": HEADS, "num_key_value_heads": KV}
    return load_target(write_tiny_target(directory, "gpt_oss", rms_norm_eps=EPS, **heads))


@pytest.fixture(scope="module")
def arrays():
    return draw()


def refusal(kind, *args):
    with pytest.raises(kind) as error:
        load_draft(*args)
    return str(error.value)


# ---- the same network


def test_a_run_is_the_network_that_was_trained(target, arrays, tmp_path):
    run = write_fork_run(tmp_path, arrays, CONFIG | WITH_IDS)
    for where in (run, tmp_path, str(run)):
        draft = load_draft(where, target)
        assert_same_network(draft, arrays)
    c = draft.config
    assert (c.target_layer_ids, c.block_size, c.learned_mask, c.fc_bias, c.mlp_bias) == ((1, 2), BLOCK, *[True] * 3)
    assert c.rope.truncate
    assert not target.config.rope.truncate


def test_the_parts_of_the_conversion_matter(target, arrays, tmp_path):
    """The reference is not blind: it differs without the norm, and with heads in the other order."""
    draft = load_draft(write_fork_run(tmp_path, arrays, CONFIG | WITH_IDS), target)
    with pytest.raises(AssertionError):
        assert_same_network(draft, arrays, qk_norm=False)
    for part in ("q_proj", "k_proj"):
        kernel = arrays[f"layers/1/attn/{part}/kernel"]
        with pytest.raises(AssertionError):
            assert_same_network(draft, arrays | {f"layers/1/attn/{part}/kernel": np.roll(kernel, D, axis=1)})
    with pytest.raises(AssertionError):
        assert_same_network(draft, arrays | {"mask_embedding": arrays["mask_embedding"] + 0.1})


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("fused", [True, False])
def test_an_export_is_the_network_of_its_run(target, arrays, tmp_path, dtype, fused):
    directory = write_fork_export(tmp_path / "draft", arrays, dtype, NOTES, fused)
    draft = load_draft(directory, target)
    assert_same_network(draft, {name: value.astype(dtype) for name, value in arrays.items()})
    assert draft.config.target_layer_ids == (1, 2)


def test_a_linen_trainers_file_is_the_network_that_was_trained(target, arrays, tmp_path):
    meta = {"target_layer_ids": [1, 2], "add_one_for_pre_layer_capture": False, "block_size": BLOCK}
    write_linen(tmp_path, draw(9), meta, step=3)
    step = write_linen(tmp_path, arrays, meta, step=20)
    without = {name: value for name, value in arrays.items() if name != "fc/bias"}
    for where in (tmp_path, step, step / "draft_params.msgpack"):
        draft = load_draft(where, target)
        assert_same_network(draft, without, qk_norm=False)
    assert draft.config.target_layer_ids == (0, 1)
    assert not draft.config.fc_bias
    assert draft_hash(tmp_path) == draft_hash(step) != draft_hash(tmp_path / "step_000003")


# ---- which layers it reads


@pytest.mark.parametrize(
    ("meta", "ids"),
    [
        ({"target_layer_ids": [1, 2], "add_one_for_pre_layer_capture": True}, (1, 2)),
        ({"target_layer_ids": [1, 2], "add_one_for_pre_layer_capture": False}, (0, 1)),
        ({"target_layer_ids": [1, 2]}, (0, 1)),  # the oldest caches
    ],
)
def test_a_run_without_layer_ids_has_those_of_its_cache(target, arrays, tmp_path, meta, ids):
    write_json(tmp_path / "cache" / "meta.json", meta)
    run = write_fork_run(tmp_path / "root", arrays, CONFIG, settings={"cache_dir": str(tmp_path / "cache")})
    assert load_draft(run, target).config.target_layer_ids == ids
    shutil.rmtree(tmp_path / "cache")
    message = refusal(ConfigError, run, target)
    assert str(run) in message
    assert re.search("add target_layer_ids.* add_one_for_pre_layer_capture", message)


def test_a_linen_draft_has_block_size_and_layers_of_its_cache(target, arrays, tmp_path):
    meta = {"target_layer_ids": [3, 1], "block_size": BLOCK}
    np.savez(tmp_path / "cache.npz", meta=np.array(json.dumps(meta)), target_ids=np.zeros((1, 4), np.int32))
    write_linen(tmp_path / "out", arrays, {"cache": str(tmp_path / "cache.npz")})
    config = load_draft(tmp_path / "out", target).config
    assert (config.target_layer_ids, config.block_size) == ((2, 0), BLOCK)
    np.save(tmp_path / "array.npy", np.zeros(3))
    for content in (b"PK\x03\x04 cut", b"", (tmp_path / "array.npy").read_bytes()):
        (tmp_path / "cache.npz").write_bytes(content)
        assert "cache.npz is no teacher cache" in refusal(ConfigError, tmp_path / "out", target)
    write_linen(tmp_path / "untold", arrays, {"cache": None} | WITH_IDS)
    assert "has no block_size" in refusal(ConfigError, tmp_path / "untold", target)


def test_the_input_of_the_first_layer_is_refused(target, arrays, tmp_path):
    told = {"target_layer_ids": [0, 2], "add_one_for_pre_layer_capture": False}
    run = write_fork_run(tmp_path, arrays, CONFIG | told)
    assert "input of layer 0 is the embedding" in refusal(ConfigError, run, target)


def test_an_export_moved_its_layer_ids(target, arrays, tmp_path):
    """What its run says counts, then what its own config.json is told, never the moved ids by themselves."""
    run = write_fork_run(
        tmp_path, arrays, CONFIG | {"target_layer_ids": [2, 3], "add_one_for_pre_layer_capture": False}
    )
    exported = write_fork_export(tmp_path / "a", arrays, source_checkpoint=str(run))
    assert load_draft(exported, target).config.target_layer_ids == (1, 2)
    told = write_fork_export(tmp_path / "b", arrays, add_one_for_pre_layer_capture=True)
    assert load_draft(told, target).config.target_layer_ids == (0, 1)
    alone = write_fork_export(tmp_path / "c", arrays)
    assert "target_layer_ids [0, 1] name inputs or outputs" in refusal(ConfigError, alone, target)


# ---- what is refused, and why


def test_a_run_without_its_target(arrays, tmp_path):
    run = write_fork_run(tmp_path / "root", arrays, CONFIG | WITH_IDS, settings={"teacher_snapshot_dir": "/gone"})
    with pytest.raises(ConfigError, match=r"\('/gone'\) is not here: .*snapshot"):
        read_any_draft(run)
    write_tiny_target(tmp_path / "target", "gpt_oss")
    write_json(tmp_path / "root" / "run_config.json", {"teacher_snapshot_dir": str(tmp_path / "target")})
    assert read_any_draft(run).config.vocab_size == 199


def test_arrays_that_do_not_fit_are_told_at_once(target, arrays, tmp_path):
    changed = {name: value for name, value in arrays.items() if name != "fc/bias"}
    changed |= {"extra": np.zeros(3, np.float32), "mask_embedding": np.zeros(9, np.float32)}
    said = refusal(WeightsError, write_fork_run(tmp_path, changed, CONFIG | WITH_IDS), target)
    assert "(3 faults)" in said
    for fault in ("missing model/fc/bias/value [64]", "unexpected model/extra/value [3]", "is [9], must be [64]"):
        assert fault in said


def test_configs_that_do_not_fit(target, arrays, tmp_path):
    run = write_fork_run(tmp_path, arrays, CONFIG | WITH_IDS | {"num_context_features": 3, "hidden_act": "silu"})
    assert "num_context_features is 3, but target_layer_ids are [1, 2]" in refusal(ConfigError, run, target)
    write_json(run / "config.json", CONFIG | WITH_IDS | {"hidden_act": "gelu", "mlp_ratio": None, "block_size": 1})
    said = refusal(ConfigError, run, target)
    for fault in ("hidden_act must be one of ['silu'], got 'gelu'", "intermediate_size is missing", "block_size must"):
        assert fault in said
    write_json(run / "config.json", CONFIG | WITH_IDS | {"mlp_ratio": 1e308})
    assert "intermediate_size is missing" in refusal(ConfigError, run, target)
    write_json(run / "config.json", CONFIG | WITH_IDS | {"target_layer_ids": [1, 9]})
    assert "it reads layers [9]" in refusal(ConfigError, run, target)


def test_exports_without_an_exact_equivalent(target, arrays, tmp_path):
    without = {name: value for name, value in arrays.items() if name != "fc/bias"}
    said = refusal(ConfigError, write_fork_export(tmp_path / "a", without, notes=NOTES), target)
    assert "without the bias of fc" in said
    trained = write_fork_export(tmp_path / "b", arrays, notes=NOTES)
    shard = trained / "model-00002-of-00003.safetensors"
    tensors = load_file(shard)
    tensors["model.layers.0.self_attn.q_norm.weight"][3] = 2
    save_file(tensors, shard)
    assert "['model.layers.0.self_attn.q_norm.weight'] must be ones" in refusal(ConfigError, trained, target)
    of_torch = tmp_path / "c"
    of_torch.mkdir()
    save_file({"fc.weight": np.zeros((H, 2 * H), np.float32)}, of_torch / "model.safetensors")
    shutil.copy(trained / "config.json", of_torch / "config.json")
    assert "whose attention has sinks" in refusal(ConfigError, of_torch, target)


def test_files_of_many_hosts_are_refused_by_name(target, arrays, tmp_path):
    for name in ("graphstate.pkl", "graphstate.msgpack"):
        run = tmp_path / name / "run-7"
        (run / "model").mkdir(parents=True)
        (run / "model" / name).write_bytes(b"\x80\x04.")
        write_json(run / "config.json", CONFIG)
        write_json(run / "metadata.json", {"format": "dflash_replicated_pickle_gzip_v2", "step": 7})
        assert f"holds model/{name}" in refusal(WeightsError, run, target)


def test_a_file_that_is_no_msgpack(target, arrays, tmp_path):
    step = write_linen(tmp_path, arrays, WITH_IDS | {"block_size": BLOCK})
    file = step / "draft_params.msgpack"
    file.write_bytes(file.read_bytes()[:1000])
    assert "is no msgpack of arrays" in refusal(WeightsError, tmp_path, target)
    for content in (msgpack_serialize({"params": {"fc": [1, [2]]}}), b"\x81\xa1a" * 900 + b"\x01", b""):
        file.write_bytes(content)
        assert re.search("is no msgpack of arrays|does not fit", refusal(WeightsError, tmp_path, target))


def test_a_run_that_was_copied_incompletely_is_no_zeros(target, arrays, tmp_path):
    run = write_fork_run(tmp_path, arrays, CONFIG | WITH_IDS)
    for path in ("layers/0/attn/q_proj/bias/value/0", "layers/1/mlp/up_proj/kernel/value/0.0"):
        (run / "model" / path).unlink()
    said = refusal(WeightsError, run, target)
    assert "weights would be read as zeros (1 fault): " in said
    assert "layers/1/mlp/up_proj/kernel" in said


def test_what_a_run_says_of_its_sizes_is_compared_before_it_is_read(target, arrays, tmp_path):
    """An array of a million by a million zeros needs no chunk."""
    run = write_fork_run(tmp_path, arrays, CONFIG | WITH_IDS)
    for file, key in ((run / "tensorstore_index.json", None), (run / "model/fc/kernel/value/.zarray", "shape")):
        content = json.loads(file.read_text())
        if key is None:
            (entry,) = [e for e in content["prefixes"]["model"] if e["path"] == "model/fc/kernel/value"]
            entry["shape"] = [10**6, 10**6]
        else:
            content[key] = [10**6, 10**6]
        file.write_text(json.dumps(content))
    assert "model/fc/kernel/value is [1000000, 1000000], must be [128, 64]" in refusal(WeightsError, run, target)


# ---- what can be done with it


@pytest.mark.slow
def test_a_converted_draft_decodes_and_is_written_again(target, arrays, tmp_path):
    run = write_fork_run(tmp_path / "root", arrays, CONFIG | WITH_IDS)
    draft = load_draft(run, target)
    prompts = [[3, 50, 7, 120], [9, 8, 60]]
    greedy = decode(target, None, prompts, mode="greedy", max_new_tokens=12).tokens
    for mode in ("cached_block_verify", "recompute"):
        assert decode(target, draft, prompts, mode=mode, max_new_tokens=12).tokens == greedy
    again = write_run(draft, tmp_path / "ours", 1, optimizer_state=None, provenance={}, keep=None)
    write_draft(draft, tmp_path / "exported")
    for read in (read_run(again), read_any_draft(tmp_path / "exported"), load_draft(again, target)):
        assert read.config == draft.config
        assert_same_network(read, arrays)


def test_a_runs_hash_follows_its_weights(arrays, tmp_path):
    runs = [write_fork_run(tmp_path / str(i), draw(i % 2), CONFIG | WITH_IDS) for i in range(3)]
    first, second, third = map(draft_hash, runs)
    assert first == third != second


@pytest.mark.slow
def test_decoding_and_training_put_the_learned_mask_in(draw_draft, write_sequences, tmp_path):
    """With the mask token's embedding as its vector such a draft is the canonical one, whatever its own mask token."""
    target = load_target(write_tiny_target(tmp_path / "t", num_hidden_layers=4, vocab_size=7))
    changes = {"vocab_size": 7, "target_layer_ids": (0, 2), "num_target_layers": 4, "block_size": 6}
    plain = draw_draft(10, **changes, mask_token_id=5)
    learned = draw_draft(10, **changes, mask_token_id=2, learned_mask=True)
    weights = dict(nnx.to_flat_state(nnx.state(plain)))
    weights[("mask_embedding",)] = nnx.Param(target.embedding.weight[...][5])
    nnx.update(learned, nnx.from_flat_state(list(weights.items())))
    prompts = [[3, 1, 4, 1, 5], [2, 6, 5, 3, 5, 0, 1, 2]]
    for mode in ("cached_block_verify", "cached_sequential_verify", "recompute"):
        ours, theirs = (decode(target, d, prompts, mode=mode, max_new_tokens=40) for d in (learned, plain))
        assert ours.accept_lens == theirs.accept_lens
    assert sum(map(sum, ours.accept_lens)) >= 5
    cache = write_sequences(tmp_path / "cache")
    rows = cache.rows(held_out=False)[:2]
    batch = sequence_batch(cache, rows, [np.array([3]), np.array([4])], 6, np.ones((199, H), np.float32))
    vector = target.embedding.weight[...][5]
    np.testing.assert_array_equal(block_hidden(learned, batch, 0 * vector), block_hidden(plain, batch, vector))
