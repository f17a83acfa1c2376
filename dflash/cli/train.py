"""`python -m dflash train`: teacher cache -> draft."""

import dataclasses
import math
from pathlib import Path
from typing import Annotated, Any, Literal

import jax.numpy as jnp
import numpy as np
import tyro

from dflash.cli.option import refuse_unused
from dflash.config import (
    BlockSize,
    Checked,
    ConfigError,
    ConvConfig,
    Count,
    DraftVocab,
    Index,
    SelectorConfig,
    TargetConfig,
)
from dflash.easydel import load
from dflash.easydel import trainer as easydel_trainer
from dflash.host.device import device_facts, open_default_device
from dflash.host.provenance import compile_cache, of_command
from dflash.models.draft import Draft, pack_tokens, plain, proposed_tokens
from dflash.training.batches import TrainingBatches
from dflash.training.cache import open_with_target, recorded_target
from dflash.training.cache.sequences import SequenceCache
from dflash.training.cache.windows import WindowCache
from dflash.training.evaluate import check_fit
from dflash.training.run import Run, RunConfig
from dflash.training.start import check_init_layers, frequent_tokens, start_from_layers
from dflash.training.trainer import TrainConfig, Trainer
from dflash.weights.config_json import MAX_LAYERS
from dflash.weights.load import Borrowed, draft_hash, new_draft, read_any_draft, read_layers, target_directory

# Held-out batches to score at a time; for sequences as many as make this many blocks.
HELD_OUT_BATCHES = 4
HELD_OUT_BLOCKS = 512


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Train(Checked):
    """What `train` takes."""

    cache_dir: Annotated[Path, tyro.conf.Positional]
    """Teacher cache, in either form."""
    run: tyro.conf.OmitArgPrefixes[RunConfig]
    target: str = ""
    """Snapshot directory of the target that the cache was made with, for its embedding and head; by default the one
    that the cache names."""
    init_from: str = ""
    """Draft to start from (a DFlashDraftModel or run directory, or smollm2-135m[-plain]) instead of random weights."""
    draft_layers: Count = 2
    """Layers of a new draft."""
    init_layers: tuple[Index, ...] = ()
    """Layers of the target to copy as a new draft's layers, one for each; by default random weights."""
    architecture: Literal["dflash", "dflash2"] | None = None
    """dflash2: a new draft has convolutions over a block's slots and chooses among each slot's likeliest tokens. By
    default dflash, or what init-from's draft is; with dflash a DFlash 2 draft starts without these parts."""
    conv_kernel_size: Count = 3
    """dflash2: slots that a convolution reads."""
    conv_group_size: Count = 64
    """dflash2: channels that share a computed kernel; divides the hidden size."""
    selector_rank: Count = 64
    """dflash2: rank of the product that scores how well one token follows another."""
    selector_top_k: Count = 8
    """dflash2: candidates per slot."""
    draft_vocab_size: DraftVocab | None = None
    """Number of tokens that the draft proposes, or all: the most frequent of the cache, after those that init-from's
    draft proposes; by default what that draft proposes, or all. Only their rows of the head are multiplied."""
    block_size: BlockSize | None = None
    """Block size, the anchor included; by default that of init-from's draft, or 8."""
    mask_token_id: Index | None = None
    """Token whose embedding stands for a drafted slot; by default the last of the vocabulary."""
    draft_rope: Literal["target", "default"] = "target"
    """Rotary embedding of a new draft: the target's; or default, the target's without its scaling (YaRN), which
    sglang-jax does not read."""
    trainer: Literal["dflash", "easydel"] = "dflash"
    """Whose loop trains; EasyDeL's makes the same steps on all devices and scores no held-out rows."""
    training: tyro.conf.OmitArgPrefixes[TrainConfig]


def _second(args: Train, target: TargetConfig) -> dict[str, Any]:
    """The parts of a DFlash 2 draft, checked; empty for a DFlash draft."""
    if args.architecture != "dflash2":
        return {}
    faults = []
    if target.hidden_size % args.conv_group_size:
        faults.append(f"conv_group_size must divide the hidden size {target.hidden_size}, got {args.conv_group_size}")
    if args.selector_top_k > target.vocab_size:
        faults.append(f"selector_top_k is at most the vocabulary {target.vocab_size}, got {args.selector_top_k}")
    if args.selector_rank > target.hidden_size:
        faults.append(f"selector_rank is at most the hidden size {target.hidden_size}, got {args.selector_rank}")
    if args.conv_kernel_size > MAX_LAYERS:
        faults.append(f"conv_kernel_size is at most {MAX_LAYERS}, got {args.conv_kernel_size}")
    if faults:
        raise ConfigError("; ".join(faults))
    return {
        "conv": ConvConfig(kernel_size=args.conv_kernel_size, group_size=args.conv_group_size),
        "selector": SelectorConfig(rank=args.selector_rank, top_k=args.selector_top_k),
    }


def _vocabulary(
    count: DraftVocab | None, cache: SequenceCache | WindowCache, size: int, lowest: int, learned: np.ndarray | None
) -> bytes | None:
    """The `count` tokens that a draft proposes of a vocabulary of this `size`; None for all."""
    if count is None or count == "all":
        return None
    if not lowest <= count <= size:
        raise ConfigError(f"draft_vocab_size must be {lowest} to {size}, the target's tokens; got {count}")
    return pack_tokens(frequent_tokens(cache, count, size, learned), size)


# What only DFlash 2 drafts have.
_OF_DFLASH_2 = ("conv_kernel_size", "conv_group_size", "selector_rank", "selector_top_k")
# What init-from's draft has already.
_OF_A_NEW_DRAFT = ("draft_layers", "init_layers", *_OF_DFLASH_2, "mask_token_id", "draft_rope")
# The weighting that each parameter is of.
_OF_A_WEIGHTING = {"gamma": "decay", "alpha": "dpace"}


def _check_unused(args: Train) -> None:
    """Raises ConfigError for options that this training would ignore."""
    if args.init_from:
        refuse_unused(args, _OF_A_NEW_DRAFT, f"for a new draft, and {args.init_from} is one already")
    elif args.architecture != "dflash2":
        refuse_unused(args, _OF_DFLASH_2, "for a DFlash 2 draft (--architecture dflash2), and this is a DFlash one")
    weights = args.training.objective.weights
    for name, weighting in _OF_A_WEIGHTING.items():
        if weights != weighting:
            refuse_unused(args, [name], f"for --position-weights {weighting}, and these are {weights}")
    if args.trainer == "easydel":
        refuse_unused(args, ["evaluate_every"], "for held-out rows, and EasyDeL's trainer scores none")


def _check_places(cache: Path, root: Path) -> None:
    """Raises ConfigError for a run that would be written into its cache."""
    inner, outer = root.resolve(), cache.resolve()
    if inner == outer or outer in inner.parents:
        raise ConfigError(
            f"a run is kept outside of the teacher cache that it reads; got {root}, in the cache {cache}: name another "
            "directory"
        )


def _start(args: Train, borrowed: Borrowed, cache: SequenceCache | WindowCache) -> Draft:
    """The draft before the first step."""
    if args.init_from:
        draft = read_any_draft(args.init_from, target=borrowed.config)
        if args.architecture == "dflash2" and draft.config.conv is None:
            raise ConfigError(f"architecture dflash2 is for new drafts, and {args.init_from} is a DFlash draft")
        draft = plain(draft) if args.architecture == "dflash" else draft
        config = draft.config
        if args.draft_vocab_size is not None:
            lowest, learned = 1 if config.selector is None else config.selector.top_k, proposed_tokens(config)
            vocabulary = _vocabulary(args.draft_vocab_size, cache, config.vocab_size, lowest, learned)
            config = dataclasses.replace(config, vocabulary=vocabulary)
        draft.config = dataclasses.replace(config, block_size=args.block_size or config.block_size)
        return draft
    lowest = args.selector_top_k if args.architecture == "dflash2" else 1
    draft = new_draft(
        borrowed.config,
        num_layers=args.draft_layers,
        block_size=args.block_size or 8,
        target_layer_ids=cache.feature_layer_ids,
        vocabulary=_vocabulary(args.draft_vocab_size, cache, borrowed.config.vocab_size, lowest, None),
        mask_token_id=args.mask_token_id,
        scaled_rope=args.draft_rope == "target",
        seed=args.training.seed,
        **_second(args, borrowed.config),
    )
    # The norm that the head was trained with; weights of 1 would start hundreds of nats away.
    draft.norm.weight[...] = jnp.asarray(borrowed.norm, jnp.float32)
    if args.init_layers:
        check_init_layers(args.init_layers, borrowed.config, args.draft_layers)
        start_from_layers(draft, read_layers(target_directory(args.target), args.init_layers))
    return draft


def train(args: Annotated[Train, tyro.conf.arg(name="")]) -> None:
    """Train a draft on a teacher cache, without running the target. Start it again to resume."""
    _check_unused(args)
    _check_places(args.cache_dir, args.run.root)
    if args.trainer == "easydel":
        load("easydel.trainers")  # fail before hashing a large target
    device, compiled, config = open_default_device(), compile_cache(), args.training
    args = dataclasses.replace(args, target=args.target or recorded_target(args.cache_dir))
    cache, borrowed, target_hash = open_with_target(args.cache_dir, args.target)
    draft = _start(args, borrowed, cache)
    check_fit(draft, cache)

    def batches(held_out: bool) -> TrainingBatches:
        return TrainingBatches(
            cache,
            cache.rows(held_out),
            batch_size=config.batch_size,
            num_anchors=config.num_anchors,
            block_size=draft.config.block_size,
            embedding=borrowed.embedding,
            seed=config.seed,
        )

    provenance = {
        "cache_dir": str(args.cache_dir),
        "cache_sha256": cache.sha256,
        "teacher_snapshot_dir": args.target,
        "snapshot_sha256": target_hash,
        "init_from": args.init_from,
        "init_from_sha256": draft_hash(args.init_from) if args.init_from else None,
        "init_layers": list(args.init_layers),
        "split": cache.split,
    }
    facts = device_facts(device) | {"mesh": {"dp": config.dp, "tp": config.tp}, "seeds": {"training": config.seed}}
    facts |= {"target": args.target, "target_sha256": target_hash, "cache_sha256": cache.sha256}
    origin = of_command(facts, compiled)
    reads = draft, borrowed.head, borrowed.embedding[draft.config.mask_token_id], config
    if args.trainer == "easydel":
        last = easydel_trainer.train(*reads, batches(False), args.run, provenance, origin)
    else:
        held_out = batches(True) if len(cache.rows(True)) else None
        count = max(HELD_OUT_BATCHES, math.ceil(HELD_OUT_BLOCKS / (config.batch_size * config.num_anchors)))
        scored = [held_out(i) for i in range(count)] if held_out else []
        last = Run(Trainer(*reads), batches(False), scored, args.run, provenance, origin).train()
    print(f"draft: {last}")
