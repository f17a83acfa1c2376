"""GPT-OSS's own parts: routed experts against a plain loop, MXFP4 against transformers."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from networks import drawn

from dflash.models import native
from dflash.models.gpt_oss import Experts
from dflash.weights.config_json import read_target_config
from dflash.weights.load import load_target
from dflash.weights.tiny import tiny_config, write_tiny_target


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
            inner = values["gate_up"][e] @ x[:, n] + values["gate_up_bias"][e]
            gate, up = np.split(inner, 2)
            gate, up = np.minimum(gate, s.limit), np.clip(up, -s.limit, s.limit)
            glu = gate / (1 + np.exp(-s.alpha * gate))
            out[:, n] += w * (values["down"][e] @ ((up + 1) * glu) + values["down_bias"][e])
    return out


def drawn_experts(count: int, rng: np.random.Generator) -> Experts:
    """`count` experts of the tiny GPT-OSS, two a token, with weights as wide as its activations need."""
    config = read_target_config(tiny_config("gpt_oss"))
    config = dataclasses.replace(config, experts=dataclasses.replace(config.experts, count=count))
    widths = {("gate_up",): 0.4, ("down",): 0.4, ("gate_up_bias",): 1, ("down_bias",): 1, ("router", "weight"): 0.3}
    widths[("router", "bias")] = 0.3
    return drawn(
        lambda: Experts(config, dtype=jnp.float32, rngs=nnx.Rngs(0)),
        lambda path, shape: rng.normal(0, widths[path], shape),
    )


# Of 16 experts, up to 2 tokens read those that they chose, and with our kernels any number; more read all of them.
@pytest.mark.parametrize("kernels", ["auto", "0"])
@pytest.mark.parametrize("count", [4, 16])
@pytest.mark.parametrize("tokens", [1, 2, 5, 8, 40])
def test_experts_are_the_plain_loop(tokens: int, count: int, kernels: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DFLASH_NATIVE", kernels)
    rng = np.random.default_rng(0)
    experts = drawn_experts(count, rng)
    x = rng.normal(0, 2, (experts.router.in_size, tokens)).astype(np.float32)
    expected = plain_experts(experts, x)
    np.testing.assert_allclose(experts(jnp.asarray(x)), expected, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize(("tokens", "kernels"), [(1, "0"), (2, "0"), (1, "auto"), (7, "auto"), (70, "auto")])
def test_experts_that_no_token_chose_are_not_read(tokens: int, kernels: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DFLASH_NATIVE", kernels)
    rng = np.random.default_rng(0)
    experts = drawn_experts(16, rng)
    if tokens > 2 and not native.takes(1, experts.gate_up[...]):
        return  # without the kernels all of them are read
    # The same few tokens again and again, so that some experts sleep.
    x = jnp.asarray(np.resize(rng.normal(0, 2, (3, experts.router.in_size)), (tokens, experts.router.in_size)).T)
    x = x.astype(jnp.float32)
    expected = experts(x)
    asleep = np.isin(np.arange(16), np.asarray(experts.route(x)[1]), invert=True)
    assert asleep.any()
    for weight in (experts.gate_up, experts.down):
        weight[...] = jnp.where(asleep[:, None, None], jnp.nan, weight[...])
    np.testing.assert_array_equal(experts(x), expected)


@pytest.mark.parametrize(
    ("platform", "tokens", "slices"),
    [("tpu", 1, True), ("tpu", 7, True), ("tpu", 8, False), ("cuda", 2, True), ("cuda", 3, False)],
)
def test_an_accelerator_reads_the_experts_that_few_tokens_chose(platform: str, tokens: int, slices: bool) -> None:
    """Two of 16 experts a token: eight tokens may wake all of them, and read all of them at once."""
    experts = drawn_experts(16, np.random.default_rng(0))
    graph, weights = nnx.split(experts)
    x = jax.ShapeDtypeStruct((experts.router.in_size, tokens), jnp.float32)
    program = jax.jit(lambda weights, x: nnx.merge(graph, weights)(x)).trace(weights, x)
    text = program.lower(lowering_platforms=(platform,)).as_text()
    assert ("dynamic_slice" in text) == slices


@pytest.mark.parametrize("tokens", [1, 5])
def test_experts_held_in_eight_bits_are_those_values_and_their_factors(tokens: int) -> None:
    config = read_target_config(tiny_config("gpt_oss"))
    config = dataclasses.replace(config, experts=dataclasses.replace(config.experts, count=16))
    small = Experts(config, dtype=jnp.float32, held=jnp.float8_e5m2, rngs=nnx.Rngs(0))
    wide = Experts(config, dtype=jnp.float32, rngs=nnx.Rngs(0))
    wide.router = small.router
    rng = np.random.default_rng(0)
    for name in ("gate_up", "down"):
        held, scale = getattr(small, name), getattr(small, f"{name}_scale")
        held[...] = jnp.asarray(rng.normal(0, 0.4, held.shape), held.dtype)
        scale[...] = jnp.asarray(np.exp2(rng.integers(-3, 4, scale.shape)), jnp.float32)
        getattr(wide, name)[...] = held[...].astype(jnp.float32) * scale[...][:, :, None]
    x = jnp.asarray(rng.normal(0, 2, (config.hidden_size, tokens)), jnp.float32)
    expected = np.asarray(wide(x))
    np.testing.assert_allclose(small(x), expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.oracle
@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning", "ignore:.*:FutureWarning", "ignore:.*:UserWarning")
def test_an_mxfp4_snapshot_is_read_as_transformers_reads_it(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    directory = write_tiny_target(tmp_path, "gpt_oss", mxfp4=True, hidden_size=64, intermediate_size=64)
    target = load_target(directory)
    quantisation = transformers.Mxfp4Config(dequantize=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager", quantization_config=quantisation
    )
    for ours, theirs in zip(target.layers, model.model.layers, strict=True):
        for name in ("gate_up", "down"):
            expected = getattr(theirs.mlp.experts, f"{name}_proj").detach().float().numpy().swapaxes(1, 2)
            if name == "gate_up":
                expected = np.concatenate([expected[:, ::2], expected[:, 1::2]], axis=1)
            np.testing.assert_array_equal(getattr(ours.mlp, name)[...], expected)
    tokens = np.random.default_rng(0).integers(0, 199, (1, 60))
    with torch.no_grad():
        expected = model.float()(torch.tensor(tokens)).logits.numpy()
    np.testing.assert_allclose(target.forward(tokens)[0], expected, atol=1e-4, rtol=0)
