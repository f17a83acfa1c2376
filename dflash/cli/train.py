"""`python -m dflash train`: teacher cache -> draft."""

import dataclasses
from pathlib import Path
from typing import Annotated, Any, Literal

import jax.numpy as jnp
import tyro

from dflash import easydel_trainer
from dflash.config import ConfigError, ConvConfig, SelectorConfig, TargetConfig
from dflash.device import device_facts, open_default_device
from dflash.easydel import load
from dflash.evaluate import check_fit
from dflash.models.draft import Draft, pack_tokens
from dflash.provenance import compile_cache, of_command
from dflash.teacher_cache import open_cache
from dflash.teacher_cache.sequences import SequenceCache
from dflash.teacher_cache.windows import WindowCache
from dflash.training.batches import TrainingBatches
from dflash.training.objective import Objective
from dflash.training.run import Run, RunConfig
from dflash.training.start import check_init_layers, frequent_tokens, start_from_layers
from dflash.training.trainer import TrainConfig, Trainer
from dflash.weights.huggingface import Borrowed, read_borrowed, read_layers
from dflash.weights.load import draft_hash, new_draft, read_any_draft, target_directory
from dflash.weights.snapshot import snapshot_hash

# Scored every so often: this many batches, and of sequences as many more as make this many blocks.
HELD_OUT_BATCHES = 4
HELD_OUT_BLOCKS = 512


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Train:
    """What `train` takes."""

    cache_dir: Annotated[Path, tyro.conf.Positional]
    """Teacher cache, in either form."""
    save_directory: Annotated[Path, tyro.conf.Positional]
    """Directory of the run; one that holds checkpoints of this very run is resumed."""
    target: str = "smollm2-135m"
    """Snapshot directory of the target that the cache was made with: for its embedding and head."""
    init_from: str = ""
    """Draft to start from (a DFlashDraftModel or run directory, or smollm2-135m) instead of random weights."""
    draft_layers: int = 2
    """Layers of a new draft."""
    init_layers: tuple[int, ...] = ()
    """Layers of the target that a new draft's layers start as copies of, one for each; without any, random weights."""
    architecture: Literal["dflash", "dflash2"] = "dflash"
    """dflash2: a new draft has convolutions over a block's slots, and chooses among each slot's likeliest tokens."""
    conv_kernel_size: int = 3
    """dflash2: slots that a convolution reads."""
    conv_group_size: int = 64
    """dflash2: channels that share a computed kernel; divides the hidden size."""
    selector_rank: int = 64
    """dflash2: rank of the product that says how well one token follows another."""
    selector_top_k: int = 8
    """dflash2: tokens of a slot that are chosen among."""
    draft_vocab_size: int | None = None
    """Tokens that a new draft proposes, the cache's most frequent ones; by default all of the vocabulary. Proposing and
    training then multiply so many rows of the head."""
    block_size: int | None = None
    """Slots of a block, the anchor included; by default those of init-from's draft, 8 for a new one."""
    mask_token_id: int | None = None
    """Token whose embedding stands for a drafted slot; by default the last of the vocabulary."""
    steps: int = 2000
    """Steps of the optimizer."""
    batch_size: int = 32
    """Rows (sequences or windows) of a step, over all devices."""
    num_anchors: int = 32
    """Anchors drawn in each sequence of a step."""
    accumulation: int = 1
    """Parts that a batch is computed in, one after another."""
    learning_rate: float = 6e-4
    """Highest learning rate."""
    warmup: float = 0.04
    """Share of the steps that the rate rises in."""
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """How the rate falls afterwards."""
    weight_decay: float = 0.0
    """AdamW's weight decay; norms don't decay."""
    beta2: float = 0.95
    """AdamW's decay of squared gradients: nearer to 1 averages more steps, as those of few slots need."""
    clip: float = 1.0
    """Largest norm of the gradient; 0 clips nothing."""
    position_weights: Literal["uniform", "decay", "dpace"] = "dpace"
    """How the slots of a block weigh in the loss."""
    decay_gamma: float = 4.0
    """decay: slots until the weight has fallen to 1/e."""
    dpace_alpha: float = 0.5
    """dpace: 1 is uniform in the draft's confidence, 0 trusts it entirely."""
    vocab_chunk_size: int = 2048
    """Rows of the head that are multiplied at a time."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of computation; weights and optimizer state are float32."""
    remat: bool = False
    """Compute layers again for the gradient instead of keeping what they made."""
    dp: int = 1
    """Devices that the batch is split over."""
    tp: int = 1
    """Devices that the vocabulary is split over."""
    trainer: Literal["dflash", "easydel"] = "dflash"
    """Whose loop trains; EasyDeL's makes the same steps on all devices, and scores no held-out rows."""
    seed: int = 0
    """Seed of the weights, the order of rows and the anchors."""
    save_every: int = 500
    """Steps between checkpoints."""
    keep: int = 2
    """Checkpoints that stay."""
    log_every: int = 10
    """Steps between lines of metrics.jsonl."""
    evaluate_every: int = 200
    """Steps between scores on held-out rows."""


def _config(args: Train) -> TrainConfig:
    names = {f.name for f in dataclasses.fields(TrainConfig)} - {"objective"}
    common: dict[str, Any] = {f.name: getattr(args, f.name) for f in dataclasses.fields(args) if f.name in names}
    objective = Objective(
        weights=args.position_weights,
        gamma=args.decay_gamma,
        alpha=args.dpace_alpha,
        chunk=args.vocab_chunk_size,
    )
    return TrainConfig(**common, objective=objective)


def _second(args: Train, target: TargetConfig) -> dict[str, Any]:
    """The parts of a DFlash 2 draft, checked; nothing for a DFlash one."""
    if args.architecture == "dflash":
        return {}
    least = {name: getattr(args, name) for name in ("conv_kernel_size", "selector_rank", "selector_top_k")}
    faults = [f"{name} is at least 1, got {value}" for name, value in least.items() if value < 1]
    if args.conv_group_size < 1 or target.hidden_size % args.conv_group_size:
        faults.append(f"conv_group_size must divide the hidden size {target.hidden_size}, got {args.conv_group_size}")
    if args.selector_top_k > target.vocab_size:
        faults.append(f"selector_top_k is at most the vocabulary {target.vocab_size}, got {args.selector_top_k}")
    if faults:
        raise ConfigError("; ".join(faults))
    return {
        "conv": ConvConfig(kernel_size=args.conv_kernel_size, group_size=args.conv_group_size),
        "selector": SelectorConfig(rank=args.selector_rank, top_k=args.selector_top_k),
    }


def _vocabulary(args: Train, cache: SequenceCache | WindowCache, target: TargetConfig) -> bytes | None:
    """The tokens that a new draft proposes; None for all."""
    count = args.draft_vocab_size
    if count is None:
        return None
    least = args.selector_top_k if args.architecture == "dflash2" else 1
    if not least <= count <= target.vocab_size:
        raise ConfigError(f"draft_vocab_size must be {least} to {target.vocab_size}, the target's tokens; got {count}")
    return pack_tokens(frequent_tokens(cache, count, target.vocab_size), target.vocab_size)


def _start(args: Train, borrowed: Borrowed, cache: SequenceCache | WindowCache) -> Draft:
    """The draft before the first step."""
    if args.block_size is not None and args.block_size < 2:
        raise ConfigError(f"block_size is at least 2 (anchor and one drafted token), got {args.block_size}")
    if args.init_from:
        draft = read_any_draft(args.init_from, target=borrowed.config)
        if args.block_size is not None:
            draft.config = dataclasses.replace(draft.config, block_size=args.block_size)
        return draft
    draft = new_draft(
        borrowed.config,
        num_layers=args.draft_layers,
        block_size=args.block_size or 8,
        target_layer_ids=cache.feature_layer_ids,
        vocabulary=_vocabulary(args, cache, borrowed.config),
        mask_token_id=args.mask_token_id,
        seed=args.seed,
        **_second(args, borrowed.config),
    )
    # What the head was trained to read; norm weights of 1 would start hundreds of nats away.
    draft.norm.weight[...] = jnp.asarray(borrowed.norm, jnp.float32)
    if args.init_layers:
        check_init_layers(args.init_layers, borrowed.config, args.draft_layers)
        start_from_layers(draft, read_layers(target_directory(args.target), args.init_layers))
    return draft


def train(args: Annotated[Train, tyro.conf.arg(name="")]) -> None:
    """Train a draft on a teacher cache; no target runs. Start it again to resume."""
    if args.trainer == "easydel":
        load("easydel.trainers")  # before a large target is hashed for nothing
    device, compiled = open_default_device(), compile_cache()
    config = _config(args)
    cache = open_cache(args.cache_dir)
    directory = target_directory(args.target)
    target_hash = snapshot_hash(directory)
    if cache.snapshot_sha256 not in (None, target_hash):
        raise ConfigError(f"{args.cache_dir} was made with another target than {args.target} (their hashes differ)")
    borrowed = read_borrowed(directory)
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
    facts = device_facts(device) | {"mesh": {"dp": args.dp, "tp": args.tp}, "seeds": {"training": args.seed}}
    facts |= {"target": args.target, "target_sha256": target_hash, "cache_sha256": cache.sha256}
    origin = of_command(facts, compiled)
    settings = RunConfig(
        root=args.save_directory,
        save_every=args.save_every,
        keep=args.keep,
        log_every=args.log_every,
        evaluate_every=args.evaluate_every,
    )
    reads = draft, borrowed.head, borrowed.embedding[draft.config.mask_token_id], config
    if args.trainer == "easydel":
        last = easydel_trainer.train(*reads, batches(False), settings, provenance, origin)
    else:
        held_out = batches(True) if len(cache.rows(True)) else None
        count = max(HELD_OUT_BATCHES, -(-HELD_OUT_BLOCKS // (config.batch_size * config.num_anchors)))
        scored = [held_out(i) for i in range(count)] if held_out else []
        last = Run(Trainer(*reads), batches(False), scored, settings, provenance, origin).train()
    print(f"draft: {last}")
