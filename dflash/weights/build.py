"""Networks with weights read from files one at a time: nothing is initialised first, nothing is held twice."""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from tqdm import tqdm

from dflash.config import TargetConfig, fault_list
from dflash.models.families import build
from dflash.models.llama import Llama
from dflash.models.mesh import AnyNetwork, check_mesh, place_of
from dflash.weights.mxfp4 import Packed, factors_of
from dflash.weights.names import AnySource, Source
from dflash.weights.snapshot import WeightsError

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


@dataclasses.dataclass(frozen=True, slots=True)
class Opened:
    """A readable target: how every weight is made, and a reader for one tensor of the file by name, or a part of it."""

    config: TargetConfig
    plan: Mapping[str, AnySource]
    read: Callable[..., Any]


def check_dtype(dtype: str) -> None:
    """Raises ValueError for a dtype that networks don't compute in."""
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {sorted(DTYPES)}, got {dtype!r}")


# float16's largest number. Trained networks are published in float16, and no weight comes near it; squares and products
# of larger ones overflow, and a norm then makes zeros of them, which look like logits.
LARGEST = 65504.0


@jax.jit
def _largest(value: jax.Array) -> jax.Array:
    # A CPU's maximum may pass over NaN: it counts as infinity.
    value = value.astype(jnp.float32)
    return jnp.where(jnp.isfinite(value), jnp.abs(value), jnp.inf).max()


def _largest_of_parts(value: np.ndarray | jax.Array) -> list[Any]:
    """The largest magnitude in each different part of a weight, not finite for NaN, on the device that holds it.

    Nothing goes between devices.
    """
    if isinstance(value, np.ndarray):
        with np.errstate(invalid="ignore"):  # NaN, which NumPy passes on
            return [abs(float(value.min())), abs(float(value.max()))]
    parts = {str(shard.index): shard.data for shard in value.addressable_shards}
    return [_largest(part) for part in parts.values()]


def check_values(weights: Mapping[str, Any], source: str | Path) -> None:
    """Raises WeightsError with every weight that holds NaN, infinity, or a number that no trained network has.

    What they compute would be nonsense that may look like text. Each is looked at where it lies, and all are waited for
    once.
    """
    floats = {name: value for name, value in weights.items() if jnp.issubdtype(value.dtype, jnp.floating)}
    largest = jax.device_get({name: _largest_of_parts(value) for name, value in floats.items()})
    broken = []
    for name, parts in largest.items():
        if not np.isfinite(parts).all():
            broken.append(f"{name} holds NaN or infinity")
        elif max(parts) > LARGEST:
            broken.append(f"{name} holds a number of {max(parts):.2g}, and no trained weight is beyond {LARGEST:g}")
    if broken:
        raise WeightsError(f"{source} can't be used: {fault_list(broken)}. Fetch it again, or give another one")


def check_tied(head: np.ndarray, embedding: np.ndarray, source: Path) -> None:
    """Raises WeightsError where a head [V, H] stands beside the embedding that is said to be the head, and differs."""
    if head.shape != embedding.shape or not np.array_equal(head.astype(np.float32), embedding.astype(np.float32)):
        raise WeightsError(
            f"{source} has a head that is not the embedding, and its config.json says tie_word_embeddings: set that to "
            "false to use the head, or remove the head"
        )


def named_weights(network: nnx.Module) -> dict[str, jax.Array]:
    """The weights of a network by their paths, joined with dots."""
    return {".".join(map(str, path)): v.get_value() for path, v in nnx.to_flat_state(nnx.state(network, nnx.Param))}


def _powers(exponents: np.ndarray, _: list[np.ndarray]) -> np.ndarray:
    return np.exp2(exponents)


def fill(
    network: Callable[[], AnyNetwork],
    plan: Mapping[str, AnySource],
    read: Callable[..., Any],
    dtype: str,
    mesh: Mesh | None,
    factors: Mapping[str, np.ndarray] | None = None,
) -> AnyNetwork:
    """A module of the built kind whose weights are made from what is read; no weight is initialised first.

    `factors` are those of MXFP4 weights that the network holds in float8_e5m2 (`mxfp4.factors_of`), each a weight too.
    """
    factors = factors or {}
    plan = {**plan, **{f"{path}_scale": Source({}, partial(_powers, f)) for path, f in factors.items()}}
    model = nnx.eval_shape(network)
    check_mesh(model.config, mesh)
    graph, state = nnx.split(model)
    flat = dict(nnx.to_flat_state(state))
    paths = {".".join(map(str, path)): path for path in flat}
    assert paths.keys() == plan.keys(), sorted(paths.keys() ^ plan.keys())
    kind = jnp.dtype(DTYPES[dtype])
    for name, source in tqdm(plan.items(), desc="weights", unit="tensor", leave=False, disable=None):
        weight = flat[paths[name]]
        value: Any
        if isinstance(source, Packed):
            part = partial(source.part, read, kind=kind, factors=factors.get(name))
            value = part((slice(None),) * 3) if mesh is None else place_of(weight, mesh).build(part)
        else:
            value = source.combine([read(tensor) for tensor in source.tensors])
            value = value if value.dtype == kind else value.astype(kind)
            assert value.shape == weight.get_value().shape, (name, value.shape, weight.get_value().shape)
            value = value if mesh is None else place_of(weight, mesh).put(value)
        # device_put copies, and what is a model's array already may be shared with it.
        if not isinstance(value, jax.Array):
            value = jax.device_put(value)
        flat[paths[name]] = weight.replace(value)
    filled = nnx.merge(graph, nnx.from_flat_state(list(flat.items())))
    filled.mesh = mesh
    return filled


def build_target(opened: Opened, dtype: str = "float32", mesh: Mesh | None = None) -> Llama:
    """The target that is read, its weights in `dtype` (float32 or bfloat16), each device with its part of them.

    In bfloat16 MXFP4 experts are held in float8_e5m2, if it holds all their values exactly.
    """
    check_dtype(dtype)
    factors = factors_of(opened.plan, opened.read) if dtype == "bfloat16" else None
    held = None if factors is None else jnp.dtype(jnp.float8_e5m2)
    return fill(
        lambda: build(opened.config, dtype=DTYPES[dtype], held=held, rngs=nnx.Rngs(0)),
        opened.plan,
        opened.read,
        dtype,
        mesh,
        factors,
    )
