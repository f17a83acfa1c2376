"""Offline acceptance is live acceptance, block by block; and every broken convention is noticed."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from learning import train, write_sequences

from dflash import decode, metrics
from dflash.config import ConfigError
from dflash.decoding.decode import forget_compiled
from dflash.models.draft import Draft, DraftAttention
from dflash.models.layers import attend, rotate
from dflash.training.cache.sample import Sampler
from dflash.training.evaluate import Blocks, Evaluator, check_fit, summarise, walk
from dflash.weights.load import load_target, new_draft
from dflash.weights.tiny import write_tiny_target

pytestmark = pytest.mark.slow

VOCAB, BLOCK, LAYERS, PROMPTS, HELD_OUT, BUDGET = 32, 8, (0, 2, 1), 256, 64, 40


def read_soft_target(directory, dtype):
    """At half their size the weights make a text that a small draft can learn: it soon repeats itself, or nearly."""
    target = load_target(directory, dtype)
    for path, value in nnx.to_flat_state(nnx.state(target)):
        if path[0] == "layers" and value.get_value().ndim > 1:
            value.set_value(value.get_value() * 0.5)
    return target


class Laboratory:
    """A tiny target and a draft trained on its text, decoding held-out prompts live, and their cache."""

    def __init__(self, directory):
        self.directory = directory
        self.folder = write_tiny_target(directory / "target", vocab_size=VOCAB)
        self.target = read_soft_target(self.folder, "float32")
        self.embedding = np.asarray(self.target.embedding.weight[...])
        self.head = np.asarray(self.target.head.weight[...])
        self.evaluator = Evaluator(self.embedding, self.head, chunk=VOCAB)
        rng = np.random.default_rng(0)
        self.prompts = [rng.integers(0, VOCAB, rng.integers(3, 12)).tolist() for _ in range(PROMPTS)]
        sampler = Sampler(self.target, batch=128, max_prompt_len=16, max_new_tokens=BUDGET + BLOCK)
        halves = [range(0, 128), range(128, 256)]
        self.answers = [row for half in halves for row in sampler.run([self.prompts[i] for i in half], indices=half)]
        self.cache = self.write(self.target, "cache", self.answers)
        draft = new_draft(self.target.config, num_layers=2, block_size=BLOCK, target_layer_ids=LAYERS)
        draft.norm.weight[...] = self.target.norm.weight[...]
        learning = {"learning_rate": 3e-3, "num_anchors": 8, "weights": "dpace"}
        self.draft = train(draft, self.embedding, self.head, [self.cache], 250, **learning)
        self.live = self.decode(self.target, self.draft)
        with pytest.MonkeyPatch.context() as patch:
            # The cache holds bfloat16. Live decoding that reads just those numbers must agree to the last block.
            plain = Draft._context
            patch.setattr(
                Draft, "_context", lambda self, features: plain(self, [f.astype(jnp.bfloat16) for f in features])
            )
            # What is compiled serves every network of its form, patched or not.
            forget_compiled()
            self.rounded = self.decode(self.target, self.draft)
        forget_compiled()

    def write(self, target, name, answers, read_layer_ids=None):
        """Their cache; it says that it holds the features of LAYERS, whatever was read."""
        return write_sequences(
            target,
            self.directory / name,
            self.prompts,
            answers,
            LAYERS,
            held_out=HELD_OUT,
            read_layer_ids=read_layer_ids,
        )

    def decode(self, target, draft):
        """Held-out prompts, live, so far that the last block that counts has all its labels."""
        return decode(target, draft, self.prompts[-HELD_OUT:], max_new_tokens=BUDGET + BLOCK)

    def offline(self, draft, cache):
        """Accept lengths of the held-out rows, walked block by block."""
        blocks = self.evaluator.score(draft, cache, cache.rows(held_out=True))
        lists = {row: [] for row in cache.rows(held_out=True).tolist()}
        for i in walk(blocks):
            if blocks.anchor[i] - len(self.prompts[blocks.row[i]]) < BUDGET:
                lists[blocks.row[i]].append(int(blocks.accept_len[i]))
        return list(lists.values())


def counted(live):
    """Accept lengths of the blocks whose anchor is one of the first BUDGET tokens."""
    lists = []
    for accepted, produced in zip(live.accept_lens, live.produced, strict=True):
        anchors = np.cumsum([0, *produced[:-1]])
        lists.append([a for a, anchor in zip(accepted, anchors, strict=True) if anchor < BUDGET])
    return lists


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    return Laboratory(tmp_path_factory.mktemp("evaluate"))


def mean(lists):
    return float(np.mean([a for row in lists for a in row]))


def test_offline_is_live_block_by_block(lab):
    assert lab.live.tokens == lab.rounded.tokens == lab.answers[-HELD_OUT:]
    live, offline = counted(lab.rounded), lab.offline(lab.draft, lab.cache)
    assert offline == live
    # A draft that is hardly ever accepted, or always, would make this easy.
    assert 1.5 < mean(live) < 6.5
    assert len({a for row in live for a in row}) == BLOCK
    assert mean(offline) == pytest.approx(mean(counted(lab.live)), rel=0.01)


def test_in_bfloat16_the_means_agree(lab):
    target = read_soft_target(lab.folder, "bfloat16")
    draft = nnx.eval_shape(lambda: Draft(lab.draft.config, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)))
    nnx.update(draft, jax.tree.map(lambda w: w.astype(jnp.bfloat16), nnx.state(lab.draft)))
    live = lab.decode(target, draft)
    cache = lab.write(target, "bfloat16", [*lab.answers[:-HELD_OUT], *live.tokens])
    assert mean(lab.offline(draft, cache)) == pytest.approx(mean(counted(live)), rel=0.01)


# ---- what earlier systems got wrong, one by one


def layer_off_by_one(lab, monkeypatch):
    return lab.write(lab.target, "layers", lab.answers, tuple(i + 1 for i in LAYERS))


def layers_in_another_order(lab, monkeypatch):
    return lab.write(lab.target, "order", lab.answers, tuple(sorted(LAYERS)))


def position_off_by_one(lab, monkeypatch):
    shift = itertools.cycle([0, 1])  # the context's positions are asked for first, then the block's
    plain = Draft._rope
    monkeypatch.setattr(Draft, "_rope", lambda self, positions: plain(self, positions + next(shift)))
    return lab.cache


def anchor_in_the_context(lab, monkeypatch):
    """The row of every token holds the next token's hidden state: the last one that is seen is the anchor's own."""
    features = np.array(lab.cache.features)
    features[:-1] = features[1:]
    return dataclasses.replace(lab.cache, features=features)


def labels_shifted(lab, monkeypatch):
    plain = Evaluator._sequences

    def shifted(self, *arguments):
        for rows, batch in plain(self, *arguments):
            batch.labels[:, :, :-1] = batch.labels[:, :, 1:]
            yield rows, batch

    monkeypatch.setattr(Evaluator, "_sequences", shifted)
    return lab.cache


def norm_after_rotation(lab, monkeypatch):
    def keys_values(self, x, rope):
        _, B, T = rope[0].shape
        k, v = jnp.split(self.kv(x).reshape(-1, self.head_dim, B, T), 2)
        return self.k_norm(rotate(k, rope), axis=1), v

    def mix(self, x, rope, keys, values, visible):
        _, B, T = rope[0].shape
        q = self.q_norm(rotate(self.q(x).reshape(-1, self.head_dim, B, T), rope), axis=1)
        mixed = attend(q.reshape(self.kv_heads, -1, self.head_dim, B, T), keys, values, visible)
        return self.out(mixed.reshape(-1, B * T))

    monkeypatch.setattr(DraftAttention, "keys_values", keys_values)
    monkeypatch.setattr(DraftAttention, "mix", mix)
    return lab.cache


BROKEN = (
    layer_off_by_one,
    layers_in_another_order,
    position_off_by_one,
    anchor_in_the_context,
    labels_shifted,
    norm_after_rotation,
)


@pytest.fixture
def retraced():
    """Patched networks must be traced anew, before and after."""
    jax.clear_caches()
    yield
    jax.clear_caches()


@pytest.mark.parametrize("break_it", BROKEN, ids=lambda f: f.__name__)
def test_a_broken_convention_is_noticed(lab, monkeypatch, retraced, break_it):
    live = counted(lab.rounded)
    broken = lab.offline(lab.draft, break_it(lab, monkeypatch))
    differing = sum(a != b for a, b in zip(broken, live, strict=True))
    print(f"{break_it.__name__}: {differing} of {len(live)} rows, accept_len {mean(broken):.2f}, live {mean(live):.2f}")
    assert differing > len(live) / 4


# ---- figures


def blocks_of(*entries, labels=BLOCK - 1):
    """Blocks from (row, anchor, accept_len)."""
    row, anchor, accepted = np.array(entries).T
    return Blocks(
        row=row,
        anchor=anchor,
        accept_len=accepted,
        right=accepted,
        labels=np.full(len(row), labels),
        ctx_pos_start=1000 * (row % 2),
    )


def test_a_walk_goes_on_behind_what_was_accepted():
    """Row 0: anchors 5, 5+2+1, 8+0+1; row 3 begins anew at its own first anchor, whatever the order they come in."""
    blocks = blocks_of((3, 2, 7), (0, 9, 1), (0, 5, 2), (0, 6, 4), (0, 7, 0), (0, 8, 0), (3, 3, 1))
    assert walk(blocks).tolist() == [2, 5, 1, 0]


def test_figures_are_those_of_the_metrics_and_of_earlier_scripts():
    blocks = blocks_of((0, 1, 7), (0, 2, 0), (1, 1, 3), (1, 2, 2))
    summary = summarise(blocks, BLOCK)
    assert summary["accept_len_mean"] == 3.0
    assert summary["acceptance_length"] == 4.0
    assert summary["accept_len_p50"] == 2.5
    assert summary["accept_rate_tokens"] == summary["accept_rate"] == pytest.approx(12 / 28)
    assert summary["token_acc_mean"] == pytest.approx(12 / 28)
    assert summary | metrics.acceptance([[7, 0, 3, 2]], BLOCK) == summary
    assert {k: (v["n"], v["accept_len_mean"]) for k, v in summary["by_ctx_pos_start"].items()} == {
        "0": (2, 3.5),
        "1000": (2, 2.5),
    }
    assert {"accept_len_p90", "accept_len_p99", "token_acc_p50", "token_acc_p90", "num_samples"} <= summary.keys()


def test_blocks_without_all_their_labels_do_not_count():
    whole, cut = blocks_of((0, 1, 7)), blocks_of((0, 2, 2), labels=2)
    both = Blocks(**{n: np.concatenate([getattr(whole, n), getattr(cut, n)]) for n in Blocks.__slots__})
    assert summarise(both, BLOCK) == summarise(whole, BLOCK)
    with pytest.raises(ConfigError, match="no block of 8 slots"):
        summarise(cut, BLOCK)


def test_features_of_other_layers_are_refused(lab):
    other = new_draft(lab.target.config, num_layers=1, block_size=BLOCK, target_layer_ids=(0, 1, 2))
    with pytest.raises(ConfigError, match=r"layers \[0, 1, 2\], .*cache .* \[0, 2, 1\]"):
        check_fit(other, lab.cache)
    check_fit(lab.draft, lab.cache)
