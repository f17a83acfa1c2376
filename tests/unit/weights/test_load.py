"""Targets and drafts by name or directory, and new drafts for a target."""

import dataclasses
import json
import shutil
import warnings
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dflash import ConfigError, WeightsError, init_draft, load_draft, load_target, load_tokenizer, write_draft
from dflash.weights import load, smollm2
from dflash.weights.export import export_draft
from dflash.weights.load import (
    default_draft,
    draft_config,
    draft_directory,
    draft_hash,
    find_draft,
    model_facts,
    own_run,
    read_any_draft,
    read_borrowed,
    target_directory,
)
from dflash.weights.runs.checkpoint import write_run
from dflash.weights.tiny import write_tiny_target


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny_target(tmp_path_factory.mktemp("load") / "target", num_hidden_layers=6)


@pytest.fixture(scope="module")
def target(folder):
    return load_target(folder)


def same_weights(a, b):
    left, right = (dict(nnx.to_flat_state(nnx.state(m))) for m in (a, b))
    assert left.keys() == right.keys()
    return all(np.array_equal(left[k].get_value(), right[k].get_value()) for k in left)


def test_target_directory(monkeypatch, tmp_path):
    assert target_directory(tmp_path) == tmp_path
    assert target_directory(str(tmp_path)) == tmp_path
    monkeypatch.setattr(smollm2, "snapshot_dir", lambda: Path("made on first use"))
    assert target_directory("smollm2-135m") == Path("made on first use")


def test_draft_directory(monkeypatch, tmp_path):
    assert draft_directory(tmp_path) == draft_directory(str(tmp_path)) == tmp_path
    assert draft_directory("./smollm2-135m") == Path("smollm2-135m")
    (tmp_path / "model.safetensors").write_bytes(b"")
    monkeypatch.setitem(load.SHIPPED_DRAFTS, "smollm2-135m", tmp_path)
    assert draft_directory("smollm2-135m") == tmp_path


def test_an_installation_without_the_draft_says_so(target, monkeypatch, tmp_path):
    monkeypatch.setitem(load.SHIPPED_DRAFTS, "smollm2-135m", tmp_path / "gone")
    for read in (draft_directory, read_any_draft, draft_hash, own_run):
        with pytest.raises(WeightsError, match=r"no weights at .*gone: install .* another draft's directory$"):
            read("smollm2-135m")
    with pytest.raises(WeightsError, match=r"install .* another draft's directory or untrained$"):
        load_draft("smollm2-135m", target)


WAYS = (
    "name a DFlashDraftModel directory (config.json and model.safetensors) or its name on the hub, a run-<step> "
    "directory or the folder of them, smollm2-135m"
)
# Whatever reads a draft and has no target to make one for.
READERS = (draft_directory, find_draft, draft_config, read_any_draft, draft_hash, own_run)


@pytest.mark.parametrize("read", READERS, ids=lambda read: read.__name__)
def test_an_untrained_draft_is_taken_only_where_it_is_offered(read, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "untrained").mkdir()  # ./untrained names it
    with pytest.raises(WeightsError) as error:
        read("untrained")
    assert str(error.value) == f"an untrained draft is not taken here: {WAYS} or smollm2-135m-plain"


def test_load_draft_takes_an_untrained_draft_and_offers_it(target, tmp_path):
    assert same_weights(load_draft("untrained", target), init_draft(target))
    assert load_draft("untrained", target).config == init_draft(target).config
    for path in (tmp_path, tmp_path / "nowhere", Path("/no/such/dir")):
        with pytest.raises(WeightsError) as error:
            load_draft(path, target)
        assert str(error.value) == f"{path} holds no draft: {WAYS}, smollm2-135m-plain or untrained"
        with pytest.raises(WeightsError) as error:
            read_any_draft(path)
        assert str(error.value) == f"{path} holds no draft: {WAYS} or smollm2-135m-plain"


@pytest.mark.parametrize("name", ["", " ", "\n\t"])
def test_an_empty_name_is_told_as_one(name, target):
    """Path("") is the working directory, and an unset variable of a shell is empty."""
    for read in (target_directory, load_target):
        with pytest.raises(WeightsError, match=r"a target is named by .*: name one") as error:
            read(name)
        assert f"got {name!r}: " in str(error.value)
    for read in (*READERS, lambda name: load_draft(name, target)):
        with pytest.raises(WeightsError, match=r"a draft is named by .*: name one"):
            read(name)
    with pytest.raises(WeightsError, match=r"a model is named by .*: name one"):
        load_tokenizer(name)


def test_only_the_built_in_target_comes_with_a_draft(tmp_path):
    assert default_draft("smollm2-135m") == "smollm2-135m"
    assert default_draft(str(tmp_path)) is None


def test_load_target(folder, target):
    assert target.config.num_layers == 6
    assert target.dtype == jnp.float32
    assert same_weights(load_target(str(folder)), target)
    assert load_target(folder, dtype="bfloat16").dtype == jnp.bfloat16
    with pytest.raises(ValueError, match=r"dtype .*\['bfloat16', 'float32'\], got 'float16'"):
        load_target(folder, dtype="float16")


def test_a_target_that_is_not_there(tmp_path):
    with pytest.raises(WeightsError, match=r"directory; .*nowhere"):
        load_target(tmp_path / "nowhere")


def test_init_draft_defaults(target):
    c, d = target.config, init_draft(target).config
    assert (d.num_layers, d.block_size, d.target_layer_ids) == (2, 8, (1, 3))
    assert d.mask_token_id == c.vocab_size - 1
    assert d.num_target_layers == c.num_layers
    assert d.windows == (None, None)
    assert d.causal == (False, False)
    for name in ("vocab_size", "hidden_size", "intermediate_size", "num_heads", "num_kv_heads", "head_dim", "rope"):
        assert getattr(d, name) == getattr(c, name), name
    assert d.max_position == c.max_position


def test_init_draft_as_asked(target):
    draft = init_draft(target, num_layers=1, block_size=4, target_layer_ids=[5, 0, 2], mask_token_id=7, seed=3)
    d = draft.config
    assert (d.num_layers, d.block_size, d.target_layer_ids, d.mask_token_id) == (1, 4, (5, 0, 2), 7)
    assert d.num_features == 3
    settings = {"num_layers": 1, "block_size": 4, "target_layer_ids": (5, 0, 2), "mask_token_id": 7}
    assert same_weights(draft, init_draft(target, **settings, seed=3))
    assert not same_weights(draft, init_draft(target, **settings, seed=4))


def test_init_draft_takes_the_targets_dtype(folder):
    assert init_draft(load_target(folder, dtype="bfloat16"), num_layers=1).dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"block_size": 1}, "1 layer .*blocks of 2; got 2 and 1"),
        ({"block_size": 131073}, "within its target's 131072 positions, got one of 131073"),
        ({"block_size": 2**31}, "within its target's 131072 positions"),
        ({"num_layers": 0}, "1 layer .*blocks of 2; got 0 and 8"),
        ({"num_layers": 5}, "features .*different layers"),
        ({"target_layer_ids": (1, 6)}, r"reads layers \[6\] .*0\.\.5"),
        ({"target_layer_ids": (-1,)}, r"reads layers \[-1\]"),
        ({"target_layer_ids": ()}, "reads at least one layer"),
        ({"target_layer_ids": 5}, "numbers of layers in a list, got 5"),
        ({"block_size": "x"}, "integers .*got 'x'"),
        ({"num_layers": 10**9}, "at most 10000 layers, got 1000000000"),
        ({"num_layers": 1.5}, r"integers .*got 1\.5"),
        ({"seed": 2**70}, "integers .*got 1180591620717411303424"),
        ({"mask_token_id": 199}, "mask token 199 .*vocabulary of 199"),
    ],
)
def test_init_draft_refuses(target, settings, message):
    with pytest.raises(ConfigError, match=message):
        init_draft(target, **settings)


@pytest.mark.parametrize("given", ["smollm2-135m", Path("somewhere"), None])
def test_what_is_no_loaded_target_is_refused(given):
    for make in (lambda: init_draft(given), lambda: load_draft("smollm2-135m", given)):
        with pytest.raises(ConfigError, match=f"load_target gives, got .*{given}"):
            make()


@pytest.mark.parametrize("given", [None, 5, b"smollm2-135m"])
def test_what_is_no_name_is_refused(given, target):
    for load_it in (load_target, load_tokenizer, lambda name: load_draft(name, target)):
        with pytest.raises(WeightsError, match=f"got {given!r}"):
            load_it(given)


def test_load_draft(target, folder, tmp_path):
    draft = init_draft(target, num_layers=1, block_size=4, target_layer_ids=(0, 3), seed=5)
    write_draft(draft, tmp_path / "draft")
    read = load_draft(str(tmp_path / "draft"), target)
    assert read.config == draft.config
    assert same_weights(read, draft)
    assert load_draft(tmp_path / "draft", load_target(folder, dtype="bfloat16")).dtype == jnp.bfloat16


def test_a_draft_by_its_name_is_the_one_of_its_directory(target, folder, monkeypatch, tmp_path):
    directory = tmp_path / "draft"
    write_draft(init_draft(target, num_layers=1, seed=5), directory)
    monkeypatch.setitem(load.SHIPPED_DRAFTS, "smollm2-135m", directory)
    assert same_weights(load_draft("smollm2-135m", target), load_draft(directory, target))
    assert same_weights(read_any_draft("smollm2-135m"), read_any_draft(directory))
    assert own_run("smollm2-135m") is None
    facts = model_facts(str(folder), "smollm2-135m")
    assert (facts["draft"], facts["draft_sha256"]) == ("smollm2-135m", draft_hash(directory))


def test_a_draft_of_another_target_is_refused_at_load(target, tmp_path):
    write_draft(init_draft(target, num_layers=1, target_layer_ids=(5,)), tmp_path / "draft")
    other = load_target(
        write_tiny_target(tmp_path / "other", num_hidden_layers=2, hidden_size=32, vocab_size=150, head_dim=8)
    )
    faults = (
        "hidden size .*64, .* 32; .*vocabulary .*199 .* 150; .*6 layers, .* 2; "
        r".*layers \[5\] .*0\.\.1; .*mask token 198 .* 150\. "
    )
    with pytest.raises(ConfigError, match=faults):
        load_draft(tmp_path / "draft", other)


def test_a_drafts_hash_follows_its_weights_in_either_layout(target, tmp_path):
    one, other = (init_draft(target, seed=s, target_layer_ids=(1, 3)) for s in (0, 1))
    written = {"same layout": [], "run": []}
    for i, draft in enumerate((one, one, other)):
        write_draft(draft, tmp_path / f"draft-{i}")
        write_run(draft, tmp_path / f"root-{i}", 5, optimizer_state=None, provenance={}, keep=None)
        written["same layout"].append(draft_hash(tmp_path / f"draft-{i}"))
        written["run"].append(draft_hash(tmp_path / f"root-{i}"))
    for first, second, third in written.values():
        assert first == second != third
    assert draft_hash(tmp_path / "root-0" / "run-5") == written["run"][0]


def test_every_form_of_drafts_is_found_by_its_files(target, folder, tmp_path):
    draft = init_draft(target, num_layers=1, target_layer_ids=(1, 3))
    write_draft(draft, tmp_path / "zlab")
    write_run(draft, tmp_path / "root", 5, optimizer_state=None, provenance={}, keep=None)
    export_draft(draft, tmp_path / "speculators", consumer="speculators", dtype="float32", target_dir=folder)
    fork = tmp_path / "fork" / "run-7"
    shutil.copytree(tmp_path / "root" / "run-5", fork)
    config = json.loads((fork / "config.json").read_text())
    (fork / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "dflash"}))
    export = shutil.copytree(tmp_path / "zlab", tmp_path / "export")
    config = json.loads((export / "config.json").read_text())
    config["dflash_config"]["use_mask_embedding"] = True
    (export / "config.json").write_text(json.dumps(config))
    linen = tmp_path / "linen" / "step_000040" / "draft_params.msgpack"
    linen.parent.mkdir(parents=True)
    linen.write_bytes(b"")
    forms = {
        "zlab": ("a DFlashDraftModel directory", tmp_path / "zlab"),
        "root": ("a run of this project", tmp_path / "root" / "run-5"),
        "root/run-5": ("a run of this project", tmp_path / "root" / "run-5"),
        "speculators": ("a draft for speculators", tmp_path / "speculators"),
        "fork": ("a run of the EasyDeL fork", fork),
        "export": ("an export of the EasyDeL fork's", export),
        "linen": ("msgpack of the EasyDeL fork's Linen trainer", linen),
        "linen/step_000040": ("msgpack of the EasyDeL fork's Linen trainer", linen),
    }
    for path, (name, place) in forms.items():
        dialect, found = find_draft(tmp_path / path)
        assert (dialect.name, found) == (name, place), path
        assert (own_run(tmp_path / path) is not None) == (name == "a run of this project"), path
    (tmp_path / "empty").mkdir()
    for path in ("empty", "nowhere", "zlab/config.json"):
        with pytest.raises(WeightsError, match=f"{path} holds no draft: .*DFlashDraftModel"):
            find_draft(tmp_path / path)


def test_a_draft_for_speculators_comes_back(target, folder, tmp_path):
    windows = {"windows": (None, 16), "causal": (False, False)}
    for i, changes in enumerate(({}, windows, windows | {"causal": (False, True)})):
        draft = init_draft(target, num_layers=2, block_size=4, mask_token_id=7, seed=5)
        draft.config = dataclasses.replace(draft.config, **changes)
        directory = tmp_path / str(i)
        export_draft(draft, directory, consumer="speculators", dtype="float32", target_dir=folder)
        read = load_draft(directory, target)
        assert read.config == draft.config
        assert same_weights(read, draft)
    with pytest.raises(ConfigError, match=r"layers .*verifier .*: name .*snapshot"):
        read_any_draft(tmp_path / "0")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"draft_vocab_size": 32}, r"draft_vocab_size .*\[199\], got 32"),
        ({"speculators_model_type": "eagle3"}, r"speculators_model_type .*\['dflash'\], got 'eagle3'"),
        ({"sample_from_anchor": True}, r"sample_from_anchor .*\[False\], got True"),
        ({"aux_hidden_state_layer_ids": [0, 2]}, r"aux_hidden_state_layer_ids must be .* got \[0, 2\]"),
        ({"aux_hidden_state_layer_ids": None}, "aux_hidden_state_layer_ids must be"),
        ({"transformer_layer_config": []}, "transformer_layer_config must be an object"),
        ({"speculators_config": []}, "speculators_config must be an object"),
        (
            {"speculators_config": {"verifier": {"architectures": ["Qwen3ForCausalLM"]}}},
            r"verifier is one of \['Qwen3ForCausalLM'\], and the target a LlamaForCausalLM",
        ),
        ({"speculators_config": {"verifier": {"architectures": "Llama"}}}, "verifier is one of 'Llama'"),
        ({"block_size": 1}, "block_size .*2, got 1"),
        ({"mask_token_id": None}, "mask_token_id .*got None"),
    ],
)
def test_a_config_for_speculators_that_is_not_ours_is_refused(target, folder, tmp_path, changes, message):
    export_draft(init_draft(target), tmp_path / "d", consumer="speculators", target_dir=folder)
    path = tmp_path / "d" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(ConfigError, match=message):
        load_draft(tmp_path / "d", target)


@pytest.mark.parametrize("tied", [False, True])
def test_what_a_draft_borrows_is_the_targets(tied, tmp_path):
    folder = write_tiny_target(tmp_path / "target", tie_word_embeddings=tied, shards=3)
    borrowed, target = read_borrowed(folder), load_target(folder)
    assert borrowed.config == target.config
    np.testing.assert_array_equal(borrowed.embedding, target.embedding.weight[...])
    np.testing.assert_array_equal(borrowed.norm, target.norm.weight[...])
    assert (borrowed.head is borrowed.embedding) == tied
    if not tied:
        np.testing.assert_array_equal(borrowed.head, target.head.weight[...])


def test_a_target_without_its_embedding_lends_nothing(tmp_path):
    from safetensors.numpy import load_file, save_file

    folder = write_tiny_target(tmp_path / "target")
    tensors = load_file(folder / "model.safetensors")
    tensors.pop("model.embed_tokens.weight")
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(WeightsError, match=r"missing model\.embed_tokens\.weight"):
        read_borrowed(folder)


def with_tensors(folder, **changes):
    """The snapshot with these tensors changed, added, or (None) taken away."""
    from safetensors.numpy import load_file, save_file

    tensors = load_file(folder / "model.safetensors") | changes
    save_file({name: t for name, t in tensors.items() if t is not None}, folder / "model.safetensors")
    return tensors


def test_a_head_beside_a_tied_embedding_is_compared(tmp_path):
    folder = write_tiny_target(tmp_path / "target", tie_word_embeddings=True)
    plain = load_target(folder)
    embedding = with_tensors(folder)["model.embed_tokens.weight"]
    with_tensors(folder, **{"lm_head.weight": embedding})
    assert same_weights(load_target(folder), plain)
    assert read_borrowed(folder).head is not None
    other = embedding.copy()
    other[3, 5] += 1e-3
    for head in (other, other[:-1], embedding.T.copy()):
        with_tensors(folder, **{"lm_head.weight": head})
        for read in (load_target, read_borrowed):
            with pytest.raises(WeightsError, match=r"head .*not the embedding.* tie_word_embeddings"):
                read(folder)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(
    "name", ["model.embed_tokens.weight", "model.layers.2.mlp.down_proj.weight", "model.norm.weight"]
)
def test_a_target_with_a_weight_that_is_not_finite_is_refused(tmp_path, name, value):
    folder = write_tiny_target(tmp_path / "target")
    tensor = with_tensors(folder)[name].copy()
    tensor.reshape(-1)[7] = value
    with_tensors(folder, **{name: tensor})
    with pytest.raises(WeightsError, match=r"target can't be used: \S+ holds NaN"):
        load_target(folder)
    if "layers" not in name:
        with pytest.raises(WeightsError, match=r"holds NaN or infinity"):
            read_borrowed(folder)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("value", [1e5, -1e30, 3.4e38])
@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight"])
def test_a_weight_beyond_any_trained_one_is_refused(tmp_path, name, value, dtype):
    """It is finite, and would make zeros of what a norm divides."""
    folder = write_tiny_target(tmp_path / "target")
    tensor = with_tensors(folder)[name].copy()
    tensor.reshape(-1)[7] = value
    with_tensors(folder, **{name: tensor})
    with pytest.raises(WeightsError, match=r"weight holds (a number of|NaN)"):
        load_target(folder, dtype)


@pytest.mark.parametrize("exponent", [254, 200])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_absurd_scale_of_experts_is_refused(tmp_path, exponent, dtype):
    folder = write_tiny_target(tmp_path / "target", "gpt_oss", mxfp4=True)
    name = next(name for name in with_tensors(folder) if name.endswith("down_proj_scales"))
    scales = with_tensors(folder)[name].copy()
    scales.reshape(-1)[5] = exponent
    with_tensors(folder, **{name: scales})
    warnings.simplefilter("ignore")  # that experts stay as wide as they are
    with pytest.raises(WeightsError, match=r"holds (a number of|NaN)"):
        load_target(folder, dtype)


def test_a_draft_with_a_weight_that_is_not_finite_is_refused_in_every_form(target, folder, tmp_path):
    draft = init_draft(target, num_layers=1, target_layer_ids=(1, 3))
    weight = draft.layers[0].mlp.down.weight
    weight[...] = weight[...].at[2, 2].set(np.nan)
    write_draft(draft, tmp_path / "zlab")
    write_run(draft, tmp_path / "root", 5, optimizer_state=None, provenance={}, keep=None)
    for name in ("zlab", "root"):
        with pytest.raises(WeightsError, match=r"layers\.0\.mlp\.down\.weight holds NaN"):
            load_draft(tmp_path / name, target)


IN_PARTS = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from dflash.models.mesh import make_mesh
from dflash.weights.build import _largest_of_parts, check_values
from dflash.weights.snapshot import WeightsError

mesh = make_mesh(jax.devices(), tp=8)
whole = np.ones((16, 4), np.float32)
spoilt = whole.copy()
spoilt[15, 3] = np.inf
put = lambda value, spec: jax.device_put(value, NamedSharding(mesh, PartitionSpec(*spec)))
check_values({"split": put(whole, ["tp"]), "copied": put(whole, [])}, "target")
for split, copied in ((spoilt, whole), (whole, spoilt)):
    weights = {"split": put(split, ["tp"]), "copied": put(copied, [])}
    # Nothing goes between devices: with large weights and few cores eight of a CPU's wait for each other for ever.
    counts = {name: [len(part.devices()) for part in _largest_of_parts(value)] for name, value in weights.items()}
    assert counts == {"split": [1] * 8, "copied": [1]}, counts
    try:
        check_values(weights, "target")
    except WeightsError as error:
        assert ("split holds" in str(error)) == (split is spoilt), error
        assert ("copied holds" in str(error)) == (copied is spoilt), error
    else:
        raise AssertionError("infinity passed")
print("same")
"""


@pytest.mark.slow
def test_infinity_is_found_in_the_part_of_any_device(on_eight_devices):
    on_eight_devices(IN_PARTS)
