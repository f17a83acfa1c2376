"""Training checkpoints in EasyDeL's layout: `run-<step>/` with config.json, metadata.json and arrays for tensorstore.

EasyDeL itself is not needed. Kernels are [in, out], as there. What its config.json leaves to the reader's guess (the
mask, the place of the q/k norm, rotary settings, windows) stands under the key `dflash`; a run without that key is of
the EasyDeL fork, whose conventions differ (`dflash.weights.easydel_fork.conventions`).
"""

import datetime
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from dflash.config import ConfigError, DraftConfig, TargetConfig, counted_faults, fault_list
from dflash.models.draft import Draft
from dflash.weights.build import DTYPES, check_dtype
from dflash.weights.config_json import read_draft_config, write_draft_config
from dflash.weights.dialect import Dialect, digest_of
from dflash.weights.huggingface import draft_tensors
from dflash.weights.names import draft_plan
from dflash.weights.runs.arrays import FLOATS, read_arrays, read_index, read_run_object, write_array, write_index
from dflash.weights.runs.directories import MARKER, check_run, new_run, run_at
from dflash.weights.runs.leaves import check_leaves, leaf_kind, leaves_of, restore
from dflash.weights.snapshot import ARRAY_INDEX, WeightsError, check_tensors, tensor_faults

_NAMES = {"input_layernorm": "in_norm", "post_attention_layernorm": "post_norm", "self_attn": "attn"}


def run_path(tensor: str) -> str:
    """The array of a run that is a tensor of a `DFlashDraftModel`; it lies there with its axes in reverse."""
    path = "/".join(_NAMES.get(part, part) for part in tensor.split("."))
    path = re.sub(r"norm/weight$", "norm/scale", path)
    path = re.sub(r"/weight$", "/kernel", path)
    return f"model/{'final_norm/scale' if path == 'norm/scale' else path}/value"


def run_arrays(c: DraftConfig) -> dict[str, tuple[int, ...]]:
    """Paths and shapes of the arrays, [in, out] or [size], that a run holds of a draft."""
    return {run_path(name): shape[::-1] for _, source in draft_plan(c) for name, shape in source.tensors.items()}


# ---- config.json


def _conventions(*, learned_mask: bool = False, qk_norm: bool = True) -> dict[str, str]:
    return {
        "kernels": "[in, out]",
        "mask": "a learned vector" if learned_mask else "the target's embedding of mask_token_id",
        "positions": "absolute",
        "qk_norm": "with weights, before rope" if qk_norm else "none",
        "query_heads": "repeated: head h reads kv head h // (heads / kv heads)",
        "target_layer_ids": "layers whose output is read",
    }


def _conventions_of(c: DraftConfig) -> dict[str, str]:
    return _conventions(learned_mask=c.learned_mask, qk_norm=c.qk_norm)


def _layout_config(c: DraftConfig) -> dict[str, Any]:
    """The keys of EasyDeL's runs; `remat` is a training setting that leaves no trace in the weights."""
    return {
        "add_one_for_pre_layer_capture": True,
        "block_size": c.block_size,
        "head_dim": c.head_dim,
        "hidden_act": "silu",
        "hidden_size": c.hidden_size,
        "mlp_ratio": c.intermediate_size / c.hidden_size,
        "num_attention_heads": c.num_heads,
        "num_context_features": c.num_features,
        "num_key_value_heads": c.num_kv_heads,
        "num_layers": c.num_layers,
        "qk_norm": c.qk_norm,
        "rms_norm_eps": c.rms_norm_eps,
        "target_layer_ids": list(c.target_layer_ids),
    }


def run_config(config: DraftConfig, dtype: str, provenance: Mapping[str, Any]) -> str:
    """config.json of a run as text. Raises ConfigError for a draft that it can't hold, ValueError if it is not JSON."""
    draft = write_draft_config(config, dtype)
    read = read_draft_config(draft)
    if read != config:
        raise ConfigError(f"config.json can't hold this draft: {config} would be read as {read}; change its settings")
    content = _layout_config(config) | {"remat": False}
    content["dflash"] = {"conventions": _conventions_of(config), "draft": draft, "provenance": dict(provenance)}
    try:
        return json.dumps(content, indent=2, sort_keys=True, allow_nan=False) + "\n"
    except (TypeError, ValueError) as error:
        raise ValueError(f"provenance must be JSON ({error}), got {provenance!r}: give texts and numbers") from None


def _read_config(directory: Path) -> DraftConfig:
    """The draft of a run directory. Raises ConfigError with every fault of config.json."""
    raw = read_run_object(directory, "config.json")
    nested, source = raw.get("dflash"), f"{directory / 'config.json'}"
    if not isinstance(nested, dict) or not isinstance(nested.get("draft"), dict):
        raise ConfigError(
            f"{source} has no `dflash` entry, so it is another trainer's, with other conventions: dflash.load_draft "
            "converts it"
        )
    stated = nested.get("conventions")
    stated = stated if isinstance(stated, dict) else {}

    def differing(wanted: dict[str, str]) -> list[str]:
        keys = sorted(key for key in wanted.keys() | stated.keys() if stated.get(key) != wanted.get(key))
        return [f"convention {key} must be {wanted.get(key)!r}, got {stated.get(key)!r}" for key in keys]

    try:
        config = read_draft_config(nested["draft"], f"{source} (dflash.draft)")
    except ConfigError as error:
        raise ConfigError("; ".join([str(error), *differing(_conventions())])) from None
    faults = differing(_conventions_of(config))
    for key, value in _layout_config(config).items():
        if raw.get(key) != value:
            faults.append(f"{key} is {raw.get(key)!r}, but {value!r} by dflash.draft")
    if faults:
        raise ConfigError(f"{source} can't be used: " + fault_list(faults) + ". Give another run")
    return config


# ---- weights


def split_draft(draft: Draft) -> dict[str, np.ndarray]:
    """The draft's weights as arrays of the layout. Raises WeightsError when their dtypes differ or can't be stored."""
    tensors = draft_tensors(draft)
    dtypes = sorted({value.dtype.name for value in tensors.values()})
    if len(dtypes) > 1 or dtypes[0] not in DTYPES:
        raise WeightsError(f"the weights of a run have one dtype of {sorted(DTYPES)}, got {dtypes}: cast them")
    return {run_path(name): value.T for name, value in tensors.items()}


def join_draft(config: DraftConfig, arrays: Mapping[str, np.ndarray | Array], dtype: str) -> Draft:
    """The draft made of the arrays of the layout, in `dtype`. Differentiable."""
    graph, state = nnx.split(nnx.eval_shape(lambda: Draft(config, dtype=DTYPES[dtype], rngs=nnx.Rngs(0))))
    flat = {".".join(map(str, path)): (path, value) for path, value in nnx.to_flat_state(state)}
    for name, source in draft_plan(config):
        path, empty = flat[name]
        rows = [arrays[run_path(tensor)].T for tensor in source.tensors]
        # Arrays that were read are joined on the host, without compiling programs for it.
        value = (np if isinstance(rows[0], np.ndarray) else jnp).concatenate(rows).astype(jnp.dtype(dtype))
        assert value.shape == empty.get_value().shape, (name, value.shape)
        flat[name] = path, empty.replace(jnp.asarray(value))
    return nnx.merge(graph, nnx.from_flat_state(list(flat.values())))


# ---- runs


def write_run(
    draft: Draft,
    directory: Path,
    step: int,
    *,
    optimizer_state: Any | None,
    provenance: Mapping[str, Any],
    keep: int | None,
    identity: str | None = None,
) -> Path:
    """Writes `<directory>/run-<step>` atomically, then removes earlier runs beyond the last `keep`.

    Weights (float32 or bfloat16) and optimizer state (a pytree of arrays and numbers; None for none) keep every bit.
    `provenance` (hashes of what was trained on) is JSON and goes into config.json, the `identity` of the training into
    metadata.json. Raises WeightsError, also if that run exists or another process writes to `directory`; ConfigError
    for a draft that config.json can't hold.
    """
    weights = split_draft(draft)
    leaves = None if optimizer_state is None else leaves_of(optimizer_state)
    check_leaves(leaves or {})
    dtype = next(iter(weights.values())).dtype.name
    config = run_config(draft.config, dtype, provenance)
    with new_run(Path(directory), step, keep) as folder:
        prefixes = {"model": [write_array(folder, path, value) for path, value in weights.items()]}
        if leaves is not None:
            prefixes["tx"] = [write_array(folder, path, np.asarray(leaf)) for path, leaf in leaves.items()]
        write_index(folder, prefixes)
        (folder / "config.json").write_text(config, encoding="utf-8")
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        marker = {"is_temporary": False, "step": step, "timestamp": now} | ({"identity": identity} if identity else {})
        (folder / MARKER).write_text(json.dumps(marker, indent=2) + "\n", encoding="utf-8")
    return Path(directory) / f"run-{step}"


def read_run(directory: Path, dtype: str = "float32") -> Draft:
    """The draft of one run directory, in `dtype` (float32 or bfloat16); `resolve_run` finds the latest of a root.

    Raises ConfigError, or WeightsError when the run is incomplete or damaged; each with every fault.
    """
    directory = Path(directory)
    return _read(directory, dtype, _config(directory))


def _config(run: Path, _: TargetConfig | None = None) -> DraftConfig:
    check_run(run)
    return _read_config(run)


def _read(directory: Path, dtype: str, config: DraftConfig) -> Draft:
    check_dtype(dtype)
    entries = read_index(directory).get("model", {})
    check_tensors(entries, {path: (shape, FLOATS) for path, shape in run_arrays(config).items()}, directory)
    return join_draft(config, read_arrays(directory, entries.values()), dtype)


def read_optimizer_state(directory: Path, like: Any) -> Any:
    """The optimizer state of one run directory, in the structure, shapes and dtypes of `like`.

    The result has numpy arrays or Python numbers where `like` has them, and jax arrays elsewhere. Raises WeightsError
    with every leaf that is missing, unexpected, of another shape or dtype, or damaged.
    """
    directory = Path(directory)
    check_run(directory)
    entries = read_index(directory).get("tx")
    if entries is None:
        raise WeightsError(f"{directory} was written without an optimizer state: start a new one from its weights")
    leaves = leaves_of(like)
    kinds = {path: leaf_kind(leaf) for path, leaf in leaves.items()}
    faults = tensor_faults(entries, {path: (shape, (dtype,)) for path, (shape, dtype) in kinds.items()})
    if faults:
        raise WeightsError(
            f"the optimizer state of {directory} is another optimizer's or draft's {counted_faults(faults)}. Resume "
            "with the settings that it was written with"
        )
    values = read_arrays(directory, entries.values())
    return jax.tree.unflatten(jax.tree.structure(like), [restore(leaf, values[path]) for path, leaf in leaves.items()])


def _digest(run: Path) -> str:
    """The index holds the hash of every array."""
    return digest_of([run / "config.json", run / ARRAY_INDEX])


DIALECT = Dialect(name="a run of this project", find=run_at, config=_config, read=_read, digest=_digest)
