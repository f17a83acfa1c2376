"""Targets in EasyDeL's form: the state of its model, and the directory that its `save_pretrained` writes.

EasyDeL is not needed. Names are transformers'; kernels are [in, out]; q, k, v, gate and up are separate arrays.
"""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from dflash.config import TargetConfig, fault_list
from dflash.models.llama import Llama
from dflash.models.mesh import gather
from dflash.weights.build import Opened, build_target, check_tied
from dflash.weights.names import Source
from dflash.weights.runs.arrays import check_chunks, read_arrays, read_index
from dflash.weights.snapshot import WeightsError, check_tensors, target_config

_FLOATS = ("float32", "bfloat16", "float16")
_MAY_BE_ZERO = ("/bias", "/sinks")
# Not saved if the head is the embedding, but part of the state.
HEAD = "lm_head/kernel"

Shapes = dict[str, tuple[int, ...]]
# A weight of ours, its arrays there with the conversion to ours, and the conversion back.
Plan = Iterator[tuple[str, Source, Callable[[Any], list[Any]]]]


def _same(ours: str, theirs: str, *shape: int) -> Plan:
    """One array unchanged, which both sides may share."""
    yield ours, Source({theirs: shape}, lambda arrays: arrays[0]), lambda value: [value]


def _turned(ours: str, theirs: list[str], *shape: int) -> Plan:
    """Kernels of experts [E, in, out], which are one weight of ours [E, outs, in]."""

    def join(arrays: list[Any]) -> np.ndarray:
        return np.concatenate([np.asarray(array).swapaxes(1, 2) for array in arrays], axis=1)

    def split(value: Any) -> list[np.ndarray]:
        return [part.swapaxes(1, 2) for part in np.split(np.asarray(value), len(theirs), axis=1)]

    yield ours, Source(dict.fromkeys(theirs, shape), join), split


def _in_a_row(ours: str, theirs: list[str], *shape: int) -> Plan:
    """Arrays that ours joins along their last axes."""

    def split(value: Any) -> list[np.ndarray]:
        return np.split(np.asarray(value), len(theirs), axis=-1)

    yield ours, Source(dict.fromkeys(theirs, shape), lambda arrays: np.concatenate(arrays, axis=-1)), split


def _linear(ours: str, prefix: str, parts: list[str], inputs: int, outputs: list[int], bias: bool) -> Plan:
    ends = np.cumsum(outputs)[:-1]

    def join(arrays: list[Any]) -> np.ndarray:
        return np.concatenate([np.asarray(array).T for array in arrays])

    def split(value: Any) -> list[np.ndarray]:
        return [part.T for part in np.split(np.asarray(value), ends)]

    kernels: Shapes = {f"{prefix}{part}/kernel": (inputs, size) for part, size in zip(parts, outputs, strict=True)}
    yield f"{ours}.weight", Source(kernels, join), split
    if bias:
        biases: Shapes = {f"{prefix}{part}/bias": (size,) for part, size in zip(parts, outputs, strict=True)}
        yield f"{ours}.bias", Source(biases, join), split


def _expert_plan(path: str, prefix: str, c: TargetConfig) -> Plan:
    assert c.experts is not None
    E, H, I = c.experts.count, c.hidden_size, c.intermediate_size  # noqa: E741
    yield from _linear(f"{path}.router", prefix, ["router"], H, [E], True)
    gate_up = [f"{prefix}experts/{name}_proj" for name in ("gate", "up")]
    yield from _turned(f"{path}.gate_up", [f"{name}/kernel" for name in gate_up], E, H, I)
    yield from _in_a_row(f"{path}.gate_up_bias", [f"{name}/bias" for name in gate_up], E, I)
    yield from _turned(f"{path}.down", [f"{prefix}experts/down_proj/kernel"], E, I, H)
    yield from _same(f"{path}.down_bias", f"{prefix}experts/down_proj/bias", E, H)


def _layer_plan(path: str, prefix: str, c: TargetConfig) -> Plan:
    H, D, I = c.hidden_size, c.head_dim, c.intermediate_size  # noqa: E741
    queries, keys = c.num_heads * D, c.num_kv_heads * D
    ours, theirs = f"{path}.attention", f"{prefix}self_attn/"
    yield from _same(f"{path}.attention_norm.weight", f"{prefix}input_layernorm/kernel", H)
    yield from _same(f"{path}.mlp_norm.weight", f"{prefix}post_attention_layernorm/kernel", H)
    qkv = ["q_proj", "k_proj", "v_proj"]
    yield from _linear(f"{ours}.qkv", theirs, qkv, H, [queries, keys, keys], c.qkv_bias)
    yield from _linear(f"{ours}.out", theirs, ["o_proj"], queries, [H], c.o_bias)
    if c.qk_norm:
        yield from _same(f"{ours}.q_norm.weight", f"{theirs}q_norm/kernel", D)
        yield from _same(f"{ours}.k_norm.weight", f"{theirs}k_norm/kernel", D)
    if c.sinks:
        yield from _same(f"{ours}.sinks", f"{theirs}sinks", c.num_heads)
    if c.experts is not None:
        yield from _expert_plan(f"{path}.mlp", f"{prefix}mlp/", c)
    else:
        yield from _linear(f"{path}.mlp.gate_up", f"{prefix}mlp/", ["gate_proj", "up_proj"], H, [I, I], c.mlp_bias)
        yield from _linear(f"{path}.mlp.down", f"{prefix}mlp/", ["down_proj"], I, [H], c.mlp_bias)


def _plan(c: TargetConfig) -> Plan:
    yield from _same("embedding.weight", "model/embed_tokens/embedding", c.vocab_size, c.hidden_size)
    for i in range(c.num_layers):
        yield from _layer_plan(f"layers.{i}", f"model/layers/{i}/", c)
    yield from _same("norm.weight", "model/norm/kernel", c.hidden_size)
    if not c.tie_embeddings:
        yield from _linear("head", "", ["lm_head"], c.hidden_size, [c.vocab_size], False)


def _sources(config: TargetConfig) -> dict[str, Source]:
    return {ours: source for ours, source, _ in _plan(config)}


def _check(config: TargetConfig, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raises WeightsError with every array of a state that is missing, unexpected or of another shape."""
    wanted = {path: shape for source in _sources(config).values() for path, shape in source.tensors.items()}
    faults = [f"missing {path} {list(shape)}" for path, shape in wanted.items() if path not in shapes]
    for path, shape in shapes.items():
        if path not in wanted:
            faults += [] if path == HEAD and config.tie_embeddings else [f"unexpected {path} {list(shape)}"]
        elif tuple(shape) != wanted[path]:
            faults.append(f"{path} is {list(shape)}, must be {list(wanted[path])}")
    if faults:
        raise WeightsError(f"the state does not fit its config ({len(faults)} faults): " + fault_list(faults))


def from_state(config: TargetConfig, arrays: dict[str, Any], dtype: str = "float32", mesh: Mesh | None = None) -> Llama:
    """The target made from a state: arrays by path (joined with "/"), of a model with this config.

    Arrays are removed from `arrays` one weight at a time, so none is held twice once their model is gone. Arrays that
    already have our layout and dtype (embedding, norms) are shared. Raises WeightsError.
    """
    _check(config, {path: array.shape for path, array in arrays.items()})
    return build_target(Opened(config, _sources(config), arrays.pop), dtype, mesh)


def to_state(target: Llama) -> Iterator[tuple[str, Any]]:
    """The reverse, one array at a time: paths joined with "/", and arrays in the target's dtype.

    Arrays that already have their layout are shared. A tied head has no array of its own.
    """
    weights = {".".join(map(str, path)): v.get_value() for path, v in nnx.to_flat_state(nnx.state(gather(target)))}
    for ours, source, split in _plan(target.config):
        yield from zip(source.tensors, map(jnp.asarray, split(weights[ours])), strict=True)


def open_target(directory: Path) -> Opened:
    """The target in a directory that EasyDeL's `save_pretrained` wrote. Raises ConfigError or WeightsError."""
    directory = Path(directory)
    config = target_config(directory)
    entries = read_index(directory).get("model", {})
    wanted = {p: shape for source in _sources(config).values() for p, shape in source.tensors.items()}
    there = {path: entry for path, entry in entries.items() if not (config.tie_embeddings and path == f"model/{HEAD}")}
    check_tensors(there, {f"model/{path}": (shape, _FLOATS) for path, shape in wanted.items()}, directory)

    check_chunks(directory, there.values(), _MAY_BE_ZERO)

    def read(path: str) -> np.ndarray:
        entry = entries[f"model/{path}"]
        return read_arrays(directory, [entry])[entry.path]

    if config.tie_embeddings and f"model/{HEAD}" in entries:
        check_tied(read(HEAD).T, read("model/embed_tokens/embedding"), directory)
    return Opened(config, _sources(config), read)
