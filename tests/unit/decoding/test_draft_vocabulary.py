"""Drafts that propose some of the target's tokens only: decoding, what they learn from and are scored by, files."""

import base64
import dataclasses
import functools
import json
import operator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
from networks import block_hidden, predict_blocks

from dflash import decode, load_target, stream
from dflash.config import ConfigError, ConvConfig, SelectorConfig
from dflash.decoding.decode import RequestError
from dflash.decoding.loop import draft_head
from dflash.models.draft import pack_tokens, proposed_tokens, proposing
from dflash.models.layers import most_likely
from dflash.models.native import takes
from dflash.training.batches import TrainingBatches
from dflash.training.evaluate import Evaluator
from dflash.training.objective import Objective, block_sums, means, trained_head
from dflash.training.start import frequent_tokens
from dflash.training.trainer import TrainConfig, Trainer
from dflash.weights.config_json import read_draft_config, write_draft_config
from dflash.weights.export import check_export
from dflash.weights.huggingface import write_draft
from dflash.weights.load import read_any_draft
from dflash.weights.runs.checkpoint import read_run, write_run
from dflash.weights.tiny import write_tiny_target

V, H = 199, 64
SECOND = {
    "conv": ConvConfig(kernel_size=3, group_size=16),
    "selector": SelectorConfig(rank=8, top_k=5),
}
ARCHITECTURES = pytest.mark.parametrize("architecture", [{}, SECOND], ids=["dflash", "dflash2"])
SOME = np.sort(np.random.default_rng(8).choice(V, 100, replace=False)).astype(np.int32)
VOCABULARY = pack_tokens(SOME, V)


@pytest.fixture(scope="module")
def plain(draw_draft):
    return draw_draft().config


@given(st.sets(st.integers(0, 300), min_size=1), st.integers(301, 320))
def test_tokens_are_packed_and_come_back(plain, tokens, vocab_size):
    packed = pack_tokens(np.array(sorted(tokens)), vocab_size)
    config = dataclasses.replace(plain, vocab_size=vocab_size, vocabulary=packed)
    assert proposed_tokens(config).tolist() == sorted(tokens)
    assert config.num_tokens == len(tokens)
    assert read_draft_config(json.loads(json.dumps(write_draft_config(config, "float32")))) == config


# ---- decoding


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    return load_target(write_tiny_target(tmp_path_factory.mktemp("vocabulary") / "target", num_hidden_layers=2))


PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12]]


@ARCHITECTURES
def test_decoding_is_lossless_and_every_mode_accepts_the_same(architecture, target, draw_draft):
    greedy = decode(target, None, PROMPTS, mode="greedy", max_new_tokens=24)
    # The text's own tokens and some more: with few of them nothing would ever be accepted.
    ids = np.union1d(np.concatenate(greedy.tokens), SOME[:40])
    draft = draw_draft(0, **architecture, vocabulary=pack_tokens(ids, V))
    found = {
        mode: decode(target, draft, PROMPTS, mode=mode, max_new_tokens=24)
        for mode in ("cached_block_verify", "cached_sequential_verify", "recompute")
    }
    assert all(result.tokens == greedy.tokens for result in found.values())
    lengths = [result.accept_lens for result in found.values()]
    assert lengths[0] == lengths[1] == lengths[2]


@ARCHITECTURES
def test_it_proposes_the_likeliest_of_its_tokens(architecture, target, draw_draft):
    draft = draw_draft(0, **architecture, vocabulary=VOCABULARY)
    whole = draw_draft(0, **architecture)
    x = jnp.asarray(np.random.default_rng(1).normal(size=(H, 2 * 7)), jnp.float32)
    head, anchors = draft_head(target, draft), jnp.asarray([3, 4])
    np.testing.assert_array_equal(head, target.head.weight[...][SOME])
    assert takes(14, head, x) == takes(14, target.head.weight[...], x), "read by other kernels than the whole head"
    logits = np.full((V, 14), -np.inf, np.float32)
    logits[SOME] = target.logits(x)[SOME]
    got = np.asarray(draft.choose(x, jnp.asarray(logits[SOME]), anchors))
    assert set(got.ravel()) <= set(SOME.tolist())
    np.testing.assert_array_equal(got, whole.choose(x, jnp.asarray(logits), anchors))
    assert (np.asarray(most_likely(target.logits(x))) != got.ravel()).any(), "it would have proposed the same with all"


REST = np.setdiff1d(np.arange(V), SOME)


SIZES = {
    None: SOME,
    40: SOME[:40],
    100: SOME,
    130: np.sort(np.r_[SOME, REST[:30]]),
    V: np.arange(V),
    "all": np.arange(V),
}


@pytest.mark.parametrize("count", SIZES)
def test_its_trained_tokens_come_first_and_then_those_of_the_lowest_ids(count, draw_draft):
    draft = draw_draft(0, **SECOND, vocabulary=VOCABULARY)
    tokens = proposed_tokens(proposing(draft, count).config)
    np.testing.assert_array_equal(np.arange(V) if tokens is None else tokens, SIZES[count])
    assert draft.config.vocabulary == VOCABULARY, "the draft itself was changed"


@ARCHITECTURES
def test_whoever_decodes_says_how_many_it_proposes(architecture, target, draw_draft):
    """A draft that was drawn with the whole vocabulary decodes the same."""
    draft, whole = (draw_draft(0, **architecture, vocabulary=tokens) for tokens in (VOCABULARY, None))
    expected = decode(target, whole, PROMPTS, max_new_tokens=24)
    found = decode(target, draft, PROMPTS, max_new_tokens=24, draft_vocab="all")
    assert (found.tokens, found.accept_lens) == (expected.tokens, expected.accept_lens)
    assert decode(target, draft, PROMPTS, max_new_tokens=24, draft_vocab=np.int64(V)).tokens == expected.tokens
    streamed = list(stream(target, draft, PROMPTS, max_new_tokens=24, draft_vocab="all"))
    assert [functools.reduce(operator.iadd, rows, []) for rows in zip(*streamed, strict=True)] == expected.tokens


def test_another_vocabulary_copies_no_weight(draw_draft):
    draft = draw_draft(0, vocabulary=VOCABULARY)
    pairs = zip(jax.tree.leaves(nnx.state(draft)), jax.tree.leaves(nnx.state(proposing(draft, "all"))), strict=True)
    assert all(a is b for a, b in pairs)


@pytest.mark.parametrize("count", [0, 4, V + 1, -1, 2.5, True, "some", float("nan")])
def test_a_vocabulary_that_can_not_be_is_refused(count, target, draw_draft):
    draft = draw_draft(0, **SECOND, vocabulary=VOCABULARY)
    with pytest.raises(ConfigError, match=f"5 to {V} .* got draft_vocab {count!r}"):
        decode(target, draft, PROMPTS, draft_vocab=count)


def test_a_vocabulary_without_a_draft_is_refused(target):
    with pytest.raises(RequestError, match=r"draft_vocab .* got 50"):
        decode(target, None, PROMPTS, mode="greedy", draft_vocab=50)


# ---- training and evaluation


@pytest.fixture
def cache(write_sequences, tmp_path):
    return write_sequences(tmp_path / "cache")


@pytest.fixture
def tables():
    rng = np.random.default_rng(6)
    return {name: rng.normal(size=(V, H)).astype(np.float32) for name in ("head", "embedding")}


@pytest.fixture
def batch(cache, tables):
    make = TrainingBatches(
        cache, cache.rows(False), batch_size=4, num_anchors=3, block_size=8, embedding=tables["embedding"], seed=0
    )
    return make(0)


def predict(draft, batch, tables, chunk=64):
    head = trained_head(draft.config, tables["head"])
    mask = jnp.asarray(tables["embedding"][5])
    return predict_blocks(draft, batch, mask, jnp.asarray(head), vocab_size=len(head), chunk=chunk)


@ARCHITECTURES
def test_likelihoods_are_among_its_tokens(architecture, batch, tables, draw_draft):
    """Against the whole vocabulary with -inf for the others, label by label in numpy."""
    draft = draw_draft(0, **architecture, vocabulary=VOCABULARY)
    found = predict(draft, batch, tables)
    x = np.asarray(block_hidden(draft, batch, jnp.asarray(tables["embedding"][5]))).T.reshape(*batch.labels.shape, H)
    logits = np.full((*batch.labels.shape, V), -np.inf)
    logits[..., SOME] = x.astype(np.float64) @ tables["head"][SOME].T
    total = np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1)) + logits.max(-1)
    nll = total - np.take_along_axis(logits, batch.labels[..., None], -1)[..., 0]
    inside = np.isin(batch.labels, SOME)
    assert 0.3 < inside.mean() < 0.7
    np.testing.assert_allclose(np.asarray(found.nll)[inside], nll[inside], rtol=1e-4, atol=1e-4)
    assert set(np.asarray(found.best).ravel()) <= set(SOME.tolist())
    if not architecture:
        np.testing.assert_array_equal(found.best, logits.argmax(-1))
    else:
        previous = np.concatenate([batch.anchor_ids[..., None], batch.labels[..., :-1]], axis=-1)
        s = draft.selector
        wanted = np.asarray(s.predecessor[...])[previous] * (x @ np.asarray(s.hidden.weight[...]).T)
        scores = logits + wanted @ np.asarray(s.successor[...]).T
        scores[logits < np.sort(logits, axis=-1)[..., -s.top_k, None]] = -np.inf
        np.testing.assert_array_equal(found.best, scores.argmax(-1))


def test_a_label_that_it_does_not_propose_teaches_nothing_and_is_wrong(batch, tables, draw_draft):
    draft = draw_draft(0, vocabulary=VOCABULARY)
    outside = np.setdiff1d(np.arange(V), SOME)
    never = dataclasses.replace(batch, labels=outside[batch.labels % len(outside)].astype(np.int32))

    def loss(state, batch):
        sums = block_sums(predict(nnx.merge(nnx.graphdef(draft), state), batch, tables), batch, Objective())
        return sums["weighted"], sums

    gradient, sums = jax.jit(jax.grad(loss, has_aux=True))(nnx.state(draft), never)
    assert all(float(jnp.abs(g).max()) == 0 for g in jax.tree.leaves(gradient))
    assert {n: float(sums[n]) for n in ("weighted", "weight", "nll", "taught", "right", "accepted")} == dict.fromkeys(
        ("weighted", "weight", "nll", "taught", "right", "accepted"), 0
    )
    assert float(sums["labels"]) == batch.mask.sum() > 0
    # Slots 3 and 5 of every block are not proposed: the others' weights and likelihoods are those of a mask without.
    mixed = dataclasses.replace(batch, labels=SOME[batch.labels % len(SOME)])
    holes = np.isin(np.arange(7), [2, 4])
    mixed = dataclasses.replace(mixed, labels=np.where(holes, outside[0], mixed.labels).astype(np.int32))
    found = predict(draft, mixed, tables)
    nll = np.asarray(found.nll)
    kept = np.where(holes, 0, mixed.mask)
    reached = np.cumprod(np.where(holes, 0.5, 0.5 + 0.5 * np.exp(-nll)), axis=-1) * kept
    weights = np.flip(np.cumsum(np.flip(reached, -1), -1), -1) * kept
    sums = block_sums(found, mixed, Objective())
    np.testing.assert_allclose(sums["weighted"], (weights * np.where(holes, 0, nll)).sum(), rtol=1e-5)
    assert means(sums)["cross_entropy"] == pytest.approx(nll[kept > 0].mean(), rel=1e-5)


@ARCHITECTURES
def test_it_learns(architecture, batch, tables, draw_draft):
    draft = draw_draft(0, **architecture, vocabulary=VOCABULARY)
    config = TrainConfig(batch_size=4, num_anchors=3, steps=8, learning_rate=3e-3, warmup=0)
    trainer = Trainer(draft, tables["head"], tables["embedding"][5], config)
    assert trainer.head.shape == (len(SOME), H)
    losses = [float(trainer.step(batch)["weighted"]) for _ in range(8)]
    assert losses[-1] < 0.9 * losses[0]
    assert trainer.draft().config == draft.config


def test_one_evaluator_serves_drafts_of_several_vocabularies(cache, tables, draw_draft):
    evaluator, rows = Evaluator(tables["embedding"], tables["head"], chunk=64), cache.rows(True)
    every = pack_tokens(np.arange(V), V)
    whole, same, some = (draw_draft(0, vocabulary=v) for v in (None, every, VOCABULARY))
    right = [evaluator.score(draft, cache, rows).right for draft in (whole, some, same, whole)]
    np.testing.assert_array_equal(right[0], right[2])
    np.testing.assert_array_equal(right[0], right[3])
    assert (right[0] != right[1]).any()


SHARDED = """
import dataclasses, sys
from pathlib import Path
import jax, jax.numpy as jnp, numpy as np
from dflash.training.cache import open_cache
from dflash.models.mesh import make_mesh
from dflash.training.batches import TrainingBatches
from dflash.training.evaluate import Evaluator
from dflash.training.trainer import TrainConfig, Trainer
from dflash.weights.runs.checkpoint import read_run
root = Path(sys.argv[1])
tables, cache = np.load(root / "tables.npz"), open_cache(root / "cache")
batches = TrainingBatches(cache, cache.rows(False), batch_size=8, num_anchors=3, block_size=8,
                          embedding=tables["embedding"], seed=0)
def after_a_step(dp, tp):
    config = TrainConfig(batch_size=8, num_anchors=3, steps=2, warmup=0, dp=dp, tp=tp)
    trainer = Trainer(read_run(root / "run-0"), tables["head"], tables["embedding"][5], config)
    sums = trainer.score(batches(0))
    return {name: float(value) for name, value in sums.items()}
alone = after_a_step(1, 1)
for dp, tp in ((1, 8), (2, 4), (8, 1)):
    for name, value in after_a_step(dp, tp).items():
        np.testing.assert_allclose(value, alone[name], rtol=1e-4, err_msg=f"{name} {dp} {tp}")
def evaluated(devices):
    evaluator = Evaluator(tables["embedding"], tables["head"], chunk=64, batch_size=3, devices=devices)
    return evaluator.score(read_run(root / "run-0"), cache, cache.rows(True))
whole = evaluated(None)
for dp, tp in ((1, 8), (2, 4)):
    for name, value in dataclasses.asdict(evaluated(make_mesh(jax.devices(), dp=dp, tp=tp))).items():
        np.testing.assert_array_equal(value, getattr(whole, name), err_msg=f"{name} {dp} {tp}")
print("same")
"""


@pytest.mark.slow
def test_a_split_vocabulary_gives_the_same_figures(cache, tables, draw_draft, on_eight_devices, tmp_path):
    """100 rows of the head over 8 devices: they don't divide."""
    draft = draw_draft(0, **SECOND, vocabulary=VOCABULARY)
    write_run(draft, tmp_path, 0, optimizer_state=None, provenance={}, keep=None)
    np.savez(tmp_path / "tables.npz", **tables)
    on_eight_devices(SHARDED)


# ---- which tokens, and files


def test_the_most_frequent_tokens_of_the_training_answers(write_sequences, tmp_path):
    cache = write_sequences(tmp_path / "drawn", tokens=lambda rng, n: rng.integers(0, 60, n) ** 2 % 61)
    counts = np.zeros(V, int)
    for row in cache.rows(False):
        for token in range(cache.bounds[row], cache.bounds[row + 1]):
            counts[cache.token_ids[token]] += cache.loss_mask[token] > 0
    order = sorted(range(V), key=lambda t: (-counts[t], t))
    for count in (1, 10, 50, V):
        assert frequent_tokens(cache, count, V).tolist() == sorted(order[:count])


@ARCHITECTURES
def test_it_is_written_and_read_whole(architecture, draw_draft, tmp_path):
    draft = draw_draft(0, **architecture, vocabulary=VOCABULARY)
    write_draft(draft, tmp_path / "hf")
    write_run(draft, tmp_path / "runs", 7, optimizer_state=None, provenance={}, keep=None)
    for read in (read_any_draft(tmp_path / "hf"), read_run(tmp_path / "runs" / "run-7")):
        assert read.config == draft.config


def encoded(number, size):
    return base64.b64encode(number.to_bytes(size, "little")).decode()


@pytest.mark.parametrize(
    "value",
    ["", "no base64!", 7, ["a"], encoded(0, 25), encoded(1, 24), encoded(1, 26), encoded(1 << V, 25)],
    ids=["empty", "letters", "number", "list", "none set", "short", "long", "beyond the vocabulary"],
)
def test_a_vocabulary_that_is_none_is_refused(value, draw_draft):
    raw = write_draft_config(draw_draft(0, vocabulary=VOCABULARY).config, "float32")
    raw["dflash_config"]["draft_vocabulary"] = value
    with pytest.raises(ConfigError, match=r"draft_vocabulary .*base64 of 199 bits"):
        read_draft_config(raw)


def test_a_selector_chooses_among_what_is_proposed(draw_draft):
    raw = write_draft_config(draw_draft(0, **SECOND, vocabulary=pack_tokens(SOME[:4], V)).config, "float32")
    with pytest.raises(ConfigError, match=r"selector_top_k .*1 to 4, got 5"):
        read_draft_config(raw)


@pytest.mark.parametrize("consumer", ["z-lab", "sglang-jax", "speculators"])
def test_no_program_is_refused_for_what_a_draft_learned_to_propose(consumer, draw_draft):
    config = draw_draft(0, vocabulary=VOCABULARY, windows=(None, None), causal=(False, False)).config
    check_export(dataclasses.replace(config, num_target_layers=4), consumer)
