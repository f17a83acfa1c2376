"""What a target says of a whole sequence without cache or loop, and how far honest rounding may move it.

The audit trusts nothing that decoding uses: here all tokens are read at once, with positions and masks written out. The
noise is measured, not assumed: the sequence is read again a few times with every entry of every layer's output moved at
random by about one unit in the last place (Monte Carlo arithmetic, Parker 1997). All later roundings then fall
differently, and more of them than when a matrix product changes its shape. A fault of the decoders can't enter this
noise.
"""

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from dflash.decoding.sampling import GREEDILY, Draws, Sampling
from dflash.models import mesh
from dflash.models.draft import Draft
from dflash.models.kv_cache import KVCache, attention_mask
from dflash.models.layers import rope_tables
from dflash.models.llama import Llama

DRAWS = 8
# Draws before a choice is called dishonest: a nearly tied router may need several before it switches.
MOST_DRAWS = 64
# Two logits, or both decoders that are compared, may each move as far as was measured.
SAFETY = 2.0
# Logits are rounded to the dtype: differences below this many units of the largest one mean nothing.
FLOOR_ULPS = 2.0
_PAD = 128
_PLACES = 64


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class _Record(KVCache):
    """The keys and values of one append of all tokens, position p in slot p: it shares no arithmetic with a cache."""

    @classmethod
    def empty(cls, windows: Sequence[int | None]) -> "_Record":
        return cls(keys=(), values=(), lengths=jnp.zeros(1, jnp.int32), windows=tuple(windows), block=0)

    def positions(self, count: int) -> Array:
        return jnp.arange(count, dtype=jnp.int32)[None]

    def append(self, layer: int, keys: Array, values: Array) -> "_Record":
        assert layer == len(self.keys)
        return dataclasses.replace(
            self,
            keys=(*self.keys, keys.transpose(2, 0, 1, 3)),
            values=(*self.values, values.transpose(2, 0, 3, 1)),
        )


def _moved(x: Array, size: Array, key: Array) -> Array:
    """x with every entry moved by up to `size` of itself, at random."""
    moves = jax.random.uniform(key, x.shape, jnp.float32, -1, 1) * size
    return (x.astype(jnp.float32) * (1 + moves)).astype(x.dtype)


# Keys and values of a layer, [T, D] each: one row per position, with all heads.
Layers = list[tuple[Array, Array]]


def _rows(record: KVCache) -> Layers:
    def rows(x: Array) -> Array:
        return x.reshape(x.shape[0], -1)

    return [
        (rows(k[0].transpose(2, 0, 1)), rows(v[0].transpose(1, 0, 2)))
        for k, v in zip(record.keys, record.values, strict=True)
    ]


@partial(jax.jit, static_argnames="graphs")
def _read(
    graphs: tuple[Any, Any], weights: tuple[Any, Any], tokens: Array, size: Array, key: Array
) -> tuple[Array, Layers, Layers]:
    """tokens int32 [T] -> columns after the final norm [H, T]; keys and values of the target, and of the draft."""

    def run(weights: tuple[Any, Any], tokens: Array, size: Array, key: Array) -> tuple[Array, Layers, Layers]:
        target = nnx.merge(graphs[0], weights[0])
        draft = None if graphs[1] is None else nnx.merge(graphs[1], weights[1])
        positions = jnp.arange(tokens.shape[0], dtype=jnp.int32)
        config = target.config
        masks = {
            w: attention_mask(positions[None, :, None], positions[None, None, :], window=w, causal=True)
            for w in set(config.windows)
        }
        rope = rope_tables(config.rope, config.head_dim, positions[None])
        keys = jax.random.split(key, config.num_layers + 1)
        record: Any = _Record.empty(config.windows)
        x = _moved(target.embed(tokens), size, keys[-1])
        outputs = []
        for i, layer in enumerate(target.layers):
            x, record = layer(x, rope, masks, record)
            x = _moved(x, size, keys[i])
            outputs.append(x)
        drafted: Layers = []
        if draft is not None:
            features = [outputs[i] for i in draft.config.target_layer_ids]
            drafted = _rows(draft.append_context(features, _Record.empty(draft.config.windows)))
        return target.norm(x), _rows(record), drafted

    heads = mesh.split_by(None, "kv_heads")
    there = mesh.of(graphs[0], weights[0])
    return mesh.on_every_device(run, there, (mesh.WHOLE, heads, heads))(weights, tokens, size, key)


@partial(jax.jit, static_argnames="graph")
def _judge(
    graph: Any,
    weights: Any,
    x: Array,
    drawn: list[Array],
    choices: Array,
    draws: Draws | None,
    positions: Array,
) -> tuple[Array, ...]:
    """Columns x [H, N], and the same columns with perturbed layers; choices int32 [N] at positions int32 [1, N].

    See `Judged`. Where `draws` is not None, scores stand for logits: a filter may drop a token in one reading and keep
    it in another, so it counts as far below as in the reading that favours it.
    """

    def run(
        weights: Any, x: Array, drawn: list[Array], choices: Array, draws: Draws | None, positions: Array
    ) -> tuple[Array, ...]:
        target = nnx.merge(graph, weights)

        def read(x: Array) -> tuple[Array, Array]:
            """Logits and scores [V, N]."""
            logits = target.logits(x).astype(jnp.float32)
            return logits, logits if draws is None else draws.perturb(logits, positions, logits.shape[0])

        def behind(scores: Array) -> tuple[Array, Array]:
            """How far the choice is below the top, and how many tokens are strictly above it."""
            chosen = jnp.take_along_axis(scores, choices[None], axis=0)
            return scores.max(axis=0) - chosen[0], (scores > chosen).sum(axis=0)

        logits, scores = read(x)
        best = target.most_likely(x) if draws is None else jnp.argmax(scores, axis=0)
        margin, rank = behind(scores)
        noise = jnp.zeros_like(margin)
        for other_logits, other in map(read, drawn):
            noise = jnp.maximum(noise, jnp.abs(other_logits - logits).max(axis=0))
            other_margin, other_rank = behind(other)
            rank = jnp.minimum(rank, other_rank)
            if draws is not None and draws.rule.filters:
                margin = jnp.minimum(margin, other_margin)
        return best, margin, noise, rank, jnp.abs(logits.max(axis=0))

    return mesh.on_every_device(run, mesh.of(graph, weights))(weights, x, drawn, choices, draws, positions)


def ulp(values: np.ndarray, dtype: Any) -> np.ndarray:
    """The unit in the last place of `dtype` at each of these magnitudes, float64."""
    exponents = np.floor(np.log2(np.maximum(np.abs(values.astype(np.float64)), np.finfo(np.float32).tiny)))
    return np.exp2(exponents) * float(jnp.finfo(dtype).eps)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Judged:
    """Chosen tokens against the honest logits, one entry per token.

    best: the honest most likely token. margin: its logit above the chosen one's. noise: the margin that honest rounding
    may overturn: SAFETY times the largest move of any logit over all draws, and at least FLOOR_ULPS. rank: how many
    tokens are above the chosen one in the draw that favours it most. Of sampled tokens, scores instead of logits.
    """

    best: np.ndarray
    margin: np.ndarray
    noise: np.ndarray
    rank: np.ndarray

    @property
    def honest(self) -> np.ndarray:
        """Whether each choice is the top token or nearly tied: within the noise, and first or second in some draw."""
        return (self.margin == 0) | ((self.margin <= self.noise) & (self.rank <= 1))


class Reference:
    """One sequence, read at once: honest logits at any position, keys and values of every layer, and their noise.

    `keys_values` and `draft_keys_values` are per layer a pair of float32 [T, D]; `moves` and `draft_moves` per layer a
    pair of float64 [T]: the furthest that rounding moved the row in any draw, as a share of its norm.
    """

    def __init__(self, target: Llama, tokens: Sequence[int], draft: Draft | None = None, *, seed: int = 0):
        models = (target, None if draft is None else mesh.place(draft, target.mesh))
        graphs = tuple(None if m is None else nnx.graphdef(m) for m in models)
        weights = tuple(None if m is None else nnx.state(m) for m in models)
        self.target, self._graph, self._weights = target, graphs[0], weights[0]
        length = len(tokens)
        padded = jnp.asarray([*tokens, *([0] * (-length % _PAD))], jnp.int32)
        # Sums are kept in float32 in either dtype; their error grows with the square root of the number of terms.
        sums = float(np.sqrt(target.config.hidden_size) * np.finfo(np.float32).eps)
        size = jnp.float32(float(jnp.finfo(target.dtype).eps) + sums)
        keys = jax.random.split(jax.random.key(seed, impl="rbg"), MOST_DRAWS + 1)
        read = partial(_read, graphs, weights, padded)
        self._x, *kept = read(jnp.float32(0), keys[0])
        self._draw = [partial(read, size, key) for key in keys[1:]]
        self.keys_values, self.draft_keys_values = (self._numbers(layers, length) for layers in kept)
        self.moves, self.draft_moves = ([(np.zeros(length), np.zeros(length)) for _ in layers] for layers in kept)
        self._drawn = []
        for draw in self._draw[:DRAWS]:
            x, *layers = draw()
            self._drawn.append(x)
            self.moves = self._largest(self.moves, self.keys_values, self._numbers(layers[0], length))
            self.draft_moves = self._largest(self.draft_moves, self.draft_keys_values, self._numbers(layers[1], length))

    @staticmethod
    def _numbers(layers: Layers, length: int) -> list[tuple[np.ndarray, ...]]:
        return [tuple(np.asarray(x)[:length].astype(np.float32) for x in pair) for pair in layers]

    @staticmethod
    def _largest(moves: list[Any], plain: list[Any], drawn: list[Any]) -> list[Any]:
        return [
            tuple(np.maximum(m, relative_move(d, p)) for m, p, d in zip(*layer, strict=True))
            for layer in zip(moves, plain, drawn, strict=True)
        ]

    def judge(self, start: int, choices: Sequence[int], sampling: Sampling = GREEDILY) -> Judged:
        """Judges `choices[k]` as the token after position start + k; draws more often if one seems dishonest.

        `sampling` is that of this row (`Sampling.row`).
        """
        judged = self._judge_by(self._drawn, start, choices, sampling)
        if not judged.honest.all() and len(self._drawn) < MOST_DRAWS:
            self._drawn += [draw()[0] for draw in self._draw[len(self._drawn) :]]
            judged = self._judge_by(self._drawn, start, choices, sampling)
        return judged

    def _judge_by(self, drawn: list[Array], start: int, choices: Sequence[int], sampling: Sampling) -> Judged:
        parts, draws, temperature = [], sampling.draws(1), sampling.temperature or 1.0
        for first in range(0, len(choices), _PLACES):
            # The head is applied to a few positions and draws at a time: all logits of a long answer may not fit.
            some = np.asarray(choices[first : first + _PLACES], np.int32)
            padded = jnp.asarray(np.pad(some, (0, _PLACES - len(some))))
            places = np.minimum(start + first + np.arange(_PLACES), self._x.shape[1] - 1)
            few = [[x[:, places] for x in drawn[i : i + DRAWS]] for i in range(0, len(drawn), DRAWS)]
            after = jnp.asarray(places, jnp.int32)[None] + 1
            out = [_judge(self._graph, self._weights, self._x[:, places], xs, padded, draws, after) for xs in few]
            best, margin, noise, rank, top = (np.stack(a)[:, : len(some)] for a in zip(*out, strict=True))
            parts.append((best[0], margin.min(axis=0), noise.max(axis=0), rank.min(axis=0), top[0]))
        best, margin, noise, rank, top = (np.concatenate(p) for p in zip(*parts, strict=True))
        noise = np.maximum(SAFETY * noise, FLOOR_ULPS * ulp(top, self.target.dtype)) / temperature
        return Judged(best=best, margin=margin, noise=noise, rank=rank)


def relative_move(rows: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """How far each row of [T, D] is from the reference's, as a share of the reference's norm, float64 [T]."""
    norms = np.linalg.norm(reference.astype(np.float64), axis=1)
    return np.linalg.norm(rows.astype(np.float64) - reference, axis=1) / np.maximum(norms, np.finfo(np.float32).tiny)
