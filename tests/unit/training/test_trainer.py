"""The training step against unsharded, unchunked references: its gradients, its optimizer, and that it learns."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from dflash import ConfigError
from dflash.training import trainer as trainer_module
from dflash.training.batches import TrainingBatches
from dflash.training.objective import SUMS, Objective, Predictions, accept_lens, block_sums, means, predict_blocks
from dflash.training.trainer import TrainConfig, Trainer, learning_rate, make_optimizer, step_flops
from dflash.weights.runs.checkpoint import write_run

V, H, S = 199, 64, 8
# Columns enough for XLA's products: the native kernels are for decoding, and have tests of their own.
ROWS, ANCHORS = 4, 5


@pytest.fixture(scope="module")
def draft(draw_draft):
    return draw_draft(windows=(None,), causal=(False,))


@pytest.fixture(scope="module")
def tables():
    """The embedding and head of a target, both random."""
    rng = np.random.default_rng(5)
    return {name: rng.standard_normal((V, H)).astype(np.float32) for name in ("embedding", "head")}


@pytest.fixture(scope="module")
def cache(write_sequences, tmp_path_factory):
    return write_sequences(tmp_path_factory.mktemp("trainer") / "cache")


def batches_of(cache, tables, **changes):
    settings = {"batch_size": ROWS, "num_anchors": ANCHORS, "block_size": S, "seed": 0} | changes
    return TrainingBatches(cache, cache.rows(False), embedding=tables["embedding"], **settings)


@pytest.fixture(scope="module")
def batch(cache, tables):
    return batches_of(cache, tables)(0)


def config_of(**changes):
    """Uniform weights don't depend on the draft, so sums over blocks add up."""
    settings = {"steps": 20, "batch_size": ROWS, "num_anchors": ANCHORS, "objective": Objective(weights="uniform")}
    return TrainConfig(**(settings | changes))


def trainer_of(draft, tables, **changes):
    return Trainer(draft, tables["head"], tables["embedding"][5], config_of(**changes))


PLAIN = {"learning_rate": 0.01, "weight_decay": 0.1, "warmup": 0.0, "schedule": "constant", "clip": 0.0}


@pytest.fixture(scope="module")
def shared(draft, tables):
    trainer = trainer_of(draft, tables, **PLAIN)
    return trainer, jax.tree.map(np.asarray, trainer.state[1])


@pytest.fixture
def trainer(shared, draft):
    """One for all, since compiling takes longest; at its start again."""
    trainer, moments = shared
    trainer.restore(draft, moments)
    return trainer


def weights_of(tree):
    return [np.asarray(x) for x in jax.tree.leaves(tree)]


def apart(a, b):
    """The largest difference of any two leaves, as a share of the second's largest entry."""
    pairs = zip(weights_of(a), weights_of(b), strict=True)
    return max(float(np.abs(x - y).max() / np.abs(y).max()) for x, y in pairs)


def keeping(config):
    """An optimizer that changes nothing and whose state is the gradient."""
    return optax.GradientTransformation(
        init=lambda params: jax.tree.map(jnp.zeros_like, params),
        update=lambda gradient, state, params: (jax.tree.map(jnp.zeros_like, params), gradient),
    )


@pytest.fixture(scope="module")
def gradient_of(draft, tables):
    """The sums of a step in this dtype, and what its optimizer was given."""
    trainers = {}

    def gradient_of(batch, dtype="float32"):
        if dtype not in trainers:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(trainer_module, "make_optimizer", keeping)
                trainers[dtype] = trainer_of(draft, tables, dtype=dtype)
        sums = trainers[dtype].step(batch)
        return sums, jax.tree.map(np.asarray, trainers[dtype].state[1])

    return gradient_of


# ---- many devices, parts and chunks against one block at a time and whole logits

SHARDED = """
import dataclasses, sys
from pathlib import Path
import jax, jax.numpy as jnp, numpy as np, optax
from flax import nnx
from dflash.training.cache import open_cache
from dflash.training import trainer as module
from dflash.training.batches import TrainingBatches
from dflash.training.objective import Objective
from dflash.weights.runs.checkpoint import read_run

assert len(jax.devices()) == 8
where = Path(sys.argv[1])
draft, tables, cache = read_run(where / "run-0"), np.load(where / "tables.npz"), open_cache(where / "cache")
embedding, mask_embedding = tables["embedding"], jnp.asarray(tables["embedding"][5])
batch = TrainingBatches(
    cache, cache.rows(False), batch_size=8, num_anchors=2, block_size=8, embedding=embedding, seed=0
)(0)
batch.mask[0] = 0  # one device of 8 in dp has nothing that counts
S = batch.labels.shape[2] + 1

def one_block(params, features, start, anchor, embedded, labels, mask, head, kind):
    columns = jax.lax.bitcast_convert_type(features, jnp.bfloat16).astype(jnp.float32).T
    block = jnp.concatenate([embedded[:, None], jnp.tile(mask_embedding[:, None], S - 1)], axis=1)
    hidden = nnx.merge(graph, params).uncached(list(columns.reshape(2, 64, -1)), anchor[None, None], block, start[None])
    nll = optax.losses.softmax_cross_entropy_with_integer_labels((head @ hidden).T[1:], labels)
    weights = list(mask)
    if kind == "decay":
        weights = [m * jnp.exp(-k / 2.5) for k, m in enumerate(mask)]
    if kind == "dpace":
        s = 0.75 * jnp.exp(-nll) + 0.25
        reached = [jnp.prod(s[: k + 1]) for k in range(S - 1)]
        weights = [mask[k] * sum(reached[j] * mask[j] for j in range(k, S - 1)) for k in range(S - 1)]
    weights = jax.lax.stop_gradient(jnp.stack(weights))
    return (weights * nll).sum(), weights.sum()

graph, params = nnx.split(draft)
one = jax.jit(jax.value_and_grad(one_block, has_aux=True), static_argnames="kind")

def reference(batch, head, kind):
    total = None
    for b in range(batch.labels.shape[0]):
        for a in range(batch.labels.shape[1]):
            parts = batch.anchors[b, a], batch.anchor_embedding[b, a], batch.labels[b, a], batch.mask[b, a]
            got = one(params, batch.features[b], batch.starts[b], *map(jnp.asarray, parts), head, kind=kind)
            total = got if total is None else jax.tree.map(jnp.add, total, got)
    (weighted, weight), gradient = total
    return weighted / weight, jax.tree.map(lambda g: g / weight, gradient)

def check(expected, head, dp, tp, kind, **changes):
    config = module.TrainConfig(
        batch_size=8, num_anchors=2, dp=dp, tp=tp,
        objective=Objective(weights=kind, gamma=2.5, alpha=0.25, chunk=10), **changes,
    )
    draft.config = dataclasses.replace(draft.config, vocab_size=len(head))
    trainer = module.Trainer(draft, head, mask_embedding, config)
    sums = trainer.step(dataclasses.replace(batch, labels=batch.labels % len(head)))
    loss, gradient = sums["weighted"] / sums["weight"], trainer.state[1]
    said = f"{dp=} {tp=} {kind} {len(head)} {changes}"
    np.testing.assert_allclose(loss, expected[0], rtol=1e-5, err_msg=said)
    leaves = zip(jax.tree.leaves(gradient), jax.tree.leaves(expected[1]), strict=True)
    for got, plain in leaves:
        np.testing.assert_allclose(got, plain, rtol=0, atol=3e-5 * float(jnp.abs(plain).max()), err_msg=said)
        for copy in got.addressable_shards:
            np.testing.assert_array_equal(copy.data, got, err_msg=said)
    kept = zip(jax.tree.leaves(trainer.state[0]), jax.tree.leaves(params), strict=True)
    assert all(np.array_equal(a, b) for a, b in kept)

module.make_optimizer = lambda config: optax.GradientTransformation(
    lambda params: jax.tree.map(jnp.zeros_like, params),
    lambda gradient, state, params: (jax.tree.map(jnp.zeros_like, params), gradient),
)
whole = jnp.asarray(tables["head"])
by_pace, by_decay = (reference(batch, whole, kind) for kind in ("dpace", "decay"))
check(by_pace, whole, 1, 1, "dpace", accumulation=4, remat=True)
check(by_pace, whole, 8, 1, "dpace")
check(by_pace, whole, 4, 2, "dpace")
check(by_decay, whole, 2, 4, "decay", accumulation=2, remat=True)
few = whole[:13]  # over 8 devices: the last holds padding only
check(reference(dataclasses.replace(batch, labels=batch.labels % 13), few, "uniform"), few, 1, 8, "uniform")
print("same")
"""


@pytest.mark.slow
def test_devices_parts_and_chunks_give_the_gradient_of_plain_blocks(cache, draft, tables, on_eight_devices, tmp_path):
    write_run(draft, tmp_path, 0, optimizer_state=None, provenance={}, keep=None)
    np.savez(tmp_path / "tables.npz", **tables)
    (tmp_path / "cache").symlink_to(cache.directory)
    on_eight_devices(SHARDED)


def test_a_device_too_few_is_refused(draft, tables):
    with pytest.raises(ConfigError, match=r"devices here, 1; got 1 x 2"):
        trainer_of(draft, tables, tp=2)


# ---- many blocks at once


@pytest.fixture(scope="module")
def predict(draft, tables):
    """nll [B, A, S-1] of a batch."""

    @jax.jit
    def nll(batch):
        head, mask = jnp.asarray(tables["head"]), jnp.asarray(tables["embedding"][5])
        return predict_blocks(draft, batch, mask, head, vocab_size=V, chunk=V)[0]

    return nll


def only(batch, a):
    """The batch with one of its anchors."""
    return dataclasses.replace(
        batch, **{n: getattr(batch, n)[:, a : a + 1] for n in ("anchors", "anchor_embedding", "labels", "mask")}
    )


def test_many_anchors_are_the_same_blocks_one_by_one(gradient_of, batch, predict):
    together = predict(batch)
    sums, gradient = gradient_of(batch)
    parts = []
    for a in range(ANCHORS):
        np.testing.assert_allclose(predict(only(batch, a))[:, 0], together[:, a], rtol=1e-4, atol=1e-4)
        parts.append(gradient_of(only(batch, a)))
    for name in SUMS:
        np.testing.assert_allclose(sum(float(s[name]) for s, _ in parts), float(sums[name]), rtol=1e-5)
    shares = [float(s["weight"]) / float(sums["weight"]) for s, _ in parts]
    added = jax.tree.map(lambda *gs: sum(w * g for w, g in zip(shares, gs, strict=True)), *(g for _, g in parts))
    assert apart(added, gradient) < 3e-5


def test_what_comes_at_or_after_the_anchor_is_hidden(batch, predict):
    features = batch.features.copy()
    for b in range(ROWS):
        features[b, batch.anchors[b].min() :] += 3
    changed = predict(dataclasses.replace(batch, features=features))
    for b in range(ROWS):
        first = batch.anchors[b].argmin()
        np.testing.assert_array_equal(changed[b, first], predict(batch)[b, first])
        assert np.abs(changed[b] - predict(batch)[b]).max() > 1e-3  # the later ones see it


def test_blocks_do_not_see_each_other(batch, predict):
    embedding, anchors = batch.anchor_embedding.copy(), batch.anchors.copy()
    embedding[:, 2] *= -1
    anchors[:, 2] //= 2
    changed = np.asarray(predict(dataclasses.replace(batch, anchor_embedding=embedding, anchors=anchors)))
    whole = np.asarray(predict(batch))
    np.testing.assert_array_equal(np.delete(changed, 2, axis=1), np.delete(whole, 2, axis=1))
    assert np.abs(changed[:, 2] - whole[:, 2]).max() > 1e-3


def test_figures_of_blocks():
    labels = np.array([[[1, 2, 3], [4, 5, 6]]], np.int32)
    best = jnp.asarray([[[1, 2, 9], [4, 0, 6]]], jnp.int32)
    assert accept_lens(best, jnp.asarray(labels)).tolist() == [[2, 1]]
    nll = jnp.asarray([[[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]])
    mask = np.array([[[1, 1, 1], [1, 1, 0]]], np.float32)
    empty = np.zeros(0)
    parts = {"features": empty, "starts": empty, "anchors": empty, "anchor_ids": empty, "anchor_embedding": empty}
    batch = trainer_module.Batch(**parts, labels=labels, mask=mask)
    # The second block's last label doesn't count, so its accept length is not known.
    found = means(block_sums(Predictions(nll, jnp.zeros_like(nll), best), batch, Objective(weights="uniform")))
    assert found == {"loss": 3.0, "cross_entropy": 3.0, "token_acc": pytest.approx(3 / 5), "accept_len_mean": 2.0}
    decay = means(block_sums(Predictions(nll, jnp.zeros_like(nll), best), batch, Objective(weights="decay", gamma=1.0)))
    w = np.exp(-np.arange(3.0))
    expected = (w @ [1, 2, 3] + w[:2] @ [4, 5]) / (w.sum() + w[:2].sum())
    assert decay == found | {"loss": pytest.approx(expected)}
    nothing = dataclasses.replace(batch, mask=np.zeros_like(mask))
    assert set(means(block_sums(Predictions(nll, jnp.zeros_like(nll), best), nothing, Objective())).values()) == {0.0}


# ---- the optimizer


def test_a_step_is_optaxs(trainer, gradient_of, draft, batch):
    _, gradient = gradient_of(batch)
    sums = trainer.step(batch)
    assert float(sums["gradient_norm"]) == pytest.approx(float(optax.tree.norm(gradient)), rel=1e-5)
    assert bool(sums["finite"])
    params = nnx.state(draft)
    adamw = optax.adamw(0.01, b1=0.9, b2=0.95, weight_decay=0.1, mask=jax.tree.map(lambda p: p.ndim > 1, params))
    updates, _ = jax.jit(adamw.update)(gradient, adamw.init(params), params)
    expected = optax.apply_updates(params, updates)
    for got, want in zip(weights_of(trainer.state[0]), weights_of(expected), strict=True):
        # Adam's first step is the gradient's sign: where that is noise, so is the step.
        assert np.mean(np.abs(got - want) > 1e-6) < 1e-3


def test_norms_do_not_decay():
    optimizer = make_optimizer(config_of(weight_decay=0.5, learning_rate=0.1, schedule="constant", warmup=0.0))
    params = {"norm": jnp.ones(3), "weight": jnp.ones((3, 3))}
    updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)
    assert updates["norm"].tolist() == [0, 0, 0]
    np.testing.assert_allclose(updates["weight"], -0.05 * np.ones((3, 3)), rtol=1e-6)


@pytest.mark.parametrize(("clip", "seen"), [(1.0, 0.1), (100.0, 1.0), (0.0, 1.0)])
def test_a_long_gradient_is_clipped(clip, seen):
    """Adam's second step tells the lengths of two gradients apart, the first alone does not."""
    settings = {"learning_rate": 0.1, "schedule": "constant", "warmup": 0.0}
    optimizer = make_optimizer(config_of(clip=clip, **settings))
    plain = optax.adamw(0.1, b1=0.9, b2=0.95, weight_decay=0.0)
    params = jnp.zeros(2)
    state, expected = optimizer.init(params), plain.init(params)
    short, long = jnp.array([0.5, 0.5]), jnp.array([6.0, 8.0])
    for gradient, scale in ((short, 1.0), (long, seen)):
        update, state = optimizer.update(gradient, state, params)
        want, expected = plain.update(gradient * scale, expected, params)
        np.testing.assert_allclose(update, want, rtol=1e-5)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.25, 0.5, 0.75, 1.0, *[1.0] * 16]),
        ("linear", [0.25, 0.5, 0.75, 1.0, *(1 - np.arange(16) / 16)]),
        ("cosine", [0.25, 0.5, 0.75, 1.0, *((1 + np.cos(np.pi * np.arange(16) / 16)) / 2)]),
    ],
)
def test_learning_rates(schedule, expected):
    rate = learning_rate(config_of(learning_rate=2.0, warmup=0.2, schedule=schedule))
    np.testing.assert_allclose([rate(i) for i in range(20)], 2 * np.asarray(expected), rtol=1e-5)


@pytest.mark.parametrize(("steps", "warmup", "first"), [(20, 0.0, 1.0), (20, 0.05, 1.0), (1, 0.0, 1.0), (2, 0.9, 0.5)])
def test_no_step_has_rate_0(steps, warmup, first):
    rate = learning_rate(config_of(steps=steps, warmup=warmup, learning_rate=1.0))
    rates = [float(rate(i)) for i in range(steps)]
    assert rates[0] == first
    assert min(rates) > 0


def test_all_faults_of_a_config_at_once():
    faulty = {
        "steps": 0,
        "dp": 0,
        "schedule": "steps",
        "dtype": "float16",
        "learning_rate": float("nan"),
        "weight_decay": -1.0,
        "clip": -1.0,
        "seed": -1,
        "beta2": 1.0,
        "warmup": 1.0,
    }
    with pytest.raises(ConfigError) as error:
        TrainConfig(**faulty)
    for name in faulty:
        assert name in str(error.value)
    with pytest.raises(ConfigError, match=r"batch_size .*dp x accumulation, got 12, 2 and 4"):
        TrainConfig(batch_size=12, dp=2, accumulation=4)
    with pytest.raises(ConfigError) as error:
        Objective(weights="linear", gamma=0.0, alpha=1.5, chunk=0)
    for name in ("weights", "gamma", "alpha", "chunk"):
        assert f"{name} (--" in str(error.value)


# ---- dtypes, and who owns the weights


def test_bfloat16_keeps_float32_weights(gradient_of, draft, tables, batch):
    trainer = trainer_of(draft, tables, dtype="bfloat16", learning_rate=1e-6)
    sums = trainer.step(batch)
    assert {x.dtype.name for x in weights_of(trainer.state[0])} == {"float32"}
    assert {x.dtype.name for x in weights_of(trainer.state[1])} == {"float32", "int32"}
    assert {x.dtype.name for x in sums.values()} == {"float32", "bool"}
    # A step far below bfloat16's resolution is not lost.
    moved = [
        np.abs(a - b).max() for a, b in zip(weights_of(trainer.state[0]), weights_of(nnx.state(draft)), strict=True)
    ]
    assert 0 < max(moved) < 1e-5


def test_bfloat16_is_close_to_float32(gradient_of, batch):
    (rough_sums, rough), (sums, exact) = gradient_of(batch, "bfloat16"), gradient_of(batch)
    assert means(rough_sums)["loss"] == pytest.approx(means(sums)["loss"], rel=0.02)
    rough, exact = (np.concatenate([x.ravel() for x in weights_of(g)]) for g in (rough, exact))
    assert rough @ exact > 0.98 * np.linalg.norm(rough) * np.linalg.norm(exact)


def test_the_drafts_given_and_taken_stay_as_they_were(trainer, draw_draft, draft, batch):
    """A step donates its buffers; a draft that shared them would be gone."""
    start = trainer.draft()
    trainer.step(batch)
    trainer.restore(start, trainer.state[1])
    trainer.step(batch)
    for kept in (draft, start):
        assert apart(nnx.state(kept), nnx.state(draw_draft(windows=(None,), causal=(False,)))) == 0
    assert apart(nnx.state(trainer.draft()), nnx.state(start)) > 0


def test_a_bfloat16_draft_becomes_a_float32_one(draw_draft, tables):
    draft = trainer_of(draw_draft(dtype=jnp.bfloat16), tables).draft()
    assert draft.dtype == draft.fc.weight[...].dtype == jnp.float32


def test_scores_are_the_sums_of_a_step_and_change_nothing(trainer, draft, batch):
    scored = trainer.score(batch)
    assert apart(trainer.state[0], nnx.state(draft)) == 0
    sums = trainer.step(batch)
    assert {n: float(v) for n, v in scored.items()} == pytest.approx({n: float(sums[n]) for n in SUMS}, rel=1e-5)
    assert float(trainer.score(batch)["nll"]) < float(scored["nll"])


def test_a_step_that_is_not_finite_changes_nothing(trainer, batch):
    trainer.step(batch)
    before = weights_of(trainer.state)
    features = batch.features.copy()
    features[1, 0, 0] = 0x7FC0
    assert not bool(trainer.step(dataclasses.replace(batch, features=features))["finite"])
    for a, b in zip(weights_of(trainer.state), before, strict=True):
        np.testing.assert_array_equal(a, b)
    assert bool(trainer.step(batch)["finite"])


# ---- what it is for


@pytest.mark.slow
def test_it_learns_what_can_be_foretold(draft, write_sequences, tmp_path):
    """Every token names the next one, so a block follows from its anchor."""
    rng = np.random.default_rng(6)
    cycle = rng.permutation(V)[:16]
    tables = {n: rng.standard_normal((V, H)).astype(np.float32) for n in ("embedding", "head")}
    cache = write_sequences(
        tmp_path / "cache",
        sequences=48,
        tokens=lambda rng, N: cycle[np.arange(N) % 16],
        features=lambda rng, ids: np.tile(tables["embedding"][ids], 2),
    )
    settings = {"num_anchors": 16, "batch_size": 8}
    trainer = trainer_of(draft, tables, steps=60, learning_rate=0.01, objective=Objective(), **settings)
    batches = batches_of(cache, tables, **settings)
    rows = cache.rows(True)
    held_out = TrainingBatches(cache, rows, block_size=S, embedding=tables["embedding"], seed=0, **settings)(0)
    assert means(trainer.score(held_out))["accept_len_mean"] < 0.2
    for step in range(60):
        trainer.step(batches(step))
    assert means(trainer.score(held_out))["accept_len_mean"] > 0.8 * (S - 1)


def test_flops_are_those_of_the_program(draft, tables, cache):
    """Within a third of what XLA counts in the whole program.

    XLA also counts norms, softmax and optimizer, and scores between blocks that don't see each other, which we leave
    out; one chunk and one part, since of a loop it counts one round.
    """
    trainer = trainer_of(draft, tables, batch_size=8, num_anchors=4, objective=Objective(chunk=V))
    batch = batches_of(cache, tables, batch_size=8, num_anchors=4)(0)
    program = trainer._step.lower(trainer.state, batch, trainer.head, trainer.mask_embedding)
    counted = program.cost_analysis()["flops"] / step_flops(draft.config, batch)
    assert 1 < counted < 4 / 3, counted
