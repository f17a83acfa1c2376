"""How a new draft starts: the tokens that it proposes, and copies of the target's layers and final norm.

Random weights spend their first hundred thousand slots on learning how often each token occurs.
"""

from collections.abc import Mapping, Sequence

import jax.numpy as jnp
import numpy as np
from flax import nnx

from dflash.config import ConfigError, TargetConfig
from dflash.models.draft import Draft
from dflash.training.cache.sequences import SequenceCache
from dflash.training.cache.windows import WindowCache


def frequent_tokens(
    cache: SequenceCache | WindowCache, count: int, vocab_size: int, learned: np.ndarray | None = None
) -> np.ndarray:
    """The `count` most frequent tokens of the training rows' labels, ascending; the lowest ids among equals.

    Those that a draft has `learned` come before all others.
    """
    rows = cache.rows(False)
    if isinstance(cache, WindowCache):
        labels = cache.labels(rows)
    else:
        tokens = np.concatenate([np.arange(cache.bounds[row], cache.bounds[row + 1]) for row in rows])
        labels = cache.token_ids[tokens[np.asarray(cache.loss_mask[tokens]) > 0]]
    occurrences = np.bincount(np.ravel(labels), minlength=vocab_size)
    unknown = np.ones(vocab_size, bool)
    unknown[slice(None) if learned is None else learned] = False
    return np.sort(np.lexsort((-occurrences, unknown))[:count])


def check_init_layers(layers: Sequence[int], target: TargetConfig, num_layers: int) -> None:
    """Raises ConfigError unless these are `num_layers` layers of the target that a draft layer can copy."""
    if len(layers) != num_layers or not all(0 <= i < target.num_layers for i in layers):
        raise ConfigError(
            f"init_layers name one layer of the target, 0..{target.num_layers - 1}, for each of the draft's "
            f"{num_layers}; got {list(layers)}"
        )
    biases = target.qkv_bias or target.o_bias or target.mlp_bias
    if target.experts is not None or target.sinks or biases:
        raise ConfigError(
            "init_layers copy plain layers; the target's have experts, sinks or biases, which a draft's layer lacks: "
            "leave init_layers out"
        )


def start_from_layers(draft: Draft, layers: Sequence[Mapping[str, np.ndarray]]) -> None:
    """Draft layer i becomes layers[i] (`read_layers`), fc the mean of the features; in place.

    If the target has no q/k norms, the draft's norms keep the length that queries and keys have without one: weights of
    1 would make its attention almost uniform. The norm of the context has no counterpart and stays unchanged.
    """
    H, K, head_dim = draft.config.hidden_size, draft.config.num_features, draft.config.head_dim
    inner = draft.config.num_heads * head_dim
    draft.fc.weight[...] = jnp.tile(jnp.eye(H, dtype=draft.dtype) / K, (1, K))
    for layer, source in zip(draft.layers, layers, strict=True):
        values = dict(source)
        q, kv = np.split(values.pop("attention.qkv.weight"), [inner])
        values |= {"attention.q.weight": q, "attention.kv.weight": kv}
        lengths = {"attention.q_norm.weight": q, "attention.k_norm.weight": np.split(kv, 2)[0]}
        for name, weight in lengths.items():
            values.setdefault(name, np.full(head_dim, _length(weight * values["attention_norm.weight"])))
        nnx.update(
            layer,
            nnx.from_flat_state(
                [(tuple(p.split(".")), nnx.Param(jnp.asarray(v, draft.dtype))) for p, v in values.items()]
            ),
        )


def _length(weight: np.ndarray) -> np.floating:
    """Root mean square of W x, W [out, in], over independent x of root mean square 1."""
    return np.sqrt((weight**2).sum(axis=1).mean())
