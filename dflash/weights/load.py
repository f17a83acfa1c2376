"""Targets and drafts by name or directory, and a new untrained draft for a target."""

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

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
from dflash.weights import easydel, huggingface, smollm2, snapshot
from dflash.weights.config_json import read_target_config
from dflash.weights.older import convert
from dflash.weights.older_layouts import is_older_run, linen_step, read_older
from dflash.weights.runs import is_root, is_run, resolve_run
from dflash.weights.zarr import INDEX

# In place of a directory: a draft with random weights.
UNTRAINED = "untrained"
# The trained draft that comes with the project; it is called as its target is.
SHIPPED_DRAFT = Path(__file__).parents[1] / "data" / f"{smollm2.NAME}-draft"


def target_directory(name_or_dir: str | Path) -> Path:
    """The snapshot directory of a target; `smollm2-135m` is made on first use."""
    return smollm2.snapshot_dir() if str(name_or_dir) == smollm2.NAME else Path(name_or_dir)


def draft_directory(name_or_dir: str | Path) -> Path:
    """The directory of a draft; `smollm2-135m` is the trained one that comes with the project.

    Raises WeightsError when that one is not in this installation.
    """
    if str(name_or_dir) != smollm2.NAME:
        return Path(name_or_dir)
    if not snapshot.holds_weights(SHIPPED_DRAFT):
        raise snapshot.WeightsError(
            f"the draft {smollm2.NAME} comes with the project, and this installation has no weights at "
            f"{SHIPPED_DRAFT}: install it anew from a whole checkout, or name another draft's directory, or {UNTRAINED}"
        )
    return SHIPPED_DRAFT


def default_draft(target: str) -> str | None:
    """The trained draft that decodes a target when none is named; None for a target that comes without one."""
    return smollm2.NAME if target == smollm2.NAME else None


def target_config(directory: Path) -> TargetConfig:
    """The config of the target in a snapshot directory. Raises ConfigError or WeightsError."""
    return read_target_config(snapshot.read_json(directory, "config.json"), str(directory / "config.json"))


def load_target(name_or_dir: str | Path, dtype: str = "float32", mesh: Mesh | None = None) -> Llama:
    """A target from a Hugging Face snapshot directory, or `smollm2-135m`, computing in `dtype` (float32, bfloat16).

    A directory that EasyDeL's `save_pretrained` wrote is read too. With a mesh its weights are split over the axis
    `tp`. Raises ConfigError, WeightsError or SnapshotError.
    """
    return huggingface.read_target(target_directory(name_or_dir), dtype, mesh)


def read_any_draft(name_or_dir: str | Path, dtype: str = "float32", target: TargetConfig | None = None) -> Draft:
    """A draft from a `DFlashDraftModel` directory, a `run-<step>` directory, a root of runs, or `smollm2-135m`.

    A root gives its latest complete run. What an older trainer left (`dflash.weights.older_layouts`) is converted; its
    runs leave rotary settings and vocabulary to the `target`, and without one, to the target that they recorded.
    Raises ConfigError or WeightsError.
    """
    directory = draft_directory(name_or_dir)
    older = read_older(directory, target)
    if older is not None:
        return convert(older, dtype)
    if _is_training_run(directory):
        return easydel.read_run(resolve_run(directory), dtype)
    return huggingface.read_draft(directory, dtype)


def _is_training_run(directory: Path) -> bool:
    """Whether this is a run directory or a root of them, and no exported draft."""
    return not snapshot.holds_weights(directory) and (is_run(directory) or is_root(directory))


def is_own_run(name_or_dir: str | Path) -> bool:
    """Whether this is a run directory, or a root of them, that this project's trainer wrote."""
    directory = draft_directory(name_or_dir)
    return _is_training_run(directory) and not is_older_run(resolve_run(directory))


def draft_hash(name_or_dir: str | Path) -> str:
    """SHA-256 of a draft's config and weights: what a result says that it was measured with. Raises WeightsError."""
    directory = draft_directory(name_or_dir)
    step = linen_step(directory)
    if step is not None:
        files = [step.parent.parent / "meta.json", step]
    elif _is_training_run(directory):
        run = resolve_run(directory)
        files = [run / "config.json", run / INDEX]
        # Our index holds the hash of every array; an older trainer's doesn't.
        if is_older_run(run):
            files += sorted(path for path in (run / "model").rglob("*") if path.is_file())
    else:
        return snapshot.snapshot_hash(directory)
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def model_facts(target: str, draft: str = UNTRAINED) -> dict[str, Any]:
    """What identifies a target and a draft in a result: names and hashes, and the seed of an untrained draft."""
    facts = {"target": target, "target_sha256": snapshot.snapshot_hash(target_directory(target)), "draft": draft}
    if draft == UNTRAINED:
        return facts | {"draft_sha256": None, "seeds": {"draft": 0}}
    return facts | {"draft_sha256": draft_hash(draft)}


def load_draft(name_or_dir: str | Path, target: Llama) -> Draft:
    """A draft in the target's dtype, from whatever `read_any_draft` reads.

    Raises ConfigError (also when it does not fit the target) or WeightsError.
    """
    draft = read_any_draft(name_or_dir, str(target.dtype), target.config)
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
    vocabulary: bytes | None = None,
    dtype: jnp.dtype = jnp.float32,
    seed: int = 0,
) -> Draft:
    """An untrained draft for a target of this config, with its heads and MLP width; random weights from `seed`.

    With `conv` and `selector` a DFlash 2 draft, which at first proposes what the DFlash draft of this seed would.

    `target_layer_ids` default to as many as there are draft layers, `mask_token_id` to the last of the vocabulary
    (unused in most: vocabularies are padded); `vocabulary` is `DraftConfig`'s. Raises ConfigError.
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
        vocabulary=vocabulary,
    )
    check_draft(config, target)
    return Draft(config, dtype=dtype, rngs=nnx.Rngs(seed))
