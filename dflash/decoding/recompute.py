"""Decoding without a cache: every step reads the whole sequence again. Slow and simple: the loop is checked against it.

It shares only the networks with the loop: accept rule, stop tokens and budget are plain Python here.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from dflash.decoding.sampling import Draws
from dflash.metrics import round_up
from dflash.models import mesh
from dflash.models.draft import Draft, proposed_tokens
from dflash.models.llama import Llama

# Sequences are padded to a multiple of this, so that few shapes are compiled.
_PAD = 64


# Models are passed split: nnx.jit would write them back and so move their weights between devices.


def _perturbed(scores: Array, draws: Draws | None, positions: Array, ids: np.ndarray | None = None) -> Array:
    return scores if draws is None else draws.perturb(scores, positions, scores.shape[0], ids)


@partial(jax.jit, static_argnames=("graph", "layer_ids"))
def _read(
    graph: Any, weights: Any, tokens: Array, draws: Draws | None, layer_ids: tuple[int, ...]
) -> tuple[Array, list[Array]]:
    """tokens int32 [1, T] -> the target's token after each [T], and the context features [H, T]."""

    def run(weights: Any, tokens: Array, draws: Draws | None) -> tuple[Array, list[Array]]:
        target = nnx.merge(graph, weights)
        x, features, _ = target.hidden(tokens, layer_ids=layer_ids)
        after = 1 + jnp.arange(tokens.shape[1])[None]
        return jnp.argmax(_perturbed(target.logits(x), draws, after), axis=0), features

    return mesh.on_every_device(run, mesh.of(graph, weights))(weights, tokens, draws)


@partial(jax.jit, static_argnames="graphs")
def _propose(
    graphs: Any, weights: Any, features: list[Array], context: Array, block: Array, draws: Draws | None
) -> Array:
    """block int32 [1, S] after `context` int32 [1] tokens of features [H, T] -> drafted tokens [S-1]."""

    def run(weights: Any, features: list[Array], context: Array, block: Array, draws: Draws | None) -> Array:
        target, draft = (nnx.merge(g, w) for g, w in zip(graphs, weights, strict=True))
        x = draft.masked(target.embed(block).astype(draft.dtype), block.shape[1])
        slots = draft.uncached(features, context[:, None], x)[:, 1:]
        ids = proposed_tokens(draft.config)
        logits = target.logits(slots.astype(target.dtype))[... if ids is None else ids]
        logits = _perturbed(logits, draws, context[:, None] + jnp.arange(1, block.shape[1]), ids)
        if draft.selector is not None:
            scale = 1.0 if draws is None else 1 / draws.rule.temperature
            return draft.choose(slots, logits, block[:, 0], scale)[0]
        best = jnp.argmax(logits, axis=0)
        return best if ids is None else jnp.asarray(ids)[best]

    return mesh.on_every_device(run, mesh.of(graphs[0], weights[0]))(weights, features, context, block, draws)


def _padded(tokens: Sequence[int]) -> Array:
    length = round_up(len(tokens), _PAD)
    return jnp.asarray([*tokens, *([0] * (length - len(tokens)))], jnp.int32)[None]


def recompute_row(
    target: Llama,
    draft: Draft | None,
    prompt: Sequence[int],
    *,
    block_size: int,
    budget: int,
    stops: Sequence[int],
    script: np.ndarray | None = None,
    draws: Draws | None = None,
) -> tuple[list[int], list[int], list[int]]:
    """Tokens, accept lengths and produced lengths of one row; `draft` None: a token at a time (accept lengths 0).

    script int32 [M]: tokens to propose instead of the draft's, by position in the output; -1 leaves the draft's.
    """
    draft = None if draft is None else mesh.place(draft, target.mesh)
    layer_ids = () if draft is None else draft.config.target_layer_ids
    models = (target,) if draft is None else (target, draft)
    graphs, weights = tuple(nnx.graphdef(m) for m in models), tuple(nnx.state(m) for m in models)

    def read(tokens: Sequence[int]) -> tuple[Array, list[Array]]:
        return _read(graphs[0], weights[0], _padded(tokens), draws, layer_ids)

    predictions, features = read(prompt)
    output = [int(predictions[len(prompt) - 1])]
    accepted, produced = list[int](), list[int]()
    while len(output) < budget and output[-1] not in stops:
        drafted: list[int] = []
        if draft is not None:
            block = [output[-1]] + [draft.config.mask_token_id] * (block_size - 1)
            context = jnp.asarray([len(prompt) + len(output) - 1], jnp.int32)
            drafted = np.asarray(_propose(graphs, weights, features, context, jnp.asarray([block]), draws)).tolist()
            for k in range(len(drafted)):
                place = len(output) + k
                if script is not None and place < len(script) and script[place] >= 0:
                    drafted[k] = int(script[place])
        known = [*prompt, *output]
        predictions, features = read([*known, *drafted])
        answers = np.asarray(predictions)[len(known) - 1 : len(known) + len(drafted)].tolist()
        agreed = 0
        while agreed < len(drafted) and drafted[agreed] == answers[agreed]:
            agreed += 1
        emitted = list[int]()
        for token in answers[: agreed + 1]:
            emitted.append(token)
            if token in stops or len(output) + len(emitted) == budget:
                break
        output += emitted
        accepted.append(agreed)
        produced.append(len(emitted))
    return output, accepted, produced
