"""The candidate selector of a DFlash 2 draft: picks one of each slot's likeliest tokens by the token before it.

A draft's slots are predicted in parallel, without knowing each other's tokens. The selector goes through them from left
to right and adds to each candidate's logit how well it follows the token chosen before it, a product of rank r.
Canonical form: PyPI `dflash==0.1.0`.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from dflash.config import SelectorConfig
from dflash.models.layers import Linear, likeliest, precision


class CandidateSelector(nnx.Module):
    """score(c) = logit(c) + successor[c] . (predecessor[previous] * hidden(x)); codebooks [V, r].

    The successors start at zero, so a new selector keeps the draft's choice.
    """

    def __init__(self, vocab_size: int, hidden_size: int, config: SelectorConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.top_k = config.top_k
        self.predecessor = nnx.Param(rngs.normal((vocab_size, config.rank), dtype))
        self.successor = nnx.Param(jnp.zeros((vocab_size, config.rank), dtype))
        self.hidden = Linear(hidden_size, config.rank, dtype=dtype, rngs=rngs)

    def follow(self, hidden: Array, previous: Array, candidates: Array) -> Array:
        """How well each candidate follows: hidden [r, N], previous int32 [N], candidates int32 [N, k] -> [N, k]."""
        wanted = self.predecessor[...][previous] * hidden.T
        return jnp.einsum("nr,nkr->nk", wanted, self.successor[...][candidates], precision=precision(hidden.dtype))

    def select(
        self,
        x: Array,
        logits: Array,
        anchors: Array,
        count: int,
        ids: np.ndarray | None = None,
        scale: float = 1.0,
    ) -> Array:
        """Drafted slots [H, B*T] and their logits [V, B*T], behind anchors int32 [B] -> tokens int32 [B, T].

        With `ids` int32 [M] the logits are those of these tokens, [M, B*T]. `count` is V, or M: on a mesh this device
        has some of these rows. `scale` is what the logits were multiplied by.
        """
        B = anchors.shape[0]
        unary, candidates = (x.reshape(B, -1, self.top_k) for x in likeliest(logits, self.top_k, count))
        candidates = candidates if ids is None else jnp.asarray(ids)[candidates]
        hidden = self.hidden(x).reshape(-1, B, unary.shape[1])

        def choose(previous: Array, slot: tuple[Array, Array, Array]) -> tuple[Array, Array]:
            unary, candidates, hidden = slot
            best = jnp.argmax(unary + scale * self.follow(hidden, previous, candidates), axis=1)
            token = jnp.take_along_axis(candidates, best[:, None], axis=1)[:, 0]
            return token, token

        slots = (unary.swapaxes(0, 1), candidates.swapaxes(0, 1), jnp.moveaxis(hidden, 2, 0))
        return jax.lax.scan(choose, anchors, slots)[1].T
