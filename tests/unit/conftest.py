"""What several unit tests need: drafts whose proposals differ."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dflash.config import DraftConfig, RopeConfig
from dflash.models.draft import Draft

# Fits the targets of dflash.tiny.
TINY_DRAFT = {
    "vocab_size": 199,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 16,
    "max_position": 131072,
    "rms_norm_eps": 1e-5,
    "rope": RopeConfig(theta=10000.0),
    "windows": (None, 16),
    "causal": (False, True),
    "block_size": 8,
    "mask_token_id": 5,
    "target_layer_ids": (0, 1),
    "num_target_layers": 2,
}


def _draw(rng, path, shape):
    if path[-2] == "q_norm":
        # Sharp attention: a mean over a long context is the same for every slot.
        return rng.uniform(1.5, 3.5, shape)
    if "norm" in str(path[-2]):
        return rng.uniform(0.5, 1.5, shape)
    if path[-1] == "bias":
        return rng.normal(0, 0.3, shape)
    return rng.normal(0, 1.6 * shape[-1] ** -0.5, shape)


@pytest.fixture(scope="session")
def draw_draft():
    """Makes a draft of a tiny config with changes. Its weights are wide: at 0.02 it proposes the mask token only."""

    def draw(seed=0, dtype=jnp.float32, **changes):
        draft = Draft(DraftConfig(**(TINY_DRAFT | changes)), dtype=dtype, rngs=nnx.Rngs(seed))
        rng = np.random.default_rng(seed)
        weights = nnx.to_flat_state(nnx.state(draft))
        drawn = [(p, v.replace(jnp.asarray(_draw(rng, p, v.get_value().shape), dtype))) for p, v in weights]
        nnx.update(draft, nnx.from_flat_state(drawn))
        return draft

    return draw
