"""What a cache holds is what the target says of its own text, at the positions it claims; and a kill costs nothing."""

import dataclasses
import hashlib
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from dflash import load_target, load_tokenizer
from dflash.text.prompts import PromptError
from dflash.training.cache import (
    CacheError,
    CacheSource,
    ConversationConfig,
    SequenceCache,
    WindowCache,
    WindowConfig,
    build_sequences,
    build_windows,
    open_cache,
)
from dflash.training.cache.build_windows import window_contexts
from dflash.training.cache.conversations import Conversation, read_batches, split_record
from dflash.weights.snapshot import snapshot_hash
from dflash.weights.tiny import write_tiny_target, write_tiny_tokenizer

pytestmark = pytest.mark.slow

FAMILIES = ["llama", "gpt_oss"]
LIMIT, LAYERS = 131072, (1, 0)
TEXTS = ConversationConfig(
    openings="none",
    count=12,
    max_prompt_len=32,
    max_user_turn=24,
    max_new_tokens=16,
    batch_size=8,
    held_out=0.3,
    seed=3,
)
C, B, BLOCKS, STEPS = 24, 4, 6, 3
# The last one leaves just the room that a base's context and its rollout need.
OFFSETS = (0, 4096, LIMIT - C - STEPS * B)
WINDOWS = {
    "ctx_len": C + 1,
    "block_size": B,
    "num_blocks": BLOCKS,
    "rollout_steps": STEPS,
    "accept_len_mode": "uniform",
    "position_offsets": OFFSETS,
}
ROLLOUTS, CYCLES = (WindowConfig(**WINDOWS, position_offset_mode=m) for m in ("per_prompt_rollout", "cycle_samples"))


def write_folder(directory, family):
    types = {"layer_types": ["sliding_attention", "full_attention"]} if family == "gpt_oss" else {}
    return write_tiny_tokenizer(write_tiny_target(directory, family, vocab_size=260, num_hidden_layers=2, **types))


def open_source(folder):
    tokenizer = load_tokenizer(folder)
    # A random target hardly ever ends a turn by itself.
    tokenizer.stop_token_ids = (1, *range(100, 140))
    target = load_target(folder)
    return CacheSource(target=target, tokenizer=tokenizer, snapshot_dir="tiny", snapshot_hash=snapshot_hash(folder))


def build_all(source, directory):
    """The sequence form, and windows in both offset modes; what is there already stays."""
    if not (directory / "sequences").exists():
        offsets = (0, LIMIT - 48)
        build_sequences(
            source, directory / "sequences", TEXTS, layer_ids=LAYERS, position_offsets=offsets, batch_size=5
        )
    for name, config in (("rollouts", ROLLOUTS), ("cycles", CYCLES)):
        if not (directory / name).exists():
            build_windows(source, directory / name, TEXTS, config, layer_ids=LAYERS, batch_size=2)
    return directory


def text_of(cache):
    batches = read_batches(cache / "conversations.jsonl")
    return [conversation for batch in batches for conversation in batch][: TEXTS.count]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {family: write_folder(tmp_path_factory.mktemp(family) / "target", family) for family in FAMILIES}


@pytest.fixture(scope="module")
def sources(folders):
    return {family: open_source(folder) for family, folder in folders.items()}


@pytest.fixture(scope="module")
def source(sources):
    return sources["llama"]


@pytest.fixture(scope="module")
def built(sources, tmp_path_factory):
    """A directory of caches for each family."""
    return {
        family: build_all(source, tmp_path_factory.mktemp(f"{family}_caches")) for family, source in sources.items()
    }


def run_target(target, tokens, start):
    """Logits [T, V] and features [T, K*H] of one text whose first token is at `start`, by a plain forward."""
    T = len(tokens)
    # One shape for all texts.
    padded = np.zeros((1, 64), np.int32)
    padded[0, :T] = tokens
    logits, hidden = target.forward(padded, start + np.arange(64)[None])
    return np.asarray(logits)[0, :T], np.concatenate([np.asarray(hidden[i])[0, :T] for i in LAYERS], axis=1)


def assert_rounded(bits, values):
    """bfloat16 of these values, but for a last bit here and there: a batch of another shape adds in another order."""
    stored, expected = (
        x.astype(np.float32) for x in (bits.view(ml_dtypes.bfloat16), values.astype(ml_dtypes.bfloat16))
    )
    np.testing.assert_allclose(stored, expected, rtol=2**-7, atol=1e-5)
    assert (stored == expected).mean() > 0.98


# ---- sequences


@pytest.mark.parametrize("family", FAMILIES)
def test_sequences_hold_the_text_and_what_the_target_says_of_it(sources, built, family):
    cache = open_cache(built[family] / "sequences")
    made = text_of(built[family] / "sequences")
    assert isinstance(cache, SequenceCache)
    assert len(cache) == len(made) == TEXTS.count
    for i, (c, (first, end)) in enumerate(zip(made, itertools.pairwise(cache.bounds), strict=True)):
        text = [*c.prompt, *c.answer]
        assert cache.token_ids[first:end].tolist() == text
        assert cache.loss_mask[first:end].tolist() == [0] * len(c.prompt) + [1] * len(c.answer)
        assert (cache.pos_start[i], cache.held_out[i]) == ((0, LIMIT - 48)[i % 2], c.held_out)
        assert_rounded(cache.features[first:end], run_target(sources[family].target, text, cache.pos_start[i])[1])


# ---- windows


def bases(cache, config):
    """Every base: its text to the last anchor, put together of its samples, and where the window of each begins."""
    samples, contexts = cache.samples(range(len(cache))), np.load(cache.path / "ctx_token_ids.npy")
    for block in range(config.num_blocks):
        begins = np.cumsum([0, *(config.accept_lens(block, TEXTS.seed)[:-1] + 1)])
        text = np.full(begins[-1] + C + 1, -1)
        for i, begin in enumerate(begins, start=block * STEPS):
            part = [*contexts[i], samples.anchor_ids[i]]
            known = text[begin : begin + len(part)]
            assert ((known == part) | (known == -1)).all(), "samples of a base go on from one another"
            text[begin : begin + len(part)] = part
        yield block, text, begins


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("name", "config"), [("rollouts", ROLLOUTS), ("cycles", CYCLES)])
def test_windows_are_cut_from_one_untruncated_text(sources, built, family, name, config):
    """Features and labels are what the target says with the whole text before it, at the sample's own positions."""
    cache, target = open_cache(built[family] / name), sources[family].target
    assert isinstance(cache, WindowCache)
    samples, moved = cache.samples(range(len(cache))), set()
    anchor_pos = np.load(cache.path / "anchor_pos_i32.npy")
    embedding = np.asarray(target.embedding.weight[...]).astype(ml_dtypes.bfloat16)
    for block, text, begins in bases(cache, config):
        logits, _ = run_target(target, text, samples.ctx_pos_start[block * STEPS])
        np.testing.assert_array_equal(text[C:], logits[C - 1 : -1].argmax(axis=1))
        for step, begin in enumerate(begins):
            i, end = block * STEPS + step, begin + C
            offset = OFFSETS[(block if config is ROLLOUTS else i) % len(OFFSETS)]
            moved.add(offset)
            assert (samples.ctx_pos_start[i], anchor_pos[i]) == (offset + begin, offset + end)
            logits, features = run_target(target, [*text[: end + 1], *samples.target_ids[i]], offset)
            assert_rounded(samples.context_features[i], features[begin:end])
            np.testing.assert_array_equal(samples.target_ids[i], logits[end:-1].argmax(axis=1))
            np.testing.assert_array_equal(samples.anchor_embedding[i], embedding[text[end]])
    assert moved == set(OFFSETS)


@pytest.mark.parametrize("name", ["rollouts", "cycles"])
def test_contexts_are_text_of_one_side_and_nothing_else(built, name):
    cache = open_cache(built["llama"] / name)
    made = text_of(built["llama"] / name)
    sides = {h: [t for c in made if c.held_out == h for t in [*c.prompt, *c.answer]] for h in (False, True)}
    tokens = np.load(cache.path / "ctx_token_ids.npy")[::STEPS]
    held_out = np.isin(np.arange(len(cache)), cache.rows(held_out=True)).reshape(BLOCKS, STEPS)
    assert {*held_out.ravel().tolist()} == {False, True}
    for context, marks in zip(tokens, held_out, strict=True):
        assert len(set(marks)) == 1
        stream = sides[bool(marks[0])]
        assert any(stream[i : i + C] == context.tolist() for i in range(len(stream) - C + 1))


def talk(number, held_out=False, prompt=5, answer=10):
    first = 100 * number
    return Conversation(
        prompt=tuple(range(first, first + prompt)),
        answer=tuple(range(first + 50, first + 50 + answer)),
        held_out=held_out,
    )


def test_a_context_ends_within_an_answer_and_reaches_back_on_its_side():
    talks = [talk(n, held_out=n % 3 == 2) for n in range(12)]
    contexts = window_contexts(talks, WindowConfig(ctx_len=21, num_blocks=8), 0)
    assert len(contexts) == 8
    for tokens, held_out in contexts:
        assert len(tokens) == 20
        assert {t // 100 % 3 == 2 for t in tokens} == {held_out}
        # What comes next is a token of an answer, so the last one is that or the end of the prompt.
        assert tokens[-1] % 100 in [4, *range(50, 59)]


def test_too_little_text_is_refused_with_numbers():
    with pytest.raises(CacheError, match=r"3 conversations .*\b1 .*35 tokens.* 2 "):
        window_contexts([talk(n) for n in range(3)], WindowConfig(ctx_len=36, num_blocks=2), 0)


@pytest.mark.parametrize(
    ("mode", "shares"),
    [
        ("full", [0, 0, 0, 1]),
        ("uniform", [0.25] * 4),
        ("geometric", [0.35, 0.35 * 0.65, 0.35 * 0.65**2, 0.65**3]),
    ],
)
def test_accept_lengths_are_distributed_as_asked(mode, shares):
    config = WindowConfig(block_size=4, rollout_steps=50, accept_len_mode=mode)
    drawn = np.concatenate([config.accept_lens(block, 0) for block in range(200)])
    np.testing.assert_allclose(np.bincount(drawn, minlength=4) / len(drawn), shares, atol=0.015)
    np.testing.assert_array_equal(config.accept_lens(7, 0), config.accept_lens(7, 0))


# ---- what a cache says of itself

SEEDS_KEYS = """
    model_snapshot_dir platform ctx_len ctx_len_full block_size num_blocks rollout_steps rollout_accept_len_mode
    rollout_accept_len_p rollout_state_evolution num_samples batch_size prefill_chunk page_size hbm_utilization
    sharding_axis_dims target_layer_ids add_one_for_pre_layer_capture target_ids_mode hidden_size num_context_features
    dtype seed position_offsets position_offset_mode positions_contiguous ctx_pos_start_file anchor_pos_file
    teacher_easydel_dir calib_repo_id calib_data_files max_rows_per_pack wall_s"""
OUR_KEYS = {"form", "snapshot_sha256", "computed_in", "teacher", "conversations", "conversations_sha256", "split"}
OUR_KEYS |= {"vocab_size", "max_position", "template_date", "chat_template_args", "dropped_unknown_ids"}


def test_meta_of_windows_has_every_key_of_the_seeds_loader_and_ours(built):
    meta = json.loads((built["llama"] / "cycles" / "meta.json").read_text())
    assert meta.keys() == {*SEEDS_KEYS.split()} | OUR_KEYS
    expected = {
        "ctx_len": C,
        "ctx_len_full": C + 1,
        "num_samples": BLOCKS * STEPS,
        "target_layer_ids": [1, 0],
        "num_context_features": 2,
        "add_one_for_pre_layer_capture": True,
        "target_ids_mode": "block_verify_target_predict_shifted",
        "dtype": "bf16_u16",
        "computed_in": "float32",
        "position_offsets": list(OFFSETS),
        "position_offset_mode": "cycle_samples",
        "rollout_accept_len_mode": "uniform",
        "platform": "cpu",
        "wall_s": None,
    }
    assert expected.items() <= meta.items()


@pytest.mark.parametrize("name", ["sequences", "rollouts"])
def test_a_cache_is_bound_to_its_target_and_its_text(built, source, name):
    directory = built["llama"] / name
    meta, text = json.loads((directory / "meta.json").read_text()), directory / "conversations.jsonl"
    assert meta["snapshot_sha256"] == source.snapshot_hash
    assert meta["conversations_sha256"] == hashlib.sha256(text.read_bytes()).hexdigest()
    assert meta["split"] == split_record(text_of(directory))
    assert meta["conversations"]["seed"] == TEXTS.seed
    assert meta.keys() >= OUR_KEYS


# ---- refusals


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"position_offsets": (0, LIMIT - 35)}, r"room for 36 tokens within 131072 positions; got \[131037\]"),
        ({"position_offsets": ()}, "got none"),
        ({"rollout_steps": LIMIT}, r"ctx_len - 1 \+ rollout_steps x block_size comes to \d+: lower them"),
        (
            {"ctx_len": 41, "position_offsets": (0,), "num_blocks": 99},
            r"12 .* give \d+ contexts of 40 tokens, and 99 are",
        ),
    ],
)
def test_windows_that_cannot_be_made_leave_nothing(source, tmp_path, changes, said):
    with pytest.raises(CacheError, match=said):
        build_windows(source, tmp_path / "new", TEXTS, WindowConfig(**WINDOWS | changes), layer_ids=LAYERS)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"max_user_turn": 10**9}, "max_user_turn 1000000000: lower it"),
        (
            {"max_new_tokens": 10**9},
            r"131072 positions; max_prompt_len \+ max_new_tokens comes to 1000000032: lower them",
        ),
        ({"max_prompt_len": 10**9}, r"max_prompt_len \+ max_new_tokens comes to 1000000016: lower them"),
    ],
)
def test_text_beyond_the_targets_positions_leaves_nothing(source, tmp_path, changes, said):
    texts = dataclasses.replace(TEXTS, **changes)
    with pytest.raises((CacheError, PromptError), match=said):
        build_sequences(source, tmp_path / "new", texts, layer_ids=LAYERS)
    with pytest.raises((CacheError, PromptError), match=said):
        build_windows(source, tmp_path / "new", texts, WindowConfig(**WINDOWS), layer_ids=LAYERS)
    assert not list(tmp_path.iterdir())


def test_sequences_that_cannot_be_made_leave_nothing(source, tmp_path):
    asks = tmp_path / "asks.jsonl"
    asks.write_text(json.dumps({"messages": [{"role": "user", "content": "Why?"}]}))
    few = ConversationConfig(
        source=str(asks), openings="none", count=2, max_prompt_len=32, max_new_tokens=16, batch_size=8
    )
    with pytest.raises(PromptError, match="gives 1 conversations"):
        build_sequences(source, tmp_path / "new", few, layer_ids=LAYERS)
    with pytest.raises(CacheError, match=r"room for 48 tokens within 131072 positions; got \[131025\]"):
        build_sequences(source, tmp_path / "new", TEXTS, layer_ids=LAYERS, position_offsets=(LIMIT - 47,))
    assert list(tmp_path.iterdir()) == [asks]


# ---- kills

CHILD = """
import sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
import test_build
test_build.build_all(test_build.open_source(Path(sys.argv[2])), Path(sys.argv[3]))
"""


def contents(directory):
    return {p.name: p.read_bytes() for p in sorted(directory.iterdir())}


def items(directory):
    """How many items of an unfinished cache are made, or 0."""
    try:
        return json.loads((directory / "progress.json").read_text())["done"]
    except (OSError, ValueError):
        return 0


def test_a_build_that_is_killed_again_and_again_comes_to_the_same(folders, source, built, tmp_path):
    """SIGKILL soon after it began to write text, after some sequences, and amid windows."""
    rng = random.Random(1)
    work, names = tmp_path / "work", ("sequences", "rollouts", "cycles")
    building = [work / f"{name}.building" for name in names]
    moments = [
        lambda: (building[0] / "cache" / "conversations.jsonl").exists(),
        lambda: items(building[0]) > 3,
        lambda: items(building[1]) > 1,
    ]
    environment = os.environ | {
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    work.mkdir()
    for moment in moments:
        command = [sys.executable, "-c", CHILD, str(Path(__file__).parent), str(folders["llama"]), str(work)]
        with subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL) as child:
            while child.poll() is None and not moment():
                time.sleep(0.001)
            time.sleep(rng.uniform(0, 0.05))
            child.send_signal(signal.SIGKILL)
            assert child.wait(60) == -signal.SIGKILL
    build_all(source, work)
    for name in names:
        assert contents(work / name) == contents(built["llama"] / name), name
    assert sorted(p.name for p in work.iterdir()) == sorted(names)
