"""Targets and drafts by name or directory, and a new untrained draft for a target."""

import dataclasses
import hashlib
from pathlib import Path

import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from dflash.config import (
    ConfigError,
    ConvConfig,
    DraftConfig,
    SelectorConfig,
    TargetConfig,
    build_target_layer_ids,
    check_draft,
)
from dflash.models.draft import Draft
from dflash.models.llama import Llama
from dflash.weights import easydel, huggingface, smollm2
from dflash.weights.runs import is_root, is_run
from dflash.weights.zarr import INDEX

# In place of a directory: a draft with random weights.
UNTRAINED = "untrained"


def target_directory(name_or_dir: str | Path) -> Path:
    """The snapshot directory of a target; `smollm2-135m` is made on first use."""
    return smollm2.snapshot_dir() if str(name_or_dir) == smollm2.NAME else Path(name_or_dir)


def load_target(name_or_dir: str | Path, dtype: str = "float32", mesh: Mesh | None = None) -> Llama:
    """A target from a Hugging Face snapshot directory, or `smollm2-135m`, computing in `dtype` (float32, bfloat16).

    With a mesh its weights are split over the axis `tp`. Raises ConfigError, WeightsError or SnapshotError.
    """
    return huggingface.read_target(target_directory(name_or_dir), dtype, mesh)


def read_any_draft(name_or_dir: str | Path, dtype: str = "float32") -> Draft:
    """A draft from a `DFlashDraftModel` directory, a `run-<step>` directory, or a root of runs.

    A root gives its latest complete run. Raises ConfigError or WeightsError.
    """
    directory = Path(name_or_dir)
    if _is_training_run(directory):
        return easydel.read_run(easydel.resolve_run(directory), dtype)
    return huggingface.read_draft(directory, dtype)


def _is_training_run(directory: Path) -> bool:
    """Whether this is a run directory or a root of them, and no exported draft."""
    exported = any((directory / n).is_file() for n in ("model.safetensors", "model.safetensors.index.json"))
    return not exported and (is_run(directory) or is_root(directory))


def draft_hash(name_or_dir: str | Path) -> str:
    """SHA-256 of a draft's config and weights: what a result says that it was measured with. Raises WeightsError."""
    directory = Path(name_or_dir)
    if not _is_training_run(directory):
        return huggingface.snapshot_hash(directory)
    run = easydel.resolve_run(directory)
    # The index holds the hash of every array.
    parts = [(run / name).read_bytes() for name in ("config.json", INDEX)]
    return hashlib.sha256(b"".join(parts)).hexdigest()


def load_draft(name_or_dir: str | Path, target: Llama) -> Draft:
    """A draft in the target's dtype, from whatever `read_any_draft` reads.

    Raises ConfigError (also when it does not fit the target) or WeightsError.
    """
    draft = read_any_draft(name_or_dir, str(target.dtype))
    check_draft(draft.config, target.config)
    return draft


def init_draft(
    target: Llama,
    *,
    num_layers: int = 2,
    block_size: int = 8,
    target_layer_ids: tuple[int, ...] | None = None,
    mask_token_id: int | None = None,
    seed: int = 0,
) -> Draft:
    """An untrained draft for a target, in its dtype; see `new_draft`. Raises ConfigError."""
    return new_draft(
        target.config,
        num_layers=num_layers,
        block_size=block_size,
        target_layer_ids=target_layer_ids,
        mask_token_id=mask_token_id,
        dtype=target.dtype,
        seed=seed,
    )


def new_draft(
    target: TargetConfig,
    *,
    num_layers: int,
    block_size: int,
    target_layer_ids: tuple[int, ...] | None = None,
    mask_token_id: int | None = None,
    conv: ConvConfig | None = None,
    selector: SelectorConfig | None = None,
    dtype: jnp.dtype = jnp.float32,
    seed: int = 0,
) -> Draft:
    """An untrained draft for a target of this config, with its heads and MLP width; random weights from `seed`.

    With `conv` and `selector` a DFlash 2 draft, which at first proposes what the DFlash draft of this seed would.

    `target_layer_ids` default to as many as there are draft layers, `mask_token_id` to the last of the vocabulary
    (unused in most: vocabularies are padded). Raises ConfigError.
    """
    if block_size < 2 or num_layers < 1:
        raise ConfigError(f"a draft has at least 1 layer and blocks of 2; got {num_layers} and {block_size}")
    ids = build_target_layer_ids(target.num_layers, num_layers) if target_layer_ids is None else tuple(target_layer_ids)
    if not ids:
        raise ConfigError("a draft reads at least one layer of its target; target_layer_ids names none")
    config = DraftConfig(
        vocab_size=target.vocab_size,
        hidden_size=target.hidden_size,
        intermediate_size=target.intermediate_size,
        num_heads=target.num_heads,
        num_kv_heads=target.num_kv_heads,
        head_dim=target.head_dim,
        max_position=target.max_position,
        rms_norm_eps=target.rms_norm_eps,
        rope=dataclasses.replace(target.rope),
        windows=(None,) * num_layers,
        causal=(False,) * num_layers,
        block_size=block_size,
        mask_token_id=target.vocab_size - 1 if mask_token_id is None else mask_token_id,
        target_layer_ids=ids,
        num_target_layers=target.num_layers,
        conv=conv,
        selector=selector,
    )
    check_draft(config, target)
    return Draft(config, dtype=dtype, rngs=nnx.Rngs(seed))
