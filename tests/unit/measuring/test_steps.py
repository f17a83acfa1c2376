"""The clock: functions called in turn, and what a step reads. No time is asserted."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest

from dflash import init_draft, load_target, metrics
from dflash.measuring import steps as measure
from dflash.measuring.steps import (
    draft_step,
    experts_awake,
    in_turn,
    matmul_rate,
    read_bandwidth,
    step_bytes,
    time_steps,
    verify_step,
)
from dflash.weights.tiny import write_tiny_target


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    return load_target(write_tiny_target(tmp_path_factory.mktemp("measure") / "target", num_hidden_layers=2))


@pytest.fixture(scope="module")
def draft(target):
    return init_draft(target, num_layers=1, block_size=4, target_layer_ids=(0, 1))


def test_in_turn(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("dflash.measuring.steps.time.perf_counter", lambda: clock[0])
    called = []

    def timed(name, seconds):
        def run():
            called.append(name)
            # The first two calls, warm-up, are a hundred times slower.
            clock[0] += seconds * (100 if called.count(name) <= 2 else 1)

        return run

    seconds = in_turn({"a": timed("a", 1), "b": timed("b", 2), "c": timed("c", 3)}, rounds=3, warmup=2)
    assert "".join(called) == "abccbaabccbaabc"
    assert {n: s.tolist() for n, s in seconds.items()} == {"a": [1, 1, 1], "b": [2, 2, 2], "c": [3, 3, 3]}


def test_of_a_machines_products_the_best_round_counts_and_the_first_does_not(monkeypatch):
    ticks = iter([0.0, 0.001, 1.0, 1.5, 2.0, 2.25, 3.0, 4.0])
    monkeypatch.setattr(measure, "time", SimpleNamespace(perf_counter=lambda: next(ticks)))
    assert matmul_rate(size=64, rounds=3) == 2 * 64**3 / 0.25


def test_read_bandwidth():
    assert read_bandwidth(megabytes=4, rounds=2) > 0


def llama_bytes(config, vocabularies):
    """By hand: attention, MLP and two norms a layer, the last norm, and what is read of the vocabulary's rows."""
    c = config
    attention = 2 * (c.num_heads + c.num_kv_heads) * c.head_dim * c.hidden_size
    layer = attention + 3 * c.intermediate_size * c.hidden_size + 2 * c.hidden_size
    return 4 * (c.num_layers * layer + c.hidden_size + vocabularies * c.hidden_size)


def test_step_bytes_untied(target):
    c = target.config
    for tokens in (1, 8):
        assert step_bytes(target, tokens) == pytest.approx(llama_bytes(c, c.vocab_size + tokens))
    assert step_bytes(target, 10 * c.vocab_size) == pytest.approx(llama_bytes(c, 2 * c.vocab_size))


def test_step_bytes_tied(tmp_path):
    tied = load_target(write_tiny_target(tmp_path / "tied", num_hidden_layers=2, tie_word_embeddings=True))
    for tokens in (1, 8):
        assert step_bytes(tied, tokens) == llama_bytes(tied.config, tied.config.vocab_size)


def test_step_bytes_of_experts(tmp_path):
    routed = load_target(
        write_tiny_target(tmp_path / "routed", "gpt_oss", num_hidden_layers=2, layer_types=["full_attention"] * 2)
    )
    c = routed.config
    H, I, E = c.hidden_size, c.intermediate_size, c.experts.count  # noqa: E741
    expert = H * 2 * I + 2 * I + I * H + H
    heads, kv = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    attention = (heads + 2 * kv) * H + (heads + 2 * kv) + heads * H + H + c.num_heads
    layer = attention + E * H + E + 2 * H

    def by_hand(tokens):
        awake = metrics.expected_awake(E, c.experts.per_token, tokens)
        return 4 * (2 * (layer + awake * expert) + H + (c.vocab_size + tokens) * H)

    for tokens in (1, 4, 8):
        assert step_bytes(routed, tokens) == pytest.approx(by_hand(tokens))


@pytest.fixture(scope="module")
def routed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("routed") / "target"
    return load_target(write_tiny_target(folder, "gpt_oss", num_hidden_layers=2, layer_types=["full_attention"] * 2))


def test_experts_awake(routed):
    """Counted by hand from what each token chose."""
    rows = [[5, 17, 3, 88, 9, 41, 7], [120, 2, 90, 14, 61, 33]]
    chosen = np.asarray(routed.chosen_experts(np.array([r[:6] for r in rows])))
    experts, k = routed.config.experts.count, routed.config.experts.per_token
    assert chosen.shape == (2, 2, 6, k)
    assert chosen.min() >= 0
    assert chosen.max() < experts
    for size in (1, 2, 4):
        counts = [
            len({int(e) for row in layer for token in row[start : start + size] for e in token})
            for layer in chosen
            for start in range(0, 6 - size + 1, size)
        ]
        assert experts_awake(routed, rows, size) == pytest.approx(np.mean(counts))
    assert experts_awake(routed, rows[:1], 1) == k
    with pytest.raises(ValueError, match=r"row .*8 tokens.*got 6"):
        experts_awake(routed, rows, 8)


def test_watching_experts_changes_nothing(routed):
    tokens = np.array([[5, 17, 3]], np.int32)
    before, _ = routed.forward(tokens)
    routed.chosen_experts(tokens)
    np.testing.assert_array_equal(before, routed.forward(tokens)[0])


def test_steps_stay_in_place_and_compile_nothing(target, draft, caplog):
    batch = 2
    steps = [
        verify_step(target, tokens=1, batch=batch, context=40),
        verify_step(target, tokens=4, batch=batch, context=40, layer_ids=(0, 1)),
        draft_step(target, draft, block_size=4, batch=batch, context=40),
    ]
    for step in steps:
        step()
    with jax.log_compiles():
        for step in steps:
            for _ in range(3):
                step()
    assert "Finished XLA compilation" not in caplog.text
    for step in steps:
        assert step.caches.lengths.tolist() == [40] * batch


def test_rows_of_a_step_differ(target):
    block, draws = verify_step(target, tokens=2, batch=3, context=8).inputs
    assert draws is None
    assert len({tuple(row) for row in block.tolist()}) == 3


def test_time_steps(target, draft):
    times = time_steps(target, draft, [4], verify_sizes=[3], context=20, rounds=2, time_limit_s=0)
    assert times.step_s > 0
    assert sorted(times.verify_s) == [3, 4]
    assert sorted(times.draft_s) == [4]
    assert min(*times.verify_s.values(), *times.draft_s.values()) > 0
    assert (times.context, times.batch) == (20, 1)
    # Two rounds have no interval.
    assert times.verify_ratio_ci95 == {3: (0, np.inf), 4: (0, np.inf)}
    assert times.block_ratio(4) == pytest.approx((times.verify_s[4] + times.draft_s[4]) / times.step_s)


def test_the_largest_verify_step_is_timed_until_it_is_sure(target, draft, monkeypatch):
    """A clock that only some calls move, by a verify step that now and then takes longer."""
    rng, calls = np.random.default_rng(0), 0

    def tick(timed, *, rounds, warmup=2):
        nonlocal calls
        calls += rounds
        return {name: 1.2 * np.exp(rng.normal(0, 0.05, rounds)) if "4" in name else np.ones(rounds) for name in timed}

    monkeypatch.setattr(measure, "in_turn", tick)
    monkeypatch.setattr(measure.time, "monotonic", lambda: 0.0)
    times = time_steps(target, draft, [2, 4], context=20, rounds=5)
    low, high = times.verify_ratio_ci95[4]
    assert low <= times.verify_ratio(4) <= high <= 1.015 * times.verify_ratio(4)
    assert calls > 5
    assert times.verify_ratio_ci95[2] == (1, 1)  # which none of them moved


def test_a_column_is_multiplied_plain_and_padded(target):
    products = measure.one_column_products(target)
    assert set(products) == {"plain", "padded"}
    head, column = products["plain"].args[1:]
    plain, padded = (product.args[0](head, column) for product in products.values())
    assert (plain.shape, padded.shape) == ((target.config.vocab_size, 1), (target.config.vocab_size, 8))
    np.testing.assert_allclose(padded[:, :1], plain, rtol=1e-5)
    assert not np.any(padded[:, 1:])
