"""The accept rule against a loop over one row in plain python."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dflash.decoding.accept import accept_length, produced_length

BATCH, STOPS = 3, 4
accept = jax.jit(accept_length)
produce = jax.jit(produced_length)
prove = settings(derandomize=True, database=None, deadline=None, max_examples=300)


def plain_accept(candidates, predictions):
    accepted = 0
    for drafted, predicted in zip(candidates[1:], predictions[:-1], strict=True):
        if drafted != predicted:
            break
        accepted += 1
    return accepted


def plain_produce(predictions, accepted, budget, stops):
    """The emitted tokens, one at a time, and whether the row ends."""
    emitted = []
    for token in predictions[: accepted + 1]:
        if len(emitted) == budget:
            break
        emitted.append(token)
        if token in stops:
            return len(emitted), True
    return len(emitted), len(emitted) == budget


@st.composite
def blocks(draw):
    """Candidates and predictions [B, S] of few tokens, so that they often agree; budgets; padded stop tokens."""
    size = draw(st.sampled_from([1, 2, 5, 8]))
    tokens = st.integers(0, draw(st.sampled_from([1, 2, 5])))
    rows = st.lists(st.lists(tokens, min_size=size, max_size=size), min_size=BATCH, max_size=BATCH)
    predictions = draw(rows)
    candidates = draw(rows)
    for candidate, prediction in zip(candidates, predictions, strict=True):
        agreed = draw(st.integers(0, size - 1))
        candidate[1 : agreed + 1] = prediction[:agreed]
    budgets = draw(st.lists(st.integers(0, size + 2), min_size=BATCH, max_size=BATCH))
    stops = [draw(st.lists(st.integers(0, 6), max_size=STOPS)) for _ in range(BATCH)]
    return candidates, predictions, budgets, stops


def padded(stops):
    return np.array([row + [-1] * (STOPS - len(row)) for row in stops], np.int32)


@prove
@given(blocks())
def test_accept_length_is_the_plain_loops(block):
    candidates, predictions, _, _ = block
    accepted = accept(np.array(candidates, np.int32), np.array(predictions, np.int32)).tolist()
    assert accepted == [plain_accept(c, p) for c, p in zip(candidates, predictions, strict=True)]
    assert all(0 <= a <= len(predictions[0]) - 1 for a in accepted)


@prove
@given(blocks(), st.data())
def test_produced_length_is_the_plain_loops(block, data):
    _, predictions, budgets, stops = block
    accepted = [data.draw(st.integers(0, len(p) - 1)) for p in predictions]
    arrays = (np.array(x, np.int32) for x in (predictions, accepted, budgets))
    produced, ends = (np.asarray(x).tolist() for x in produce(*arrays, padded(stops)))
    plain = [plain_produce(*row) for row in zip(predictions, accepted, budgets, stops, strict=True)]
    assert list(zip(produced, ends, strict=True)) == plain
    for p, a, budget, end in zip(produced, accepted, budgets, ends, strict=True):
        assert 0 <= p <= min(a + 1, budget)
        assert p > 0 or budget == 0
        assert end or p == a + 1


@pytest.mark.parametrize(
    ("accepted", "budget", "stops", "expected"),
    [
        pytest.param(3, 9, [], (4, False), id="nothing-ends-it"),
        pytest.param(3, 9, [11], (2, True), id="stop-inside-the-accepted"),
        pytest.param(3, 9, [13], (4, True), id="stop-at-the-bonus"),
        pytest.param(2, 9, [13], (3, False), id="stop-beyond-the-bonus"),
        pytest.param(0, 9, [10], (1, True), id="stop-at-the-bonus-of-nothing-accepted"),
        pytest.param(3, 2, [], (2, True), id="budget-cuts"),
        pytest.param(3, 4, [], (4, True), id="budget-just-holds"),
        pytest.param(3, 2, [11], (2, True), id="stop-and-budget-at-once"),
        pytest.param(3, 2, [12], (2, True), id="stop-beyond-the-budget"),
        pytest.param(3, 3, [11], (2, True), id="stop-before-the-budget"),
        pytest.param(3, 9, [12, 11], (2, True), id="the-earliest-stop-counts"),
        pytest.param(4, 9, [], (5, False), id="all-accepted"),
    ],
)
def test_produced_length_by_hand(accepted, budget, stops, expected):
    predictions = np.array([[10, 11, 12, 13, 14]], np.int32)
    produced, ends = produce(predictions, np.array([accepted]), np.array([budget]), padded([stops]))
    assert (int(produced[0]), bool(ends[0])) == expected


def test_an_earlier_agreement_does_not_count_after_a_wrong_token():
    candidates = np.array([[7, 1, 9, 3, 4], [7, 9, 2, 3, 4], [7, 1, 2, 3, 4]], np.int32)
    predictions = np.array([[1, 2, 3, 4, 5]] * 3, np.int32)
    assert accept(candidates, predictions).tolist() == [1, 0, 4]


def test_the_padding_of_stop_tokens_stops_nothing():
    """Not even a prediction of -1, which no target gives."""
    produced, ends = produce(
        np.array([[0, 1]], np.int32), np.array([1]), np.array([5]), np.full((1, STOPS), -1, np.int32)
    )
    assert (int(produced[0]), bool(ends[0])) == (2, False)
