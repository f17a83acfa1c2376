"""GPT-OSS's own parts: routed experts against a plain loop, MXFP4 against its definition and transformers."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from dflash.models.gpt_oss import Experts
from dflash.tiny import tiny_config, write_tiny_target
from dflash.weights.config_json import read_target_config
from dflash.weights.huggingface import read_target
from dflash.weights.plan import dequantise_mxfp4

E2M1 = [0, 0.5, 1, 1.5, 2, 3, 4, 6]


def plain_experts(experts: Experts, x: np.ndarray) -> np.ndarray:
    """Token by token, expert by expert, in float64. x [H, N]."""
    s = experts.settings
    values = {
        k: np.asarray(getattr(experts, k)[...], np.float64) for k in ("gate_up", "gate_up_bias", "down", "down_bias")
    }
    router = np.asarray(experts.router.weight[...], np.float64)
    router_bias = np.asarray(experts.router.bias[...], np.float64)
    out = np.zeros_like(x, np.float64)
    for n in range(x.shape[1]):
        logits = router @ x[:, n] + router_bias
        chosen = np.argsort(-logits)[: s.per_token]
        weights = np.exp(logits[chosen]) / np.exp(logits[chosen]).sum()
        for e, w in zip(chosen, weights, strict=True):
            inner = x[:, n] @ values["gate_up"][e] + values["gate_up_bias"][e]
            gate = np.minimum(inner[0::2], s.limit)
            up = np.clip(inner[1::2], -s.limit, s.limit)
            glu = gate / (1 + np.exp(-s.alpha * gate))
            out[:, n] += w * (((up + 1) * glu) @ values["down"][e] + values["down_bias"][e])
    return out


@pytest.mark.parametrize("tokens", [1, 5, 40])
def test_experts_are_the_plain_loop(tokens: int) -> None:
    config = read_target_config(tiny_config("gpt_oss"))
    experts = Experts(config, dtype=jnp.float32, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(0)
    for name in ("gate_up", "down"):
        parameter = getattr(experts, name)
        parameter[...] = jnp.asarray(rng.normal(0, 0.4, parameter.shape), jnp.float32)
    for name in ("gate_up_bias", "down_bias"):
        parameter = getattr(experts, name)
        parameter[...] = jnp.asarray(rng.normal(0, 1, parameter.shape), jnp.float32)
    experts.router.weight[...] = jnp.asarray(rng.normal(0, 0.3, experts.router.weight.shape), jnp.float32)
    x = rng.normal(0, 2, (config.hidden_size, tokens)).astype(np.float32)
    expected = plain_experts(experts, x)
    np.testing.assert_allclose(experts(jnp.asarray(x)), expected, atol=1e-4 * np.abs(expected).max())


@settings(derandomize=True, deadline=None, max_examples=50)
@given(st.binary(min_size=32, max_size=32), st.tuples(st.integers(0, 252), st.integers(0, 252)))
def test_mxfp4_is_its_definition(data: bytes, scales: tuple[int, int]) -> None:
    """Two values a byte, the low nibble first, sign in the nibble's highest bit, times 2**(scale - 127)."""
    blocks = np.frombuffer(data, np.uint8).reshape(2, 16)
    got = dequantise_mxfp4(blocks, np.array(scales, np.uint8))
    expected = []
    for block, scale in zip(blocks.tolist(), scales, strict=True):
        for byte in block:
            for nibble in (byte % 16, byte // 16):
                sign = -1.0 if nibble >= 8 else 1.0
                expected.append(sign * E2M1[nibble % 8] * 2.0 ** (scale - 127))
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got, np.array(expected, np.float64).astype(np.float32))


def test_mxfp4_scale_255_is_nan() -> None:
    assert np.isnan(dequantise_mxfp4(np.zeros((1, 16), np.uint8), np.array([255], np.uint8))).all()


@pytest.mark.oracle
@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning", "ignore:.*:FutureWarning", "ignore:.*:UserWarning")
def test_an_mxfp4_snapshot_is_read_as_transformers_reads_it(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    directory = write_tiny_target(tmp_path, "gpt_oss", mxfp4=True, hidden_size=64, intermediate_size=64)
    target = read_target(directory)
    quantisation = transformers.Mxfp4Config(dequantize=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager", quantization_config=quantisation
    )
    for ours, theirs in zip(target.layers, model.model.layers, strict=True):
        for name in ("gate_up", "down"):
            expected = getattr(theirs.mlp.experts, f"{name}_proj").detach().float().numpy()
            np.testing.assert_array_equal(getattr(ours.mlp, name)[...], expected)
    tokens = np.random.default_rng(0).integers(0, 199, (1, 60))
    with torch.no_grad():
        expected = model.float()(torch.tensor(tokens)).logits.numpy()
    np.testing.assert_allclose(target.forward(tokens)[0], expected, atol=1e-4, rtol=0)
