"""Which tensors of a Hugging Face snapshot make which weight of ours (q, k and v are one product here)."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from dflash.config import DraftConfig, TargetConfig
from dflash.weights.mxfp4 import BLOCK, Packed
from dflash.weights.snapshot import WeightsError

_FLOATS = ("BF16", "F16", "F32")


@dataclasses.dataclass(frozen=True, slots=True)
class Source:
    """How one weight is made: `tensors` of the file with their required shapes, then `combine`."""

    tensors: dict[str, tuple[int, ...]]
    combine: Callable[[list[np.ndarray]], np.ndarray]
    kinds: tuple[str, ...] = _FLOATS


def _one(name: str, *shape: int) -> Source:
    return Source({name: shape}, lambda arrays: arrays[0])


def _stack(names: Sequence[str], rows: Sequence[int], *rest: int) -> Source:
    return Source({n: (r, *rest) for n, r in zip(names, rows, strict=True)}, np.concatenate)


AnySource = Source | Packed
Plan = Iterator[tuple[str, AnySource]]


def _linear(path: str, prefix: str, parts: Sequence[str], rows: Sequence[int], columns: int, bias: bool) -> Plan:
    names = [f"{prefix}{p}_proj" for p in parts]
    yield f"{path}.weight", _stack([f"{n}.weight" for n in names], rows, columns)
    if bias:
        yield f"{path}.bias", _stack([f"{n}.bias" for n in names], rows)


def _expert_plan(path: str, prefix: str, c: TargetConfig, packed: bool) -> Plan:
    assert c.experts is not None
    E, H, I = c.experts.count, c.hidden_size, c.intermediate_size  # noqa: E741
    if packed and (H % BLOCK or I % BLOCK):
        raise WeightsError(
            f"MXFP4 packs {BLOCK} values together; hidden_size {H} and intermediate_size {I} must divide by 32"
        )
    yield f"{path}.router.weight", _one(f"{prefix}router.weight", E, H)
    yield f"{path}.router.bias", _one(f"{prefix}router.bias", E)
    experts = f"{prefix}experts."
    yield from _expert_weight(f"{path}.gate_up", f"{experts}gate_up_proj", (E, H, 2 * I), packed, _halves)
    yield from _expert_weight(f"{path}.down", f"{experts}down_proj", (E, I, H), packed, _as_it_is)


def _expert_weight(
    path: str, name: str, shape: tuple[int, int, int], packed: bool, order: Callable[[np.ndarray], np.ndarray]
) -> Plan:
    """One weight of all experts and its bias, rows in `order`; the file has it by experts, inputs and outputs."""
    E, inputs, outputs = shape
    if packed:
        yield path, Packed(name, (E, outputs, inputs), halves=order is _halves)
    else:
        yield path, Source({name: shape}, lambda arrays: order(arrays[0].swapaxes(1, 2)))
    yield f"{path}_bias", Source({f"{name}_bias": (E, outputs)}, lambda arrays: order(arrays[0]))


def _halves(rows: np.ndarray) -> np.ndarray:
    """Rows [E, 2I, ...] of gate and up in turn -> those of all gates, then of all ups."""
    return np.concatenate([rows[:, ::2], rows[:, 1::2]], axis=1)


def _as_it_is(rows: np.ndarray) -> np.ndarray:
    return rows


def target_plan(c: TargetConfig, packed: bool) -> Plan:
    """Every weight of a target and its source; `packed`: its experts are MXFP4. Raises WeightsError."""
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
    """Every weight of a draft and its source, by z-lab's names."""
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
