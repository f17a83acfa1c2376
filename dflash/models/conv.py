"""The grouped dynamic causal convolution of a DFlash 2 draft: each slot mixes in the ones before it in its block.

Canonical form: PyPI `dflash==0.1.0`. A block is drafted in one pass, so a slot knows its neighbours only through
attention; the convolution, around attention and around the MLP, gives it the last few directly.
"""

import jax.numpy as jnp
from flax import nnx
from jax import Array

from dflash.config import ConvConfig
from dflash.models.layers import Linear


class DynamicConv(nnx.Module):
    """`base` [2, K, H]: a kernel before the sublayer and one after it; `kernel` adds to both, per group and slot.

    y_t = sum over o < K of (base[o] + dynamic[t, o]) * x_(t-o), where x before the block is zero. It starts as the
    identity, so adding one does not change what a DFlash draft computes.
    """

    def __init__(self, hidden_size: int, config: ConvConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.size, self.groups = config.kernel_size, hidden_size // config.group_size
        self.base = nnx.Param(jnp.zeros((2, self.size, hidden_size), dtype).at[:, 0].set(1))
        self.kernel = Linear(hidden_size, 2 * self.size * self.groups, dtype=dtype, rngs=rngs)
        self.kernel.weight[...] = jnp.zeros_like(self.kernel.weight[...])

    def prepare(self, x: Array, slots: int) -> tuple[Array, Array]:
        """Normed input [H, N], `slots` columns per block -> the sublayer's input [H, N] and `finish`'s kernels."""
        dynamic = self.kernel(x).reshape(2, self.size, self.groups, -1)
        return self._convolve(0, x, dynamic[0], slots), dynamic[1]

    def finish(self, x: Array, dynamic: Array, slots: int) -> Array:
        """The sublayer's output [H, N], convolved with the kernels [K, H/group, N] that `prepare` gave -> [H, N]."""
        return self._convolve(1, x, dynamic, slots)

    def _convolve(self, which: int, x: Array, dynamic: Array, slots: int) -> Array:
        base = self.base[...][which].reshape(self.size, self.groups, -1, 1, 1)
        blocks = x.reshape(self.groups, -1, x.shape[1] // slots, slots)
        total = jnp.zeros_like(blocks)
        for offset in range(min(self.size, slots)):
            earlier = jnp.pad(blocks, ((0, 0), (0, 0), (0, 0), (offset, 0)))[..., :slots]
            total += (base[offset] + dynamic[offset].reshape(self.groups, 1, -1, slots)) * earlier
        return total.reshape(x.shape)
