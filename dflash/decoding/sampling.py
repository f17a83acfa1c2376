"""Sampling as a rule: token = argmax(filtered logits / temperature + Gumbel noise), exact token by token.

The noise of a token depends on the seed, the row's number, the position that the token would take, and the token's id:
on nothing that was drafted, and on no other row. So plain decoding and DFlash draw the same tokens, at any block size,
batch or mesh (arXiv 2408.07978), and by the Gumbel rule they are distributed as the softmax says.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from dflash.config import Checked, Index, Mass, Seed, Share, Temperature
from dflash.models import mesh
from dflash.models.layers import likeliest, most_likely
from dflash.models.llama import Llama

Words = tuple[Array, Array]
# So many of the likeliest tokens are listed before a filter looks at all of them.
_LISTED = 256


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class SamplingSettings:
    """How tokens are drawn. Filters are transformers', in this order; of equally likely tokens all stay or go."""

    temperature: Temperature = 0.0
    """Above 0, tokens are drawn, the same in every mode; 0 is greedy. Servers draw with noise of their own."""
    top_k: Index = 0
    """Draw from this many of the likeliest tokens; 0 from all."""
    top_p: Mass = 1.0
    """Draw from the likeliest tokens that reach this probability together."""
    min_p: Share = 0.0
    """Draw from tokens at least this fraction as likely as the likeliest."""
    seed: Seed = 0
    """Seed of the draws."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class SamplingOptions(SamplingSettings, Checked):
    """How tokens are drawn."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Sampling(SamplingSettings):
    """How the tokens of a request are drawn. `check_request` checks it."""

    first_row: Index = 0
    """The number of the first prompt, where a request is a part of a longer list."""

    @classmethod
    def of(cls, options: Any) -> "Sampling":
        """The sampling that a command's or pytest's options ask for; they have these names."""
        return cls(**{f.name: getattr(options, f.name) for f in dataclasses.fields(SamplingSettings)})

    @property
    def filters(self) -> bool:
        """Whether some tokens are never drawn."""
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0

    @property
    def facts(self) -> dict[str, float] | None:
        """The settings for a result; None for greedy decoding."""
        settings = dataclasses.asdict(self)
        del settings["first_row"]
        return settings if self.temperature else None

    @property
    def rule(self) -> "Sampling":
        """What a program depends on: all but whose noise it is."""
        return dataclasses.replace(self, seed=0, first_row=0) if self.temperature else GREEDILY

    def rows(self, batch: int) -> np.ndarray:
        """Seed and number of every row, int32 [B, 2]."""
        numbers = np.arange(self.first_row, self.first_row + batch, dtype=np.uint32)
        return np.stack([np.full(batch, self.seed, np.uint32), numbers], axis=1).view(np.int32)

    def draws(self, batch: int) -> "Draws | None":
        """What a program needs to draw for this many rows; None where it is greedy."""
        return Draws(rule=self.rule, rows=jnp.asarray(self.rows(batch))) if self.temperature else None

    def row(self, number: int) -> "Sampling":
        """The sampling of one row of a request."""
        return dataclasses.replace(self, first_row=self.first_row + number)


GREEDILY = Sampling()


def threefry(key: Words, counter: Words) -> Words:
    """Threefry 2x32 with 20 rounds (Salmon et al. 2011), elementwise on uint32, the shapes broadcast.

    As one expression: jax's own is a loop on a CPU, and costs several times as much.
    """
    k = (*key, key[0] ^ key[1] ^ np.uint32(0x1BD11BDA))
    a, b = counter[0] + k[0], counter[1] + k[1]
    for group in range(5):
        for turn in (13, 15, 26, 6) if group % 2 == 0 else (17, 29, 16, 24):
            a = a + b
            b = ((b << turn) | (b >> (32 - turn))) ^ a
        a, b = a + k[(group + 1) % 3], b + k[(group + 2) % 3] + np.uint32(group + 1)
    return a, b


def gumbel(bits: Array) -> Array:
    """Gumbel noise of 32 random bits each, float32.

    Of -log(-log(1 - u)) with u near 0, where the largest values come from, every bit of u counts.
    """
    u = jnp.minimum((bits.astype(jnp.float32) + 0.5) * 2.0**-32, 1 - 2.0**-24)
    # log1p, which costs a CPU three times a log.
    return -jnp.log(jnp.where(u < 2.0**-8, u * (1 + u * (1 / 2 + u / 3)), -jnp.log(1 - u)))


def _least(scores: Array, weights: Array, limit: Array | int, top: Array, total: Callable[[Array], Array]) -> Array:
    """The lowest score [N] of [M, N] above which the weight is below `limit`; `top` [N] are the largest.

    By bisection over the bits of a float: nothing is sorted, and a mesh exchanges sums alone.
    """
    sign = np.uint32(1 << 31)

    def ordered(x: Array) -> Array:
        """Floats as uint32 in the same order."""
        bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
        return jnp.where(bits < sign, bits | sign, ~bits)

    places = ordered(scores)

    def halve(_: int, ends: Words) -> Words:
        low, high = ends
        middle = low + (high - low) // 2
        enough = total(jnp.where(places > middle, weights, 0)) < limit
        return jnp.where(enough, low, middle + 1), jnp.where(enough, middle, high)

    _, level = jax.lax.fori_loop(0, 32, halve, (ordered(jnp.full_like(top, -jnp.inf)), ordered(top)))
    return jax.lax.bitcast_convert_type(jnp.where(level < sign, ~level, level ^ sign), jnp.float32)


@partial(jax.tree_util.register_dataclass, data_fields=["rows"], meta_fields=["rule"])
@dataclasses.dataclass(frozen=True, kw_only=True)
class Draws:
    """A rule and the rows that it draws for: int32 [B, 2], seed and number of each."""

    rule: Sampling
    rows: Array

    def perturb(self, logits: Array, positions: Array, size: int, tokens: np.ndarray | None = None) -> Array:
        """Logits [M, B*T] -> the scores whose largest is the token drawn, float32 [M, B*T].

        positions int32 [B, T]: where the token would stand in its row's sequence. The logits' rows are `tokens` int32
        [size] (0..size-1 by default), or this device's of them.
        """
        numbers = jnp.arange(logits.shape[0])
        scores = logits.astype(jnp.float32) / self.rule.temperature
        if logits.shape[0] != size:
            numbers += mesh.first_row(logits.shape[0])
            scores = jnp.where((numbers < size)[:, None], scores, -jnp.inf)
        if tokens is not None:
            numbers = jnp.asarray(tokens)[jnp.minimum(numbers, size - 1)]
        scores = self._filtered(scores, size)
        seed, row = (jnp.repeat(x.astype(jnp.uint32), positions.shape[1]) for x in (self.rows[:, 0], self.rows[:, 1]))
        nothing = jnp.uint32(0)
        key = threefry((seed, row), (nothing, positions.reshape(-1).astype(jnp.uint32)))
        both = threefry(key, (nothing, numbers[:, None].astype(jnp.uint32)))
        return scores + gumbel(both[0] ^ both[1])

    def _filtered(self, scores: Array, size: int) -> Array:
        """-inf for what is never drawn. Of equal scores all stay or go."""
        rule, split = self.rule, scores.shape[0] != size

        def total(x: Array) -> Array:
            return mesh.total(x.sum(axis=0)) if split else x.sum(axis=0)

        def at_least(least: Array) -> Array:
            return jnp.where(scores >= least, scores, -jnp.inf)

        if not rule.filters:
            return scores
        # The filters end among the likeliest tokens almost always; where they don't, all are looked at.
        count = _LISTED if rule.top_k or rule.top_p < 1 else 1
        top = likeliest(scores, min(count, size), size)[0].T
        if rule.top_k:
            inside = rule.top_k <= len(top)
            ones = jnp.ones_like(scores)
            least = top[rule.top_k - 1] if inside else _least(scores, ones, rule.top_k, top[0], total)
            scores, top = at_least(least), jnp.where(top >= least, top, -jnp.inf)
        if rule.top_p < 1:
            weights, listed = jnp.exp(scores - top[0]), jnp.exp(top - top[0])
            # The likeliest stays, however little is asked for.
            limit = jnp.maximum(rule.top_p * total(weights), np.finfo(np.float32).tiny)
            above = jnp.cumsum(listed, axis=0) - listed
            scores = at_least(
                jax.lax.cond(
                    (above[-1] + listed[-1] >= limit).all(),
                    lambda: jnp.where(above < limit, top, jnp.inf).min(axis=0),
                    lambda: _least(scores, weights, limit, top[0], total),
                )
            )
        return at_least(top[0] + np.log(rule.min_p)) if rule.min_p else scores


def next_tokens(target: Llama, draws: Draws | None, x: Array, positions: Array) -> Array:
    """Columns after the final norm [H, B*T] of tokens at positions int32 [B, T] -> the token after each, int32 [B, T].

    The most likely one where `draws` is None, the lowest id of a tie.
    """
    if draws is None:
        best = target.most_likely(x)
    else:
        size = target.config.vocab_size
        best = most_likely(draws.perturb(target.scores(x), positions + 1, size), size)
    return best.reshape(positions.shape)
