"""The families of targets: what a `model_type` says beyond the keys of config.json, and the network that runs it."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from flax import nnx

from dflash.config import TargetConfig
from dflash.models.gpt_oss import GptOss
from dflash.models.llama import Llama


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """One `model_type`. `architecture` is transformers' class, without ForCausalLM.

    `head_dim` (None: hidden_size / heads), `rms_norm_eps`, `rope_theta` and `bias` (the key attention_bias) hold where
    their key is absent. `qkv_bias_only`: q, k and v always have biases and the output never has one; there is no key.
    `optional_windows`: use_sliding_window decides; `alternating`: every other layer has a window where layer_types is
    absent.
    """

    architecture: str
    network: type[Llama] = Llama
    head_dim: int | None = None
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    bias: bool = False
    qkv_bias_only: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    sinks: bool = False
    experts: bool = False
    optional_windows: bool = False
    alternating: bool = False


FAMILIES = {
    "llama": Family(architecture="Llama", mlp_bias=True),
    "qwen2": Family(architecture="Qwen2", qkv_bias_only=True, optional_windows=True),
    "qwen3": Family(architecture="Qwen3", head_dim=128, qk_norm=True, optional_windows=True),
    "gpt_oss": Family(
        architecture="GptOss",
        network=GptOss,
        head_dim=64,
        rms_norm_eps=1e-5,
        rope_theta=150000.0,
        bias=True,
        sinks=True,
        experts=True,
        alternating=True,
    ),
}


def build(
    config: TargetConfig, *, dtype: jnp.dtype = jnp.float32, held: jnp.dtype | None = None, rngs: nnx.Rngs
) -> Llama:
    """The network of a target of this config, with random weights (none under `nnx.eval_shape`).

    `held` is the dtype of routed experts where that is another; see `Experts`.
    """
    experts: dict[str, Any] = {} if config.experts is None or held is None else {"held": held}
    return FAMILIES[config.family].network(config, dtype=dtype, **experts, rngs=rngs)
