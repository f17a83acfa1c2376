"""Drafts of speculators, which vLLM also reads: z-lab's tensors and a different config.json, written and read."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dflash.config import ConfigError, DraftConfig, TargetConfig
from dflash.models.families import FAMILIES
from dflash.weights.config_json import HARMLESS, Reader, read_draft_config, write_draft_config
from dflash.weights.dialect import Dialect
from dflash.weights.huggingface import read_draft_weights
from dflash.weights.snapshot import holds_weights, read_json, snapshot_hash

# The release of speculators whose DFlash config this writes.
_SPECULATORS_VERSION = "0.9.0"


def speculators_config(c: DraftConfig, dtype: str, verifier: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of a draft for speculators; `verifier` is the target's name and architectures."""
    ours = write_draft_config(c, dtype)
    apart = ("architectures", "block_size", "dflash_config", "dtype", "is_causal", "num_target_layers")
    return {
        "architectures": ["DFlashDraftModel"],
        "speculators_model_type": "dflash",
        "speculators_version": _SPECULATORS_VERSION,
        "dtype": dtype,
        "transformer_layer_config": {key: value for key, value in ours.items() if key not in apart},
        # The whole vocabulary, so there is no map between vocabularies.
        "draft_vocab_size": c.vocab_size,
        "target_hidden_size": c.hidden_size,
        "block_size": c.block_size,
        # Index 0 there is the embedding.
        "aux_hidden_state_layer_ids": [i + 1 for i in c.target_layer_ids],
        "mask_token_id": c.mask_token_id,
        "sample_from_anchor": False,
        "sliding_window_non_causal": any(c.windows) and not any(c.causal),
        "tie_word_embeddings": False,
        "speculators_config": {
            "algorithm": "dflash",
            "default_proposal_method": "greedy",
            "proposal_methods": [
                {
                    "proposal_type": "greedy",
                    "speculative_tokens": c.block_size - 1,
                    "accept_tolerance": 0.0,
                    "verifier_accept_k": 1,
                }
            ],
            "verifier": dict(verifier),
        },
    }


def read_speculators_config(raw: Mapping[str, Any], target: TargetConfig, source: str) -> DraftConfig:
    """The draft that a speculators config.json describes for this target. Raises ConfigError with every fault."""
    reader = Reader(raw, source)
    layers, ids = reader.object("transformer_layer_config").raw, reader.take("aux_hidden_state_layer_ids")
    reader.expect("speculators_model_type", ("dflash",), None)
    reader.expect("draft_vocab_size", (layers.get("vocab_size"),), None)
    reader.expect("target_hidden_size", (target.hidden_size,), None)
    reader.expect("sample_from_anchor", (False,), False)
    good = isinstance(ids, list) and all(type(i) is int and i > 0 for i in ids)
    reader.check(good, f"aux_hidden_state_layer_ids must be numbers of layers from 1, got {ids!r}")
    # Who verified in training; a name on the hub can't be compared with a directory.
    verifiers = reader.object("speculators_config").object("verifier").take("architectures", [])
    own = f"{FAMILIES[target.family].architecture}ForCausalLM"
    known = isinstance(verifiers, list) and (not verifiers or own in verifiers)
    reader.check(known, f"its verifier is one of {verifiers!r}, and the target a {own}")
    causal = False if reader.flag("sliding_window_non_causal") else None
    settings = {"block_size": reader.take("block_size"), "mask_token_id": reader.take("mask_token_id")}
    reader.refuse_rest({"speculators_version", "tie_word_embeddings", *HARMLESS})
    reader.finish()
    written = {
        **layers,
        "architectures": ["DFlashDraftModel"],
        "num_target_layers": target.num_layers,
        "is_causal": causal,
        "dflash_config": {"target_layer_ids": [i - 1 for i in ids], **settings},
    }
    return read_draft_config(written, source)


def _find(path: Path) -> Path | None:
    return path if holds_weights(path) and "speculators_config" in read_json(path, "config.json") else None


def _config(directory: Path, target: TargetConfig | None) -> DraftConfig:
    source = str(directory / "config.json")
    if target is None:
        raise ConfigError(
            f"{source} is written for speculators, and does not say how many layers its verifier has: name the "
            "target's snapshot directory (--target)"
        )
    return read_speculators_config(read_json(directory, "config.json"), target, source)


DIALECT = Dialect(
    name="a draft for speculators", find=_find, config=_config, read=read_draft_weights, digest=snapshot_hash
)
