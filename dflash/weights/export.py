"""Draft directories for the programs that read them: one network, and a config.json in each reader's words.

Readers silently load broken drafts, or drop what they don't know. So a draft is checked against its reader's abilities
before anything is written, and every fault is reported at once.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np

from dflash.config import ConfigError, DraftConfig, TargetConfig, TargetShape, check_draft, fault_list, range_faults
from dflash.models.draft import Draft
from dflash.weights.config_json import draft_extras, read_draft_config, read_target_config, write_draft_config
from dflash.weights.huggingface import check_draft_tensors, draft_tensors
from dflash.weights.snapshot import WeightsError, read_json, write_snapshot
from dflash.weights.speculators import speculators_config

Consumer = Literal["z-lab", "sglang-jax", "speculators"]
Dtype = Literal["float32", "bfloat16", "float16"]

_SIZE = re.compile(r"([0-9]+)(B|KB|MB|GB)?", re.IGNORECASE)


def parse_size(text: str) -> int:
    """Bytes of a size such as 5GB, 200MB or 1000 (decimal units, as Hugging Face's). Raises ConfigError."""
    match = _SIZE.fullmatch(text.strip())
    if match is None or int(match[1]) < 1:
        raise ConfigError(f"a size is a number of bytes, KB, MB or GB, such as 5GB; got {text!r}")
    return int(match[1]) * {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}[(match[2] or "B").upper()]


# ---- what readers can do


def _own_faults(c: DraftConfig) -> list[str]:
    """What is wrong with a draft for every reader."""
    faults = []
    extras = draft_extras(c)
    if extras:
        faults.append(f"{extras} is not of the canonical draft: no other program reads it, each would drop it silently")
    if len(set(c.target_layer_ids)) < c.num_features:
        faults.append(f"target_layer_ids {list(c.target_layer_ids)} name a layer twice")
    faults += range_faults(c, c.num_target_layers, c.vocab_size)
    if c.block_size < 2:
        faults.append(f"its block_size is {c.block_size}, an anchor and at least one drafted token are 2")
    return faults


def reader_faults(c: DraftConfig, consumer: Consumer) -> list[str]:
    """What this reader would do differently from us."""
    faults = []
    last = c.num_target_layers - 1
    if consumer != "z-lab" and last in c.target_layer_ids:
        faults.append(f"{consumer} can't read the output of the target's last layer ({last})")
    if consumer != "z-lab" and c.conv is not None:
        faults.append(f"{consumer} knows no DFlash 2 draft")
    if consumer == "sglang-jax":
        if c.rope.kind != "default":
            faults.append(f"sglang-jax reads no rope_scaling; the draft's rope is {c.rope.kind}")
        if any(c.windows) or any(c.causal):
            faults.append("sglang-jax has neither sliding windows nor causal blocks in a draft")
    if consumer == "speculators":
        if any(causal and window is None for window, causal in zip(c.windows, c.causal, strict=True)):
            faults.append("speculators' full-attention layers see the whole block; the draft's are causal")
        sliding = {causal for window, causal in zip(c.windows, c.causal, strict=True) if window is not None}
        if len(sliding) > 1:
            faults.append("speculators' sliding layers are all causal in the block, or none is")
    return faults


def check_export(config: DraftConfig, consumer: Consumer, target: TargetConfig | TargetShape | None = None) -> None:
    """Raises ConfigError with every reason why this reader can't run the draft as we do."""
    faults = _own_faults(config) + reader_faults(config, consumer)
    if target is not None:
        try:
            check_draft(config, target)
        except ConfigError as error:
            faults.append(str(error))
    if faults:
        raise ConfigError(f"the draft can't be exported for {consumer}: " + fault_list(faults))


def check_directory(directory: Path, target: TargetShape) -> DraftConfig:
    """The config of a `DFlashDraftModel` directory that a server may get: before one is started with it.

    Its tensors are exactly those of its config, with their shapes, and it fits the target. Raises ConfigError with
    every fault of the directory.
    """
    directory = Path(directory)
    config = read_draft_config(read_json(directory, "config.json"), str(directory / "config.json"))
    faults = []
    for check in (
        lambda: check_draft_tensors(directory, config),
        lambda: check_export(config, "z-lab", target),
    ):
        try:
            check()
        except (ConfigError, WeightsError) as error:
            faults.append(str(error))
    if faults:
        raise ConfigError(fault_list(faults))
    return config


# ---- each reader's config


def _sglang_jax_config(c: DraftConfig, dtype: str) -> dict[str, Any]:
    extra = {
        "target_hidden_size": c.hidden_size,
        "target_layer_ids": list(c.target_layer_ids),
        "mask_token_id": c.mask_token_id,
    }
    return write_draft_config(c, dtype) | extra


def _cast(tensors: Mapping[str, np.ndarray], dtype: Dtype) -> dict[str, np.ndarray]:
    """The tensors in `dtype`. Raises WeightsError with every one that is then not finite."""
    with np.errstate(over="ignore"):
        cast = {name: value.astype(jnp.dtype(dtype)) for name, value in tensors.items()}
    broken = [name for name, value in cast.items() if not np.isfinite(value.astype(np.float32)).all()]
    if broken:
        raise WeightsError(f"as {dtype}, {broken} hold numbers that are not finite: export another run or dtype")
    return cast


def export_draft(
    draft: Draft,
    directory: Path,
    *,
    consumer: Consumer = "z-lab",
    dtype: Dtype = "bfloat16",
    shard_bytes: int | None = None,
    target_dir: Path | None = None,
    verifier: str | None = None,
    record: Mapping[str, Any] | None = None,
) -> None:
    """Writes a draft directory for one kind of reader, atomically.

    `target_dir` is the target's snapshot: the draft must fit it, and a speculators config names its architectures,
    and the target itself as `verifier`. Raises ConfigError or WeightsError, each with every fault.
    """
    c = draft.config
    snapshot = None if target_dir is None else read_json(target_dir, "config.json")
    target = None if snapshot is None else read_target_config(snapshot, f"{target_dir}/config.json")
    check_export(c, consumer, target)
    if consumer == "speculators" and snapshot is None:
        raise ConfigError("a speculators config names its verifier: give the target's snapshot directory (--target)")
    if consumer == "z-lab":
        config = write_draft_config(c, dtype)
    elif consumer == "sglang-jax":
        config = _sglang_jax_config(c, dtype)
    else:
        assert snapshot is not None
        architectures = snapshot.get("architectures") or []
        config = speculators_config(c, dtype, {"name_or_path": verifier, "architectures": architectures})
    write_snapshot(directory, config, _cast(draft_tensors(draft), dtype), shard_bytes=shard_bytes, record=record)
