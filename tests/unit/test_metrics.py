"""Every number means one thing: the identities between them, and what is said where nothing was drafted."""

import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dflash import metrics

seeded = settings(derandomize=True, deadline=None, max_examples=150, database=None)


@st.composite
def drafted_rows(draw):
    """A block size and accept lengths per row and block, at least one block in all."""
    size = draw(st.integers(2, 16))
    rows = draw(st.lists(st.lists(st.integers(0, size - 1), max_size=12), min_size=1, max_size=5))
    rows[0].append(draw(st.integers(0, size - 1)))
    return size, rows


@seeded
@given(drafted_rows())
def test_acceptance_identities(drawn):
    size, rows = drawn
    m = metrics.acceptance(rows, size)
    assert m["num_drafts"] == sum(map(len, rows))
    assert m["num_draft_tokens"] == m["num_drafts"] * (size - 1)
    assert m["num_accepted_tokens"] == sum(map(sum, rows))
    assert m["acceptance_length"] == m["accept_len_mean"] + 1
    assert m["accept_rate"] == pytest.approx(m["accept_len_mean"] / (size - 1))
    assert 0 <= m["accept_rate"] <= 1


@seeded
@given(drafted_rows())
def test_histogram_and_positions_tell_the_same_story(drawn):
    size, rows = drawn
    m = metrics.acceptance(rows, size)
    histogram, per_pos = m["accept_histogram"], m["accept_rate_per_pos"]
    assert len(histogram) == size
    assert sum(histogram) == m["num_drafts"]
    assert sum(a * n for a, n in enumerate(histogram)) == m["num_accepted_tokens"]
    assert len(per_pos) == size - 1
    assert per_pos == sorted(per_pos, reverse=True)
    assert sum(per_pos) == pytest.approx(m["accept_len_mean"])


@seeded
@given(st.lists(st.lists(st.integers(1, 8), max_size=10), min_size=1, max_size=5), st.floats(0.01, 100))
def test_tokens_and_their_times(produced, seconds):
    tokens = metrics.output_tokens(produced)
    assert tokens == len(produced) + sum(map(sum, produced))
    rate, tpot = metrics.throughput(produced, seconds), metrics.time_per_output_token_ms(produced, seconds)
    if tokens == len(produced):
        assert (rate, tpot) == (None, None)
    else:
        assert rate * seconds == pytest.approx(tokens - len(produced))
        assert tpot * max(map(sum, produced)) == pytest.approx(1000 * seconds)
        if len(produced) == 1:
            assert rate * tpot == pytest.approx(1000)


def test_means_are_pooled_over_blocks():
    # One row of one block with 7 accepted, one of three blocks with none: the mean of the rows' means would be 3.5.
    assert metrics.acceptance([[7], [0, 0, 0]], 8)["accept_len_mean"] == 7 / 4


@pytest.mark.parametrize(("rows", "size"), [([[8]], 8), ([[1], [-1]], 8), ([[1]], 1)])
def test_impossible_accept_lengths_are_refused(rows, size):
    with pytest.raises(ValueError, match=rf"accept lengths .*block of {size} .*0\.\.{size - 1}, got "):
        metrics.acceptance(rows, size)


@pytest.mark.parametrize(("rows", "size"), [([], 8), ([[], []], 8), ([[0, 0]], 1), ([[]], 1)])
def test_none_where_nothing_was_drafted(rows, size):
    m = metrics.acceptance(rows, size)
    assert (m["num_drafts"], m["num_draft_tokens"], m["num_accepted_tokens"]) == (0, 0, 0)
    for name in ("accept_len_mean", "acceptance_length", "accept_rate", "accept_histogram", "accept_rate_per_pos"):
        assert m[name] is None, name


def test_no_blocks_no_rate():
    assert metrics.output_tokens([[], []]) == 2
    assert metrics.throughput([[], []], 1.0) is None
    assert metrics.throughput([[3]], 0.0) is None
    assert metrics.time_per_output_token_ms([[], []], 1.0) is None
    assert metrics.time_per_output_token_ms([], 1.0) is None


def test_cost_model():
    assert metrics.predicted_speedup(8.0, step_s=0.030, verify_s=0.042, draft_s=0.015) == pytest.approx(8 / 1.9)
    # A verify and a draft that cost one step in all: everything accepted is gained.
    assert metrics.predicted_speedup(5.0, step_s=1.0, verify_s=0.8, draft_s=0.2) == pytest.approx(5)


def test_expected_awake_experts():
    assert [round(metrics.expected_awake(32, 4, n)) for n in (1, 4, 8, 16)] == [4, 13, 21, 28]
    assert metrics.expected_awake(8, 8, 1) == 8


def test_finite_makes_strict_json():
    value = {"a": math.nan, "b": [1.5, -math.inf, (math.inf, "text")], "c": {"d": None, "e": True, "f": 0}}
    plain = metrics.finite(value)
    assert plain == {"a": None, "b": [1.5, None, [None, "text"]], "c": {"d": None, "e": True, "f": 0}}
    assert json.loads(json.dumps(plain, allow_nan=False)) == plain


def test_every_direction_names_a_figure():
    assert all(isinstance(better, bool) for better in metrics.HIGHER_IS_BETTER.values())
    assert not metrics.HIGHER_IS_BETTER["tpot_ms"]
    assert metrics.HIGHER_IS_BETTER["speedup_x"]
