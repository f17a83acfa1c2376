"""The sequence form on disk: what is written is read, and every fault is named in one error."""

import contextlib
import shutil

import numpy as np
import pytest
from cache_meta import edit_meta
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dflash.training.cache import CacheError, open_cache
from dflash.training.cache.arrays import ArrayWriter
from dflash.training.cache.sequences import FORM, open_sequences, sequence_specs
from dflash.weights.config_json import read_target_config
from dflash.weights.tiny import tiny_config

LENGTHS, H, LAYERS = (5, 70, 3, 4), 6, [2, 0]
N, M = sum(LENGTHS), len(LENGTHS)
BOUNDS = np.cumsum([0, *LENGTHS])
META = {
    "form": FORM,
    "hidden_size": H,
    "num_context_features": 2,
    "target_layer_ids": LAYERS,
    "num_tokens": N,
    "snapshot_sha256": "cd",
    "split": {"train": {"num_prompts": 3}},
}


@pytest.fixture(scope="module")
def values():
    rng = np.random.default_rng(0)
    # Answers of 2, 40, 1 and 2 tokens end the sequences.
    answers = np.concatenate([np.arange(n) >= n - a for n, a in zip(LENGTHS, (2, 40, 1, 2), strict=True)])
    return {
        "features_u16": rng.integers(0, 2**16, (N, len(LAYERS) * H)),
        "token_ids": rng.integers(0, 99, N),
        "loss_mask_u8": answers,
        "sequence_start_i64": BOUNDS,
        "ctx_pos_start_i32": [0, 4096, 0, 4096],
        "held_out_u8": [0, 0, 0, 1],
    }


@pytest.fixture(scope="module")
def whole(tmp_path_factory, values):
    writer = ArrayWriter(tmp_path_factory.mktemp("whole") / "cache", {})
    writer.allocate(sequence_specs(N, M, len(LAYERS) * H))
    for name, array in writer.arrays.items():
        array[:] = values[name]
    writer.commit(M)
    return writer.finish(META)


@pytest.fixture
def cache(whole, tmp_path):
    """A whole cache to be spoilt."""
    return shutil.copytree(whole, tmp_path / "cache")


def test_what_was_written_is_read(whole, values):
    cache = open_cache(whole)
    assert (len(cache), cache.hidden_size, cache.feature_layer_ids, cache.longest) == (M, H, (2, 0), 128)
    assert (cache.max_block_size, cache.snapshot_sha256, cache.split) == (cache.longest, "cd", META["split"])
    for name in ("features", "token_ids", "loss_mask"):
        array = getattr(cache, name)
        assert isinstance(array, np.memmap)
        stored = {"features": "features_u16", "loss_mask": "loss_mask_u8"}.get(name, name)
        np.testing.assert_array_equal(array, values[stored])
    assert (cache.bounds.tolist(), cache.pos_start.tolist()) == (BOUNDS.tolist(), [0, 4096, 0, 4096])


def test_rows_have_room_for_an_anchor_and_a_label(whole):
    cache = open_sequences(whole)
    assert (cache.rows(held_out=False).tolist(), cache.rows(held_out=True).tolist()) == ([0, 1], [3])


@pytest.mark.parametrize(
    ("limits", "fault"),
    [
        ({"vocab_size": 99, "max_position": 4166}, None),
        (
            {"vocab_size": 90, "max_position": 4166},
            "token_ids.npy .*0 to 89, got 0 to 98",
        ),
        ({"vocab_size": 99, "max_position": 4165}, "within the target's 4165 positions, got 0 to 4166"),
    ],
)
def test_ids_and_positions_beyond_the_target_are_refused(cache, limits, fault):
    """By the target's own config, and without one by what the cache says of it."""
    vocab_size, max_position = limits.values()
    target = read_target_config(tiny_config(vocab_size=vocab_size, max_position_embeddings=max_position))
    token_ids = np.load(cache / "token_ids.npy")
    token_ids[0] = 98
    np.save(cache / "token_ids.npy", token_ids)
    for meta, config in (({}, target), (limits, None)):
        edit_meta(cache, **meta)
        if fault is None:
            assert len(open_cache(cache, config)) == M
        else:
            with pytest.raises(CacheError, match=fault):
                open_cache(cache, config)


def test_the_hash_follows_the_meta_data(whole, cache):
    assert open_sequences(cache).sha256 == open_sequences(whole).sha256
    edit_meta(cache, snapshot_sha256="ef")
    assert open_sequences(cache).sha256 != open_sequences(whole).sha256


def test_all_faults_come_in_one_error(cache):
    edit_meta(cache, hidden_size="6", num_tokens=..., target_layer_ids=[1, 2, 3])
    (cache / "token_ids.npy").unlink()
    (cache / "features_u16.npy").write_bytes((cache / "features_u16.npy").read_bytes()[:-1])
    np.save(cache / "held_out_u8.npy", np.zeros(M, np.int64))
    with pytest.raises(CacheError) as caught:
        open_sequences(cache)
    for fault in (
        "hidden_size must be an integer of at least 1, got '6'",
        "num_tokens must be an integer of at least 1, got None",
        "num_context_features is 2 for 3 target_layer_ids",
        "token_ids.npy can't be read",
        "features_u16.npy can't be read",
        "held_out_u8.npy is int64, must be uint8",
        "Build it again",
    ):
        assert fault in str(caught.value)


@pytest.mark.parametrize(
    ("name", "array", "fault"),
    [
        ("features_u16", np.zeros((N, H), np.uint16), rf"features_u16.npy is \[{N}, {H}\], must be \[{N}, {2 * H}\]"),
        ("held_out_u8", np.zeros(M - 1, np.uint8), rf"held_out_u8.npy is \[{M - 1}\], must be \[{M}\]"),
        ("sequence_start_i64", np.int64(3), r"sequence_start_i64.npy is \[\], must be \[2\]"),
        ("sequence_start_i64", BOUNDS + 1, "sequence_start_i64.npy must rise from 0"),
        ("sequence_start_i64", np.sort(BOUNDS)[[0, 2, 1, 3, 4]], "must rise from 0"),
        ("sequence_start_i64", BOUNDS[[0, 1, 1, 3, 4]], "must rise from 0"),
        (
            "token_ids",
            np.full(N, -1, np.int32),
            "token_ids.npy .*0 to 2147483647, got -1",
        ),
        ("ctx_pos_start_i32", np.full(M, -7, np.int32), "ctx_pos_start_i32.npy must leave every row within"),
        ("loss_mask_u8", np.full(N, 2, np.uint8), "loss_mask_u8.npy must be 0 or 1, got 2"),
        ("held_out_u8", np.full(M, 255, np.uint8), "held_out_u8.npy must be 0 or 1, got 255"),
        ("token_ids", np.array([{}] * N), "token_ids.npy can't be read"),
    ],
)
def test_arrays_that_disagree_are_refused(cache, name, array, fault):
    np.save(cache / f"{name}.npy", array)
    with pytest.raises(CacheError, match=fault):
        open_sequences(cache)


@pytest.mark.parametrize("text", ["", "{", "[1]", "[" * 100_000, "\udcff"])
def test_meta_that_is_no_object_is_refused(cache, text):
    (cache / "meta.json").write_bytes(text.encode(errors="surrogateescape"))
    for opened in (open_sequences, open_cache):
        with pytest.raises(CacheError, match="JSON"):
            opened(cache)


def test_an_unfinished_cache_is_refused(tmp_path):
    writer = ArrayWriter(tmp_path / "c", {})
    writer.allocate(sequence_specs(N, M, H))
    for path in (tmp_path / "c", tmp_path / "c.building"):
        for opened in (open_sequences, open_cache):
            with pytest.raises(CacheError, match=r"c\.building is not finished: .*build-cache"):
                opened(path)


def test_no_cache_is_said_to_be_none(tmp_path):
    with pytest.raises(CacheError, match=r"none at .*nowhere: build-cache"):
        open_cache(tmp_path / "nowhere")
    for opened in (open_sequences, open_cache):
        with pytest.raises(CacheError, match="is neither"):
            opened(tmp_path)


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.randoms(use_true_random=False))
def test_damage_is_a_cache_error_or_nothing(tmp_path_factory, whole, rng):
    """Bytes flipped in headers or meta, and cuts anywhere, never raise anything else."""
    folder = tmp_path_factory.getbasetemp() / "damaged_sequences"
    shutil.rmtree(folder, ignore_errors=True)
    victim = rng.choice(sorted(shutil.copytree(whole, folder).iterdir()))
    data = bytearray(victim.read_bytes())
    for _ in range(rng.randint(1, 3)):
        data[rng.randrange(min(160, len(data)))] = rng.randrange(256)
    victim.write_bytes(data[: rng.choice([len(data), rng.randrange(len(data))])])
    with contextlib.suppress(CacheError):
        open_cache(folder).rows(held_out=False)
