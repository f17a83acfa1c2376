"""Products of bfloat16 matrices on a CPU.

XLA's fast path for CPUs (AMX, AVX512-BF16) takes bfloat16 operands and a float32 result, with the contracted axis last
in the left operand and first or last in the right one. A bfloat16 result, or one operand in float32, as differentiation
would make it, is up to eight times as slow. On other platforms these products are plain.
"""

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental.layout import Layout, with_layout_constraint

from dflash.models.native import on_cpu

_ROWS = Layout(major_to_minor=(0, 1))


def _dot(equation: str, left: Array, right: Array) -> Array:
    def on_any(left: Array, right: Array) -> Array:
        return jnp.einsum(equation, left, right)

    def wide(left: Array, right: Array) -> Array:
        return jnp.einsum(equation, left, right, preferred_element_type=jnp.float32).astype(left.dtype)

    return on_cpu(wide, on_any)(left, right)


def transposed(weight: Array) -> Array:
    """weight.T, written out on a CPU: else XLA multiplies by the weight as it lies, which is the slow way."""
    return on_cpu(lambda w: with_layout_constraint(w.T, _ROWS), jnp.transpose)(weight)


@jax.custom_vjp
def product(weight: Array, x: Array) -> Array:
    """weight bfloat16 [out, in] times x bfloat16 [in, N] -> bfloat16 [out, N]. No forward-mode derivative."""
    return _dot("oi,in->on", weight, x)


def _forward(weight: Array, x: Array) -> tuple[Array, tuple[Array, Array]]:
    return product(weight, x), (weight, x)


def _backward(operands: tuple[Array, Array], cotangent: Array) -> tuple[Array, Array]:
    weight, x = operands
    return _dot("on,in->oi", cotangent, x), _dot("io,on->in", transposed(weight), cotangent)


product.defvjp(_forward, _backward)
