"""Products of bfloat16 matrices on a CPU: their values, their gradients, and the form that XLA multiplies fast."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dflash.models import bfloat16
from dflash.models.layers import multiply
from dflash.models.native import MAX_COLUMNS

OUT, IN, N = 24, 40, MAX_COLUMNS + 1


@pytest.fixture(scope="module")
def operands():
    rng = np.random.default_rng(0)
    shapes = (OUT, IN), (IN, N), (OUT, N)
    return [jnp.asarray(rng.normal(size=shape), jnp.bfloat16) for shape in shapes]


def passes(weight, x, cotangent):
    y, back = jax.vjp(multiply, weight, x)
    return y, *back(cotangent)


def test_a_product_and_its_gradients_are_those_of_float32_rounded_once(operands):
    weight, x, cotangent = (np.asarray(a, np.float64) for a in operands)
    for found, exact in zip(
        jax.jit(passes)(*operands), (weight @ x, cotangent @ x.T, weight.T @ cotangent), strict=True
    ):
        assert found.dtype == jnp.bfloat16
        # Half a unit in the last of 8 bits.
        np.testing.assert_allclose(np.asarray(found, np.float64), exact, rtol=2**-8, atol=1e-5)


@pytest.mark.parametrize(("platform", "result"), [("cpu", "f32"), ("tpu", "bf16"), ("cuda", "bf16")])
def test_a_cpu_multiplies_into_float32_and_others_as_before(operands, platform, result):
    lowered = jax.jit(passes).trace(*operands).lower(lowering_platforms=(platform,)).as_text()
    products = [line for line in lowered.splitlines() if "dot_general" in line]
    assert len(products) == 3
    for line in products:
        operand_types, _, of_result = line.rpartition(" -> ")
        assert operand_types.count("xbf16>") == 2
        assert f"x{result}>" in of_result


def test_mixed_products_and_steps_of_decoding_stay_as_they_are(operands):
    weight, x, _ = operands
    assert multiply(weight, x.astype(jnp.float32)).dtype == jnp.float32
    step = jax.jit(multiply).lower(weight, x[:, :MAX_COLUMNS]).as_text()
    assert "-> tensor<24x64xbf16>" in step


def test_what_xla_compiles_for_a_cpu_reads_every_left_operand_by_rows(operands):
    """A transposed left operand would be read as it lies, 5 times as slowly: it must be written out first."""
    text = jax.jit(lambda w, g: jax.vjp(lambda x: bfloat16.product(w, x), jnp.zeros((IN, N), jnp.bfloat16))[1](g)[0])
    compiled = text.lower(operands[0], operands[2]).compile().as_text()
    assert "lhs_contracting_dims={1}" in compiled
    assert "lhs_contracting_dims={0}" not in compiled
