"""Which tensors of a Hugging Face snapshot make which weight of ours: q, k and v are one product here."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from dflash.config import DraftConfig, TargetConfig
from dflash.weights.snapshot import WeightsError

_FLOATS = ("BF16", "F16", "F32")


@dataclasses.dataclass(frozen=True, slots=True)
class Source:
    """How one weight is made: `tensors` of the file with the shapes they must have, then `combine`."""

    tensors: dict[str, tuple[int, ...]]
    combine: Callable[[list[np.ndarray]], np.ndarray]
    kinds: tuple[str, ...] = _FLOATS


def _one(name: str, *shape: int) -> Source:
    return Source({name: shape}, lambda arrays: arrays[0])


def _stack(names: Sequence[str], rows: Sequence[int], *rest: int) -> Source:
    return Source({n: (r, *rest) for n, r in zip(names, rows, strict=True)}, np.concatenate)


Plan = Iterator[tuple[str, Source]]


def _linear(path: str, prefix: str, parts: Sequence[str], rows: Sequence[int], columns: int, bias: bool) -> Plan:
    names = [f"{prefix}{p}_proj" for p in parts]
    yield f"{path}.weight", _stack([f"{n}.weight" for n in names], rows, columns)
    if bias:
        yield f"{path}.bias", _stack([f"{n}.bias" for n in names], rows)


# The 16 values of MXFP4's e2m1, the sign bit highest (OCP Microscaling Formats v1.0, table 5).
_FP4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)


def dequantise_mxfp4(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """blocks uint8 [..., N, 16] (two values a byte, low nibble first), scales uint8 [..., N] -> float32 [..., N * 32].

    Exact: value = e2m1 * 2**(scale - 127) has two significant bits. Scale 255 is NaN in the format.
    """
    pairs = np.stack([_FP4[blocks & 15], _FP4[blocks >> 4]], axis=-1).reshape(*blocks.shape[:-1], 32)
    values = np.ldexp(pairs, scales.astype(np.int32)[..., None] - 127)
    values[scales == 255] = np.nan
    return values.reshape(*blocks.shape[:-2], -1)


def _expert_plan(path: str, prefix: str, c: TargetConfig, packed: bool) -> Plan:
    assert c.experts is not None
    E, H, I = c.experts.count, c.hidden_size, c.intermediate_size  # noqa: E741
    if packed and (H % 32 or I % 32):
        raise WeightsError(
            f"MXFP4 packs 32 values together; hidden_size {H} and intermediate_size {I} must divide by 32"
        )
    yield f"{path}.router.weight", _one(f"{prefix}router.weight", E, H)
    yield f"{path}.router.bias", _one(f"{prefix}router.bias", E)
    for ours, theirs, inputs, outputs in (("gate_up", "gate_up_proj", H, 2 * I), ("down", "down_proj", I, H)):
        name = f"{prefix}experts.{theirs}"
        if packed:
            yield (
                f"{path}.{ours}",
                Source(
                    {f"{name}_blocks": (E, outputs, inputs // 32, 16), f"{name}_scales": (E, outputs, inputs // 32)},
                    lambda arrays: dequantise_mxfp4(*arrays).swapaxes(1, 2),
                    kinds=("U8",),
                ),
            )
        else:
            yield f"{path}.{ours}", _one(name, E, inputs, outputs)
        yield f"{path}.{ours}_bias", _one(f"{name}_bias", E, outputs)


def target_plan(c: TargetConfig, packed: bool) -> Plan:
    """Every weight of a target and what makes it; `packed`: its experts are MXFP4. Raises WeightsError."""
    H, D = c.hidden_size, c.head_dim
    yield "embedding.weight", _one("model.embed_tokens.weight", c.vocab_size, H)
    for i in range(c.num_layers):
        path, prefix = f"layers.{i}", f"model.layers.{i}."
        rows = [c.num_heads * D, c.num_kv_heads * D, c.num_kv_heads * D]
        yield f"{path}.attention_norm.weight", _one(f"{prefix}input_layernorm.weight", H)
        yield f"{path}.mlp_norm.weight", _one(f"{prefix}post_attention_layernorm.weight", H)
        attention = f"{prefix}self_attn."
        yield from _linear(f"{path}.attention.qkv", attention, ["q", "k", "v"], rows, H, c.qkv_bias)
        yield from _linear(f"{path}.attention.out", attention, ["o"], [H], c.num_heads * D, c.o_bias)
        if c.qk_norm:
            yield f"{path}.attention.q_norm.weight", _one(f"{attention}q_norm.weight", D)
            yield f"{path}.attention.k_norm.weight", _one(f"{attention}k_norm.weight", D)
        if c.sinks:
            yield f"{path}.attention.sinks", _one(f"{attention}sinks", c.num_heads)
        if c.experts is not None:
            yield from _expert_plan(f"{path}.mlp", f"{prefix}mlp.", c, packed)
        else:
            yield from _swiglu_plan(f"{path}.mlp", f"{prefix}mlp.", H, c.intermediate_size, c.mlp_bias)
    yield "norm.weight", _one("model.norm.weight", H)
    if not c.tie_embeddings:
        yield "head.weight", _one("lm_head.weight", c.vocab_size, H)


def target_tensors(config: TargetConfig, *, packed: bool = False) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a snapshot's tensors; `packed` for MXFP4 experts."""
    return {name: shape for _, source in target_plan(config, packed) for name, shape in source.tensors.items()}


def _swiglu_plan(path: str, prefix: str, hidden: int, inner: int, bias: bool) -> Plan:
    yield from _linear(f"{path}.gate_up", prefix, ["gate", "up"], [inner, inner], hidden, bias)
    yield from _linear(f"{path}.down", prefix, ["down"], [hidden], inner, bias)


def draft_plan(c: DraftConfig) -> Plan:
    """Every weight of a draft and what makes it, by z-lab's names."""
    H, D = c.hidden_size, c.head_dim
    yield "fc.weight", _one("fc.weight", H, c.num_features * H)
    if c.fc_bias:
        yield "fc.bias", _one("fc.bias", H)
    if c.learned_mask:
        yield "mask_embedding", _one("mask_embedding", H)
    yield "hidden_norm.weight", _one("hidden_norm.weight", H)
    for i in range(c.num_layers):
        path, prefix = f"layers.{i}", f"layers.{i}."
        attention = f"{prefix}self_attn."
        yield f"{path}.attention_norm.weight", _one(f"{prefix}input_layernorm.weight", H)
        yield f"{path}.mlp_norm.weight", _one(f"{prefix}post_attention_layernorm.weight", H)
        yield from _linear(f"{path}.attention.q", attention, ["q"], [c.num_heads * D], H, c.attention_bias)
        rows = [c.num_kv_heads * D] * 2
        yield from _linear(f"{path}.attention.kv", attention, ["k", "v"], rows, H, c.attention_bias)
        yield from _linear(f"{path}.attention.out", attention, ["o"], [H], c.num_heads * D, c.attention_bias)
        if c.qk_norm:
            yield f"{path}.attention.q_norm.weight", _one(f"{attention}q_norm.weight", D)
            yield f"{path}.attention.k_norm.weight", _one(f"{attention}k_norm.weight", D)
        yield from _swiglu_plan(f"{path}.mlp", f"{prefix}mlp.", H, c.intermediate_size, c.mlp_bias)
        if c.conv is not None:
            for name in ("attention_conv", "mlp_conv"):
                kernels = 2 * c.conv.kernel_size * (H // c.conv.group_size)
                yield f"{path}.{name}.base", _one(f"{prefix}{name}.base_kernel", 2, c.conv.kernel_size, H)
                yield f"{path}.{name}.kernel.weight", _one(f"{prefix}{name}.kernel_projection.weight", kernels, H)
    if c.selector is not None:
        for name in ("predecessor", "successor"):
            yield f"selector.{name}", _one(f"candidate_selector.{name}_codebook", c.vocab_size, c.selector.rank)
        yield "selector.hidden.weight", _one("candidate_selector.hidden_projection.weight", c.selector.rank, H)
    yield "norm.weight", _one("norm.weight", H)
