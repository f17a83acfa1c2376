"""Configs of public targets: how large each one is, which is what its name says."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dflash.models.gpt_oss import GptOss
from dflash.models.llama import Llama
from dflash.weights.public import CONFIGS, public_config


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("gpt-oss-20b", 20.91),
        ("gpt-oss-120b", 116.83),
        ("qwen3-4b", 4.02),
        ("qwen3-8b", 8.19),
        ("llama-3.1-8b", 8.03),
        ("smollm2-135m", 0.1345),
    ],
)
def test_parameters_are_as_many_as_published(name: str, billions: float) -> None:
    config = public_config(name)
    assert config is not None
    kind = GptOss if config.family == "gpt_oss" else Llama
    network = nnx.eval_shape(lambda: kind(config, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)))
    count = sum(int(np.prod(w.get_value().shape)) for _, w in nnx.to_flat_state(nnx.state(network)))
    assert count / 1e9 == pytest.approx(billions, rel=2e-3)


def test_every_name_is_tested_and_no_other_name_is_known() -> None:
    assert set(CONFIGS) == {"gpt-oss-20b", "gpt-oss-120b", "qwen3-4b", "qwen3-8b", "llama-3.1-8b", "smollm2-135m"}
    assert public_config("qwen3-9b") is None
