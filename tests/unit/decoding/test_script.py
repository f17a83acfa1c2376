"""Scripted drafts: the table that makes the target agree with exactly `a` tokens of every block."""

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dflash import ScriptedDraft

VOCAB = 11
# Only the vocabulary of the wrapped draft matters here.
DRAFT = SimpleNamespace(config=SimpleNamespace(vocab_size=VOCAB))


def scripted(outputs, accept_len):
    return ScriptedDraft(draft=DRAFT, outputs=outputs, accept_len=accept_len)


def accept_lengths(table, outputs, size):
    """The accept rule in plain python, for all blocks that the outputs cover."""
    place, lengths = 1, []
    while place + size - 1 <= len(outputs):
        agreed = 0
        while agreed < size - 1 and table[place + agreed] == outputs[place + agreed]:
            agreed += 1
        lengths.append(agreed)
        place += agreed + 1
    return lengths


@settings(derandomize=True, deadline=None, max_examples=200, database=None)
@given(st.data())
def test_every_block_is_accepted_exactly_so_far(data):
    size = data.draw(st.integers(2, 9))
    wanted = data.draw(st.integers(0, size - 1))
    rows = data.draw(st.lists(st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=40), min_size=1, max_size=3))
    table = scripted(rows, wanted).table(size)
    assert table.dtype == np.int32
    assert table.shape == (len(rows), max(map(len, rows)))
    assert table.max() < VOCAB
    for line, outputs in zip(table, rows, strict=True):
        assert (line[: len(outputs)] >= 0).all()
        assert (line[len(outputs) :] == -1).all()
        assert set(accept_lengths(line, outputs, size)) <= {wanted}


def test_worked_example():
    # Blocks of 4 that agree for 1: places 1-3, 3-5, 5-7; each second one is wrong.
    assert scripted([[0, 1, 2, 3, 10, 5]], 1).table(4).tolist() == [[0, 1, 3, 3, 0, 5]]
    assert scripted([[0, 1, 2, 3]], 3).table(4).tolist() == [[0, 1, 2, 3]]
    assert scripted([[0, 1, 2], [4]], 0).table(2).tolist() == [[0, 2, 3], [4, -1, -1]]


@pytest.mark.parametrize("accept_len", [-1, 4, 100])
def test_accept_len_out_of_range_is_refused(accept_len):
    with pytest.raises(ValueError, match=rf"accept_len .*0\.\.3 .*blocks of 4, got {accept_len}"):
        scripted([[1, 2]], accept_len).table(4)


def test_outputs_stay_as_they_are():
    outputs = np.array([[1, 2, 3, 4]], np.int32)
    scripted(outputs, 0).table(3)
    assert outputs.tolist() == [[1, 2, 3, 4]]
