"""DFlash 2 drafts: convolution and selector against loops, decoding, training and files of a draft that has both."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import networks
import numpy as np
import pytest
from flax import nnx

from dflash import decode, load_target
from dflash.config import ConfigError, ConvConfig, SelectorConfig
from dflash.models.conv import DynamicConv
from dflash.models.selector import CandidateSelector
from dflash.training.objective import Objective, block_sums
from dflash.training.trainer import TrainConfig, Trainer
from dflash.weights.config_json import read_draft_config, write_draft_config
from dflash.weights.huggingface import write_draft
from dflash.weights.load import new_draft, read_any_draft
from dflash.weights.runs.checkpoint import read_run, write_run
from dflash.weights.tiny import write_tiny_target

CONV, SELECTOR = ConvConfig(kernel_size=3, group_size=16), SelectorConfig(rank=8, top_k=5)
SECOND = {"conv": CONV, "selector": SELECTOR}


def drawn(make, seed):
    rng = np.random.default_rng(seed)
    return networks.drawn(make, lambda path, shape: rng.normal(size=shape))


@pytest.mark.parametrize("slots", [1, 2, 6])
def test_a_slot_mixes_in_the_ones_before_it_in_its_block(slots):
    """Against a loop over blocks, slots, offsets and groups, written from the description."""
    H, blocks, K, group = 32, 3, 3, 8
    config = ConvConfig(kernel_size=K, group_size=group)
    conv = drawn(lambda: DynamicConv(H, config, dtype=jnp.float32, rngs=nnx.Rngs(0)), 1)
    rng = np.random.default_rng(2)
    x, u = rng.normal(size=(2, H, blocks * slots)).astype(np.float32)
    before, dynamic = conv.prepare(jnp.asarray(x), slots)
    after = conv.finish(jnp.asarray(u), dynamic, slots)
    base, project = np.asarray(conv.base[...]), np.asarray(conv.kernel.weight[...])
    for half, inputs, got in ((0, x, before), (1, u, after)):
        for column in range(blocks * slots):
            computed = (project @ x[:, column]).reshape(2, K, H // group)[half]
            y = np.zeros(H)
            for offset in range(min(K, column % slots + 1)):
                y += (base[half, offset] + np.repeat(computed[offset], group)) * inputs[:, column - offset]
            np.testing.assert_allclose(np.asarray(got)[:, column], y, rtol=1e-4, atol=1e-4)


def test_each_slot_follows_the_one_chosen_before_it():
    V, H, B, T = 50, 16, 2, 6
    selector = drawn(lambda: CandidateSelector(V, H, SELECTOR, dtype=jnp.float32, rngs=nnx.Rngs(0)), 3)
    rng = np.random.default_rng(4)
    x = rng.normal(size=(H, B * T)).astype(np.float32)
    logits = rng.normal(size=(V, B * T)).astype(np.float32)
    anchors = np.array([7, 9], np.int32)
    got = np.asarray(selector.select(jnp.asarray(x), jnp.asarray(logits), jnp.asarray(anchors), logits.shape[0]))
    predecessor, successor = (np.asarray(p[...]) for p in (selector.predecessor, selector.successor))
    changed = 0
    for row in range(B):
        previous = anchors[row]
        for slot in range(T):
            column = row * T + slot
            wanted = predecessor[previous] * (np.asarray(selector.hidden.weight[...]) @ x[:, column])
            top = np.argsort(-logits[:, column], kind="stable")[: SELECTOR.top_k]
            previous = top[np.argmax(logits[top, column] + successor[top] @ wanted)]
            assert got[row, slot] == previous
            changed += previous != top[0]
    assert changed >= 4, "a selector that chooses what the draft says proves nothing"


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    return load_target(write_tiny_target(tmp_path_factory.mktemp("second") / "target", num_hidden_layers=2))


def test_a_new_one_proposes_what_the_dflash_draft_does(target):
    plain = new_draft(target.config, num_layers=2, block_size=8, target_layer_ids=(0, 1), seed=1)
    second = new_draft(target.config, num_layers=2, block_size=8, target_layer_ids=(0, 1), seed=1, **SECOND)
    shared = {tuple(p): v for p, v in nnx.to_flat_state(nnx.state(plain))}
    nnx.update(second, nnx.from_flat_state(list(shared.items())))
    rng = np.random.default_rng(0)
    features = [jnp.asarray(rng.normal(size=(64, 9)), jnp.float32) for _ in range(2)]
    x, anchors = jnp.asarray(rng.normal(size=(64, 8)), jnp.float32), jnp.asarray([[9]])
    ours, theirs = (nnx.jit(type(d).uncached)(d, features, anchors, x) for d in (second, plain))
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
    slots = ours[:, 1:]
    chosen = second.choose(slots, target.logits(slots), jnp.asarray([3]))
    np.testing.assert_array_equal(chosen, plain.choose(slots, target.logits(slots), jnp.asarray([3])))


@pytest.mark.parametrize("mode", ["cached_block_verify", "cached_sequential_verify", "recompute"])
def test_decoding_with_it_is_lossless(mode, target, draw_draft):
    draft = draw_draft(0, **SECOND)
    prompts = [[5, 6, 7], [8, 9, 10, 11, 12]]
    greedy = decode(target, None, prompts, mode="greedy", max_new_tokens=24)
    assert decode(target, draft, prompts, mode=mode, max_new_tokens=24).tokens == greedy.tokens


def test_all_modes_accept_the_same(target, draw_draft):
    draft = draw_draft(0, **SECOND)
    results = [
        decode(target, draft, [[5, 6, 7], [8, 9]], mode=mode, max_new_tokens=24)
        for mode in ("cached_block_verify", "recompute")
    ]
    assert results[0].accept_lens == results[1].accept_lens


def test_it_is_written_and_read_whole(draw_draft, tmp_path):
    draft = draw_draft(0, **SECOND)
    write_draft(draft, tmp_path / "hf")
    raw = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert raw["architectures"] == ["DFlash2DraftModel"]
    assert raw["dflash_config"] | {"conv_kernel_size": 3, "conv_group_size": 16} == raw["dflash_config"]
    write_run(draft, tmp_path / "runs", 7, optimizer_state=None, provenance={}, keep=None)
    for read in (read_any_draft(tmp_path / "hf"), read_run(tmp_path / "runs" / "run-7")):
        assert read.config == draft.config
        for (path, ours), (_, theirs) in zip(
            nnx.to_flat_state(nnx.state(draft)), nnx.to_flat_state(nnx.state(read)), strict=True
        ):
            np.testing.assert_array_equal(ours.get_value(), theirs.get_value(), err_msg=str(path))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"conv_kernel_size": 0}, "conv_kernel_size must be .*got 0"),
        ({"conv_group_size": 24}, "conv_group_size must divide hidden_size 64, got 24"),
        ({"selector_rank": None}, "selector_rank .*1 to 64, got None"),
        ({"selector_top_k": 200}, "selector_top_k .*1 to 199, got 200"),
        ({"selector_top_k": True}, "selector_top_k must be an integer"),
    ],
)
def test_a_config_that_is_none_is_refused(changes, words, draw_draft):
    raw = write_draft_config(draw_draft(0, **SECOND).config, "float32")
    raw["dflash_config"] |= changes
    with pytest.raises(ConfigError, match=words):
        read_draft_config(raw)


def test_half_of_one_can_not_be_written(draw_draft):
    config = dataclasses.replace(draw_draft(0, **SECOND).config, conv=None)
    with pytest.raises(ConfigError, match="both convolutions and a selector"):
        write_draft_config(config, "float32")


# ---- training


@pytest.fixture
def batch(write_sequences, tmp_path):
    from dflash.training.batches import TrainingBatches

    cache = write_sequences(tmp_path / "cache")
    embedding = np.random.default_rng(5).normal(size=(199, 64)).astype(np.float32)
    batches = TrainingBatches(
        cache, cache.rows(False), batch_size=4, num_anchors=3, block_size=8, embedding=embedding, seed=0
    )
    return batches(0)


def test_the_choice_is_likelihood_among_the_candidates(batch, draw_draft):
    """Against numpy, label by label: candidates by the logits, scores with the label before as predecessor."""
    draft = draw_draft(0, **SECOND)
    rng = np.random.default_rng(6)
    head, mask = rng.normal(size=(199, 64)).astype(np.float32), rng.normal(size=64).astype(np.float32)
    found = networks.predict_blocks(draft, batch, jnp.asarray(mask), jnp.asarray(head), vocab_size=199, chunk=64)
    x = np.asarray(networks.block_hidden(draft, batch, jnp.asarray(mask))).T.reshape(*batch.labels.shape, 64)
    s = draft.selector
    predecessor, successor, hidden = (np.asarray(p[...]) for p in (s.predecessor, s.successor, s.hidden.weight))
    inside = 0
    for place in np.ndindex(*batch.labels.shape):
        row, anchor, slot = place
        label = batch.labels[place]
        previous = batch.labels[row, anchor, slot - 1] if slot else batch.anchor_ids[row, anchor]
        logits = head @ x[place]
        top = np.argsort(-logits, kind="stable")[: s.top_k]
        scores = logits[top] + successor[top] @ (predecessor[previous] * (hidden @ x[place]))
        assert found.best[place] == top[scores.argmax()]
        expected = 0.0
        if label in top:
            inside += 1
            expected = np.log(np.exp(scores - scores.max()).sum()) + scores.max() - scores[list(top).index(label)]
        assert found.choice_nll[place] == pytest.approx(expected, rel=1e-4, abs=1e-4)
    assert inside >= 2


@pytest.mark.slow
def test_the_selector_and_the_convolutions_learn(batch, draw_draft):
    draft = draw_draft(0, **SECOND)
    rng = np.random.default_rng(6)
    head, mask = rng.normal(size=(199, 64)).astype(np.float32), rng.normal(size=64).astype(np.float32)

    def loss(state):
        found = networks.predict_blocks(
            nnx.merge(nnx.graphdef(draft), state), batch, jnp.asarray(mask), jnp.asarray(head), vocab_size=199, chunk=64
        )
        return block_sums(found, batch, Objective())["weighted"]

    gradient = {
        ".".join(map(str, p)): np.abs(v.get_value()).max()
        for p, v in nnx.to_flat_state(jax.jit(jax.grad(loss))(nnx.state(draft)))
    }
    for name, largest in gradient.items():
        assert largest > 0, name
    trainer = Trainer(
        draft, head, mask, TrainConfig(batch_size=4, num_anchors=3, steps=8, learning_rate=3e-3, warmup=0)
    )
    losses = [float(trainer.step(batch)["weighted"]) for _ in range(8)]
    assert losses[-1] < 0.8 * losses[0]


SHARDED = """
import sys
from pathlib import Path
import jax, jax.numpy as jnp, numpy as np, optax
from dflash.training.cache import open_cache
from dflash.training import trainer as module
from dflash.training.batches import TrainingBatches
from dflash.training.objective import Objective
from dflash.weights.runs.checkpoint import read_run

where = Path(sys.argv[1])
draft, tables, cache = read_run(where / "run-0"), np.load(where / "tables.npz"), open_cache(where / "cache")
batch = TrainingBatches(
    cache, cache.rows(False), batch_size=8, num_anchors=2, block_size=8, embedding=tables["embedding"], seed=0
)(0)
module.make_optimizer = lambda config: optax.GradientTransformation(
    lambda params: jax.tree.map(jnp.zeros_like, params),
    lambda gradient, state, params: (jax.tree.map(jnp.zeros_like, params), gradient),
)
found = {}
for dp, tp in ((1, 1), (4, 2), (2, 4), (1, 8)):
    config = module.TrainConfig(batch_size=8, num_anchors=2, dp=dp, tp=tp, objective=Objective(chunk=10), remat=tp > 2)
    trainer = module.Trainer(draft, tables["head"], tables["embedding"][5], config)
    sums = trainer.step(batch)
    found[dp, tp] = float(sums["weighted"]), float(sums["accepted"]), jax.tree.leaves(trainer.state[1])
whole = found.pop((1, 1))
for said, (loss, accepted, gradient) in found.items():  # float32 noise reaches 3e-5 of a leaf's largest entry
    np.testing.assert_allclose(loss, whole[0], rtol=1e-5, err_msg=str(said))
    assert accepted == whole[1]
    for got, plain in zip(gradient, whole[2], strict=True):
        np.testing.assert_allclose(got, plain, rtol=0, atol=1e-4 * float(jnp.abs(plain).max()), err_msg=str(said))
print("same")
"""


@pytest.mark.slow
def test_many_devices_give_the_gradient_of_one(write_sequences, draw_draft, on_eight_devices, tmp_path):
    rng = np.random.default_rng(6)
    cache = write_sequences(tmp_path / "cache")
    assert cache.directory == tmp_path / "cache"
    write_run(draw_draft(0, **SECOND), tmp_path, 0, optimizer_state=None, provenance={}, keep=None)
    np.savez(tmp_path / "tables.npz", **{n: rng.normal(size=(199, 64)).astype("f") for n in ("head", "embedding")})
    on_eight_devices(SHARDED)
