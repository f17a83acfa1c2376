"""What the target itself says of tokens: their log-probabilities, from one reading of the whole row without a cache."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from dflash.metrics import round_up
from dflash.models import mesh
from dflash.models.llama import Llama

# So many positions are scored at a time: all logits of a long row may not fit.
_PLACES = 64


@partial(jax.jit, static_argnames="graph")
def _score(graph: Any, weights: Any, tokens: Array, following: Array) -> Array:
    """tokens int32 [1, T], and what follows each int32 [T] -> the log-probability of that, float32 [T]."""

    def run(weights: Any, tokens: Array, following: Array) -> Array:
        target = nnx.merge(graph, weights)
        x, _, _ = target.hidden(tokens)

        def score(part: tuple[Array, Array]) -> Array:
            logits = target.logits(part[0].T).astype(jnp.float32)
            chosen = jnp.take_along_axis(logits, part[1][None], axis=0)[0]
            return chosen - jax.nn.logsumexp(logits, axis=0)

        parts = x.T.reshape(-1, _PLACES, x.shape[0]), following.reshape(-1, _PLACES)
        return jax.lax.map(score, parts).reshape(-1)

    return mesh.on_every_device(run, mesh.of(graph, weights))(weights, tokens, following)


def log_probabilities(target: Llama, prompt: Sequence[int], tokens: Sequence[int]) -> list[float]:
    """The natural log-probability of each token after those before it, by the target's own softmax at temperature 1.

    Whatever the tokens were drawn with: no filter changes them.
    """
    row = np.asarray([*prompt, *tokens], np.int32)
    padded = np.zeros((2, round_up(len(row), _PLACES)), np.int32)
    padded[0, : len(row)], padded[1, : len(row) - 1] = row, row[1:]
    scores = _score(*nnx.split(target), padded[:1], padded[1])
    return np.asarray(scores)[len(prompt) - 1 : len(row) - 1].tolist()
