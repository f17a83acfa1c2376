"""Targets and drafts of Hugging Face snapshots (bf16, f16, f32, GPT-OSS's MXFP4), without torch.

All missing, extra and misshapen tensors of a snapshot are told in one error, before a single weight is read.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from safetensors import safe_open
from tqdm import tqdm

from dflash.config import ConfigError, DraftConfig, TargetConfig
from dflash.models.draft import Draft
from dflash.models.gpt_oss import GptOss
from dflash.models.llama import Llama
from dflash.weights.config_json import read_draft_config, read_target_config, write_draft_config
from dflash.weights.plan import Source, draft_plan, target_plan
from dflash.weights.snapshot import Header, WeightsError, read_headers, read_json, weight_files, write_snapshot

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
_Module = TypeVar("_Module", bound=nnx.Module)


def _check(plan: dict[str, Source], headers: dict[str, Header], ignored: Callable[[str], bool], where: Path) -> None:
    """Raises WeightsError with every tensor that is missing, left over, misshapen or of a kind we can't read."""
    wanted = {name: (shape, s.kinds) for s in plan.values() for name, shape in s.tensors.items()}
    faults = [f"missing {name} {list(shape)}" for name, (shape, _) in wanted.items() if name not in headers]
    for name, header in headers.items():
        if name not in wanted:
            faults += [] if ignored(name) else [f"unexpected {name} {list(header.shape)}"]
            continue
        shape, kinds = wanted[name]
        if header.shape != shape:
            faults.append(f"{name} is {list(header.shape)}, must be {list(shape)}")
        if header.kind not in kinds:
            faults.append(f"{name} is {header.kind}, must be one of {list(kinds)}")
    if faults:
        raise WeightsError(f"{where} does not fit its config.json ({len(faults)} faults): " + "; ".join(faults))


def _shard(shape: tuple[int, ...], mesh: Mesh | None) -> NamedSharding | None:
    """Weights are split over `tp` along their first axis (outputs, experts, vocabulary) where it divides."""
    if mesh is None:
        return None
    tp = mesh.shape.get("tp", 1)
    split = len(shape) > 1 and shape[0] % tp == 0
    return NamedSharding(mesh, PartitionSpec("tp" if split and "tp" in mesh.shape else None))


@dataclasses.dataclass(frozen=True, slots=True)
class Opened:
    """A target that can be read: how every weight is made, and what gives one tensor of the file by its name."""

    config: TargetConfig
    plan: dict[str, Source]
    read: Callable[[str], Any]


def _fill(
    build: Callable[[], _Module], plan: dict[str, Source], read: Callable[[str], Any], dtype: str, mesh: Mesh | None
) -> _Module:
    """A module of the built kind whose weights are made of what is read; no weight is initialised first."""
    model = nnx.eval_shape(build)
    graph, state = nnx.split(model)
    flat = dict(nnx.to_flat_state(state))
    paths = {".".join(map(str, path)): path for path in flat}
    assert paths.keys() == plan.keys(), sorted(paths.keys() ^ plan.keys())
    kind = jnp.dtype(DTYPES[dtype])
    for name, source in tqdm(plan.items(), desc="weights", unit="tensor", leave=False, disable=None):
        value = source.combine([read(tensor) for tensor in source.tensors])
        value = value if value.dtype == kind else value.astype(kind)
        expected = flat[paths[name]].get_value().shape
        assert value.shape == expected, (name, value.shape, expected)
        # device_put copies, and what is a model's array already may be shared with it.
        if mesh is not None or not isinstance(value, jax.Array):
            value = jax.device_put(value, _shard(value.shape, mesh))
        flat[paths[name]] = flat[paths[name]].replace(value)
    return nnx.merge(graph, nnx.from_flat_state(list(flat.items())))


def _tensor_reader(headers: Mapping[str, Header]) -> Callable[[str], np.ndarray]:
    handles = {h.file: safe_open(h.file, framework="numpy") for h in headers.values()}
    return lambda name: handles[headers[name].file].get_tensor(name)


def _check_dtype(dtype: str) -> None:
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {sorted(DTYPES)}, got {dtype!r}")


def _open_target(directory: Path, wanted: tuple[str, ...] = ("",)) -> Opened:
    """The weights of a target whose paths start so; only all of them together are held against the whole file.

    Of some, MXFP4 is not read. Raises ConfigError or WeightsError, each with every fault of the file.
    """
    directory, whole = Path(directory), wanted == ("",)
    if (directory / "tensorstore_index.json").is_file():
        from dflash.weights.easydel_target import open_target  # which is built on this module

        opened = open_target(directory)
        plan = {path: source for path, source in opened.plan.items() if path.startswith(wanted)}
        return dataclasses.replace(opened, plan=plan)
    config = read_target_config(read_json(directory, "config.json"), str(directory / "config.json"))
    headers = read_headers(weight_files(directory))
    packed = whole and any(name.endswith("_blocks") for name in headers)
    plan = {path: source for path, source in target_plan(config, packed) if path.startswith(wanted)}
    names = {name for source in plan.values() for name in source.tensors}

    def ignored(name: str) -> bool:
        if not whole:
            return name not in names
        return name.endswith("rotary_emb.inv_freq") or (config.tie_embeddings and name == "lm_head.weight")

    _check(plan, headers, ignored, directory)
    return Opened(config, plan, _tensor_reader(headers))


def build_target(opened: Opened, dtype: str = "float32", mesh: Mesh | None = None) -> Llama:
    """The target that is read, its weights in `dtype` (float32 or bfloat16), split over the mesh's `tp`."""
    _check_dtype(dtype)
    config = opened.config
    kind = GptOss if config.family == "gpt_oss" else Llama
    return _fill(lambda: kind(config, dtype=DTYPES[dtype], rngs=nnx.Rngs(0)), opened.plan, opened.read, dtype, mesh)


def read_target(directory: Path, dtype: str = "float32", mesh: Mesh | None = None) -> Llama:
    """The target in a snapshot directory, or in one that EasyDeL wrote; see `build_target`.

    Raises ConfigError or WeightsError, each with every fault of the file.
    """
    _check_dtype(dtype)
    return build_target(_open_target(directory), dtype, mesh)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Borrowed:
    """What a draft borrows of its target: embedding [V, H] and head [V, H] (one array when tied), final norm [H]."""

    config: TargetConfig
    embedding: np.ndarray
    head: np.ndarray
    norm: np.ndarray


def _read_some(directory: Path, wanted: tuple[str, ...]) -> tuple[TargetConfig, dict[str, np.ndarray]]:
    """The config of a target, and those of its weights whose paths start so, in the dtype of the file."""
    opened = _open_target(directory, wanted)
    return opened.config, {
        path: source.combine([opened.read(name) for name in source.tensors]) for path, source in opened.plan.items()
    }


def read_tensors(directory: Path) -> dict[str, np.ndarray]:
    """Every tensor of a snapshot by its name, in the dtype of the file. Raises WeightsError."""
    headers = read_headers(weight_files(Path(directory)))
    read = _tensor_reader(headers)
    return {name: read(name) for name in headers}


def read_borrowed(directory: Path) -> Borrowed:
    """The few tensors of a target that training needs, in the dtype of the file; the others are not read.

    Raises ConfigError or WeightsError, as `read_target` does.
    """
    config, values = _read_some(directory, ("embedding.weight", "head.weight", "norm.weight"))
    embedding = values["embedding.weight"]
    return Borrowed(
        config=config, embedding=embedding, head=values.get("head.weight", embedding), norm=values["norm.weight"]
    )


def read_layers(directory: Path, layers: Sequence[int]) -> list[dict[str, np.ndarray]]:
    """The weights of some layers of a target by the names that `Llama.layers[i]` has for them; MXFP4 is not read.

    Raises ConfigError or WeightsError, as `read_target` does.
    """
    prefixes = [f"layers.{i}." for i in layers]
    _, values = _read_some(directory, tuple(prefixes))
    return [{path.removeprefix(p): v for path, v in values.items() if path.startswith(p)} for p in prefixes]


def read_draft(directory: Path, dtype: str = "float32", mesh: Mesh | None = None) -> Draft:
    """The draft in a `DFlashDraftModel` directory. Raises ConfigError or WeightsError, each with every fault."""
    _check_dtype(dtype)
    directory = Path(directory)
    if (directory / "tensorstore_index.json").is_file():
        raise ConfigError(
            f"{directory} is an EasyDeL run directory, not a DFlashDraftModel directory (config.json and "
            "model.safetensors): read it with dflash.load_draft"
        )
    config = read_draft_config(read_json(directory, "config.json"), str(directory / "config.json"))
    headers = read_headers(weight_files(directory))
    plan = dict(draft_plan(config))
    _check(plan, headers, lambda _: False, directory)
    return _fill(
        lambda: Draft(config, dtype=DTYPES[dtype], rngs=nnx.Rngs(0)), plan, _tensor_reader(headers), dtype, mesh
    )


def draft_tensors(draft: Draft) -> dict[str, np.ndarray]:
    """A draft's weights by z-lab's names, [out, in], in the draft's dtype."""
    values = {".".join(map(str, p)): np.asarray(v.get_value()) for p, v in nnx.to_flat_state(nnx.state(draft))}
    tensors: dict[str, np.ndarray] = {}
    for name, source in draft_plan(draft.config):
        rows = np.cumsum([shape[0] for shape in source.tensors.values()])[:-1]
        parts = np.split(values[name], rows)
        tensors |= {t: np.ascontiguousarray(p) for t, p in zip(source.tensors, parts, strict=True)}
    return tensors


def check_draft_tensors(directory: Path, config: DraftConfig) -> None:
    """Raises WeightsError with every tensor that a draft directory lacks, should not have, or has in another shape."""
    _check(dict(draft_plan(config)), read_headers(weight_files(directory)), lambda _: False, directory)


def write_draft(draft: Draft, directory: Path, record: Mapping[str, Any] | None = None) -> None:
    """Writes a `DFlashDraftModel` directory (z-lab's names, [out, in]) in the draft's dtype; whole, or not at all.

    A `record` of how it was trained goes beside it, into training.json, with the draft's hash. Raises WeightsError when
    `directory` exists.
    """
    write_snapshot(directory, write_draft_config(draft.config, str(draft.dtype)), draft_tensors(draft), record=record)
