"""Targets and drafts of Hugging Face snapshots (bf16, f16, f32, GPT-OSS's MXFP4), without torch.

All missing, extra and misshapen tensors of a snapshot are reported in one error, before any weight is read.
"""

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from flax import nnx
from safetensors import safe_open

from dflash.config import ConfigError, DraftConfig, TargetConfig
from dflash.models.draft import Draft
from dflash.models.mesh import gather
from dflash.weights.build import DTYPES, Opened, check_dtype, check_tied, fill, named_weights
from dflash.weights.config_json import read_draft_config, write_draft_config
from dflash.weights.dialect import Dialect
from dflash.weights.names import AnySource, draft_plan, target_plan
from dflash.weights.snapshot import (
    ARRAY_INDEX,
    Header,
    check_tensors,
    holds_weights,
    read_headers,
    read_json,
    snapshot_hash,
    target_config,
    write_snapshot,
)


def _check(
    plan: Mapping[str, AnySource], headers: dict[str, Header], ignored: Callable[[str], bool], where: Path
) -> None:
    """Raises WeightsError with every tensor that is missing, left over, misshapen or of a kind we can't read."""
    wanted = {name: (shape, s.kinds) for s in plan.values() for name, shape in s.tensors.items()}
    held = {name: header for name, header in headers.items() if name in wanted or not ignored(name)}
    check_tensors(held, wanted, where)


def _tensor_reader(headers: Mapping[str, Header]) -> Callable[..., np.ndarray]:
    """Reads a tensor by its name, or the part of it that an index of numbers and slices selects."""
    handles = {h.file: safe_open(h.file, framework="numpy") for h in headers.values()}

    def read(name: str, index: tuple[int | slice, ...] | None = None) -> np.ndarray:
        handle = handles[headers[name].file]
        return handle.get_tensor(name) if index is None else handle.get_slice(name)[index]

    return read


def read_tensors(directory: Path) -> dict[str, np.ndarray]:
    """Every tensor of a snapshot by its name, in the dtype of the file. Raises WeightsError."""
    headers = read_headers(Path(directory))
    read = _tensor_reader(headers)
    return {name: read(name) for name in headers}


def is_packed(headers: Mapping[str, Header]) -> bool:
    """Whether a target's experts are stored in MXFP4."""
    return any(name.endswith("_blocks") for name in headers)


def open_target(directory: Path, wanted: tuple[str, ...] = ("",)) -> Opened:
    """The weights of a snapshot's target whose paths start with one of `wanted`.

    If those are all, the file may hold nothing else; of some, MXFP4 is not read. Raises ConfigError or WeightsError,
    each with every fault of the file.
    """
    directory, whole = Path(directory), wanted == ("",)
    config = target_config(directory)
    headers = read_headers(directory)
    packed = whole and is_packed(headers)
    plan = {path: source for path, source in target_plan(config, packed) if path.startswith(wanted)}
    names = {name for source in plan.values() for name in source.tensors}

    def ignored(name: str) -> bool:
        if not whole:
            return name not in names
        return name.endswith("rotary_emb.inv_freq") or (config.tie_embeddings and name == "lm_head.weight")

    _check(plan, headers, ignored, directory)
    read = _tensor_reader(headers)
    if config.tie_embeddings and "lm_head.weight" in headers and "embedding.weight" in plan:
        check_tied(read("lm_head.weight"), read("model.embed_tokens.weight"), directory)
    return Opened(config, plan, read)


def _draft_config(directory: Path, _: TargetConfig | None = None) -> DraftConfig:
    if (directory / ARRAY_INDEX).is_file():
        raise ConfigError(
            f"{directory} is an EasyDeL run directory, not a DFlashDraftModel directory (config.json and "
            "model.safetensors): read it with dflash.load_draft"
        )
    return read_draft_config(read_json(directory, "config.json"), str(directory / "config.json"))


def read_draft_weights(directory: Path, dtype: str, config: DraftConfig) -> Draft:
    """The draft of this config, from safetensors by z-lab's names. Raises WeightsError with every fault."""
    check_dtype(dtype)
    headers = read_headers(directory)
    plan = dict(draft_plan(config))
    _check(plan, headers, lambda _: False, directory)
    read = _tensor_reader(headers)
    return fill(lambda: Draft(config, dtype=DTYPES[dtype], rngs=nnx.Rngs(0)), plan, read, dtype, mesh=None)


def draft_tensors(draft: Draft) -> dict[str, np.ndarray]:
    """A draft's weights by z-lab's names, [out, in], in the draft's dtype."""
    weights = named_weights(gather(draft))
    tensors: dict[str, np.ndarray] = {}
    for name, source in draft_plan(draft.config):
        rows = np.cumsum([shape[0] for shape in source.tensors.values()])[:-1]
        parts = np.split(np.asarray(weights.pop(name)), rows)
        tensors |= {t: np.ascontiguousarray(p) for t, p in zip(source.tensors, parts, strict=True)}
    assert not weights, sorted(weights)
    return tensors


def check_draft_tensors(directory: Path, config: DraftConfig) -> None:
    """Raises WeightsError with every tensor that a draft directory lacks, should not have, or has in another shape."""
    _check(dict(draft_plan(config)), read_headers(directory), lambda _: False, directory)


def write_draft(draft: Draft, directory: Path) -> None:
    """Writes a `DFlashDraftModel` directory (z-lab's names, [out, in]) in the draft's dtype; complete, or not at all.

    Raises WeightsError when `directory` exists.
    """
    write_snapshot(directory, write_draft_config(draft.config, str(draft.dtype)), draft_tensors(draft))


def _find(path: Path) -> Path | None:
    return path if holds_weights(path) else None


DIALECT = Dialect(
    name="a DFlashDraftModel directory",
    find=_find,
    config=_draft_config,
    read=read_draft_weights,
    digest=snapshot_hash,
)
