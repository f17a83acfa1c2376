"""`python -m dflash build-cache`: target -> teacher cache."""

import dataclasses
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import tyro

from dflash.config import build_target_layer_ids
from dflash.device import open_default_device
from dflash.easydel import load
from dflash.easydel_teacher import TeacherReader, load_teacher
from dflash.teacher_cache.build_sequences import build_sequences
from dflash.teacher_cache.build_windows import WindowConfig, build_windows
from dflash.teacher_cache.conversations import ConversationConfig, load_openings
from dflash.teacher_cache.source import Source
from dflash.tokenizer import load_tokenizer
from dflash.weights.load import load_target, target_directory
from dflash.weights.snapshot import snapshot_hash


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class BuildCache:
    """What `build-cache` takes."""

    out_dir: Annotated[Path, tyro.conf.Positional]
    """New directory for the cache."""
    form: Literal["sequences", "windows"] = "sequences"
    """sequences: one row of features per token, many anchors drawn when training. windows: one context window and one
    anchor per sample, as other programs read it."""
    target: str = "smollm2-135m"
    """Snapshot directory of the target, or smollm2-135m."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype that the target computes in; features are stored in bfloat16."""
    teacher: Literal["dflash", "easydel"] = "dflash"
    """Whose forward gives the features: our own, or EasyDeL's with its deviations corrected (audit-teacher shows them).
    Text is always the target's own."""
    num_context_features: int = 4
    """How many layers of the target the draft reads, evenly spread."""
    target_layer_ids: tuple[int, ...] = ()
    """Which layers, by the number of the layer whose output is taken; instead of num-context-features."""
    prompts: str = "self"
    """self (the target writes the user's turn too), builtin[:category], humaneval, FILE.jsonl of prompts or
    conversations, or hf:NAME."""
    openings: str = "builtin"
    """How the turns that the target writes begin: builtin (the beginnings of usual requests), none, or a JSONL file of
    strings."""
    num_conversations: int = 1024
    """How many conversations to make."""
    answers: Literal["target", "given"] = "target"
    """Who answers: the target, or the conversations of the source themselves."""
    temperature: float = 0.0
    """Temperature of the answers; 0 is greedy, which is what decoding will do."""
    prompt_temperature: float = 1.0
    """Temperature of user turns that the target writes."""
    min_p: float = 0.05
    """Where a temperature is above 0: leave out tokens less likely than this times the most likely one."""
    max_prompt_len: int = 256
    """Longest prompt in tokens; longer ones are left out."""
    max_user_turn: int = 96
    """Longest user turn that the target writes, in tokens; one that does not end by then is left out."""
    max_new_tokens: int = 256
    """Longest answer in tokens."""
    held_out: float = 0.05
    """Share of the prompts that no training sees."""
    exclude: tuple[str, ...] = ("builtin",)
    """Evaluation prompts: whatever shares 8 words in a row with one of them is left out."""
    batch_size: int = 32
    """Conversations or windows at a time; of sequences, whose features are read whole, an eighth of it."""
    seed: int = 0
    """Seed of every draw."""
    position_offsets: tuple[int, ...] = (0,)
    """What is added to the positions of a sample, in turn."""
    ctx_len: int = 1024
    """windows: context tokens, the anchor included."""
    block_size: int = 8
    """windows: slots of a block, the anchor included."""
    num_blocks: int = 256
    """windows: how many contexts."""
    rollout_steps: int = 1
    """windows: samples from each context, each where decoding would have gone on."""
    rollout_accept_len_mode: Literal["full", "uniform", "geometric"] = "full"
    """windows: how many drafted tokens a synthetic step accepts."""
    rollout_accept_len_p: float = 0.35
    """windows: parameter of the geometric mode."""
    position_offset_mode: Literal["cycle_samples", "per_prompt_rollout"] = "per_prompt_rollout"
    """windows: whether the offset changes from sample to sample, or from context to context."""


def build_cache(args: Annotated[BuildCache, tyro.conf.arg(name="")]) -> None:
    """Let the target write and answer prompts, and keep what its layers say of every token."""
    if args.teacher == "easydel":
        load()  # before a large target is read for nothing
    open_default_device()
    target = load_target(args.target, args.dtype)
    directory = target_directory(args.target)
    source = Source(
        target=target,
        tokenizer=load_tokenizer(args.target),
        snapshot_dir=args.target,
        snapshot_hash=snapshot_hash(directory),
    )
    if args.teacher == "easydel":
        teacher = load_teacher(target, directory)
        source = dataclasses.replace(source, teacher=teacher.name, make_reader=partial(TeacherReader, teacher))
    ids = args.target_layer_ids or build_target_layer_ids(target.config.num_layers, args.num_context_features)
    conversations = ConversationConfig(
        source=args.prompts,
        openings=load_openings(args.openings),
        count=args.num_conversations,
        answers=args.answers,
        temperature=args.temperature,
        prompt_temperature=args.prompt_temperature,
        min_p=args.min_p,
        max_prompt_len=args.max_prompt_len,
        max_user_turn=args.max_user_turn,
        max_new_tokens=args.max_new_tokens,
        batch_size=args.batch_size,
        held_out=args.held_out,
        exclude=args.exclude,
        seed=args.seed,
    )
    if args.form == "sequences":
        out = build_sequences(
            source,
            args.out_dir,
            conversations,
            layer_ids=ids,
            position_offsets=args.position_offsets,
            # Sequences are read whole: an eighth of the rows that are written a token at a time are columns enough.
            batch_size=max(args.batch_size // 8, 1),
        )
    else:
        windows = WindowConfig(
            ctx_len=args.ctx_len,
            block_size=args.block_size,
            num_blocks=args.num_blocks,
            rollout_steps=args.rollout_steps,
            accept_len_mode=args.rollout_accept_len_mode,
            accept_len_p=args.rollout_accept_len_p,
            position_offsets=args.position_offsets,
            position_offset_mode=args.position_offset_mode,
            seed=args.seed,
        )
        out = build_windows(source, args.out_dir, conversations, windows, layer_ids=ids, batch_size=args.batch_size)
    print(f"teacher cache: {out}")
