"""The window form on disk: every version read for what it is, and what can't be known refused by name."""

import contextlib
import dataclasses
import json
import shutil
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from cache_meta import edit_meta
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dflash.training.cache import CacheError, open_cache
from dflash.training.cache.arrays import ArrayWriter
from dflash.training.cache.window_meta import LABELS
from dflash.training.cache.windows import Samples, from_bits, open_windows, to_bits, window_specs
from dflash.weights.config_json import read_target_config
from dflash.weights.tiny import tiny_config

N, C, B, K, H = 6, 9, 4, 2, 3
BF16 = ml_dtypes.bfloat16
SPLIT = {"train": {"num_prompts": 3, "sha256": "ab"}}
META = {
    "model_snapshot_dir": "/models/tiny",
    "snapshot_sha256": "cd",
    "split": SPLIT,
    "ctx_len": C,
    "ctx_len_full": C + 1,
    "block_size": B,
    "num_blocks": N,
    "rollout_steps": 1,
    "rollout_accept_len_mode": "full",
    "rollout_state_evolution": "dflash_commit",
    "num_samples": N,
    "target_layer_ids": [1, 4],
    "add_one_for_pre_layer_capture": True,
    "target_ids_mode": LABELS,
    "hidden_size": H,
    "num_context_features": K,
    "dtype": "bf16_u16",
    "seed": 0,
    "position_offsets": [0, 64],
    "position_offset_mode": "per_prompt_rollout",
    "ctx_pos_start_file": "ctx_pos_start_i32.npy",
    "anchor_pos_file": "anchor_pos_i32.npy",
    **dict.fromkeys(("prefill_chunk", "page_size", "hbm_utilization", "sharding_axis_dims", "teacher_easydel_dir")),
}


def make_samples(rows=range(N)):
    """Samples whose values follow from their numbers."""
    draws = [np.random.default_rng(i) for i in rows]

    def draw(f, *shape):
        return np.array([f(r) for r in draws]).reshape(len(draws), *shape)

    return Samples(
        context_features=draw(lambda r: r.normal(size=(C, K * H)), C, K * H).astype(BF16),
        anchor_embedding=draw(lambda r: r.normal(size=H), H).astype(BF16),
        target_ids=draw(lambda r: r.integers(0, 99, B - 1), B - 1).astype(np.int32),
        ctx_pos_start=draw(lambda r: r.integers(0, 1000)).astype(np.int32),
        anchor_ids=draw(lambda r: r.integers(0, 99)).astype(np.int32),
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    writer = ArrayWriter(tmp_path_factory.mktemp("whole") / "cache", {})
    writer.allocate(window_specs(N, C, B, K, H))
    samples = make_samples()
    writer.arrays["held_out_u8"][:] = np.arange(N) >= 4
    writer.arrays["anchor_pos_i32"][:] = samples.ctx_pos_start + C
    writer.arrays["ctx_token_ids"][:] = np.random.default_rng(N).integers(0, 99, (N, C))
    for field in dataclasses.fields(Samples):
        values = getattr(samples, field.name)
        name = next(n for n in (field.name, f"{field.name}_u16", f"{field.name}_i32") if n in writer.arrays)
        writer.arrays[name][:] = to_bits(values) if values.dtype == BF16 else values
    writer.commit(N)
    return writer.finish(META)


@pytest.fixture
def cache(whole, tmp_path):
    """A whole cache to be spoilt."""
    return shutil.copytree(whole, tmp_path / "cache")


# ---- what is written is read


def test_what_was_written_is_read(whole):
    cache, expected, rows = open_windows(whole), make_samples(), [4, 0, 4]
    read = cache.samples(rows)
    assert (len(cache), read.context_features.dtype, read.anchor_embedding.dtype) == (N, BF16, BF16)
    for field in dataclasses.fields(Samples):
        values = getattr(expected, field.name)[rows]
        np.testing.assert_array_equal(getattr(read, field.name), values, err_msg=field.name)


def test_what_a_cache_says_of_itself(whole):
    cache = open_cache(whole)
    assert (cache.context, cache.max_block_size, cache.hidden_size, cache.feature_layer_ids) == (C, B, H, (1, 4))
    assert (cache.snapshot_sha256, cache.split, len(cache.sha256)) == ("cd", SPLIT, 64)
    assert (cache.rows(held_out=False).tolist(), cache.rows(held_out=True).tolist()) == ([0, 1, 2, 3], [4, 5])


def test_the_hash_follows_the_meta_data(whole, cache):
    assert open_windows(cache).sha256 == open_windows(whole).sha256
    edit_meta(cache, seed=1)
    assert open_windows(cache).sha256 != open_windows(whole).sha256


def test_where_nothing_was_split_all_rows_are_for_training(cache):
    (cache / "held_out_u8.npy").unlink()
    rows = open_windows(cache).rows
    assert (len(rows(held_out=False)), len(rows(held_out=True))) == (N, 0)


def test_a_cache_is_mapped_not_loaded(whole):
    assert all(isinstance(a, np.memmap) for a in open_windows(whole)._arrays.values())
    assert open_windows(whole).samples([]).context_features.shape == (0, C, K * H)


@pytest.mark.parametrize(("rows", "error"), [([N], IndexError), ([-1], IndexError), ([True, False], TypeError)])
def test_samples_are_asked_for_by_number(whole, rows, error):
    with pytest.raises(error, match="samples are"):
        open_windows(whole).samples(rows)


def test_size_of_a_sample(whole):
    features, embedding, ids = 1023 * 4 * 2880 * 2, 2880 * 2, 4 * (7 + 1 + 1023 + 1 + 1)
    assert features / 1e6 == pytest.approx(23.57, abs=0.005)
    size = sum(spec.nbytes for spec in window_specs(1, 1023, 8, features=4, hidden=2880).values())
    # One byte more than the seeds' files take: the split.
    assert size == features + embedding + ids + 1
    assert size / 1e6 == pytest.approx(23.58, abs=0.005)
    specs = window_specs(N, C, B, features=K, hidden=H).values()
    assert sum(spec.nbytes for spec in specs) == sum(p.stat().st_size - 128 for p in whole.glob("*.npy"))


@given(st.floats(width=32, allow_nan=False))
def test_bits_round_to_the_nearest_and_ties_to_even(x):
    word = int(np.float32(x).view(np.uint32))
    low, half = word & 0xFFFF, 0x8000
    up = low > half or (low == half and (word >> 16) & 1)
    assert to_bits(np.float32([x])).tolist() == [(word >> 16) + up]


def test_every_bit_pattern_survives():
    bits = np.arange(2**16, dtype=np.uint16)
    np.testing.assert_array_equal(to_bits(from_bits(bits)), bits)


def test_bits_are_not_taken_of_bits():
    with pytest.raises(TypeError, match="uint16"):
        to_bits(np.zeros(3, np.uint16))
    with pytest.raises(TypeError, match="float32"):
        from_bits(np.zeros(3, np.float32))


# ---- what the seeds' loader asks for (that meta.json has its every key is tested in test_build)

LOADER_META = {
    "model_snapshot_dir": str,
    "ctx_len": int,
    "block_size": int,
    "num_blocks": int,
    "target_layer_ids": list,
    "hidden_size": int,
    "add_one_for_pre_layer_capture": bool,
    "num_context_features": int,
    "ctx_pos_start_file": str,
    "anchor_pos_file": str,
}


def test_the_seeds_loader_contract_holds(whole):
    raw = json.loads((whole / "meta.json").read_text())
    assert {k: type(raw[k]) for k in LOADER_META} == LOADER_META
    assert (raw["dtype"], raw["add_one_for_pre_layer_capture"]) == ("bf16_u16", True)
    assert (raw["ctx_len_full"], raw["target_ids_mode"]) == (C + 1, "block_verify_target_predict_shifted")
    assert raw["num_samples"] == raw["num_blocks"] * raw["rollout_steps"] == N
    found = {p.name: np.load(p, mmap_mode="r") for p in whole.glob("*.npy")}
    assert {name: (a.dtype, a.shape) for name, a in found.items()} == {
        "context_features_u16.npy": (np.uint16, (N, C, K * H)),
        "anchor_embedding_u16.npy": (np.uint16, (N, H)),
        "target_ids.npy": (np.int32, (N, B - 1)),
        "anchor_ids.npy": (np.int32, (N,)),
        "ctx_token_ids.npy": (np.int32, (N, C)),
        raw["ctx_pos_start_file"]: (np.int32, (N,)),
        raw["anchor_pos_file"]: (np.int32, (N,)),
        "held_out_u8.npy": (np.uint8, (N,)),
    }
    assert (found["anchor_pos_i32.npy"] == found["ctx_pos_start_i32.npy"] + raw["ctx_len"]).all()


# ---- older versions, from their description

KEYS_SINCE = [
    {"model_snapshot_dir", "ctx_len", "block_size", "num_blocks", "target_layer_ids", "hidden_size", "dtype", "seed"},
    {"ctx_len_full", "add_one_for_pre_layer_capture", "target_ids_mode"},
    {"rollout_steps", "num_samples"},
    {"position_offsets", "ctx_pos_start_file", "anchor_pos_file"},
    {"prefill_chunk", "page_size", "hbm_utilization", "sharding_axis_dims"},
    {"position_offset_mode"},
    {"rollout_accept_len_mode", "rollout_state_evolution", "teacher_easydel_dir"},
]
FILES_SINCE = {"ctx_token_ids": 3, "ctx_pos_start_i32": 4, "anchor_pos_i32": 4, "held_out_u8": 99}


def older(whole, version):
    """meta and arrays as a builder of that version would have left them."""
    raw = json.loads((whole / "meta.json").read_text())
    raw = {k: raw[k] for k in set().union(*KEYS_SINCE[:version])}
    found = {p.stem: np.load(p) for p in whole.glob("*.npy") if FILES_SINCE.get(p.stem, 1) <= version}
    return raw, found


def save_older(directory, whole, version):
    raw, found = older(whole, version)
    directory.mkdir()
    (directory / "meta.json").write_text(json.dumps(raw, indent=2, sort_keys=True))
    for name, array in found.items():
        np.save(directory / f"{name}.npy", array)
    return directory


@pytest.mark.parametrize("version", range(1, 8))
def test_every_version_is_read(tmp_path, whole, version):
    cache = open_windows(save_older(tmp_path / "old", whole, version))
    batch, meta, first = cache.samples(range(N)), cache.meta, version == 1
    np.testing.assert_array_equal(batch.target_ids, make_samples().target_ids)
    np.testing.assert_array_equal(batch.ctx_pos_start, make_samples().ctx_pos_start if version >= 4 else np.zeros(N))
    # The first version: the anchor ends the context, ids count by a layer's input.
    assert (meta.anchor_in_context, meta.anchor_distance) == (first, C - first)
    assert (meta.feature_layer_ids, len(cache)) == ((0, 3) if first else (1, 4), N)


def test_the_first_version_does_not_show_its_anchor_to_the_draft(tmp_path, whole):
    cache = open_windows(save_older(tmp_path / "old", whole, 1))
    assert cache.context == C - 1
    features = cache.samples([3]).context_features
    np.testing.assert_array_equal(features, make_samples([3]).context_features[:, : C - 1])


def test_capture_without_the_shift_names_the_layer_before(cache):
    edit_meta(cache, add_one_for_pre_layer_capture=False)
    assert open_windows(cache).meta.feature_layer_ids == (0, 3)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("raw_bfloat16", [False, True])
def test_npz_is_read(tmp_path, whole, save, raw_bfloat16):
    raw, found = older(whole, 1)
    if raw_bfloat16:
        for name in ("context_features", "anchor_embedding"):
            found[name] = found.pop(f"{name}_u16").view(BF16)
        del found["anchor_ids"]
    save(tmp_path / "old.npz", meta=np.array(json.dumps(raw)), **found)
    if raw_bfloat16:
        assert np.load(tmp_path / "old.npz")["context_features"].dtype == np.dtype("V2")
    cache = open_windows(tmp_path / "old.npz")
    batch = cache.samples([2, 5])
    expected = make_samples([2, 5]).context_features[:, : C - 1]
    np.testing.assert_array_equal(batch.context_features, expected)
    np.testing.assert_array_equal(batch.anchor_embedding, make_samples([2, 5]).anchor_embedding)
    assert (batch.anchor_ids is None) == raw_bfloat16
    assert isinstance(cache._arrays["context_features_u16"], np.memmap) == (save is np.savez)


# ---- what is refused


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"ctx_len": ...}, "ctx_len .*got None"),
        ({"hidden_size": True}, "hidden_size must be an integer"),
        ({"target_layer_ids": ...}, "target_layer_ids must list integers"),
        ({"target_layer_ids": [0, 4], "add_one_for_pre_layer_capture": False}, "0 is the embedding, no layer's output"),
        ({"target_ids_mode": "guess"}, "target_ids_mode must be one of"),
        ({"target_ids_mode": ...}, "target_ids_mode missing"),
        ({"ctx_len_full": ..., "add_one_for_pre_layer_capture": ...}, "no version wrote that"),
        ({"ctx_len_full": C}, f"ctx_len_full .*{C + 1}.*, got {C}"),
        ({"num_context_features": 3}, "num_context_features is 3 for 2 target_layer_ids"),
        ({"num_samples": N + 1}, rf"target_ids is \[{N}, {B - 1}\], must be \[{N + 1}, {B - 1}\]"),
        ({"dtype": "float16"}, "dtype must be one of"),
        ({"position_offset_mode": []}, "position_offset_mode must be one of"),
        ({"anchor_pos_file": "../a.npy"}, r"own directory .*'\.\./a\.npy' .*anchor_pos_i32"),
        ({"ctx_pos_start_file": "/etc/a.npy"}, "own directory only"),
        ({"ctx_pos_start_file": "gone.npy"}, "gone.npy is missing"),
    ],
)
def test_meta_that_contradicts_itself_is_refused(cache, changes, fault):
    edit_meta(cache, **changes)
    with pytest.raises(CacheError, match=fault):
        open_windows(cache)


def test_the_anchor_of_the_first_version_is_its_last_context_token(tmp_path, whole):
    old = save_older(tmp_path / "old", whole, 1)
    np.save(old / "anchor_pos_i32.npy", np.full(N, C, np.int32))
    with pytest.raises(CacheError, match=rf"anchor_pos must be ctx_pos_start \+ {C - 1}"):
        open_windows(old)


def test_a_first_version_whose_feature_is_the_embedding_is_refused(tmp_path, whole):
    edit_meta(save_older(tmp_path / "old", whole, 1), target_layer_ids=[0, 4])
    with pytest.raises(CacheError, match="0 is the embedding, no layer's output"):
        open_windows(tmp_path / "old")


def test_positions_that_were_offset_and_not_kept_are_refused(cache):
    (cache / "ctx_pos_start_i32.npy").unlink()
    edit_meta(cache, ctx_pos_start_file=..., position_offsets=[0, 4096])
    with pytest.raises(CacheError, match="positions can't be known"):
        open_windows(cache)


def test_positions_that_no_int32_holds_are_refused(cache):
    (cache / "anchor_pos_i32.npy").unlink()
    edit_meta(cache, anchor_pos_file=...)
    np.save(cache / "ctx_pos_start_i32.npy", np.full(N, 2**31 - 2, np.int32))
    with pytest.raises(CacheError, match="within the target's 2147483648 positions"):
        open_windows(cache)


def test_all_faults_come_in_one_error(cache):
    edit_meta(cache, target_ids_mode="guess", block_size="8")
    features = cache / "context_features_u16.npy"
    features.write_bytes(features.read_bytes()[:-1])
    np.save(cache / "anchor_embedding_u16.npy", np.zeros((N, H), np.float16))
    np.save(cache / "anchor_ids.npy", np.zeros(N - 1, np.int32))
    (cache / "target_ids.npy").unlink()
    with pytest.raises(CacheError) as caught:
        open_windows(cache)
    for fault in (
        "target_ids_mode must be one of",
        "block_size must be an integer of at least 2, got '8'",
        "context_features_u16.npy can't be read",
        "anchor_embedding_u16 is float16, must be uint16",
        f"anchor_ids is [{N - 1}], must be [{N}]",
        "target_ids is missing",
    ):
        assert fault in str(caught.value)


def test_ids_below_zero_and_positions_that_disagree_are_refused(cache):
    for name in ("target_ids", "anchor_pos_i32"):
        array = np.load(cache / f"{name}.npy")
        array[3] = -7
        np.save(cache / f"{name}.npy", array)
    with pytest.raises(CacheError, match=r"target_ids .*got -7.*1 samples, \[3\]"):
        open_windows(cache)


@pytest.mark.parametrize("name", ["target_ids", "anchor_ids", "ctx_token_ids"])
@pytest.mark.parametrize("form", ["directory", "npz"])
def test_ids_beyond_the_target_are_refused(cache, tmp_path, name, form):
    array = np.load(cache / f"{name}.npy")
    array.flat[-1] = 500
    np.save(cache / f"{name}.npy", array)
    path = cache
    if form == "npz":
        arrays = {p.stem: np.load(p) for p in cache.glob("*.npy")}
        path = tmp_path / "cache.npz"
        np.savez(path, meta=(cache / "meta.json").read_text(), **arrays)
    good, bad = (read_target_config(tiny_config(vocab_size=size)) for size in (501, 500))
    limit = read_target_config(tiny_config(vocab_size=501, max_position_embeddings=C))
    assert len(open_windows(path)) == len(open_windows(path, good)) == N
    with pytest.raises(CacheError, match=f"{name} .*0 to 499, got 0 to 500"):
        open_windows(path, bad)
    with pytest.raises(CacheError, match=f"within the target's {C} positions"):
        open_windows(path, limit)


def test_nothing_is_unpickled(cache, tmp_path):
    evil = np.array([Path("x")] * N, object)
    np.save(cache / "anchor_ids.npy", evil, allow_pickle=True)
    with pytest.raises(CacheError, match=r"anchor_ids.npy can't be read"):
        open_windows(cache)
    np.savez(tmp_path / "evil.npz", meta=evil)
    with pytest.raises(CacheError, match=r"meta can't be read.*Python objects"):
        open_windows(tmp_path / "evil.npz")


@pytest.mark.parametrize("text", ["", "[1]", "{", "[" * 100_000, "\udcff"])
def test_meta_that_is_no_object_is_refused(cache, text):
    (cache / "meta.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(CacheError, match="JSON"):
        open_windows(cache)


def test_an_unfinished_cache_is_refused(tmp_path):
    ArrayWriter(tmp_path / "c", {}).allocate(window_specs(N, C, B, K, H))
    for path in (tmp_path / "c", tmp_path / "c.building"):
        with pytest.raises(CacheError, match=r"c\.building is not finished"):
            open_windows(path)


def test_marks_of_the_split_are_0_or_1(cache):
    np.save(cache / "held_out_u8.npy", np.full(N, 2, np.uint8))
    with pytest.raises(CacheError, match="held_out_u8 must be 0 or 1, got 2"):
        open_windows(cache)


def test_no_cache_is_said_to_be_none(tmp_path):
    with pytest.raises(CacheError, match="is neither"):
        open_windows(tmp_path / "nowhere")


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.sampled_from(["cache", "npz", "small.npz"]), st.randoms(use_true_random=False))
def test_damage_is_a_cache_error_or_nothing(tmp_path_factory, whole, kind, rng):
    """Bytes flipped in headers, meta or archive, and cuts anywhere, never raise anything else."""
    folder = tmp_path_factory.getbasetemp() / "damaged"
    shutil.rmtree(folder, ignore_errors=True)
    if kind == "cache":
        path = shutil.copytree(whole, folder)
        victim = rng.choice(sorted(path.iterdir()))
    else:
        folder.mkdir()
        raw, found = older(whole, 7)
        path = victim = folder / "old.npz"
        (np.savez if kind == "npz" else np.savez_compressed)(path, meta=np.array(json.dumps(raw)), **found)
    data = bytearray(victim.read_bytes())
    for _ in range(rng.randint(1, 3)):
        data[rng.choice([rng.randrange(min(160, len(data))), rng.randrange(len(data))])] = rng.randrange(256)
    victim.write_bytes(data[: rng.choice([len(data), rng.randrange(len(data))])])
    with contextlib.suppress(CacheError):
        open_windows(path).samples(range(N))


def test_a_stored_npz_is_as_long_as_its_header_says(tmp_path, whole):
    raw, found = older(whole, 7)
    np.savez(tmp_path / "old.npz", meta=np.array(json.dumps(raw)), **found)
    with zipfile.ZipFile(tmp_path / "lies.npz", "w") as lies, zipfile.ZipFile(tmp_path / "old.npz") as honest:
        for name in honest.namelist():
            lies.writestr(name, honest.read(name)[: -1 if name.startswith("target") else None])
    with pytest.raises(CacheError, match=r"target_ids can't be read"):
        open_windows(tmp_path / "lies.npz")
