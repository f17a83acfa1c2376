"""The clock: intervals that hold the truth, functions called in turn, and what a step reads. No time is asserted."""

import jax
import numpy as np
import pytest

from dflash import init_draft, load_target, metrics
from dflash.measure import draft_step, in_turn, ratio_interval, read_bandwidth, step_bytes, time_steps, verify_step
from dflash.tiny import write_tiny_target


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    return load_target(write_tiny_target(tmp_path_factory.mktemp("measure") / "target", num_hidden_layers=2))


@pytest.fixture(scope="module")
def draft(target):
    return init_draft(target, num_layers=1, block_size=4, target_layer_ids=(0, 1))


def drawn_rounds(rng, rounds, prompts, ratio, spread=0.0):
    """Seconds of two functions whose true ratio is known, on a machine that drifts from round to round."""
    common = np.exp(rng.normal(0, 0.2, prompts) + rng.normal(0, 0.15, (rounds, 1)))
    noise = np.exp(rng.normal(0, 0.05, (2, rounds, prompts)))
    per_prompt = np.exp(rng.normal(-(spread**2) / 2, spread, prompts))
    return ratio * common * noise[0] * per_prompt, common * noise[1]


@pytest.mark.parametrize(
    ("rounds", "prompts", "spread", "least"), [(15, 1, 0, 0.93), (9, 4, 0, 0.93), (5, 8, 0.1, 0.93), (5, 1, 0, 0.88)]
)
def test_interval_holds_the_truth(rounds, prompts, spread, least):
    rng = np.random.default_rng(7)
    held, draws = 0, 400
    for _ in range(draws):
        baseline, candidate = drawn_rounds(rng, rounds, prompts, 2.5, spread)
        if prompts == 1:
            baseline, candidate = baseline[:, 0], candidate[:, 0]
        _, low, high = ratio_interval(baseline, candidate, draws=500)
        held += low <= 2.5 <= high
    assert held / draws >= least


def test_drift_does_not_widen_the_interval():
    rng = np.random.default_rng(1)
    drift = np.linspace(1, 5, 20)
    baseline, candidate = drift * 3 * rng.normal(1, 0.01, 20), drift * rng.normal(1, 0.01, 20)
    ratio, low, high = ratio_interval(baseline, candidate)
    assert ratio == pytest.approx(3, rel=0.02)
    assert high - low < 0.03 * 3 * 2


def test_swapped_roles_give_the_reciprocal():
    a, b = drawn_rounds(np.random.default_rng(2), 9, 4, 1.7)
    ratio, low, high = ratio_interval(a, b)
    swapped, swapped_low, swapped_high = ratio_interval(b, a)
    assert low <= ratio <= high
    assert swapped == pytest.approx(1 / ratio)
    assert swapped_low == pytest.approx(1 / high, rel=0.005)
    assert swapped_high == pytest.approx(1 / low, rel=0.005)
    assert ratio_interval(a, a) == (1, 1, 1)


def test_shapes_of_rounds():
    assert ratio_interval(np.array([6.0]), np.array([2.0])) == (3, 3, 3)
    one_column = ratio_interval(np.array([[6.0], [8.0], [7.0]]), np.array([[2.0], [4.0], [2.0]]))
    assert one_column == ratio_interval(np.array([6.0, 8.0, 7.0]), np.array([2.0, 4.0, 2.0]))
    # One round of two prompts: their sum is what counts, and the prompts are drawn.
    ratio, low, high = ratio_interval([[4.0, 1.0]], [[1.0, 1.0]])
    assert (ratio, low, high) == (2.5, 1, 4)


def test_the_interval_is_the_same_every_time():
    a, b = drawn_rounds(np.random.default_rng(3), 5, 2, 2.0)
    assert ratio_interval(a, b) == ratio_interval(a, b)


def test_rounds_that_are_no_pairs_are_refused():
    with pytest.raises(ValueError, match=r"both must have the same rounds, got \(3,\) and \(2,\)"):
        ratio_interval(np.ones(3), np.ones(2))


def test_in_turn(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("dflash.measure.time.perf_counter", lambda: clock[0])
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
    (block,) = verify_step(target, tokens=2, batch=3, context=8).inputs
    assert len({tuple(row) for row in block.tolist()}) == 3


def test_time_steps(target, draft):
    times = time_steps(target, draft, [4], verify_sizes=[3], context=20, rounds=2)
    assert times.step_s > 0
    assert sorted(times.verify_s) == [3, 4]
    assert sorted(times.draft_s) == [4]
    assert min(*times.verify_s.values(), *times.draft_s.values()) > 0
    assert (times.context, times.batch) == (20, 1)
    assert times.block_ratio(4) == (times.verify_s[4] + times.draft_s[4]) / times.step_s
