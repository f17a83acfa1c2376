"""Hugging Face snapshot directories: config.json and safetensors (bf16, f16, f32, GPT-OSS's MXFP4), without torch.

A weight of ours is made of one or more tensors of the file (q, k and v are one product here). All missing, extra and
misshapen tensors of a snapshot are told in one error, before a single weight is read.
"""

import dataclasses
import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from tqdm import tqdm

from dflash.config import ConfigError, DraftConfig, TargetConfig
from dflash.models.draft import Draft
from dflash.models.gpt_oss import GptOss
from dflash.models.llama import Llama
from dflash.weights.config_json import read_draft_config, read_target_config, write_draft_config

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
_FLOATS = ("BF16", "F16", "F32")
_Module = TypeVar("_Module", bound=nnx.Module)


class WeightsError(ValueError):
    """Weights on disk that can't be used: what is wrong, tensor by tensor, and what to do."""


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


def _target_plan(c: TargetConfig, packed: bool) -> Plan:
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
    return {name: shape for _, source in _target_plan(config, packed) for name, shape in source.tensors.items()}


def _swiglu_plan(path: str, prefix: str, hidden: int, inner: int, bias: bool) -> Plan:
    yield from _linear(f"{path}.gate_up", prefix, ["gate", "up"], [inner, inner], hidden, bias)
    yield from _linear(f"{path}.down", prefix, ["down"], [hidden], inner, bias)


def _draft_plan(c: DraftConfig) -> Plan:
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


@dataclasses.dataclass(frozen=True, slots=True)
class Header:
    """Where a tensor of a snapshot lies, and what it is."""

    file: Path
    kind: str
    shape: tuple[int, ...]


def read_json(directory: Path, name: str) -> dict[str, Any]:
    """An object from a JSON file of a snapshot. Raises WeightsError when it is missing or no JSON object."""
    path = directory / name
    if not directory.is_dir():
        raise WeightsError(f"a snapshot is a directory; {directory} is none: give a local directory or `smollm2-135m`")
    if not path.is_file():
        raise WeightsError(f"a snapshot needs {name}; {directory} has none: is it a Hugging Face snapshot directory?")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # what is no JSON, no UTF-8, a number too long or too deep a nest
        raise WeightsError(f"{path} is no valid JSON ({error}): fetch the snapshot again") from None
    if not isinstance(value, dict):
        raise WeightsError(f"{path} must hold a JSON object, got {type(value).__name__}")
    return value


def holds_weights(directory: Path) -> bool:
    """Whether a directory has the weights of a snapshot, whole or in parts."""
    return any((directory / n).is_file() for n in ("model.safetensors", "model.safetensors.index.json"))


def _weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a snapshot, by its index or the single file; names never leave the directory."""
    if (directory / "model.safetensors").is_file():
        return [directory / "model.safetensors"]
    if not (directory / "model.safetensors.index.json").is_file():
        raise WeightsError(
            f"a snapshot needs model.safetensors or model.safetensors.index.json; {directory} has neither "
            "(pickled .bin weights are not read)"
        )
    weight_map = read_json(directory, "model.safetensors.index.json").get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise WeightsError(f"{directory}/model.safetensors.index.json must hold a weight_map")
    names = sorted({str(n) for n in weight_map.values()})
    bad = [n for n in names if Path(n).name != n or not n.endswith(".safetensors")]
    if bad:
        raise WeightsError(f"weight_map may name .safetensors files of its own directory only, got {bad}")
    missing = [n for n in names if not (directory / n).is_file()]
    if missing:
        raise WeightsError(f"{directory} lacks {missing} named in its index: the download is incomplete")
    return [directory / n for n in names]


def _read_headers(files: Sequence[Path]) -> dict[str, Header]:
    headers: dict[str, Header] = {}
    for path in files:
        try:
            with safe_open(path, framework="numpy") as tensors:
                for name in tensors.keys():  # noqa: SIM118 (a handle, not a dict)
                    if name in headers:
                        raise WeightsError(f"{name} is in {headers[name].file} and in {path}: fetch the snapshot again")
                    part = tensors.get_slice(name)
                    headers[name] = Header(path, part.get_dtype(), tuple(part.get_shape()))
        except (SafetensorError, OSError) as error:
            raise WeightsError(f"{path} can't be read ({error}): it is damaged or cut short, fetch it again") from None
    return headers


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
    headers = _read_headers(_weight_files(directory))
    packed = whole and any(name.endswith("_blocks") for name in headers)
    plan = {path: source for path, source in _target_plan(config, packed) if path.startswith(wanted)}
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
    headers = _read_headers(_weight_files(Path(directory)))
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
    headers = _read_headers(_weight_files(directory))
    plan = dict(_draft_plan(config))
    _check(plan, headers, lambda _: False, directory)
    return _fill(
        lambda: Draft(config, dtype=DTYPES[dtype], rngs=nnx.Rngs(0)), plan, _tensor_reader(headers), dtype, mesh
    )


def draft_tensors(draft: Draft) -> dict[str, np.ndarray]:
    """A draft's weights by z-lab's names, [out, in], in the draft's dtype."""
    values = {".".join(map(str, p)): np.asarray(v.get_value()) for p, v in nnx.to_flat_state(nnx.state(draft))}
    tensors: dict[str, np.ndarray] = {}
    for name, source in _draft_plan(draft.config):
        rows = np.cumsum([shape[0] for shape in source.tensors.values()])[:-1]
        parts = np.split(values[name], rows)
        tensors |= {t: np.ascontiguousarray(p) for t, p in zip(source.tensors, parts, strict=True)}
    return tensors


def check_draft_tensors(directory: Path, config: DraftConfig) -> None:
    """Raises WeightsError with every tensor that a draft directory lacks, should not have, or has in another shape."""
    _check(dict(_draft_plan(config)), _read_headers(_weight_files(directory)), lambda _: False, directory)


def write_draft(draft: Draft, directory: Path, record: Mapping[str, Any] | None = None) -> None:
    """Writes a `DFlashDraftModel` directory (z-lab's names, [out, in]) in the draft's dtype; whole, or not at all.

    A `record` of how it was trained goes beside it, into training.json, with the draft's hash. Raises WeightsError when
    `directory` exists.
    """
    write_snapshot(directory, write_draft_config(draft.config, str(draft.dtype)), draft_tensors(draft), record=record)


def write_snapshot(
    directory: Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray],
    *,
    shard_bytes: int | None = None,
    record: Mapping[str, Any] | None = None,
) -> None:
    """Writes config.json and safetensors, in files of at most `shard_bytes` (a larger tensor has one to itself).

    See `write_draft` for the record. Raises WeightsError when `directory` exists.
    """
    directory = Path(directory)
    if directory.exists():
        raise WeightsError(f"a draft is written to a new directory; {directory} exists: remove it or name another")
    directory.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{directory.name}-", dir=directory.parent))
    try:
        _save_shards(temporary, _shards(tensors, shard_bytes))
        (temporary / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        if record is not None:
            whole = {"draft_sha256": snapshot_hash(temporary), **record}
            text = json.dumps(whole, indent=2, sort_keys=True, allow_nan=False)
            (temporary / "training.json").write_text(text + "\n", encoding="utf-8")
        temporary.chmod(0o755)
        temporary.rename(directory)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _shards(tensors: Mapping[str, np.ndarray], shard_bytes: int | None) -> list[dict[str, np.ndarray]]:
    shards: list[dict[str, np.ndarray]] = [{}]
    filled = 0
    for name, value in tensors.items():
        if shard_bytes is not None and shards[-1] and filled + value.nbytes > shard_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = value
        filled += value.nbytes
    return shards


def _save_shards(directory: Path, shards: Sequence[dict[str, np.ndarray]]) -> None:
    # transformers 4 takes no other format than pt, tf, flax and mlx.
    metadata = {"format": "pt"}
    if len(shards) == 1:
        save_file(shards[0], directory / "model.safetensors", metadata=metadata)
        return
    weight_map: dict[str, str] = {}
    for i, shard in enumerate(shards, 1):
        file = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, directory / file, metadata=metadata)
        weight_map |= dict.fromkeys(shard, file)
    total = sum(value.nbytes for shard in shards for value in shard.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    text = json.dumps(index, indent=2, sort_keys=True) + "\n"
    (directory / "model.safetensors.index.json").write_text(text, encoding="utf-8")


def snapshot_hash(directory: Path) -> str:
    """SHA-256 over config.json and the weight files of a snapshot: what a result says that it was measured on."""
    digest = hashlib.sha256()
    directory = Path(directory)
    read_json(directory, "config.json")
    if (directory / "tensorstore_index.json").is_file():
        arrays = sorted(path for path in (directory / "model").rglob("*") if path.is_file())
        files = [directory / "tensorstore_index.json", *arrays]
    else:
        files = _weight_files(directory)
    for path in [directory / "config.json", *files]:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
