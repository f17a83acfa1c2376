"""One-token steps against blocks: nothing in float32, and the layer where a difference begins."""

import jax.numpy as jnp
import numpy as np
import pytest

from dflash import load_target
from dflash.decoding.parity import Spread, compare_steps, ulps
from dflash.models.layers import Linear
from dflash.weights.tiny import write_tiny_target

RNG = np.random.default_rng(3)
PROMPTS = [RNG.integers(0, 199, n).tolist() for n in (5, 21)]
ANSWERS = [RNG.integers(0, 199, n).tolist() for n in (19, 8)]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return write_tiny_target(tmp_path_factory.mktemp("parity") / "target", num_hidden_layers=2)


@pytest.fixture
def round_blocks_in_layer_1(monkeypatch):
    """Products of 8 columns come out a little larger, from the second layer's MLP on."""
    call = Linear.__call__

    def broken(self, x):
        y = call(self, x)
        return y * 1.02 if x.shape == (96, 8) and broken.calls() else y

    seen = []
    broken.calls = lambda: seen.append(1) or len(seen) == 2
    monkeypatch.setattr(Linear, "__call__", broken)


def test_float32_differs_by_no_more_than_its_own_rounding(directory):
    parity = compare_steps(load_target(directory), PROMPTS, ANSWERS, 8)
    assert (parity.positions, parity.flips, parity.defects) == (16 + 8, 0, 0)
    # Our kernels sum in one order whatever the number of tokens; XLA's need not.
    assert parity.logits.ulps_p99 <= 64
    assert len(parity.layers) == 2
    assert parity.bitwise_equal == (parity.first_layer is None)
    assert parity.flip_rate == 0


@pytest.mark.usefixtures("round_blocks_in_layer_1")
def test_where_a_difference_begins(directory):
    parity = compare_steps(load_target(directory, "bfloat16"), PROMPTS[:1], ANSWERS[:1], 8)
    assert not parity.bitwise_equal
    assert parity.first_layer == 1
    assert parity.layers[0] == Spread(ulps_max=0, ulps_p99=0)
    assert 0 < parity.layers[1].ulps_p99 <= parity.layers[1].ulps_max


def test_an_answer_without_a_block(directory):
    with pytest.raises(ValueError, match=r"\b9 tokens .*got 8"):
        compare_steps(load_target(directory), PROMPTS[1:], ANSWERS[1:], 9)


def test_ulps():
    a = np.array([[1.0, 1.0, 1e-9, -1.0]])
    b = np.array([[1.0, 1.0 + 2**-7, -1e-9, -1.0 - 2**-6]])
    # Next to zero the unit is that of the row's usual size, sqrt(3/4) here.
    expected = [0, 1, 2e-9 / (2**-1 * 2**-7), 2]
    np.testing.assert_allclose(ulps(a, b, jnp.bfloat16), [expected])
