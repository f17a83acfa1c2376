"""What is known of each chip, held against the compiler itself and against jax."""

import jax
import jax.numpy as jnp
import pytest
from compile_cases import topology
from jax.sharding import SingleDeviceSharding

from dflash.compiled.programs import Compiled, TooLarge, compile_program

NAMES = ("v5e:1x1", "v6e:1x1", "v5p:1x1x1", "v4:1x1x1")


@pytest.mark.parametrize("name", NAMES)
def test_a_program_that_needs_more_than_the_chip_has_is_refused_with_the_chips_size(name: str) -> None:
    there = topology(name)
    huge = jax.ShapeDtypeStruct((2**36,), jnp.bfloat16, sharding=SingleDeviceSharding(there.devices[0]))
    refused = compile_program(jax.jit(lambda x: x * 2).lower(huge))
    assert isinstance(refused, TooLarge)
    assert f"({there.chip.hbm_bytes / 2**30:.2f}G)" in refused.message


@pytest.mark.parametrize("name", NAMES)
def test_bytes_per_cycle_are_the_compilers(name: str) -> None:
    """A product of 8 columns takes the time that its weight takes to arrive: that is what the figure was found with."""
    there = topology(name)
    at = SingleDeviceSharding(there.devices[0])
    weight = jax.ShapeDtypeStruct((65536, 8192), jnp.bfloat16, sharding=at)
    columns = jax.ShapeDtypeStruct((8192, 8), jnp.bfloat16, sharding=at)
    product = compile_program(jax.jit(lambda w, x: w @ x).lower(weight, columns))
    assert isinstance(product, Compiled)
    cycles = product.step.matrix_cycles
    assert 65536 * 8192 * 2 / cycles == pytest.approx(there.chip.bytes_per_cycle, rel=0.02)
