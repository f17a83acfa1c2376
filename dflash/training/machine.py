"""What the machine gives that trains: its own rate of matrix products, which a step's is held beside."""

import time

import jax
import jax.numpy as jnp

from dflash.models.layers import multiply


def matmul_rate(dtype: str = "float32", size: int = 2048, rounds: int = 5) -> float:
    """Floating point operations per second of a square matrix product on the default device: the best of some rounds.

    It is multiplied as the networks here multiply: float32 without TF32 and the like.
    """
    data = jnp.ones((size, size), dtype)
    product = jax.jit(multiply).lower(data, data).compile()
    seconds = []
    for _ in range(1 + rounds):
        start = time.perf_counter()
        jax.block_until_ready(product(data, data))
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds[1:])  # the first warms up
