"""Where a new draft starts: the target's own layers and final norm instead of random weights.

Random weights spend their first hundred thousand slots on learning how often each token occurs.
"""

from collections.abc import Mapping, Sequence

import jax.numpy as jnp
import numpy as np
from flax import nnx

from dflash.config import ConfigError, TargetConfig
from dflash.models.draft import Draft


def check_init_layers(layers: Sequence[int], target: TargetConfig, num_layers: int) -> None:
    """Raises ConfigError unless these are `num_layers` layers of the target that a draft layer can hold."""
    if len(layers) != num_layers or not all(0 <= i < target.num_layers for i in layers):
        raise ConfigError(
            f"init_layers name one layer of the target, 0..{target.num_layers - 1}, for each of the draft's "
            f"{num_layers}; got {list(layers)}"
        )
    biases = target.qkv_bias or target.o_bias or target.mlp_bias
    if target.experts is not None or target.sinks or biases:
        raise ConfigError(
            "init_layers copy plain layers; the target's have experts, sinks or biases, which a draft's layer has not: "
            "leave init_layers out"
        )


def start_from_layers(draft: Draft, layers: Sequence[Mapping[str, np.ndarray]]) -> None:
    """Draft layer i becomes layers[i] (`read_layers`), fc the mean of the features; in place.

    What a target has no counterpart of stays as it is: the norm of the context, and q/k norms unless it has some.
    """
    H, inner = draft.config.hidden_size, draft.config.num_heads * draft.config.head_dim
    K = draft.config.num_features
    draft.fc.weight[...] = jnp.tile(jnp.eye(H, dtype=draft.dtype) / K, (1, K))
    for layer, source in zip(draft.layers, layers, strict=True):
        values = dict(source)
        values["attention.q.weight"], values["attention.kv.weight"] = np.split(
            values.pop("attention.qkv.weight"), [inner]
        )
        nnx.update(
            layer,
            nnx.from_flat_state(
                [(tuple(p.split(".")), nnx.Param(jnp.asarray(v, draft.dtype))) for p, v in values.items()]
            ),
        )
