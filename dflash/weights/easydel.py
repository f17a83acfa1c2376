"""Targets in EasyDeL's form: the state of its model, and the directory that its `save_pretrained` writes.

EasyDeL is not needed. Names are transformers'; kernels are [in, out]; q, k, v, gate and up are separate arrays.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from dflash.config import TargetConfig, counted_faults
from dflash.models.llama import Llama
from dflash.models.mesh import gather
from dflash.weights.build import Opened, build_target, check_tied, named_weights
from dflash.weights.names import Source, target_plan
from dflash.weights.runs.arrays import FLOATS, check_chunks, read_arrays, read_index
from dflash.weights.snapshot import WeightsError, check_tensors, target_config, tensor_faults

_MAY_BE_ZERO = ("/bias", "/sinks")
# Not saved if the head is the embedding, but part of the state.
HEAD = "lm_head/kernel"

_EXPERTS = re.compile(r"(.*/experts)/(gate_up|down)_proj(_bias)?")


def _arrays(tensor: str, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """What a tensor of a snapshot is there: paths and shapes, two for the gate and up of experts."""
    path = tensor.replace(".", "/")
    if match := _EXPERTS.fullmatch(path):
        parts, kind = match[2].split("_"), "bias" if match[3] else "kernel"
        sizes = *shape[:-1], shape[-1] // len(parts)
        return {f"{match[1]}/{part}_proj/{kind}": sizes for part in parts}
    path = re.sub(r"embed_tokens/weight$", "embed_tokens/embedding", path)
    path = re.sub(r"/weight$", "/kernel", path)
    return {path: shape[::-1] if path.endswith("/kernel") else shape}


def _has_kernels(arrays: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether these are [in, out] or [E, in, out], and ours swaps their last two axes; a norm has a kernel [H]."""
    return all(path.endswith("/kernel") and len(shape) > 1 for path, shape in arrays.items())


def _join(arrays: list[Any]) -> Any:
    """One weight of arrays that ours joins along their last axes; a lone one is shared."""
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays, axis=-1)


def _join_kernels(kernels: list[Any]) -> np.ndarray:
    return np.concatenate([np.asarray(kernel).swapaxes(-1, -2) for kernel in kernels], axis=-2)


def _split(value: Any, arrays: Mapping[str, tuple[int, ...]]) -> list[Any]:
    """The reverse of both: an array that has their layout is shared."""
    kernels = _has_kernels(arrays)
    if len(arrays) == 1 and not kernels:
        return [value]
    rows = np.asarray(value).swapaxes(-1, -2) if kernels else np.asarray(value)
    return np.split(rows, np.cumsum([shape[-1] for shape in arrays.values()])[:-1], axis=-1)


def _plan(c: TargetConfig) -> dict[str, Source]:
    """Every weight of ours, and the arrays there that it is made of."""
    plan = {}
    for ours, source in target_plan(c, packed=False):
        arrays = {path: sizes for name, shape in source.tensors.items() for path, sizes in _arrays(name, shape).items()}
        plan[ours] = Source(arrays, _join_kernels if _has_kernels(arrays) else _join)
    return plan


def _wanted(c: TargetConfig) -> dict[str, tuple[int, ...]]:
    return {path: shape for source in _plan(c).values() for path, shape in source.tensors.items()}


def from_state(config: TargetConfig, arrays: dict[str, Any], dtype: str = "float32", mesh: Mesh | None = None) -> Llama:
    """The target made from a state: arrays by path (joined with "/"), of a model with this config.

    Arrays are removed from `arrays` one weight at a time, so none is held twice once their model is gone. Arrays that
    already have our layout and dtype (embedding, norms) are shared. Raises WeightsError.
    """
    stored = {path: array for path, array in arrays.items() if not (config.tie_embeddings and path == HEAD)}
    if faults := tensor_faults(stored, {path: (shape, None) for path, shape in _wanted(config).items()}):
        raise WeightsError(f"the state does not fit its config {counted_faults(faults)}")
    return build_target(Opened(config, _plan(config), arrays.pop), dtype, mesh)


def to_state(target: Llama) -> Iterator[tuple[str, Any]]:
    """The reverse, one array at a time: paths joined with "/", and arrays in the target's dtype.

    Arrays that already have their layout are shared. A tied head has no array of its own.
    """
    weights = named_weights(gather(target))
    for ours, source in _plan(target.config).items():
        yield from zip(source.tensors, map(jnp.asarray, _split(weights[ours], source.tensors)), strict=True)


def open_target(directory: Path) -> Opened:
    """The target in a directory that EasyDeL's `save_pretrained` wrote. Raises ConfigError or WeightsError."""
    directory = Path(directory)
    config = target_config(directory)
    entries = read_index(directory).get("model", {})
    there = {path: entry for path, entry in entries.items() if not (config.tie_embeddings and path == f"model/{HEAD}")}
    check_tensors(there, {f"model/{path}": (shape, FLOATS) for path, shape in _wanted(config).items()}, directory)
    check_chunks(directory, there.values(), _MAY_BE_ZERO)

    def read(path: str) -> np.ndarray:
        entry = entries[f"model/{path}"]
        return read_arrays(directory, [entry])[entry.path]

    if config.tie_embeddings and f"model/{HEAD}" in entries:
        check_tied(read(HEAD).T, read("model/embed_tokens/embedding"), directory)
    return Opened(config, _plan(config), read)
