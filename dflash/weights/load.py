"""Targets and drafts by name or directory, and a new untrained draft for a target."""

import dataclasses
from collections.abc import Sequence
from numbers import Integral
from pathlib import Path
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from dflash.config import (
    ConfigError,
    ConvConfig,
    DraftConfig,
    RopeConfig,
    SelectorConfig,
    TargetConfig,
    build_target_layer_ids,
    check_draft,
)
from dflash.host.device import check_width
from dflash.models.draft import Draft
from dflash.models.llama import Llama
from dflash.models.mesh import place
from dflash.weights import easydel, huggingface, named, smollm2, snapshot, speculators
from dflash.weights.build import Opened, build_target, check_dtype, check_values, named_weights
from dflash.weights.config_json import MAX_LAYERS
from dflash.weights.dialect import Dialect
from dflash.weights.easydel_fork import exports, linen, runs
from dflash.weights.names import Source
from dflash.weights.public import CONFIGS
from dflash.weights.runs import checkpoint
from dflash.weights.snapshot import ARRAY_INDEX, WeightsError

# Instead of a directory: a draft with random weights.
UNTRAINED = "untrained"
# The trained drafts that come with the project. The one with the name of its target is its default; the other is plain
# DFlash, for servers that know no DFlash 2.
SHIPPED_DRAFTS = {name: Path(__file__).parent / f"{name}-draft" for name in (smollm2.NAME, f"{smollm2.NAME}-plain")}


def target_directory(name_or_dir: str | Path) -> Path:
    """The snapshot directory of a target; `smollm2-135m` is made on first use, `Qwen/Qwen3-0.6B` is the hub's.

    Raises HubError for a name that the hub does not have, or when it is out of reach.
    """
    if str(name_or_dir) == smollm2.NAME:
        return smollm2.snapshot_dir()
    return named.directory_of(name_or_dir, "target")


def name_from_anywhere(name_or_dir: str) -> str:
    """A target's name, or its directory's absolute path: what still means it in another working directory."""
    by_name = name_or_dir == smollm2.NAME or named.is_name(name_or_dir)
    return name_or_dir if by_name else str(Path(name_or_dir).absolute())


def draft_directory(name_or_dir: str | Path, *, untrained: bool = False) -> Path:
    """The directory of a draft, or its name on the hub.

    `smollm2-135m` and `smollm2-135m-plain` are the trained ones that come with the project. `untrained` says whether
    the caller takes that word too, and an error may offer it. Raises WeightsError for that word, and if a shipped draft
    is missing from this installation, HubError like `target_directory`.
    """
    if str(name_or_dir) == UNTRAINED:
        raise WeightsError(f"an {UNTRAINED} draft is not taken here: name {_ways(untrained=False)}")
    shipped = SHIPPED_DRAFTS.get(str(name_or_dir))
    if shipped is None:
        return named.directory_of(name_or_dir, "draft")
    if not snapshot.holds_weights(shipped):
        word = f" or {UNTRAINED}" if untrained else ""
        raise WeightsError(
            f"the draft {name_or_dir} comes with the project, and this installation has no weights at {shipped}: "
            f"install it again from a full checkout, or name another draft's directory{word}"
        )
    return shipped


def _ways(*, untrained: bool) -> str:
    """What a draft can be named by."""
    *words, last = [*SHIPPED_DRAFTS, UNTRAINED] if untrained else SHIPPED_DRAFTS
    return (
        "a DFlashDraftModel directory (config.json and model.safetensors) or its name on the hub, a run-<step> "
        f"directory or the folder of them, {', '.join(words)} or {last}"
    )


def default_draft(target: str) -> str | None:
    """The trained draft that decodes a target when none is named; None for a target that comes without one."""
    return smollm2.NAME if target == smollm2.NAME else None


def _open_target(directory: Path, wanted: tuple[str, ...] = ("",)) -> Opened:
    """The weights of a target whose paths start so, from a snapshot or from what EasyDeL's `save_pretrained` wrote."""
    if not (directory / ARRAY_INDEX).is_file():
        return huggingface.open_target(directory, wanted)
    opened = easydel.open_target(directory)
    plan = {path: source for path, source in opened.plan.items() if path.startswith(wanted)}
    return dataclasses.replace(opened, plan=plan)


def load_target(name_or_dir: str | Path, dtype: str = "float32", mesh: Mesh | None = None) -> Llama:
    """A target from a Hugging Face snapshot directory, or `smollm2-135m`, computing in `dtype` (float32, bfloat16).

    A directory that EasyDeL's `save_pretrained` wrote is read too. With a mesh (`dflash.models.mesh.make_mesh`) each
    device gets its part. Raises ConfigError, also for a mesh on which it can't lie, WeightsError or SnapshotError;
    DeviceError where jax computes in 64 bits.
    """
    check_width()
    check_dtype(dtype)
    directory = target_directory(name_or_dir)
    target = build_target(_open_target(directory), dtype, mesh)
    check_values(named_weights(target), directory)
    return target


def held_experts(name_or_dir: str | Path, dtype: str) -> Literal["float8_e5m2"] | None:
    """The dtype in which `load_target` holds routed experts, where that is not `dtype`.

    By the names of a snapshot's tensors; without weights, and for a name of `public.CONFIGS`, by its config.json. Where
    MXFP4's scales lie too far apart for 8 bits it is `dtype` after all, which only reading them shows. Raises
    WeightsError.
    """
    directory = Path(name_or_dir)
    if dtype != "bfloat16" or (directory / ARRAY_INDEX).is_file():
        return None
    if snapshot.holds_weights(directory):
        packed = huggingface.is_packed(snapshot.read_headers(directory))
    else:
        raw = CONFIGS.get(str(name_or_dir)) or snapshot.read_json(directory, "config.json")
        packed = (raw.get("quantization_config") or {}).get("quant_method") == "mxfp4"
    return "float8_e5m2" if packed else None


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Borrowed:
    """What a draft borrows of its target: embedding [V, H] and head [V, H] (one array when tied), final norm [H]."""

    config: TargetConfig
    embedding: np.ndarray
    head: np.ndarray
    norm: np.ndarray


def _read_some(directory: Path, wanted: tuple[str, ...]) -> tuple[TargetConfig, dict[str, np.ndarray]]:
    """The config of a target, and those of its weights whose paths start so, in the dtype of the file."""
    opened = _open_target(Path(directory), wanted)
    weights = {}
    for path, source in opened.plan.items():
        assert isinstance(source, Source), f"{path} is MXFP4, which is read for whole targets"
        weights[path] = source.combine([opened.read(name) for name in source.tensors])
    check_values(weights, directory)
    return opened.config, weights


def read_borrowed(directory: Path) -> Borrowed:
    """The few tensors of a target that training needs, in the dtype of the file; the others are not read.

    Raises ConfigError or WeightsError, as `load_target` does.
    """
    config, values = _read_some(directory, ("embedding.weight", "head.weight", "norm.weight"))
    embedding = values["embedding.weight"]
    return Borrowed(
        config=config, embedding=embedding, head=values.get("head.weight", embedding), norm=values["norm.weight"]
    )


def read_layers(directory: Path, layers: Sequence[int]) -> list[dict[str, np.ndarray]]:
    """The weights of some layers of a target by the names that `Llama.layers[i]` has for them; MXFP4 is not read.

    Raises ConfigError or WeightsError, as `load_target` does.
    """
    prefixes = [f"layers.{i}." for i in layers]
    _, values = _read_some(directory, tuple(prefixes))
    return [{path.removeprefix(p): v for path, v in values.items() if path.startswith(p)} for p in prefixes]


# In the order in which they are asked: a form that is also another's by its files comes before that one.
DIALECTS: tuple[Dialect, ...] = (
    linen.DIALECT,
    exports.DIALECT,
    speculators.DIALECT,
    huggingface.DIALECT,
    runs.DIALECT,
    checkpoint.DIALECT,
)


def _walk(path: Path) -> tuple[Dialect, Path] | None:
    for dialect in DIALECTS:
        place = dialect.find(path)
        if place is not None:
            return dialect, place
    return None


def find_draft(name_or_dir: str | Path, *, untrained: bool = False) -> tuple[Dialect, Path]:
    """The form of the draft that a name or a path means, and where it lies; `untrained` as in `draft_directory`.

    Raises WeightsError where none is, or one that is not complete.
    """
    path = draft_directory(name_or_dir, untrained=untrained)
    match = _walk(path)
    if match is None:
        raise WeightsError(f"{path} holds no draft: name {_ways(untrained=untrained)}")
    return match


def read_any_draft(name_or_dir: str | Path, dtype: str = "float32", target: TargetConfig | None = None) -> Draft:
    """A draft of any form in `DIALECTS`: a `DFlashDraftModel` directory, a run, a root of runs, or a shipped one.

    A root gives its latest complete run. Forms that leave settings to the target take them of `target`, or without one
    of the directory of the target that they recorded. Raises ConfigError, also when the draft does not fit the
    `target`, or WeightsError.
    """
    return _read_at(*find_draft(name_or_dir), dtype, target)


def _read_at(dialect: Dialect, place: Path, dtype: str, target: TargetConfig | None) -> Draft:
    config = _config_at(dialect, place, target)
    draft = dialect.read(place, dtype, config)
    check_values(named_weights(draft), place)
    return draft


def _config_at(dialect: Dialect, place: Path, target: TargetConfig | None) -> DraftConfig:
    config = dialect.config(place, target)
    if target is not None:
        check_draft(config, target)
    return config


def draft_config(name_or_dir: str | Path, target: TargetConfig | None = None) -> DraftConfig:
    """The config of a draft of any form; its weights are not read. Raises as `read_any_draft` does."""
    return _config_at(*find_draft(name_or_dir), target)


def own_run(name_or_dir: str | Path) -> Path | None:
    """The run of this project's trainer that a name or a path means; None where it means another form, or nothing."""
    match = _walk(draft_directory(name_or_dir))
    return match[1] if match is not None and match[0] is checkpoint.DIALECT else None


def draft_hash(name_or_dir: str | Path) -> str:
    """SHA-256 of a draft's config and weights: what a result says that it was measured with. Raises WeightsError."""
    dialect, place = find_draft(name_or_dir)
    return dialect.digest(place)


def model_facts(target: str, draft: str = UNTRAINED) -> dict[str, Any]:
    """What identifies a target and a draft in a result: names and hashes, and the seed of an untrained draft."""
    facts = {"target": target, "target_sha256": snapshot.snapshot_hash(target_directory(target)), "draft": draft}
    if draft == UNTRAINED:
        return facts | {"draft_sha256": None, "seeds": {"draft": 0}}
    return facts | {"draft_sha256": draft_hash(draft)}


def _check_loaded(target: Any) -> None:
    """Raises ConfigError for what is no loaded target, such as its name."""
    if not isinstance(target, Llama):
        raise ConfigError(f"a draft's target is what load_target gives, got {target!r:.60}")


def load_draft(name_or_dir: str | Path, target: Llama) -> Draft:
    """A draft in the target's dtype, beside it on its mesh, from whatever `read_any_draft` reads.

    `untrained` is the draft of `init_draft`. Raises ConfigError (also when it does not fit the target) or WeightsError.
    """
    _check_loaded(target)
    if str(name_or_dir) == UNTRAINED:
        return init_draft(target)
    return _read_at(*find_draft(name_or_dir, untrained=True), str(target.dtype), target.config)


def init_draft(
    target: Llama,
    *,
    num_layers: int = 2,
    block_size: int = 8,
    target_layer_ids: tuple[int, ...] | None = None,
    mask_token_id: int | None = None,
    seed: int = 0,
) -> Draft:
    """An untrained draft for a target, in its dtype and on its mesh; see `new_draft`. Raises ConfigError."""
    _check_loaded(target)
    draft = new_draft(
        target.config,
        num_layers=num_layers,
        block_size=block_size,
        target_layer_ids=target_layer_ids,
        mask_token_id=mask_token_id,
        dtype=target.dtype,
        seed=seed,
    )
    return place(draft, target.mesh)


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
    scaled_rope: bool = True,
    dtype: jnp.dtype = jnp.float32,
    seed: int = 0,
) -> Draft:
    """An untrained draft for a target of this config, with its heads and MLP width; random weights from `seed`.

    With `conv` and `selector` it is a DFlash 2 draft, which at first proposes what the DFlash draft of this seed would.

    `target_layer_ids` default to as many as there are draft layers, `mask_token_id` to the last of the vocabulary
    (unused in most: vocabularies are padded); `vocabulary` is `DraftConfig`'s. Its rotary
    embedding is the target's, without YaRN or another scaling if not `scaled_rope`. Raises ConfigError.
    """
    if faults := [n for n in (num_layers, block_size, seed) if not isinstance(n, Integral) or n > 2**32]:
        raise ConfigError(f"layers, block size and seed of a draft are integers below 2**32, got {faults[0]!r}")
    if num_layers > MAX_LAYERS:
        raise ConfigError(f"a draft has at most {MAX_LAYERS} layers, got {num_layers}")
    if block_size < 2 or num_layers < 1:
        raise ConfigError(f"a draft has at least 1 layer and blocks of 2; got {num_layers} and {block_size}")
    if block_size > target.max_position:
        raise ConfigError(
            f"a block lies within its target's {target.max_position} positions, got one of {block_size}: take a smaller"
        )
    if isinstance(target_layer_ids, int | str):
        raise ConfigError(f"target_layer_ids are numbers of layers in a list, got {target_layer_ids!r}")
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
        rope=target.rope if scaled_rope else RopeConfig(theta=target.rope.theta),
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
