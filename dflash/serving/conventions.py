"""Which convention a server breaks: its acceptance of a draft beside ours, as it should be and with each one broken.

A server that runs a draft wrongly still answers as the target does, so nothing but acceptance shows it. On the same
prompts, greedily, both should accept the same; where chance does not explain the difference, every convention is broken
here in turn, and one that then gives the server's acceptance slot by slot is named.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from tqdm import tqdm

from dflash import metrics
from dflash.decoding.decode import RequestError, decode
from dflash.measuring.result import BrokenConvention, OwnAcceptance
from dflash.models.draft import Draft, DraftAttention, Rope, proposing
from dflash.models.kv_cache import KVCache
from dflash.models.layers import attend, rotate
from dflash.serving.draft import ServedDraft
from dflash.weights.load import load_draft, load_target

# Of two samples of blocks. Two decoders of the same texts differ by far less: if they run a draft alike, hardly at all.
LEVEL = 0.05
_SHUFFLES = 9999
# Prompts decoded together: a cache for all of a large set would not fit.
_ROWS = 8


# ---- conventions


class _Unnormed(Draft):
    def _context(self, features: list[Array]) -> Array:
        return self.fc(jnp.concatenate(features).astype(self.dtype))


class _NormedFirst(Draft):
    def _context(self, features: list[Array]) -> Array:
        return self.fc(jnp.concatenate([self.hidden_norm(f.astype(self.dtype)) for f in features]))


class _LateAttention(DraftAttention):
    def keys_values(self, x: Array, rope: Rope) -> tuple[Array, Array]:
        assert self.k_norm is not None
        k, v = jnp.split(self.kv(x).reshape(-1, self.head_dim, *rope[0].shape[1:]), 2)
        return self.k_norm(rotate(k, rope), axis=1), v

    def mix(self, x: Array, rope: Rope, keys: Array, values: Array, visible: Array) -> Array:
        assert self.q_norm is not None
        q = rotate(self.q(x).reshape(-1, self.head_dim, *rope[0].shape[1:]), rope)
        q = self.q_norm(q, axis=1).reshape(keys.shape[1], -1, *q.shape[1:])
        return self.out(attend(q, keys, values, visible).reshape(-1, x.shape[1]))


class _NormedLate(Draft):
    def __init__(self, config: Any, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        super().__init__(config, dtype=dtype, rngs=rngs)
        for layer in self.layers:
            layer.attention = _LateAttention(config, dtype=dtype, rngs=rngs)


class _FirstNorm(Draft):
    def append_context(self, features: list[Array], cache: KVCache) -> KVCache:
        context = self._context(features)
        rope = self._rope(cache.positions(context.shape[1] // cache.lengths.shape[0]))
        norm = self.layers[0].attention.k_norm
        assert norm is not None
        for i, layer in enumerate(self.layers):
            k, v = jnp.split(layer.attention.kv(context).reshape(-1, self.config.head_dim, *rope[0].shape[1:]), 2)
            cache = cache.append(i, rotate(norm(k, axis=1), rope), v)
        return cache


class _Late(Draft):
    """A block whose positions do not follow on the context's."""

    def _positions(self, cache: KVCache, slots: int) -> Array:
        return cache.positions(slots) + 1

    def _attend_to(self, i: int, rope: Rope, cache: KVCache, normed: Array) -> tuple[Array, KVCache]:
        return super()._attend_to(i, self._rope(self._positions(cache, rope[0].shape[2])), cache, normed)


class _Early(_Late):
    def _positions(self, cache: KVCache, slots: int) -> Array:
        return cache.positions(slots) - 1


class _FromZero(_Late):
    def _positions(self, cache: KVCache, slots: int) -> Array:
        return cache.positions(slots) - cache.lengths[:, None]


class _WithoutNewest(Draft):
    """The block overwrites what it may not see; its positions stay."""

    def _attend_to(self, i: int, rope: Rope, cache: KVCache, normed: Array) -> tuple[Array, KVCache]:
        seen = dataclasses.replace(cache, lengths=cache.lengths - 1)
        return super()._attend_to(i, rope, seen, normed)[0], cache


class _WithoutContext(Draft):
    def _attend_to(self, i: int, rope: Rope, cache: KVCache, normed: Array) -> tuple[Array, KVCache]:
        seen = dataclasses.replace(cache, lengths=jnp.zeros_like(cache.lengths))
        return super()._attend_to(i, rope, seen, normed)[0], cache


def _as(kind: type[Draft], draft: Draft, changes: Mapping[str, Any] | None = None) -> Draft:
    """The draft as another kind, or with changes to its config; the weights are shared."""
    config = dataclasses.replace(draft.config, **changes or {})
    changed = nnx.eval_shape(lambda: kind(config, dtype=draft.dtype, rngs=nnx.Rngs(0)))
    nnx.update(changed, nnx.state(draft))
    changed.mesh = draft.mesh
    return changed


def _other_layers(step: int, draft: Draft) -> Draft | None:
    ids = tuple(i + step for i in draft.config.target_layer_ids)
    fits = min(ids) >= 0 and max(ids) < draft.config.num_target_layers
    return _as(Draft, draft, {"target_layer_ids": ids}) if fits else None


def _all_layers(name: str, value: Any, draft: Draft) -> Draft | None:
    """Changes a setting in every layer; None where it has that value already."""
    values = (value,) * draft.config.num_layers
    return None if getattr(draft.config, name) == values else _as(Draft, draft, {name: values})


def _other_mask(draft: Draft) -> Draft | None:
    return (
        _as(Draft, draft, {"mask_token_id": 0})
        if draft.config.mask_token_id and not draft.config.learned_mask
        else None
    )


def _other_key_norm(kind: type[Draft], draft: Draft) -> Draft | None:
    return _as(kind, draft) if draft.config.qk_norm else None


def _in_four_bits(draft: Draft) -> Draft:
    """Every matrix in 15 steps a row."""

    def rounded(weight: Array) -> Array:
        if weight.ndim < 2:
            return weight
        step = jnp.maximum(jnp.abs(weight).max(axis=-1, keepdims=True), 1e-30) / 7
        return (jnp.round(weight / step) * step).astype(weight.dtype)

    changed = _as(Draft, draft)
    nnx.update(changed, jax.tree.map(rounded, nnx.state(draft)))
    return changed


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Convention:
    """A way to run a draft wrongly: `broken(draft)` is the draft run so, None where that would be the same or fail."""

    name: str
    broken: Callable[[Draft], Draft | None]


CONVENTIONS = (
    Convention(name="target layers one too low", broken=partial(_other_layers, -1)),
    Convention(name="target layers one too high", broken=partial(_other_layers, 1)),
    Convention(name="the block causal", broken=partial(_all_layers, "causal", True)),
    Convention(name="the block not causal", broken=partial(_all_layers, "causal", False)),
    Convention(name="no sliding window", broken=partial(_all_layers, "windows", None)),
    Convention(name="no norm of the context", broken=partial(_as, _Unnormed)),
    Convention(name="the context's norm before its projection", broken=partial(_as, _NormedFirst)),
    Convention(name="the norms of queries and keys after rotation", broken=partial(_other_key_norm, _NormedLate)),
    Convention(name="the first layer's key norm for the context of all", broken=partial(_other_key_norm, _FirstNorm)),
    Convention(name="the block one position late", broken=partial(_as, _Late)),
    Convention(name="the block one position early", broken=partial(_as, _Early)),
    Convention(name="the block's positions from 0", broken=partial(_as, _FromZero)),
    Convention(name="the newest token's context lost", broken=partial(_as, _WithoutNewest)),
    Convention(name="all context lost", broken=partial(_as, _WithoutContext)),
    Convention(name="the mask token 0", broken=_other_mask),
    Convention(name="weights in 4 bits", broken=_in_four_bits),
)


# ---- acceptance beside acceptance

Figures = Mapping[str, Any]


def own_figures(
    target_dir: Path, served: ServedDraft, prompts: Sequence[list[int]], **settings: Any
) -> Callable[[Convention | None], Figures | None]:
    """Gives `metrics.acceptance` of decoding the prompts here in float32, with a convention broken, or with none.

    Servers know no reduced vocabulary and let a draft propose every token, and so it does here. None where the
    convention can't be broken; `settings` are those of `decode`. Raises ConfigError, WeightsError, and when called
    RequestError.
    """
    target = load_target(target_dir)
    draft = proposing(load_draft(served.directory, target), "all")
    block_size = served.block_size

    def figures(convention: Convention | None) -> Figures | None:
        run = draft if convention is None else convention.broken(draft)
        if run is None:
            return None
        groups = [prompts[first : first + _ROWS] for first in range(0, len(prompts), _ROWS)]
        results = [decode(target, run, group, block_size=block_size, **settings) for group in groups]
        lengths = [row for result in results for row in result.accept_lens]
        if not any(lengths):
            raise RequestError("acceptance is that of blocks, and each answer is its first token alone: ask for more")
        return metrics.acceptance(lengths, block_size)

    return figures


def chance(own: Figures, served: Figures, rounds: int) -> float:
    """How often two samples of the same acceptance differ by as much as these two.

    `served` is summed over so many rounds of the same prompts, which say no more than one. By accept lengths if the
    server reports them (blocks shuffled, acceptance per slot), else by the mean.
    """
    ours = np.array(own["accept_histogram"])
    theirs = np.rint(np.array(served["accept_histogram"] or [0]) / rounds).astype(int)
    if not theirs.any():
        lengths, n = np.arange(len(ours)), ours.sum()
        mean = ours @ lengths / n
        variance = max(ours @ (lengths - mean) ** 2 / n, 1 / n)
        error = math.sqrt(variance / n + variance * rounds / served["num_drafts"])
        return math.erfc(abs(served["accept_len_mean"] - mean) / error / math.sqrt(2))
    both, count = ours + theirs, int(theirs.sum())
    shuffled = np.random.default_rng(0).multivariate_hypergeometric(both, count, size=_SHUFFLES)
    reached = _distances(shuffled, both) >= _distances(theirs[None], both) - 1e-9
    return float((1 + reached.sum()) / (1 + _SHUFFLES))


def _distances(parts: np.ndarray, both: np.ndarray) -> np.ndarray:
    """How far the acceptance per slot of each row [N, S] of accept lengths is from that of the rest of `both` [S]."""

    def per_slot(counts: np.ndarray) -> np.ndarray:
        return counts[:, ::-1].cumsum(axis=1)[:, :-1] / counts.sum(axis=1, keepdims=True)

    return np.linalg.norm(per_slot(parts) - per_slot(both - parts), axis=1)


def held_to_ours(served: Figures, rounds: int, own: Callable[[Convention | None], Figures | None]) -> OwnAcceptance:
    """A server's figures, summed over `rounds`, beside ours; with a gap, beside those of every broken convention too.

    `own` gives our figures with a convention broken (None: with none), or None where it can't be.
    """
    right = own(None)
    assert right is not None
    likely = chance(right, served, rounds)
    broken = {}
    tried = CONVENTIONS if likely < LEVEL else ()
    for convention in tqdm(tried, desc="conventions", unit="convention", leave=False, disable=None):
        if (figures := own(convention)) is not None:
            broken[convention.name] = BrokenConvention(
                accept_len_mean=figures["accept_len_mean"],
                accept_rate_per_pos=figures["accept_rate_per_pos"],
                chance=chance(figures, served, rounds),
            )
    return OwnAcceptance(
        **right,
        chance=likely,
        gap=likely < LEVEL,
        broken=broken,
        explained_by=_nearest(broken, served),
    )


def _nearest(broken: Mapping[str, BrokenConvention], served: Figures) -> list[str]:
    """Those that chance may have made the server's, the nearest first."""

    def distance(name: str) -> float:
        mine, theirs = broken[name], served["accept_rate_per_pos"]
        if theirs is None:
            return abs(mine.accept_len_mean - served["accept_len_mean"])
        return math.dist(mine.accept_rate_per_pos, theirs)

    return sorted((name for name in broken if broken[name].chance >= LEVEL), key=distance)
