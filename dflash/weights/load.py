"""Targets and drafts by name or directory, and a new untrained draft for a target."""

import dataclasses
from pathlib import Path

from flax import nnx
from jax.sharding import Mesh

from dflash.config import ConfigError, DraftConfig, build_target_layer_ids, check_draft
from dflash.models.draft import Draft
from dflash.models.llama import Llama
from dflash.weights import huggingface, smollm2


def target_directory(name_or_dir: str | Path) -> Path:
    """The snapshot directory of a target; `smollm2-135m` is made on first use."""
    return smollm2.snapshot_dir() if str(name_or_dir) == smollm2.NAME else Path(name_or_dir)


def load_target(name_or_dir: str | Path, dtype: str = "float32", mesh: Mesh | None = None) -> Llama:
    """A target from a Hugging Face snapshot directory, or `smollm2-135m`, computing in `dtype` (float32, bfloat16).

    With a mesh its weights are split over the axis `tp`. Raises ConfigError, WeightsError or SnapshotError.
    """
    return huggingface.read_target(target_directory(name_or_dir), dtype, mesh)


def load_draft(name_or_dir: str | Path, target: Llama) -> Draft:
    """A draft from a `DFlashDraftModel` directory, in the target's dtype.

    Raises ConfigError (also when it does not fit the target) or WeightsError.
    """
    draft = huggingface.read_draft(Path(name_or_dir), str(target.dtype))
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
    """An untrained draft for a target, with its heads and MLP width; random weights from `seed`.

    `target_layer_ids` default to as many as there are draft layers, `mask_token_id` to the last of the vocabulary
    (unused in most: vocabularies are padded). Raises ConfigError.
    """
    t = target.config
    if block_size < 2 or num_layers < 1:
        raise ConfigError(f"a draft has at least 1 layer and blocks of 2; got {num_layers} and {block_size}")
    ids = build_target_layer_ids(t.num_layers, num_layers) if target_layer_ids is None else tuple(target_layer_ids)
    if not ids:
        raise ConfigError("a draft reads at least one layer of its target; target_layer_ids names none")
    config = DraftConfig(
        vocab_size=t.vocab_size,
        hidden_size=t.hidden_size,
        intermediate_size=t.intermediate_size,
        num_heads=t.num_heads,
        num_kv_heads=t.num_kv_heads,
        head_dim=t.head_dim,
        max_position=t.max_position,
        rms_norm_eps=t.rms_norm_eps,
        rope=dataclasses.replace(t.rope),
        windows=(None,) * num_layers,
        causal=(False,) * num_layers,
        block_size=block_size,
        mask_token_id=t.vocab_size - 1 if mask_token_id is None else mask_token_id,
        target_layer_ids=ids,
        num_target_layers=t.num_layers,
    )
    check_draft(config, t)
    return Draft(config, dtype=target.dtype, rngs=nnx.Rngs(seed))
