"""Networks whose weights a test draws: what nnx would draw is compiled once per shape, and then thrown away."""

from collections.abc import Callable
from typing import Any, TypeVar

import jax.numpy as jnp
from flax import nnx

from dflash.training import objective

Network = TypeVar("Network", bound=nnx.Module)

# One program each. Step by step every operation is a program of its own, and compiling those takes ten times as long.
block_hidden = nnx.jit(objective.block_hidden)
predict_blocks = nnx.jit(objective.predict_blocks, static_argnames=("vocab_size", "chunk"))


def drawn(make: Callable[[], Network], draw: Callable[[tuple[Any, ...], tuple[int, ...]], Any]) -> Network:
    """The network that `make` makes; `draw(path, shape)` gives each of its weights, in the order of their paths."""
    network = nnx.eval_shape(make)
    weights = []
    for path, weight in nnx.to_flat_state(nnx.state(network)):
        shape = weight.get_value()
        weights.append((path, weight.replace(jnp.asarray(draw(path, shape.shape), shape.dtype))))
    nnx.update(network, nnx.from_flat_state(weights))
    return network
